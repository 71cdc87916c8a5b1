"""The feature store: schema, atomic shard write, what is done, reading back.

A store is a folder of plain Parquet files with no other record of progress: what is in it is
done. Every file is written under a temporary name and renamed, so a shard that exists is whole.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embedder.errors import RecipeError, RecipeMismatch, StoreError
from embedder.files import remove_abandoned, whole_file
from embedder.recipe import VIEW, Recipe
from embedder.sources import MODIFIED_TYPE

EMBEDDINGS = "embeddings"
FAILURES = "failures"
RUNS = "runs"
RECIPE_FILE = "recipe.json"

FAILURE_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("bytes", pa.int64()),
        pa.field("sha256", pa.string()),  # null where the bytes were not read
        pa.field("modified", MODIFIED_TYPE),
        pa.field("stage", pa.string(), nullable=False),  # read, decode or embed
        pa.field("error", pa.string(), nullable=False),
    ]
)
_ROW_FIELDS = [
    pa.field("image_id", pa.string(), nullable=False),
    pa.field("sha256", pa.string(), nullable=False),
    pa.field("bytes", pa.int64(), nullable=False),
    pa.field("width", pa.int32(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
    pa.field("format", pa.string(), nullable=False),
    pa.field("modified", MODIFIED_TYPE),
]
_VIEW_FIELD = pa.field(VIEW, pa.int16(), nullable=False)
_ROW_GROUP_ROWS = 8192
_WHERE = ("weights_source", "head_source")  # of the recipe: where this machine finds its parts


def vector_array(vectors: NDArray[Any]) -> pa.Array:
    """Wrap vectors as an Arrow array, without a copy.

    Args:
        vectors: (n, dim), or (n, height, width, channels) where a feature map is not pooled.

    Returns:
        Lists of fixed length; a feature map's carry its shape as Arrow's `fixed_shape_tensor`.
    """
    size = int(np.prod(vectors.shape[1:]))
    item = pa.field("item", pa.from_numpy_dtype(vectors.dtype), nullable=False)
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(item, size))
    if vectors.ndim == 2:
        return lists
    tensor = pa.fixed_shape_tensor(item.type, vectors.shape[1:])
    return pa.ExtensionArray.from_storage(tensor, lists.cast(tensor.storage_type))


def vectors_of(array: pa.Array) -> NDArray[Any]:
    """The vectors that `vector_array` wrapped; read-only, and without a copy."""
    if isinstance(array, pa.FixedShapeTensorArray):
        vectors: NDArray[Any] = array.to_numpy_ndarray()
        return vectors
    flat: NDArray[Any] = array.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(array), -1)


def row_schema(
    recipe: Recipe, types: dict[str, pa.DataType], extra_fields: Iterable[pa.Field] = ()
) -> pa.Schema:
    """Schema of `embeddings/`: who, which bytes, the manifest's columns, then the vectors.

    Where the recipe has several views, `view` follows `image_id`.
    """
    vectors = [pa.field(name, types[name], nullable=False) for name in recipe.columns]
    fields = [*_row_fields(recipe), *extra_fields, *vectors]
    return pa.schema(fields, metadata=_metadata(recipe))


def _row_fields(recipe: Recipe) -> list[pa.Field]:
    """What the store itself has to say of each row."""
    views = [_VIEW_FIELD] if recipe.views > 1 else []
    return [*_ROW_FIELDS[:1], *views, *_ROW_FIELDS[1:]]


def extra_columns(names: Iterable[str]) -> list[str]:
    """The columns that came from a manifest, among those of refs or of rows."""
    own = {f.name for f in _ROW_FIELDS} | {
        "path",
        "embedding",
        "shard",
        "stage",
        "error",
        "same_file",
    }
    return [name for name in names if name not in own]


def _metadata(recipe: Recipe) -> dict[str, str]:
    return {
        "embedder.fingerprint": recipe.fingerprint,
        "embedder.recipe": recipe.model_dump_json(),
    }


class Store:
    """A feature store, for reading and for adding to.

    An image is one row, or with several views as many, one after the other, in the views' order.
    `ids` and `vectors` give view 0 of every image unless told otherwise; with `view=None` they
    give all rows: `vectors(view=None).reshape(n_images, n_views, -1)`.

    Attributes:
        path: The store's folder.
        recipe: What its vectors were made with.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open an existing store.

        Raises:
            StoreError: There is no store at this path, or its recipe cannot be read.
        """
        self.path = Path(path)
        file = self.path / RECIPE_FILE
        try:
            content = json.loads(file.read_bytes())
            where = {name: content[name] for name in _WHERE if content.get(name)}
            self.recipe = Recipe(**content["recipe"], **where)
        except FileNotFoundError:
            raise StoreError(
                f"{self.path} is not a feature store: it has no {RECIPE_FILE}"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, RecipeError) as error:
            raise StoreError(f"{file} cannot be read: {error}") from error

    @classmethod
    def open_or_create(
        cls, path: str | os.PathLike[str], recipe: Recipe, versions: dict[str, str]
    ) -> "Store":
        """Open the store at a path, or make an empty one there.

        Raises:
            RecipeMismatch: The store was made with another recipe.
            StoreError: The folder holds something else, or cannot be written.
        """
        folder = Path(path)
        file = folder / RECIPE_FILE
        content = {
            "recipe": recipe.model_dump(mode="json"),
            "fingerprint": recipe.fingerprint,
            "weights_sha256": recipe.weights,
            "versions": versions,
        }
        where = {name: getattr(recipe, name) for name in _WHERE if getattr(recipe, name)}
        is_written = file.exists()
        if is_written:
            store = cls(folder)
            # The same weights can be somewhere else now.
            is_written = all(getattr(store.recipe, name) == path for name, path in where.items())
            content = json.loads(file.read_bytes())
            if differences := store.recipe.differences(recipe):
                raise RecipeMismatch(
                    f"The store {folder} was made with another recipe. It has "
                    f"{'; '.join(differences)}. Use another store, or the store's own options"
                )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StoreError(
                f"A new store must be an empty folder, or one that does not exist. "
                f"Received: {folder}, which holds something else"
            )
        try:
            for name in (EMBEDDINGS, FAILURES, RUNS):
                (folder / name).mkdir(parents=True, exist_ok=True)
            if not is_written:
                _replace(file, json.dumps(content | where, indent=2).encode())
            store = cls(folder)
            store.remove_abandoned()
        except OSError as error:
            raise StoreError(f"The store {folder} cannot be written: {error}") from error
        return store

    # Reading -------------------------------------------------------------------------------

    def shards(self, kind: str = EMBEDDINGS) -> list[Path]:
        """Parquet files of `embeddings` or `failures`, in the order that reading uses."""
        return sorted((self.path / kind).glob("*.parquet"))

    def table(self, columns: list[str] | None = None, kind: str = EMBEDDINGS) -> pa.Table:
        """Read columns of all rows, views too, in the order of `ids` and `vectors`."""
        tables = [_read(path, columns) for path in self.shards(kind)]
        if not tables:
            schema = FAILURE_SCHEMA if kind == FAILURES else pa.schema(_row_fields(self.recipe))
            return schema.empty_table().select(columns or schema.names)
        return pa.concat_tables(tables, promote_options="default")

    def column_names(self) -> list[str]:
        """Names of the columns that the rows have, in any shard."""
        names: dict[str, None] = {}
        for path in self.shards():
            with _reading(path):
                names |= dict.fromkeys(pq.read_schema(path).names)
        return list(names) or [field.name for field in _row_fields(self.recipe)]

    def ids(self, *, view: int | None = 0) -> NDArray[np.object_]:
        """Image ids, in the order of `vectors(view=view)`: array of str of shape (n_rows,).

        Raises:
            RecipeError: The store has no such view.
        """
        ids = [table["image_id"].to_numpy() for table in self._tables("image_id", view)]
        return np.concatenate([np.array([], dtype=object), *ids])

    def sha256(self) -> NDArray[np.object_]:
        """Checksum of each image's bytes, in the order of `ids()`: str (n_images,)."""
        checksums = [table["sha256"].to_numpy() for table in self._tables("sha256", 0)]
        return np.concatenate([np.array([], dtype=object), *checksums])

    def views(self) -> NDArray[np.int16]:
        """Number of each row's view, in the order of `vectors(view=None)`: int16 (n_rows,)."""
        if self.recipe.views == 1:
            return np.zeros(len(self), np.int16)
        views: NDArray[np.int16] = self.table([VIEW])[VIEW].to_numpy()
        return views

    def vectors(self, column: str | None = None, *, view: int | None = 0) -> NDArray[Any]:
        """Embeddings, in the order of `ids(view)`.

        Args:
            column: Name of the feature, where the store has several.
            view: Number of the view, where the store has several; None for all of them.

        Returns:
            Array of shape (n_rows, dim), or (n_rows, height, width, channels) where feature maps
            are not pooled; float32 or float16 as stored. There is one row for each image, or with
            `view=None` one for each of its views. Read-only, and without a copy, where the store
            is a single shard that has no other rows.

        Raises:
            RecipeError: The store has no such view or feature, or several features of which none
                is named.
            StoreError: The store has no rows.
        """
        column = self.recipe.column(column)
        arrays = [
            vectors_of(chunk)
            for table in self._tables(column, view)
            for chunk in table[column].chunks
            if len(chunk)
        ]
        if not arrays:
            raise StoreError(f"The store {self.path} has no rows yet")
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def _tables(self, column: str, view: int | None) -> Iterator[pa.Table]:
        """Read a column of each shard in turn, of one view or of all."""
        if view is not None and not 0 <= view < self.recipe.views:
            raise RecipeError(
                f"`view` must be one of the store's views, 0 to {self.recipe.views - 1}, or None "
                f"for all. Received: view={view}"
            )
        for path in self.shards():
            if view is None or self.recipe.views == 1:
                yield _read(path, [column])
            else:
                table = _read(path, [column, VIEW])
                yield table.filter(pc.equal(table[VIEW], view))

    def failures(self) -> pa.Table:
        """Images that could not be embedded: a table of `FAILURE_SCHEMA`."""
        return self.table(kind=FAILURES)

    def index(self, kind: str = EMBEDDINGS) -> pa.Table:
        """What is done: every column but the vectors' and decode's, and each image's shard.

        Returns:
            Table of one row for each image, also where it has several views, with `image_id`,
            `bytes`, `modified`, a manifest's columns, and `shard`, its file's name.
        """
        views = [VIEW] if kind == EMBEDDINGS and self.recipe.views > 1 else []
        tables = []
        for path in self.shards(kind):
            # Not `pq.read_table`, which takes longer to open a small file than to read it.
            with _reading(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
                extras = self.extra_columns(file.schema_arrow.names)
                table = file.read(["image_id", "bytes", "modified", *extras, *views])
            if views:  # an image's views are in one shard, and are kept or dropped together
                table = table.filter(pc.equal(table[VIEW], 0)).drop_columns(views)
            shard = pa.array(np.zeros(table.num_rows, np.int32))
            names_of = pa.DictionaryArray.from_arrays(shard, pa.array([path.name]))
            tables.append(table.append_column("shard", names_of))
        if not tables:
            return self.table(["image_id", "bytes", "modified"], kind).append_column(
                "shard", pa.array([], pa.dictionary(pa.int32(), pa.string()))
            )
        return pa.concat_tables(tables, promote_options="default").unify_dictionaries()

    def runs(self) -> list[dict[str, Any]]:
        """Records of past runs, oldest first."""
        return [json.loads(path.read_bytes()) for path in sorted((self.path / RUNS).glob("*.json"))]

    def __len__(self) -> int:
        """Number of embedded images."""
        num_rows = 0
        for path in self.shards():
            with _reading(path):
                num_rows += pq.read_metadata(path).num_rows
        return num_rows // self.recipe.views

    def extra_columns(self, names: Iterable[str]) -> list[str]:
        """The columns that came from a manifest, among those of this store's rows."""
        own = [*self.recipe.columns, *([VIEW] if self.recipe.views > 1 else [])]
        return [name for name in extra_columns(names) if name not in own]

    # Writing -------------------------------------------------------------------------------

    def write_shard(self, rows: pa.Table, failures: pa.Table, name: str) -> int:
        """Write one shard's rows and failures, each whole or not at all.

        Args:
            rows: Table of `row_schema`; may be empty.
            failures: Table of `FAILURE_SCHEMA`; may be empty.
            name: From `shard_name`: the same refs are always written to the same file.

        Returns:
            Number of bytes written.

        Raises:
            StoreError: The disk is full, or the store cannot be written.
        """
        num_bytes = 0
        if failures.num_rows:
            num_bytes += self._write(self.path / FAILURES / name, failures)
        if rows.num_rows:
            num_bytes += self._write(self.path / EMBEDDINGS / name, rows)
        return num_bytes

    def replace_shard(self, name: str, table: pa.Table, kind: str = EMBEDDINGS) -> None:
        """Put a changed table in a shard's place; the file goes where no row is left."""
        path = self.path / kind / name
        if table.num_rows:
            self._write(path, table)
        else:
            path.unlink(missing_ok=True)

    def read_shard(self, name: str, kind: str = EMBEDDINGS) -> pa.Table:
        """Read one shard whole."""
        return _read(self.path / kind / name, None)

    def drop(self, ids_by_shard: dict[str, list[str]], kind: str = EMBEDDINGS) -> None:
        """Drop images by id, with all their views, from the shards that hold them."""
        for name, ids in ids_by_shard.items():
            table = self.read_shard(name, kind)
            keep = pc.invert(pc.is_in(table["image_id"], pa.array(ids, pa.string())))
            self.replace_shard(name, table.filter(keep), kind)

    def remove_abandoned(self) -> None:
        """Remove what runs that were killed have left under temporary names."""
        for place in (self.path, *(self.path / name for name in (EMBEDDINGS, FAILURES, RUNS))):
            remove_abandoned(place)

    def write_run(self, record: dict[str, Any], run_id: str) -> None:
        """Keep the record of one run."""
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        content = json.dumps(record, indent=2).encode()
        _replace(self.path / RUNS / f"{moment}-{run_id}.json", content)

    def _write(self, path: Path, table: pa.Table) -> int:
        # The C library's memory goes back to the system as soon as it is freed; Arrow's own would
        # keep it for the next shard, which is seconds away.
        pool = pa.system_memory_pool()
        sink = pa.BufferOutputStream(pool)
        schema = table.schema.with_metadata(_metadata(self.recipe))
        pq.write_table(
            table.replace_schema_metadata(schema.metadata),
            sink,
            compression="zstd",
            row_group_size=_ROW_GROUP_ROWS,
            use_dictionary=["format", "stage"],  # on vectors it makes reading slower
            write_statistics=[n for n in table.column_names if n not in self.recipe.columns],
            write_page_checksum=True,
            memory_pool=pool,
        )
        buffer = sink.getvalue()
        try:
            _replace(path, buffer)
        except OSError as error:
            raise StoreError(f"{path} cannot be written: {error.strerror or error}") from error
        return int(buffer.size)


def shard_name(recipe: Recipe, ids: Iterable[str]) -> str:
    """File name of a shard: the same recipe and refs always give the same."""
    digest = hashlib.sha256(recipe.fingerprint.encode())
    for image_id in ids:
        digest.update(b"\0" + image_id.encode())
    return f"{digest.hexdigest()[:20]}.parquet"


def _read(path: Path, columns: list[str] | None) -> pa.Table:
    with _reading(path):
        return pq.read_table(
            path, columns=columns, partitioning=None, page_checksum_verification=True
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the shard, and what to do, where it cannot be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise StoreError(f"{path} vanished while it was to be read") from error
    except (pa.ArrowException, OSError) as error:
        raise StoreError(
            f"The shard {path} is damaged: {error}. Delete it and run `embedder extract` again: "
            f"its images will be embedded anew"
        ) from error


def _replace(path: Path, content: bytes | pa.Buffer) -> None:
    with whole_file(path) as file:
        file.write(content)
