"""What a store's tables look like: names, columns, types, and how a shard's rows become a table."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embedder.columns import PASSING, VIEW, extra_columns
from embedder.recipe import Recipe
from embedder.sources import MODIFIED_TYPE
from embedder.store.failure import Failure
from embedder.store.shard_file import Columns, metadata_of, vector_array

EMBEDDINGS = "embeddings"
FAILURES = "failures"

FAILURE_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("bytes", pa.int64()),
        pa.field("sha256", pa.string()),  # null where the bytes were not read
        pa.field("modified", MODIFIED_TYPE),
        pa.field("stage", pa.string(), nullable=False),  # read, decode or embed
        pa.field("error", pa.string(), nullable=False),
        # Whether the next run tries again: what was in the way may be gone. Null in files of
        # older versions, where it is so of what could not be read.
        pa.field(PASSING, pa.bool_()),
    ]
)
_OLDEST_FAILURE_SCHEMA = pa.schema([field for field in FAILURE_SCHEMA if field.name != PASSING])
_ROW_FIELDS = [
    pa.field("image_id", pa.string(), nullable=False),
    pa.field(VIEW, pa.int16(), nullable=False),  # where there are several
    pa.field("sha256", pa.string(), nullable=False),
    pa.field("bytes", pa.int64(), nullable=False),
    pa.field("width", pa.int32(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
    pa.field("format", pa.string(), nullable=False),
    pa.field("modified", MODIFIED_TYPE),
]


class Row(NamedTuple):
    """A row of a shard, but for its vector; `position` is that of its ref among the shard's."""

    position: int
    view: int
    num_bytes: int | None
    sha256: str | None
    width: int
    height: int
    format: str


def row_schema(
    recipe: Recipe, types: dict[str, pa.DataType], extra_fields: Iterable[pa.Field] = ()
) -> pa.Schema:
    """Schema of `embeddings/`: who, which bytes, the manifest's columns, then the vectors.

    Where the recipe has several views, `view` follows `image_id`.

    Args:
        recipe: Gives the vectors' names.
        types: Of the vectors, by column; see `vector_array`.
        extra_fields: The manifest's columns.
    """
    vectors = [pa.field(name, types[name], nullable=False) for name in recipe.columns]
    fields = [*own_fields(recipe), *extra_fields, *vectors]
    return pa.schema(fields, metadata=metadata_of(recipe))


def own_fields(recipe: Recipe) -> list[pa.Field]:
    """What the store itself has to say of each row."""
    return [field for field in _ROW_FIELDS if field.name != VIEW or recipe.views > 1]


def expected_columns(recipe: Recipe, kind: str) -> Columns:
    """What a file of `embeddings` or `failures` must have, of whichever version of this package."""
    if kind == FAILURES:
        return Columns(recipe, _OLDEST_FAILURE_SCHEMA)
    return Columns(recipe, pa.schema(own_fields(recipe)), recipe.columns)


def shard_name(
    recipe: Recipe, ids: Iterable[str], replaced: Mapping[str, str] | None = None
) -> str:
    """File name of a shard: the same recipe and refs always give the same.

    Args:
        recipe: What is computed.
        ids: Of the shard's images.
        replaced: sha256 of the rows that the images have in other shards, by id: until the new
            ones are written, the old ones must not be written over.
    """
    digest = hashlib.sha256(recipe.fingerprint.encode())
    for image_id in ids:
        digest.update(b"\0" + image_id.encode())
        if replaced and image_id in replaced:
            digest.update(b"\0\0" + replaced[image_id].encode())
    return f"{digest.hexdigest()[:20]}.parquet"


def row_indices(rows: Iterable[Row], num_views: int) -> list[int]:
    """Where rows are in arrays (n_refs * n_views, ...), in the order of refs and views."""
    return [row.position * num_views + row.view for row in rows]


def rows_table(
    recipe: Recipe, refs: pa.Table, rows: Sequence[Row], vectors: Mapping[str, NDArray[Any]]
) -> pa.Table:
    """A shard's rows, as `row_schema` has them.

    Args:
        recipe: What the vectors were made with.
        refs: Refs of the shard's images.
        rows: In the order of refs and views; an image has a row for each of its views, or none.
        vectors: By column, (n_refs * n_views, ...), with an entry for each row; see `row_indices`.
    """
    if not rows:
        return pa.table({})
    is_whole = len(rows) == refs.num_rows * recipe.views
    indices = row_indices(rows, recipe.views)
    arrays = {
        column: vector_array(array if is_whole else array[indices])
        for column, array in vectors.items()
    }
    mine = refs.take(pa.array([row.position for row in rows], pa.int64()))
    extras = extra_columns(refs.column_names)
    columns = [
        mine["image_id"],
        *([[row.view for row in rows]] if recipe.views > 1 else []),
        [row.sha256 for row in rows],
        [row.num_bytes for row in rows],
        [row.width for row in rows],
        [row.height for row in rows],
        [row.format for row in rows],
        mine["modified"],
        *(mine[name] for name in extras),
        *arrays.values(),
    ]
    types = {column: array.type for column, array in arrays.items()}
    fields = [refs.schema.field(name) for name in extras]
    return pa.table(columns, schema=row_schema(recipe, types, fields))


def failures_table(refs: pa.Table, failures: Sequence[tuple[Row, Failure]]) -> pa.Table:
    """A shard's failures, as `FAILURE_SCHEMA` has them.

    Args:
        refs: Refs of the shard's images.
        failures: In the order of refs, with what is known of the image.
    """
    mine = refs.take(pa.array([row.position for row, _ in failures], pa.int64()))
    sizes = pa.array([row.num_bytes for row, _ in failures], pa.int64())
    columns = [
        mine["image_id"],
        pc.coalesce(sizes, mine["bytes"]),
        [row.sha256 for row, _ in failures],
        mine["modified"],
        [failure.stage for _, failure in failures],
        [failure.error for _, failure in failures],
        [failure.is_passing for _, failure in failures],
    ]
    return pa.table(columns, schema=FAILURE_SCHEMA)
