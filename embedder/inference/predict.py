"""Prediction: a model's classes for the images of a source, or for the rows of a store."""

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embedder.columns import LOGITS
from embedder.errors import RequestError, StoreBusy, Unfinished
from embedder.extraction import OnProgress, RunOptions, Summary, run_extraction
from embedder.files import local_path, os_errors_as, remove_abandoned, remove_folder, whole_file
from embedder.heads import Model
from embedder.recipe import Recipe
from embedder.sources import Listing, list_images, scheme_of
from embedder.store import Part, Store, lease, scan, share_of, vectors_of

DEFAULT_TOP_K = 5

_RANK = pa.struct([pa.field("class", pa.string(), nullable=False), ("probability", pa.float32())])
SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("sha256", pa.string()),
        pa.field("class", pa.string()),
        pa.field("classes", pa.list_(pa.string())),
        pa.field("probability", pa.float32()),
        pa.field("top_k", pa.list_(_RANK)),
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
        store: What was predicted from: features, or logits that the next run goes on with.
        summary: What the run over images was like; None where a store was predicted.
    """

    path: Path
    num_predicted: int
    num_failed: int
    store: Path
    summary: Summary | None = None

    def __repr__(self) -> str:
        """Where they are, and how many."""
        return (
            f"<Predictions {self.path}: {self.num_predicted:,} images, {self.num_failed:,} failed>"
        )


def predict(
    model_path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    top_k: int = DEFAULT_TOP_K,
    options: RunOptions | None = None,
    keep: str | None = None,
    watch: OnProgress | None = None,
) -> Predictions:
    """Predict the classes of images, and write them to one Parquet file.

    A store's features are taken as they are. Images go through the same pipeline as in `extract`,
    where the head is applied to features as they come; what is kept of them is their logits, in a
    hidden store beside OUT, so that running again predicts only what is new or changed. Another
    source, or another model, begins another such store.

    Args:
        model_path: Folder of the model.
        source: A store, or what `extract` takes as source.
        out: The file to write: one row for each image of the source, and no others, as
            `SCHEMA`; with a `part`, of that part; with a `limit`, for those that were looked at,
            or were before. `class` is the
            most probable class, or null where labels are multi-label; `classes` those
            given to it; `probability` that of the most probable class; `top_k` the most probable
            ones. Images that failed have an `error` and nothing else.
        top_k: How many of the most probable classes to write.
        options: Workers, engine and shard size of the extraction.
        keep: Store to keep the features in, in place of the hidden one.
        watch: The `on_progress` of `extraction.run_extraction`.

    Raises:
        ModelError: There is no such model.
        RecipeMismatch: The store's features are of another recipe than the model's.
        RequestError: The request makes no sense.
        EmbedderError: As in `extract`.
    """
    model, path = Model.load(model_path), local_path(out)
    if top_k < 1:
        raise RequestError(f"`top_k` must be at least 1. Received: top_k={top_k}")
    # `Path.is_file` raises where a name is longer than a name may be; these do not.
    if os.path.isdir(path) or not os.path.isdir(path.absolute().parent):
        raise RequestError(f"OUT must be a file in a folder that exists. Received: {path}")
    options = options or RunOptions()
    part = Part.parse(options.part) if options.part else None
    if Store.exists(source):
        if part is not None:
            raise RequestError(
                f"`part` must be of a source of images. Received: part={part} of the store {source}"
            )
        store = Store(source)
        model.check_recipe(store.recipe, f"the store {store}")
        return Predictions(path, *_write(model, store, path, top_k), store.path)
    listing = list_images(source)
    listing = replace(listing, refs=share_of(listing.refs, part))
    hidden = path.with_name(f".{path.name}.logits")  # a store for each source and model
    if keep:
        kept, recipe = os.fspath(local_path(keep)), model.recipe
    else:
        recipe = model.logits_recipe(model_path)
        # What nobody has made is made again; and the store is this command's own.
        options = replace(options, repair=True, part=None)
        kept = os.fspath(_store_of(hidden, listing, recipe))
        _take_over(path.with_name(f"{path.name}.logits"), Path(kept), recipe)
    (summary,) = run_extraction(listing, {kept: recipe}, options, watch)
    num_rows = _write(model, Store(kept), path, top_k, listing.refs["image_id"], options.limit)
    if not keep:
        for other in set(hidden.iterdir()) - {Path(kept)}:
            with suppress(StoreBusy), lease(other, patience=0.0):  # else another run's
                remove_folder(other)
    return Predictions(path, *num_rows, Path(kept), summary)


def _store_of(folder: Path, listing: Listing, recipe: Recipe) -> Path:
    """Where the logits of a source are: images of two can have the same names and sizes."""
    source = listing.source
    if scheme_of(source) is None:
        source = os.fspath(Path(source).absolute())
    name = hashlib.sha256(f"{recipe.fingerprint} ".encode() + os.fsencode(source))
    return folder / name.hexdigest()[:16]


def _take_over(older: Path, place: Path, recipe: Recipe) -> None:
    """Give a store of these logits its place, which older versions kept beside the file."""
    if place.exists() or not Store.exists(older):
        return
    store = Store(older)
    if store.recipe.fingerprint == recipe.fingerprint:
        store.move(place)


def prediction_table(
    model: Model,
    ids: pa.ChunkedArray,
    sha256: pa.ChunkedArray,
    logits: NDArray[np.floating],
    top_k: int,
) -> pa.Table:
    """Rows of `SCHEMA`.

    Args:
        model: Whose classes they are.
        ids: (n,), of the images.
        sha256: (n,), of their bytes.
        logits: (n, n_classes), not yet calibrated.
        top_k: How many classes are ranked, or all there are.
    """
    probabilities = model.calibrated(logits)
    top_k = min(top_k, len(model.classes))
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    ranked = np.take_along_axis(probabilities, order, axis=1).astype(np.float32)
    names = model.classes[order]
    chosen = [model.classes[row].tolist() for row in model.chosen(probabilities)]
    pairs = pa.StructArray.from_arrays(
        [pa.array(names.ravel().tolist(), pa.string()), pa.array(ranked.ravel())],
        fields=list(_RANK),
    )
    offsets = pa.array(np.arange(0, len(pairs) + 1, top_k, dtype=np.int32))
    best = [None] * len(ids) if model.is_multilabel else names[:, 0].tolist()
    columns = {
        "image_id": ids,
        "sha256": sha256,
        "class": pa.array(best, pa.string()),
        "classes": pa.array(chosen, SCHEMA.field("classes").type),
        "probability": pa.array(ranked[:, 0]),
        "top_k": pa.ListArray.from_arrays(offsets, pairs, type=SCHEMA.field("top_k").type),
        "error": pa.nulls(len(ids), pa.string()),
    }
    return pa.table(columns, schema=SCHEMA)


def _write(
    model: Model,
    store: Store,
    path: Path,
    top_k: int,
    ids: pa.Array | None = None,
    limit: int | None = None,
) -> tuple[int, int]:
    """Write the rows of these images of a store, or of all; how many are predicted, and failed.

    Raises:
        Unfinished: The store lacks some of them, but for those past a limit; or the file cannot be
            written.
    """
    failures = _of_ids(store.failures(), ids)
    num_predicted = 0
    remove_abandoned(path.absolute().parent)  # of a prediction that was killed
    with (
        os_errors_as(Unfinished, f"{path} cannot be written"),
        whole_file(path) as file,
        pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer,
    ):
        column = LOGITS if store.recipe.head else model.column
        for shard in scan(store, ["image_id", "sha256", column]):
            table = _of_ids(shard, ids)
            if not table.num_rows:
                continue
            vectors = vectors_of(table[column])
            logits = vectors if store.recipe.head else model.logits_of_columns({column: vectors})
            rows = prediction_table(model, table["image_id"], table["sha256"], logits, top_k)
            writer.write_table(rows)
            num_predicted += rows.num_rows
        if failures.num_rows:
            writer.write_table(_failure_rows(failures))
        num_rows = num_predicted + failures.num_rows
        if ids is not None and limit is None and num_rows != len(ids):
            raise Unfinished(
                f"Each of {len(ids):,} images must have one prediction or one failure. Received: "
                f"{num_rows:,} in {store}. Run the same command again"
            )
    return num_predicted, failures.num_rows


def _failure_rows(failures: pa.Table) -> pa.Table:
    known = {
        "image_id": failures["image_id"],
        "sha256": failures["sha256"],
        "error": pc.binary_join_element_wise(failures["stage"], failures["error"], ": "),
    }
    absent = {name: pa.nulls(failures.num_rows, SCHEMA.field(name).type) for name in SCHEMA.names}
    return pa.table(absent | known, schema=SCHEMA)


def _of_ids(table: pa.Table, ids: pa.Array | None) -> pa.Table:
    return table if ids is None else table.filter(pc.is_in(table["image_id"], ids))
