"""Export: a model in one file, from pixels to probabilities, that runs without this package.

What is written is run by the format's own runtime and compared with what `predict` gives for real
images; what differs is not kept.
"""

import importlib.metadata
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embedder import backbones, errors, files
from embedder.decode import decode_rgb
from embedder.extraction import OnProgress, RunOptions
from embedder.heads import Model, as_keras_layers
from embedder.inference.formats import (
    EMBEDDING,
    FORMATS,
    PIXELS,
    PROBABILITIES,
    Format,
    Outputs,
    find_format,
    write_and_run,
)
from embedder.inference.predict import predict
from embedder.libraries import import_keras, logger, versions
from embedder.sources import list_images, read_bytes
from embedder.store import Store

if TYPE_CHECKING:
    import keras

LABELS_FILE = "labels.txt"
DESCRIPTION_FILE = "export.json"
DEFAULT_NUM_IMAGES = 16
# Runtimes add up in another order, which makes less than 1e-5 with the networks of this package;
# one grey level more in every pixel is 1e-2 already.
DEFAULT_TOLERANCE = 1e-3
_ADVICE = (
    "Name images with --source: what is exported is compared with what the model predicts for them"
)


@dataclass(frozen=True)
class Exported:
    """What became of an export.

    Attributes:
        path: The folder.
        file: What was exported, in it: a file, or a folder of its own.
        num_bytes: Of it.
        num_images: Images it was compared on.
        differences: The largest difference from what `predict` gives, of `probabilities` and of
            `embedding`, where it is a share of the largest value.
    """

    path: Path
    file: str
    num_bytes: int
    num_images: int
    differences: dict[str, float]

    def __repr__(self) -> str:
        """Where it is, and how large."""
        return (
            f"<Exported {self.path / self.file}: {self.num_bytes / 1e6:,.1f} MB, "
            f"compared on {self.num_images:,} images>"
        )


def export(
    model_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    file_format: str,
    source: str | os.PathLike[str] | None = None,
    num_images: int = DEFAULT_NUM_IMAGES,
    tolerance: float = DEFAULT_TOLERANCE,
    watch: OnProgress | None = None,
) -> Exported:
    """Write a model as one network from pixels to calibrated probabilities.

    Its input is `pixels`, uint8 (batch, height, width, 3) of any batch size: RGB, decoded, cropped
    and resized as the recipe says, which the network does not do. Its outputs are `probabilities`
    (batch, n_classes) and `embedding` (batch, dim), float32. It computes in float32, whatever the
    recipe's `precision` and `store_dtype`, and is compared with the recipe in float32.

    Args:
        model_path: Folder of the model.
        out: Folder to write: the network, `labels.txt` with a class a line, and `export.json` with
            all that is needed to use it. Must be absent, empty, or of an older export.
        file_format: One of `FORMATS`.
        source: Real images to compare on, as `extract` takes them; those the model was trained on,
            if None.
        num_images: How many of them, spread over the source.
        tolerance: The largest difference of the comparison; see `Exported`.
        watch: The `on_progress` of `extraction.run_extraction`.

    Raises:
        ModelError: There is no such model, or `out` holds something else or cannot be written.
        RequestError: The request makes no sense: such as a head that is not made of layers, a
            package that is not installed, or no images to compare on.
        Unfinished: The format cannot hold the network, or computes something else; nothing is
            written.
    """
    row, folder = find_format(file_format), files.local_path(out).resolve()
    model = Model.load(model_path)
    _check_folder(folder)
    if num_images < 1:
        raise errors.RequestError(
            f"`num_images` must be at least 1. Received: num_images={num_images}"
        )
    model = _in_float32(model)
    with tempfile.TemporaryDirectory() as work, import_keras().device("cpu:0"):
        pixels = _sample(model, source, num_images, Path(work, "images"))
        network = whole_network(model)
        expected = _predicted(model, Path(work), watch)
        with (
            files.os_errors_as(errors.ModelError, f"The export {folder} cannot be written"),
            files.whole_folder(folder) as temporary,
        ):
            received = write_and_run(network, row, temporary / row.file, pixels)
            num_bytes = sum(file.stat().st_size for file in temporary.rglob("*"))
            differences = _compare(received, expected, row, tolerance)
            exported = Exported(folder, row.file, num_bytes, len(pixels), differences)
            _describe(model, exported, row, temporary)
    return exported


def whole_network(model: Model) -> "keras.Model":
    """The network from pixels to a dict of `probabilities` and `embedding`; see `export`."""
    keras = import_keras()
    head = as_keras_layers(model)
    backbone = backbones.build(model.recipe)
    embedding = backbone.output[model.column]
    if model.recipe.l2_normalise:
        embedding = keras.layers.UnitNormalization()(embedding)
    activation = "sigmoid" if model.is_multilabel else "softmax"
    probabilities = keras.layers.Activation(activation)(head(embedding))
    outputs = {PROBABILITIES: probabilities, EMBEDDING: embedding}
    return keras.Model(backbone.input, outputs, name="classifier")


def _in_float32(model: Model) -> Model:
    """The same model of the same images, whose features are computed and kept in float32."""
    if model.recipe.precision != "float32":
        logger.warning(
            "The model's recipe computes in %s, and what is exported in float32: it is compared "
            "with float32, from which predictions in %s differ by their rounding",
            *(model.recipe.precision, model.recipe.precision),
        )
    plain = {"precision": "float32", "store_dtype": "float32", "views": 1}
    return replace(model, recipe=model.recipe.model_copy(update=plain))


