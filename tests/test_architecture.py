"""The order of the modules, and the one door to each heavy library."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "embedder"

# Each module imports only from its left.
ORDER = (
    *("errors", "recipe", "torch_pickle", "sources", "decode", "weights", "model_files", "lite"),
    *("networks", "hub", "backbones", "engines", "store"),
    *("plan", "pipeline", "refresh", "cluster", "summary", "extract", "verify", "heads"),
    *("demo", "conformance", "doctor", "cli", "__main__"),
)

DOORS = {
    "PIL": {"decode", "doctor"},  # doctor writes the pictures that decode then reads
    "dask": {"cluster"},
    "distributed": {"cluster"},
    "fsspec": {"sources"},
    "h5py": {"model_files"},
    "keras_hub": {"hub"},
    "keras": {"backbones", "hub", "lite", "model_files", "networks", "weights"},
    "openvino": {"engines"},
    "psutil": {"cli"},
    "pydantic": {"recipe"},
    "pickle": {"torch_pickle"},
    "rich": {"cli"},
    "sklearn": {"heads"},
    "tensorflow": {"engines"},
    "typer": {"cli"},
}


def imports_of(path: Path) -> Iterator[str]:
    """Names of all modules that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "embedder":
            yield from (f"embedder.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_every_module_has_its_place_in_the_order() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_its_left(module: str) -> None:
    inner = {
        name.split(".")[1] for name in imports_of(PACKAGE / f"{module}.py") if "embedder." in name
    }
    assert inner <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("module", ORDER)
def test_heavy_libraries_have_one_door(module: str) -> None:
    libraries = {name.split(".")[0] for name in imports_of(PACKAGE / f"{module}.py")}
    assert [library for library in libraries if module not in DOORS.get(library, {module})] == []


def test_importing_the_package_loads_no_network_library() -> None:
    heavy = "keras", "tensorflow", "openvino", "sklearn"
    code = f"import sys, embedder.cli; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
