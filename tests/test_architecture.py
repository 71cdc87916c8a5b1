"""The order of the modules, and the one door to each heavy library."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "embedder"

# Each module imports only from its left.
ORDER = (
    *(
        "errors",
        "files",
        "recipe",
        "backbones.torch_weights",
        "sources.listing",
        "decode.views",
        "decode.pixel_budget",
        "decode.decode",
    ),
    *("backbones.weights", "backbones.declared", "heads.model_folder", "backbones.weight_files"),
    *(
        "backbones.efficientnet_lite",
        "backbones.table",
        "backbones.hub",
        "backbones.resolve",
        "engines.engine",
        "store.lease",
        "store.shard_file",
        "store.store",
        "heads.ridge_statistics",
    ),
    *(
        "heads.ridge_head",
        "heads.centroid_head",
        "heads.keras_head",
        "heads.calibration",
        "heads.model",
        "heads.keras_layers",
    ),
    *(
        "finetuning.augmentation",
        "finetuning.blocks",
        "finetuning.network",
        "finetuning.trainer",
        "finetuning.channels",
        "finetuning.parameter_groups",
        "finetuning.scratch_network",
    ),
    *(
        "extraction.plan",
        "extraction.shard",
        "extraction.changed_files",
        "extraction.cluster",
        "training.ridge_pass",
        "extraction.record",
        "extraction.extract",
        "checks.verify",
    ),
    *(
        "neighbours.near_duplicates",
        "datasets.labels",
        "datasets.splits",
        "evaluation.metrics",
        "evaluation.evaluation",
        "heads.table",
        "training.fitting",
    ),
    *(
        "training.out_of_core",
        "training.self_training",
        "training.semi_supervised",
        "training.cross_validation",
        "analysis.compare",
        "finetuning.labelled_images",
        "training.trained_head",
        "finetuning.tuned_model",
        "finetuning.initial_head",
        "finetuning.pseudo_labels",
        "finetuning.finetune",
        "training.train",
        "inference.predict",
        "inference.formats",
        "inference.export",
        "report.figures",
        "report.page",
        "report.model_report",
        "report.comparison_report",
    ),
    *(
        "sources.demo_images",
        "checks.conformance",
        "checks.doctor",
        "cli.job_file",
        "cli.console",
        "cli.heads",
        "cli.finetuning",
        "cli.interrupts",
        "cli.app",
        "__main__",
    ),
)

DOORS = {
    "ai_edge_litert": {"inference.formats"},
    "PIL": {
        "decode.decode",
        "checks.doctor",
        "report.page",
    },  # doctor writes the pictures that decode then reads
    "bokeh": {"report.figures"},
    "dask": {"extraction.cluster"},
    "distributed": {"extraction.cluster"},
    "faiss": {"neighbours.near_duplicates"},
    "fsspec": {"sources.listing"},
    "h5py": {"backbones.declared", "backbones.weight_files"},
    "jinja2": {"report.page"},
    "keras_hub": {"backbones.hub"},
    "keras": {
        *(
            "backbones.resolve",
            "backbones.declared",
            "inference.export",
            "heads.keras_layers",
            "inference.formats",
            "backbones.hub",
            "heads.keras_head",
            "backbones.efficientnet_lite",
        ),
        *("backbones.weight_files", "backbones.table", "backbones.weights"),
        # The second pass trains Keras networks.
        *(
            "finetuning.augmentation",
            "finetuning.blocks",
            "finetuning.network",
            "finetuning.trainer",
            "finetuning.channels",
            "finetuning.parameter_groups",
            "finetuning.scratch_network",
        ),
        *("finetuning.tuned_model", "finetuning.finetune"),
    },
    "onnx": {"inference.formats"},
    "onnxruntime": {"inference.formats"},
    "openvino": {"engines.engine"},
    "psutil": {"cli.console"},
    "pydantic": {"recipe"},
    "pickle": {"backbones.torch_weights"},
    "rich": {"cli.app", "cli.console"},
    "skops": {"heads.model"},
    # Estimators are written where they belong: scikit-learn is a contract as much as a library.
    "sklearn": {
        *(
            "heads.ridge_head",
            "heads.centroid_head",
            "heads.keras_head",
            "datasets.splits",
            "evaluation.metrics",
            "heads.table",
            "training.fitting",
        ),
        *(
            "heads.keras_layers",
            "training.self_training",
            "training.semi_supervised",
            "report.page",
            "finetuning.labelled_images",
        ),
    },
    "tensorflow": {
        "engines.engine",
        "inference.formats",
        "finetuning.trainer",
        "finetuning.channels",
    },
    "xxhash": {"store.shard_file"},
    "typer": {"cli.app", "cli.heads", "cli.finetuning", "cli.console"},
}


def path_of(module: str) -> Path:
    return PACKAGE / f"{module.replace('.', '/')}.py"


def imports_of(path: Path) -> Iterator[str]:
    """Names of all modules that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            inner = [name for name in names if path_of(name.removeprefix("embedder.")).exists()]
            yield from inner or [module]


def test_every_module_has_its_place_in_the_order() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    modules = {str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".") for path in files}
    assert modules == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_its_left(module: str) -> None:
    inner = {
        name.removeprefix("embedder.")
        for name in imports_of(path_of(module))
        if name.startswith("embedder.")
    }
    assert inner <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("module", ORDER)
def test_heavy_libraries_have_one_door(module: str) -> None:
    libraries = {name.split(".")[0] for name in imports_of(path_of(module))}
    assert [library for library in libraries if module not in DOORS.get(library, {module})] == []


def test_importing_the_package_loads_no_network_library() -> None:
    heavy = "keras", "tensorflow", "openvino", "sklearn"
    code = f"import sys, embedder.cli.app; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