# The comparison ------------------------------------------------------------------------------


def _sample(
    model: Model, source: str | os.PathLike[str] | None, num_images: int, folder: Path
) -> NDArray[np.uint8]:
    """Copy images that can be decoded into a folder; their pixels, in the order of their names."""
    if source is None and model.record is not None:
        source = model.record.provenance.source
    if source is None:
        raise errors.RequestError(f"The model does not say where its images are. {_ADVICE}")
    try:
        paths = list_images(source).refs["path"].to_pylist()
    except errors.SourceError as error:
        raise errors.RequestError(f"{error}. {_ADVICE}") from error
    folder.mkdir()
    pixels = []
    for number in np.linspace(0, len(paths) - 1, min(num_images, len(paths))).astype(int):
        try:
            encoded = read_bytes(paths[number])
            pixels.append(decode_rgb(encoded, model.recipe).pixels)
        except (errors.ReadError, errors.DecodeError):
            continue
        (folder / f"{number:09d}.jpg").write_bytes(encoded)  # whatever its format: see FORMATS
    if not pixels:
        raise errors.RequestError(f"None of the images tried of {source} can be decoded. {_ADVICE}")
    return np.stack(pixels)


def _predicted(model: Model, work: Path, watch: OnProgress | None) -> Outputs:
    """What `predict` gives for the images in `work/images`, in the order of their names."""
    model.save(work / "model")
    # On OpenVINO also where there is a GPU: there, TensorFlow multiplies with fewer digits.
    options = RunOptions(engine="openvino", workers=1, max_failures=0.0)
    classes, table = model.classes.tolist(), work / "predictions.parquet"
    predict(
        *(work / "model", work / "images", table, len(classes)),
        options=options,
        keep=str(work / "features"),
        watch=watch,
    )
    rows = pq.read_table(table).sort_by("image_id")["top_k"].to_pylist()
    by_class = [{ranked["class"]: ranked["probability"] for ranked in row} for row in rows]
    probabilities = [[row[name] for name in classes] for row in by_class]
    store = Store(work / "features")
    embedding = store.vectors(model.column)[np.argsort(store.ids())]
    return {PROBABILITIES: np.array(probabilities, np.float32), EMBEDDING: embedding}


def _compare(
    received: Outputs, expected: Outputs, row: Format, tolerance: float
) -> dict[str, float]:
    """The largest difference of each output: of an embedding, as a share of its largest value.

    Raises:
        Unfinished: One is larger than the tolerance.
    """
    scales = {PROBABILITIES: 1.0, EMBEDDING: np.abs(expected[EMBEDDING]).max()}
    differences = {
        name: float(np.abs(received[name] - expected[name]).max() / scale)
        for name, scale in scales.items()
    }
    if not all(value <= tolerance for value in differences.values()):  # so that nan is refused
        found = ", ".join(f"{value:.2g} of {name}" for name, value in differences.items())
        raise errors.Unfinished(
            f"What {row.file} computes must differ from what `predict` gives by {tolerance:g} at "
            f"most. Received: {found}. Nothing was kept"
        )
    return differences


# The folder ----------------------------------------------------------------------------------


def _check_folder(folder: Path) -> None:
    known = {LABELS_FILE, DESCRIPTION_FILE, "model.bin", *(row.file for row in FORMATS.values())}
    held = folder.iterdir() if folder.is_dir() else ()
    names = {entry.name for entry in held if not files.is_temporary(entry)}
    is_older_export = names <= known and DESCRIPTION_FILE in names
    if (folder.exists() and not folder.is_dir()) or (names and not is_older_export):
        raise errors.ModelError(
            f"A model must be exported to an empty folder, over an older export, or to a folder "
            f"that does not exist. Received: {folder}, which holds something else"
        )


def _versions(packages: Sequence[str]) -> dict[str, str]:
    # Such as onnxruntime, which a distribution called onnxruntime-gpu brings too.
    distributions = importlib.metadata.packages_distributions()
    return {
        name: importlib.metadata.version(distributions.get(name, [name])[0]) for name in packages
    }


def _describe(model: Model, exported: Exported, row: Format, folder: Path) -> None:
    """Write the labels, and all that is needed to use the network and to know where it is from."""
    presets = ["keras-hub"] if backbones.is_preset(model.recipe.backbone) else []
    classes = model.classes.tolist()
    content: dict[str, Any] = {
        "file": row.file,
        "input": {
            "name": PIXELS,
            "dtype": "uint8",
            "shape": [None, *model.recipe.image_size, 3],
            "values": "RGB, 0 to 255; decoded, cropped and resized as `recipe` says",
        },
        "outputs": {
            PROBABILITIES: {"dtype": "float32", "shape": [None, len(classes)]},
            EMBEDDING: {"dtype": "float32", "shape": [None, model.estimator.n_features_in_]},
        },
        "classes": classes,
        "thresholds": None if model.thresholds is None else model.thresholds.tolist(),
        "recipe": model.recipe.model_dump(mode="json"),
        "fingerprint": model.recipe.fingerprint,
        "column": model.column,
        "head": {"kind": model.head, "sha256": model.head_sha256, "temperature": model.temperature},
        "parity": {"num_images": exported.num_images, "differences": exported.differences},
        "versions": versions() | _versions([*row.packages, *presets]),
    }
    # A folder's name can hold a line break, and a class would be two.
    lines = "".join(f"{' '.join(name.splitlines())}\n" for name in classes)
    (folder / LABELS_FILE).write_text(lines, encoding="utf-8")
    (folder / DESCRIPTION_FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")
