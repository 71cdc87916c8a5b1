"""What `pip` is told of the package, and what the package says of `pip`."""

import re
import tomllib

import embedder
from embedder.libraries import DISTRIBUTION, versions
from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_distribution_has_the_name_that_messages_tell_to_install() -> None:
    assert PROJECT["project"]["name"] == DISTRIBUTION


def test_the_version_stands_once() -> None:
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "embedder.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", embedder.__version__)
    assert versions()["embedder"] == embedder.__version__
    for module in (ROOT / "embedder").rglob(
        "*.py"
    ):  # nobody asks for it by the distribution's name
        assert not re.search(r"""version\(["']embedder""", module.read_text()), module


def test_what_is_told_to_install_can_be_installed() -> None:
    sources = [*(ROOT / "embedder").rglob("*.py"), ROOT / "README.md", *(ROOT / "jobs").iterdir()]
    text = "\n".join(source.read_text() for source in sources).replace(
        "{DISTRIBUTION}", DISTRIBUTION
    )
    extras = set(re.findall(rf"\b{DISTRIBUTION}\[(\w+)\]", text))
    assert (
        {"demo", "hub", "lite2", "onnx"} <= extras <= {*PROJECT["project"]["optional-dependencies"]}
    )
    assert not re.search(r"pip install '?embedder\b", text)
