"""A command reads the ids and checksums of a store once, and lists a source once."""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from embedder.cli.app import app
from embedder.store.store import Store
from tests.support import make_archive

_LISTED: list[Path] | None = None  # folders, while somebody wants to know


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "os.scandir" and _LISTED is not None and not isinstance(arguments[0], int):
        _LISTED.append(Path(os.fsdecode(arguments[0])).absolute())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos`, `more` photos, and the `features` of the former, in three shards."""
    folder = tmp_path_factory.mktemp("world")
    make_archive(folder / "photos", 40)
    make_archive(folder / "more", 10, first_seed=100)
    options = ("--image-size", "64x96", "--shard-size", "16", "--quiet")
    run("extract", folder / "photos", folder / "features", *options)
    run("train", folder / "features", folder / "model", "--duplicates", "none")
    return folder


def run(*words: Any) -> None:
    outcome = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often columns of text are read of each store, by their names and the store's."""
    counts: Counter[str] = Counter()
    real = Store.texts

    def count(store: Store, *columns: str, **view: Any) -> Any:
        counts[f"{' and '.join(columns)} of {store.path.name}"] += 1
        return real(store, *columns, **view)

    monkeypatch.setattr(Store, "texts", count)
    return counts


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every folder that is listed."""
    folders: list[Path] = []
    monkeypatch.setattr(sys.modules[__name__], "_LISTED", folders)
    return folders


sys.addaudithook(_hear)


@pytest.mark.parametrize(
    "options",
    [
        ("--labels", "folder"),
        ("--labels", "parent", "--coarse", "folder", "--head", "centroid"),
        ("--labels", "folder", "--split", "kfold:3", "--head", "ridge"),
    ],
)
def test_training_a_head(
    world: Path, tmp_path: Path, counts: Counter[str], listed: list[Path], options: tuple[str, ...]
) -> None:
    run("train", world / "features", tmp_path / "model", *options)
    assert counts == {"image_id and sha256 of features": 1}
    assert listed.count(world / "photos") == 1  # for the report


def test_testing_a_model(world: Path, counts: Counter[str], listed: list[Path]) -> None:
    run("evaluate", world / "model", world / "features", "--coarse", "folder")
    assert counts == {"image_id and sha256 of features": 1}
    assert listed.count(world / "photos") == 0


@pytest.mark.parametrize(
    ("strategy", "stores"),
    [
        (("head",), ["activations", "tuned-features"]),
        (("norm", "--unlabelled", "MORE"), ["features", "unlabelled", "tuned-features"]),
    ],
)
def test_fine_tuning(
    world: Path,
    tmp_path: Path,
    counts: Counter[str],
    listed: list[Path],
    strategy: tuple[str, ...],
    stores: list[str],
) -> None:
    words = [str(world / "more") if word == "MORE" else word for word in strategy]
    options = ("--epochs", "1", "--quiet", "--strategy", *words)
    run("finetune", world / "model", world / "photos", tmp_path / "tuned", *options)
    assert (tmp_path / "tuned" / "report.html").exists()
    assert counts == {f"image_id and sha256 of {name}": 1 for name in stores}
    assert listed.count(world / "photos") == 1
    assert listed.count(world / "more") == int("--unlabelled" in strategy)
    run("compare", world / "model", tmp_path / "tuned")
    assert listed.count(world / "photos") == 1
