"""The feature store: what is done, reading it back, adding to it.

A store is a folder of plain Parquet files with no other record of progress: what is in it is
done. Every file is written under a temporary name and renamed, so a shard that exists is whole.
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embedder import files
from embedder.columns import PASSING, VIEW
from embedder.errors import DamagedShard, RecipeError, RecipeMismatch, StoreError
from embedder.libraries import logger
from embedder.recipe import Recipe
from embedder.store import shard_file
from embedder.store.lease import LOCK_FILE, rewriting
from embedder.store.scanning import scan
from embedder.store.schema import (
    EMBEDDINGS,
    FAILURE_SCHEMA,
    FAILURES,
    expected_columns,
    own_fields,
)
from embedder.store.shard_file import has_digests, vectors_of

# Before a shard is read again that another host has replaced: NFS gives up on the old file.
_WAIT_SECONDS = 0.05, 0.2, 0.5
RUNS = "runs"
RECIPE_FILE = "recipe.json"
DAMAGED = "damaged"  # files that `repair` has put aside
_RUN_FIELDS: dict[str, Any] = {  # of a run's record, those that are read again
    "when": str,
    "status": str,
    "source": str,
    "counts": dict,
    "images_per_second": (int, float),
    "seconds_total": (int, float),
    "bottleneck": str,
}
_WHERE = ("weights_source", "head_source")  # of the recipe: where this machine finds its parts


@dataclass(frozen=True)
class CheckedFile:
    """What reading a file of a store has shown.

    Attributes:
        name: `embeddings/NAME` or `failures/NAME`.
        has_digests: Whether it keeps digests of its columns; files of older versions do not.
        error: Why it cannot be read, if it cannot.
    """

    name: str
    has_digests: bool = False
    error: StoreError | None = None


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
        self.path = files.local_path(path)
        file = self.path / RECIPE_FILE
        try:
            content = json.loads(files.regular(file).read_bytes())
            where = {name: content[name] for name in _WHERE if content.get(name)}
            self.recipe = Recipe(**content["recipe"], **where)
            fingerprint = content["fingerprint"]
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(
                f"{self.path} is not a feature store: it has no {RECIPE_FILE}"
            ) from None
        except (OSError, ValueError, RecipeError) as error:
            raise StoreError(f"{file} cannot be read: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{file} cannot be read: it is not as a store has it") from error
        except RecursionError:
            raise StoreError(f"{file} cannot be read: it is nested too deeply") from None
        if fingerprint != self.recipe.fingerprint:
            raise StoreError(
                f"The fingerprint in {file} must be that of its recipe, {self.recipe.fingerprint}. "
                f"Received: {fingerprint}; one of the two was changed by hand"
            )

    @classmethod
    def open_or_create(
        cls,
        path: str | os.PathLike[str],
        recipe: Recipe,
        versions: dict[str, str],
        *,
        is_shared: bool = False,
    ) -> "Store":
        """Open the store at a path, or make an empty one there.

        Of several processes that make it at the same time, the recipe of one becomes the store's.

        Args:
            path: Folder.
            recipe: What is stored.
            versions: Of the libraries that compute it, by name; written into a new store.
            is_shared: Whether others write it at the same time; then nothing is removed.

        Raises:
            RecipeMismatch: The store was made with another recipe.
            StoreError: The folder holds something else, or cannot be written.
        """
        folder = files.local_path(path)
        file = folder / RECIPE_FILE
        content = {
            "recipe": recipe.model_dump(mode="json"),
            "fingerprint": recipe.fingerprint,
            "weights_sha256": recipe.weights,
            "versions": versions,
        }
        where = {name: getattr(recipe, name) for name in _WHERE if getattr(recipe, name)}
        with files.os_errors_as(StoreError, f"The store {folder} cannot be written"):
            if not os.path.exists(file):
                check_place(folder)
                folder.mkdir(parents=True, exist_ok=True)
                files.create_once(file, json.dumps(content | where, indent=2).encode())
            store = cls(folder)
            if differences := store.recipe.differences(recipe):
                raise RecipeMismatch(
                    f"The store {folder} was made with another recipe. It has "
                    f"{'; '.join(differences)}. Use another store, or the store's own options"
                )
            for name in (EMBEDDINGS, FAILURES, RUNS):
                (folder / name).mkdir(exist_ok=True)
            if any(getattr(store.recipe, name) != place for name, place in where.items()):
                # The same weights can be somewhere else now.
                with files.whole_file(file) as written:
                    content = json.loads(file.read_bytes())
                    written.write(json.dumps(content | where, indent=2).encode())
            # Not read again: by now another machine may have written where its own weights are.
            store.recipe = store.recipe.model_copy(update=where)
            if not is_shared:
                store.remove_abandoned()
        return store

    @staticmethod
    def exists(path: str | os.PathLike[str]) -> bool:
        """Whether there is a store at a path, if perhaps one that cannot be read."""
        # `Path.is_file` raises where a name is longer than a name may be; this does not.
        return os.path.isfile(Path(path) / RECIPE_FILE)  # noqa: PTH113

    def move(self, path: str | os.PathLike[str]) -> None:
        """Give the store another path; a folder that is there takes the store's path."""
        folder = files.local_path(path)
        folder.parent.mkdir(parents=True, exist_ok=True)
        files.replace_folder(self.path, folder)
        self.path = folder

    @property
    def address(self) -> str:
        """What opens the store from any folder, on any machine that sees it."""
        return str(self.path.absolute())

    def __str__(self) -> str:
        """The store's path, as it was given."""
        return str(self.path)

    def __repr__(self) -> str:
        """What the store holds; no vectors are read."""
        try:
            size = f"{len(self):,} images"
        except StoreError:
            size = "not all of which can be read"
        made_with = f"{self.recipe.backbone} with weights {self.recipe.weights_source}"
        return f"<Store {self}: {size}, {made_with}>"

    # Reading -------------------------------------------------------------------------------

    def shards(self, kind: str = EMBEDDINGS) -> list[Path]:
        """Parquet files of `embeddings` or `failures`, in the order that reading uses.

        Raises:
            StoreError: The folder cannot be listed.
        """
        return [self.path / kind / name for name in self.shard_names(kind)]

    def shard_names(self, kind: str = EMBEDDINGS) -> list[str]:
        """Names of the shards of `embeddings` or `failures`, in the order that reading uses.

        Raises:
            StoreError: The folder cannot be listed.
        """
        folder = self.path / kind
        try:
            names = sorted(entry.name for entry in os.scandir(folder))
        except FileNotFoundError:  # something copied the store without its empty folders
            return []
        except OSError as error:
            raise StoreError(f"{folder} cannot be listed: {error.strerror}") from error
        return [name for name in names if name.endswith(".parquet") and not name.startswith(".")]

    def table(self, columns: list[str] | None = None, kind: str = EMBEDDINGS) -> pa.Table:
        """Read columns of all rows, views too, in the order of `ids` and `vectors`."""
        tables = [self.read_shard(name, kind, columns) for name in self.shard_names(kind)]
        if not tables:
            schema = FAILURE_SCHEMA if kind == FAILURES else pa.schema(own_fields(self.recipe))
            return schema.empty_table().select(columns or schema.names)
        return pa.concat_tables(tables, promote_options="default")

    def read_shard(
        self, name: str, kind: str = EMBEDDINGS, columns: list[str] | None = None
    ) -> pa.Table:
        """Read one shard, or some of its columns.

        Args:
            name: Of the file.
            kind: `embeddings` or `failures`.
            columns: Names of columns; None for all.

        Raises:
            DamagedShard: It is not as it was written.
            StoreError: It is of another recipe, or cannot be read just now.
        """
        return shard_file.read(
            self.path / kind / name, expected_columns(self.recipe, kind), columns
        )

    def num_rows_of(self, name: str) -> int:
        """Number of a shard's rows, views too, without reading them."""
        return shard_file.num_rows_of(self.path / EMBEDDINGS / name, self.recipe)

    def _schemas(self) -> Iterator[pa.Schema]:
        expected = expected_columns(self.recipe, EMBEDDINGS)
        for path in self.shards():
            yield shard_file.read_schema(path, expected)

    def column_names(self) -> list[str]:
        """Names of the columns that the rows have, in any shard."""
        names: dict[str, None] = {}
        for schema in self._schemas():
            names |= dict.fromkeys(schema.names)
        return list(names) or [field.name for field in own_fields(self.recipe)]

    def dim(self, column: str) -> int:
        """Length of the vectors of a feature, of a feature map all its values; 0 of an empty store.

        Raises:
            RecipeError: The store has no such feature.
        """
        schema = next(self._schemas(), None)
        column = self.recipe.column(column)
        return 0 if schema is None else shard_file.length_of(schema.field(column).type)

    def ids(self, *, view: int | None = 0) -> NDArray[np.object_]:
        """Image ids, in the order of `vectors(view=view)`: array of str of shape (n_rows,).

        Raises:
            RequestError: The store has no such view.
        """
        return self.texts("image_id", view=view)[0]

    def sha256(self) -> NDArray[np.object_]:
        """Checksum of each image's bytes, in the order of `ids()`: str (n_images,)."""
        return self.texts("sha256")[0]

    def texts(self, *columns: str, view: int | None = 0) -> list[NDArray[np.object_]]:
        """Columns of text, read at once, in the order of `ids(view=view)`: str (n_rows,) each."""
        parts = [
            [table[column].to_numpy() for column in columns]
            for table in scan(self, [*columns], view=view)
        ]
        none = [np.array([], dtype=object)] * len(columns)
        return [np.concatenate(arrays) for arrays in zip(none, *parts, strict=True)]

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
            RequestError: The store has no such view or feature, or several features of which none
                is named.
            StoreError: The store has no rows.
        """
        column = self.recipe.column(column)
        arrays = [
            vectors_of(chunk)
            for table in scan(self, [column], view=view)
            for chunk in table[column].chunks
            if len(chunk)
        ]
        if not arrays:
            raise StoreError(f"The store {self.path} has no rows yet")
        if len({array.shape[1:] for array in arrays}) > 1:
            raise StoreError(
                f"All vectors of a store must be of one length. Received: {self.path} with "
                f"{', '.join(sorted({str(array.shape[1:]) for array in arrays}))}; "
                f"`embedder verify` says which shards are damaged"
            )
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def failures(self) -> pa.Table:
        """Images that could not be embedded: a table of `FAILURE_SCHEMA`."""
        return self.table(kind=FAILURES)

    def index(self, kind: str = EMBEDDINGS) -> pa.Table:
        """What is done: every column but the vectors' and decode's, and each image's shard.

        Shards that go while they are read are left out: what they held was of another run's part.
        Those that are replaced meanwhile are read again.

        Returns:
            Table of one row for each image, also where it has several views, with `image_id`,
            `bytes`, `modified`, of failures `sha256` and `passing`, any manifest columns, and
            `shard`, the name of the file.

        Raises:
            DamagedShard: A shard is not as it was written.
            StoreError: It is of another recipe, or cannot be read, however often it is tried.
        """
        tables = []
        for path in self.shards(kind):
            table = self._index_of(path, kind)
            if table is None:  # a run of another part has moved or dropped the last of its own
                continue
            shard = pa.array(np.zeros(table.num_rows, np.int32))
            names_of = pa.DictionaryArray.from_arrays(shard, pa.array([path.name]))
            tables.append(table.append_column("shard", names_of))
        if not tables:
            known = ["image_id", "bytes", "modified"]
            known += [] if kind == EMBEDDINGS else ["sha256", PASSING]
            return self.table(known, kind).append_column(
                "shard", pa.array([], pa.dictionary(pa.int32(), pa.string()))
            )
        return pa.concat_tables(tables, promote_options="default").unify_dictionaries()

    def _index_of(self, path: Path, kind: str) -> pa.Table | None:
        """What is done, of one shard; None where it is there no more."""
        read = self._done_in if kind == EMBEDDINGS else self._failed_in
        waits = iter(_WAIT_SECONDS)
        while True:
            try:
                return read(path)
            except DamagedShard:
                raise
            except StoreError as error:
                if not os.path.lexists(path):
                    return None
                if (seconds := next(waits, None)) is None:
                    raise
                logger.info("reading again, as another run may have replaced it: %s", error)
                time.sleep(seconds)

    def _done_in(self, path: Path) -> pa.Table:
        """A shard's images and the columns of their manifest."""
        others = {"sha256", "width", "height", "format", *self.recipe.columns}
        expected = expected_columns(self.recipe, EMBEDDINGS)
        table = shard_file.read(path, expected, without=others)
        if self.recipe.views > 1:  # an image's are in one shard, and are kept or dropped together
            table = table.filter(pc.equal(table[VIEW], 0)).drop_columns([VIEW])
        return table

    def _failed_in(self, path: Path) -> pa.Table:
        table = self.read_shard(path.name, FAILURES)
        if PASSING not in table.column_names:  # of an older version
            table = table.append_column(PASSING, pc.equal(table["stage"], "read"))
        return table.select(["image_id", "bytes", "modified", "sha256", PASSING])

    def file_sizes(self) -> dict[str, int]:
        """Bytes of each file of rows and of failures, by `embeddings/NAME` or `failures/NAME`."""
        names = [f"{kind}/{n}" for kind in (EMBEDDINGS, FAILURES) for n in self.shard_names(kind)]
        return {name: shard_file.num_bytes_of(self.path / name) for name in names}

    def runs(self) -> list[dict[str, Any]]:
        """Records of past runs, oldest first; those that cannot be read are left out."""
        return [record for record in map(_read_run, self._run_files()) if record is not None]

    def unreadable_runs(self) -> list[str]:
        """Names of the files in `runs/` that are no records of runs."""
        return [file.name for file in self._run_files() if _read_run(file) is None]

    def _run_files(self) -> list[Path]:
        return sorted((self.path / RUNS).glob("*.json"))

    def __len__(self) -> int:
        """Number of embedded images."""
        num_rows = sum(map(self.num_rows_of, self.shard_names()))
        return num_rows // self.recipe.views

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
        """Put a changed table in a shard's place; the file goes where no row is left.

        The shard is read and replaced within one `lease.rewriting`.

        Args:
            name: Of the file.
            table: All its rows.
            kind: `embeddings` or `failures`.

        Raises:
            StoreError: It cannot be written, or removed.
        """
        path = self.path / kind / name
        if table.num_rows:
            self._write(path, table)
            return
        with files.os_errors_as(StoreError, f"{path} cannot be removed"):
            path.unlink(missing_ok=True)

    def drop(self, images: Iterable[tuple[str, str]], kind: str = EMBEDDINGS) -> None:
        """Drop images, with all their views: each by its id and the name of its shard."""
        ids_by_shard: dict[str, list[str]] = defaultdict(list)
        for image_id, name in images:
            ids_by_shard[name].append(image_id)
        for name, ids in ids_by_shard.items():
            with rewriting(self.path):
                table = self.read_shard(name, kind)
                keep = pc.invert(pc.is_in(table["image_id"], pa.array(ids, pa.string())))
                self.replace_shard(name, table.filter(keep), kind)

    def check_files(self) -> Iterator[CheckedFile]:
        """Read each file of rows and of failures whole."""
        for kind in (EMBEDDINGS, FAILURES):
            for name in self.shard_names(kind):
                try:
                    is_digested = has_digests(self.read_shard(name, kind))
                    yield CheckedFile(f"{kind}/{name}", is_digested)
                except StoreError as error:
                    yield CheckedFile(f"{kind}/{name}", error=error)

    def put_damaged_aside(self) -> dict[str, str]:
        """Read all files, and move those that are damaged to STORE/damaged/.

        Returns:
            Why, by name: `embeddings/NAME` or `failures/NAME`.

        Raises:
            StoreError: A file cannot be read just now, or cannot be moved.
        """
        damaged = {}
        for file in self.check_files():
            if isinstance(file.error, DamagedShard):
                damaged[file.name] = str(file.error)
            elif file.error is not None:
                raise file.error
        for name in damaged:
            aside = self.path / DAMAGED / name.replace("/", "-")
            with files.os_errors_as(StoreError, f"{aside} cannot be written"):
                aside.parent.mkdir(exist_ok=True)
                while aside.exists():  # it was damaged before
                    aside = aside.with_name(f"again-{aside.name}")
                (self.path / name).rename(aside)
        return damaged

    def remove_abandoned(self) -> None:
        """Remove what runs that were killed have left under temporary names."""
        for place in (self.path, *(self.path / name for name in (EMBEDDINGS, FAILURES, RUNS))):
            files.remove_abandoned(place)

    def write_run(self, record: dict[str, Any], run_id: str) -> None:
        """Keep the record of one run.

        Raises:
            StoreError: It cannot be written.
        """
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        path = self.path / RUNS / f"{moment}-{run_id}.json"
        with (
            files.os_errors_as(StoreError, f"{path} cannot be written"),
            files.whole_file(path) as file,
        ):
            file.write(json.dumps(record, indent=2).encode())

    def _write(self, path: Path, table: pa.Table) -> int:
        tied = ["image_id"]  # each image to its bytes and its vectors
        if path.parent.name == EMBEDDINGS:
            tied += ["sha256", *([VIEW] if self.recipe.views > 1 else []), *self.recipe.columns]
        return shard_file.write(path, table, self.recipe, tied)


