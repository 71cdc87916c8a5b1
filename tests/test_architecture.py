"""The levels of the packages, and the one door to each heavy library."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "embedder"

# Packages, and modules beside them, from the bottom up: imports go down, never up or sideways.
LEVELS = (
    ("columns", "errors", "pixels"),
    ("libraries", "machine", "options"),
    ("files", "recipe", "sources", "neighbours"),
    ("decode", "backbones", "store"),
    ("engines", "heads", "datasets"),
    ("extraction", "evaluation"),
    ("training", "inference", "checks"),
    ("finetuning", "analysis"),
    ("report", "progress"),
    ("api", "cli"),
    ("__init__", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
MODULES = sorted(
    str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".")
    for path in PACKAGE.rglob("*.py")
)

# Libraries, and who may import them: a package, or a module beside them.
DOORS = {
    "ai_edge_litert": {"inference"},
    "PIL": {"decode", "checks", "report"},  # checks write the images that decode then reads
    "bokeh": {"report"},
    "boto3": {"sources"},
    "dask": {"extraction"},
    "distributed": {"extraction"},
    "faiss": {"neighbours"},
    "fsspec": {"sources"},
    "IPython": {"progress"},
    "h5py": {"backbones"},
    "jinja2": {"report"},
    "jax": {"engines"},
    "keras_hub": {"backbones"},
    "keras": {"libraries", "backbones", "heads", "inference", "finetuning"},
    "onnx": {"inference"},
    "onnxruntime": {"inference"},
    "obstore": {"sources"},
    "openvino": {"libraries"},
    "psutil": {"cli"},
    "pydantic": {
        "options",
        "recipe",
        "backbones",
        "extraction",
        "finetuning",
        "heads",
        "training",
    },
    "pickle": {"backbones", "engines"},
    "pynvml": {"machine"},
    "rich": {"cli", "progress"},
    "skops": {"heads"},
    # Estimators are written where they belong: scikit-learn is a contract as much as a library.
    "sklearn": {"heads", "datasets", "evaluation", "training", "finetuning", "analysis"},
    "tensorflow": {"engines", "inference", "finetuning"},
    "urllib3": {"sources"},
    "xxhash": {"store"},
    "typer": {"cli"},
}


def path_of(module: str) -> Path:
    return PACKAGE / f"{module.replace('.', '/')}.py"


def names_offered(package: str) -> set[str]:
    """Names that a package offers: functions may bear the name of their module."""
    stub = PACKAGE / package / "__init__.pyi"
    nodes = ast.parse(stub.read_text()).body if stub.exists() else []
    return {a.name for node in nodes if isinstance(node, ast.ImportFrom) for a in node.names}


def imports_of(path: Path) -> Iterator[str]:
    """Modules that a file imports from, also within functions: `embedder.store`, not its names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            offered = names_offered(name.removeprefix("embedder."))
            for alias in node.names:
                inner = f"{name}.{alias.name}".removeprefix("embedder.")
                is_module = path_of(inner).exists() and alias.name not in offered
                is_package = name == "embedder" and (PACKAGE / alias.name).is_dir()
                yield f"{name}.{alias.name}" if is_module or is_package else name


def test_every_module_has_its_level() -> None:
    assert {module.split(".")[0] for module in MODULES} == LEVEL.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_and_not_past_an_init(module: str) -> None:
    own = module.split(".")[0]
    for name in imports_of(path_of(module)):
        if not name.startswith("embedder."):
            continue
        other, *inner = name.split(".")[1:]
        assert other == own or LEVEL[other] < LEVEL[own], f"{module} imports {name}, which is above"
        assert other == own or not inner, f"{module} reaches into a package: {name}"
        assert other != own or inner, f"{module} takes {name} from its own package's outside"


@pytest.mark.parametrize("package", [name for name in LEVEL if (PACKAGE / name).is_dir()])
def test_a_package_offers_what_its_init_names(package: str) -> None:
    offered = importlib.import_module(f"embedder.{package}")
    assert offered.__all__
    for name in offered.__all__:
        assert not isinstance(getattr(offered, name), ModuleType), name


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_have_one_door(module: str) -> None:
    libraries = {name.split(".")[0] for name in imports_of(path_of(module))}
    own = module.split(".")[0]
    assert [library for library in libraries if own not in DOORS.get(library, {own})] == []


NETWORKS = {"keras", "tensorflow", "openvino", "sklearn"}
LIBRARIES = NETWORKS | {
    "bokeh",
    "dask",
    "distributed",
    "pyarrow",
    "pydantic",
    "rich",
    "scipy",
    "typer",
}


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import embedder; embedder.__version__", LIBRARIES | {"numpy", "PIL"}),
        ("import embedder; embedder.EmbedderError", LIBRARIES | {"numpy", "PIL"}),
        ("import embedder.decode; embedder.decode.decode_rgb", LIBRARIES),
        (
            "from embedder.sources import read_bytes; read_bytes(b'/proc/self/status')",
            LIBRARIES | {"numpy", "boto3", "fsspec", "obstore", "urllib3"},
        ),
        ("import embedder.sources.web", LIBRARIES | {"numpy", "boto3", "fsspec", "obstore"}),
        ("import embedder.sources.buckets", LIBRARIES | {"numpy", "boto3", "fsspec", "urllib3"}),
        ("import embedder; embedder.extract", NETWORKS),
        (
            "from embedder.cli.app import app; app(['--help'], standalone_mode=False)",
            (LIBRARIES | {"numpy", "PIL"}) - {"pydantic", "typer"},
        ),
        (
            "from embedder.cli.app import MODULES, load; list(map(load, MODULES))",
            (LIBRARIES | {"numpy", "PIL", "faiss"}) - {"pydantic", "rich", "typer"},
        ),
    ],
)
def test_what_an_import_costs(code: str, unwanted: set[str]) -> None:
    code = f"{code}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert unwanted.isdisjoint(done.stdout.split())
