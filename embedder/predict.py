"""Prediction: a model's classes for the images of a source, or for the rows of a store."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embedder.errors import RecipeError, Unfinished
from embedder.extract import Progress, RunOptions, run_extraction
from embedder.model import Model
from embedder.recipe import LOGITS, VIEW
from embedder.store import RECIPE_FILE, Store, vectors_of
from embedder.summary import Summary

DEFAULT_TOP_K = 5

_RANKED = pa.list_(
    pa.struct(
        [pa.field("class", pa.string(), nullable=False), pa.field("probability", pa.float32())]
    )
)
SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("sha256", pa.string()),
        pa.field("class", pa.string()),
        pa.field("classes", pa.list_(pa.string())),
        pa.field("probability", pa.float32()),
        pa.field("top_k", _RANKED),
        pa.field("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class Predictions:
    """What became of a prediction.

    Attributes:
        path: The Parquet file.
        num_predicted: Images with a prediction.
        num_failed: Images without one; their rows say why.
        summary: What the run over images was like; None where a store was predicted.
    """

    path: Path
    num_predicted: int
    num_failed: int
    summary: Summary | None = None


def predict(
    model_path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    top_k: int = DEFAULT_TOP_K,
    options: RunOptions | None = None,
    keep: str | None = None,
    watch: Callable[[Progress], None] | None = None,
) -> Predictions:
    """Predict the classes of images, and write them to one Parquet file.

    A store's features are taken as they are. Images go through the same pipeline as in `extract`,
    where the head is applied to features as they come; what is kept of them is their logits, in
    the store `OUT.logits`, so that running again predicts only what is new or changed.

    Args:
        model_path: Folder of the model.
        source: A store, or what `extract` takes as source.
        out: The file to write: one row for each image, as `SCHEMA`. `class` is the most probable
            class, or null where an image can have several labels; `classes` those given to it;
            `probability` that of the most probable class; `top_k` the most probable ones.
            Images that failed have an `error` and nothing else.
        top_k: How many of the most probable classes to write.
        options: How images are run.
        keep: Store to keep the features in, in place of `OUT.logits`.
        watch: The `on_progress` of `extract.run_extraction`.

    Raises:
        ModelError: There is no such model.
        RecipeMismatch: The store's features are of another recipe than the model's.
        RecipeError: The request makes no sense.
        EmbedderError: As in `extract`.
    """
    model, path = Model.load(model_path), Path(out)
    if top_k < 1:
        raise RecipeError(f"`top_k` must be at least 1. Received: top_k={top_k}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise RecipeError(f"OUT must be a file in a folder that exists. Received: {path}")
    if (Path(source) / RECIPE_FILE).is_file():
        store = Store(source)
        model.check_recipe(store.recipe, f"the store {store.path}")
        summary = None
    else:
        kept = keep or f"{path}.logits"
        recipe = model.recipe if keep else model.logits_recipe(model_path)
        (summary,) = run_extraction(source, {kept: recipe}, options or RunOptions(), watch)
        store = Store(kept)
    num_predicted, num_failed = _write(model, store, path, top_k)
    return Predictions(path, num_predicted, num_failed, summary)


def prediction_table(
    model: Model, ids: pa.Array, sha256: pa.Array, logits: NDArray[np.floating], top_k: int
) -> pa.Table:
    """Rows of `SCHEMA` for images with logits (n, n_classes), not yet calibrated."""
    probabilities = model.calibrated(logits)
    top_k = min(top_k, len(model.classes))
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    ranked = np.take_along_axis(probabilities, order, axis=1).astype(np.float32)
    names = model.classes[order]
    chosen = [model.classes[row].tolist() for row in model.chosen(probabilities)]
    pairs = pa.StructArray.from_arrays(
        [pa.array(names.ravel().tolist(), pa.string()), pa.array(ranked.ravel())],
        fields=list(_RANKED.value_type),
    )
    offsets = pa.array(np.arange(0, len(pairs) + 1, top_k, dtype=np.int32))
    best = [None] * len(ids) if model.is_multilabel else names[:, 0].tolist()
    columns = {
        "image_id": ids,
        "sha256": sha256,
        "class": pa.array(best, pa.string()),
        "classes": pa.array(chosen, SCHEMA.field("classes").type),
        "probability": pa.array(ranked[:, 0]),
        "top_k": pa.ListArray.from_arrays(offsets, pairs, type=_RANKED),
        "error": pa.nulls(len(ids), pa.string()),
    }
    return pa.table(columns, schema=SCHEMA)


def _write(model: Model, store: Store, path: Path, top_k: int) -> tuple[int, int]:
    num_predicted = 0
    with _parquet_file(path) as writer:
        for ids, sha256, vectors in _plain_rows(store, model):
            logits = (
                vectors if store.recipe.head else model.logits_of_columns({model.column: vectors})
            )
            table = prediction_table(model, ids, sha256, logits, top_k)
            writer.write_table(table)
            num_predicted += table.num_rows
        failures = store.failures()
        if failures.num_rows:
            errors = [
                f"{stage}: {error}"
                for stage, error in zip(
                    failures["stage"].to_pylist(), failures["error"].to_pylist(), strict=True
                )
            ]
            known: dict[str, Any] = {
                "image_id": failures["image_id"].combine_chunks(),
                "sha256": failures["sha256"].combine_chunks(),
                "error": pa.array(errors, pa.string()),
            }
            columns = {
                field.name: known.get(field.name, pa.nulls(failures.num_rows, field.type))
                for field in SCHEMA
            }
            writer.write_table(pa.table(columns, schema=SCHEMA))
    return num_predicted, failures.num_rows


def _plain_rows(store: Store, model: Model) -> Iterator[tuple[pa.Array, pa.Array, NDArray[Any]]]:
    """Ids, checksums and vectors of each shard, of the pictures as they are."""
    column = LOGITS if store.recipe.head else model.column
    for path in store.shards():
        table = store.read_shard(path.name)
        if store.recipe.views > 1:
            table = table.filter(pc.equal(table[VIEW], 0))
        if table.num_rows:
            arrays = (table[name].combine_chunks() for name in ("image_id", "sha256"))
            yield (*arrays, vectors_of(table[column].combine_chunks()))


@contextmanager
def _parquet_file(path: Path) -> Iterator[pq.ParquetWriter]:
    """A file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
            yield writer
        temporary.replace(path)
    except OSError as error:
        raise Unfinished(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