def check_place(place: str | os.PathLike[str]) -> None:
    """Refuse a place for a new store that holds something else.

    A store that was being made when its run was killed is none yet, and no hindrance.

    Raises:
        StoreError: It does.
    """
    folder, own = files.local_path(place), {EMBEDDINGS, FAILURES, RUNS}
    # A file, or a folder that may not be read.
    with files.os_errors_as(StoreError, f"The store {folder} cannot be opened"):
        if (folder / RECIPE_FILE).exists():
            return
        entries = list(folder.iterdir()) if folder.exists() else []
        others = [e.name for e in entries if e.name not in own and not files.is_temporary(e)]
        others = [name for name in others if not name.startswith(LOCK_FILE)]
        others += [
            f"{name}/{path.name}" for name in own for path in (folder / name).glob("*.parquet")
        ]
    # Another run may have made the store meanwhile.
    if others and not (folder / RECIPE_FILE).exists():
        raise StoreError(
            f"A new store must be an empty folder, or one that does not exist. "
            f"Received: {folder}, which holds something else, such as {min(others)}"
        )


def _read_run(file: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(files.regular(file).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and all(
        isinstance(record.get(name), kind) for name, kind in _RUN_FIELDS.items()
    )
    is_counted = is_record and all(
        isinstance(record["counts"].get(name), int) for name in ("embedded", "failed")
    )
    return record if is_counted else None
