"""One file of a store: damage is seen, and trouble is not taken for damage."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from embedder.errors import DamagedShard, StoreError
from embedder.recipe import Recipe
from embedder.store import shard_file
from embedder.store.schema import FAILURES, shard_name
from embedder.store.shard_file import digest_of, vector_array
from embedder.store.store import Store
from tests.support import rows_of

DIM = 4
IDS = [f"image-{number}" for number in range(6)]


@pytest.fixture
def store(tmp_path: Path, mean_colour_recipe: Recipe) -> Store:
    """Six rows with vectors 0, 1, 2, ... in one shard."""
    store = Store.open_or_create(tmp_path / "features", mean_colour_recipe, {})
    store.write_shard(rows_of(store.recipe, IDS, vectors()), pa.table({}), "a.parquet")
    return store


def vectors() -> NDArray[np.float32]:
    return np.repeat(np.arange(6, dtype=np.float32)[:, None], DIM, axis=1)


def rewrite(store: Store, change: Callable[[pa.Table], pa.Table]) -> None:
    """Write the shard as another program would, which keeps the schema's metadata."""
    (path,) = store.shards()
    table = pq.read_table(path, partitioning=None)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)


def with_vectors(table: pa.Table, array: NDArray[np.float32]) -> pa.Table:
    place = table.column_names.index("embedding")
    return table.set_column(place, table.schema.field("embedding"), vector_array(array))


CHANGES: dict[str, Callable[[pa.Table], pa.Table]] = {
    "swapped": lambda table: with_vectors(table, vectors()[::-1].copy()),
    "zeroed": lambda table: with_vectors(table, np.zeros((6, DIM), np.float32)),
    "shortened": lambda table: table.slice(0, 5),
    "another id": lambda table: table.set_column(
        0, table.schema.field(0), pa.array([*IDS[1:], "x"])
    ),
    "another sha256": lambda table: table.set_column(1, table.schema.field(1), pa.array(["0"] * 6)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_another_program_has_changed_is_seen_when_it_is_read(
    store: Store, change: str
) -> None:
    rewrite(store, CHANGES[change])
    with pytest.raises(DamagedShard, match=r"a\.parquet is damaged.*digest.*--repair"):
        store.table()


def test_any_flipped_bit_is_seen_or_changes_nothing(store: Store) -> None:
    (path,) = store.shards()
    whole = path.read_bytes()
    expected = store.table()
    num_seen = 0
    for place in range(0, len(whole), 4):
        damaged = bytearray(whole)
        damaged[place] ^= 0x40
        path.write_bytes(damaged)
        try:
            received = store.table()
        except StoreError:
            num_seen += 1
        else:
            tied = ["image_id", "sha256", "embedding"]
            assert received.select(tied).equals(expected.select(tied)), place
    assert num_seen > len(whole) / 8


def test_a_shard_of_another_recipe_is_named_and_neither_read_nor_rewritten(
    store: Store, tmp_path: Path
) -> None:
    recipe = store.recipe.model_copy(update={"crop": "pad"})
    other = Store.open_or_create(tmp_path / "other", recipe, {})
    other.write_shard(rows_of(recipe, IDS, vectors()), pa.table({}), "b.parquet")
    foreign = other.shards()[0].rename(store.path / "embeddings" / "b.parquet")
    content = foreign.read_bytes()
    rule = (
        rf"of its recipe, {store.recipe.fingerprint}. Received: .*b\.parquet.*{recipe.fingerprint}"
    )
    for read in (store.ids, store.vectors, store.index, store.column_names, store.__len__):
        with pytest.raises(StoreError, match=rule):
            read()
    with pytest.raises(StoreError, match=rule):
        store.drop([(IDS[0], "b.parquet")])
    with pytest.raises(StoreError, match=rule):
        store.replace_shard("b.parquet", pq.read_table(foreign, partitioning=None))
    assert foreign.read_bytes() == content


def test_a_stray_parquet_file_is_named(store: Store) -> None:
    pq.write_table(pa.table({"image_id": ["a"]}), store.path / "failures" / "stray.parquet")
    with pytest.raises(StoreError, match=r"Received: .*stray\.parquet, which names no recipe"):
        store.index(FAILURES)


@pytest.mark.parametrize(
    ("column", "rule"),
    [
        (pa.field("bytes", pa.float64()), "bytes must be of int64, and is of double"),
        (
            pa.field("embedding", pa.list_(pa.float32())),
            "embedding must be of vectors of float, and is of list",
        ),
        (None, "bytes must be of int64, and is of None"),
    ],
    ids=str,
)
def test_missing_and_retyped_columns_are_damage(
    store: Store, column: pa.Field | None, rule: str
) -> None:
    def retype(table: pa.Table) -> pa.Table:
        if column is None:
            return table.drop_columns("bytes")
        place = table.column_names.index(column.name)
        return table.set_column(place, column, table[column.name].cast(column.type))

    rewrite(store, retype)
    with pytest.raises(DamagedShard, match=rule):
        store.table()


def test_null_ids_are_damage(store: Store) -> None:
    def forget(table: pa.Table) -> pa.Table:
        metadata = {k: v for k, v in table.schema.metadata.items() if k != b"embedder.digests"}
        ids = pa.array([None, *IDS[1:]], pa.string())
        changed = table.set_column(0, pa.field("image_id", pa.string()), ids)
        return changed.replace_schema_metadata(metadata)

    (path,) = store.shards()
    pq.write_table(forget(pq.read_table(path, partitioning=None)), path)
    with pytest.raises(DamagedShard, match="image_id has nulls"):
        store.ids()


def test_shards_of_older_versions_are_read_as_they_are(store: Store) -> None:
    (path,) = store.shards()
    table = pq.read_table(path, partitioning=None)
    metadata = {k: v for k, v in table.schema.metadata.items() if k != b"embedder.digests"}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    np.testing.assert_array_equal(store.vectors(), vectors())
    assert not shard_file.has_digests(store.read_shard(path.name))


@pytest.mark.parametrize("digests", [b"{}", b"[1]", b"null", b'{"image_id": ""}', b"x"])
def test_digests_that_are_not_of_all_columns_are_damage(store: Store, digests: bytes) -> None:
    (path,) = store.shards()
    table = pq.read_table(path, partitioning=None)
    metadata = table.schema.metadata | {b"embedder.digests": digests}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(DamagedShard, match=r"a\.parquet is damaged: .*--repair"):
        store.read_shard("a.parquet", columns=["bytes"])


def test_dropping_rows_leaves_a_shard_with_digests(store: Store) -> None:
    store.drop((image_id, "a.parquet") for image_id in IDS[:2])
    assert shard_file.has_digests(store.read_shard("a.parquet"))
    np.testing.assert_array_equal(store.vectors(), vectors()[2:])


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["", "a", "bc", "é", "a" * 100, "z"]),
        vector_array(vectors()),
        vector_array(vectors().astype(np.float16)),
        vector_array(vectors().reshape(6, 2, 2, 1)),
        pa.array(range(6), pa.int16()),
    ],
    ids=lambda column: str(column.type)[:24],
)
def test_a_digest_depends_on_values_alone(column: pa.Array) -> None:
    digest = digest_of(pa.chunked_array([column]))
    assert digest_of(pa.chunked_array([column.slice(0, 2), column.slice(2)])) == digest
    assert digest_of(pa.chunked_array([column.slice(0, 0), column])) == digest
    order = pa.array([1, 0, *range(2, 6)])
    assert digest_of(pa.chunked_array([column.take(order)])) != digest
    assert digest_of(pa.chunked_array([column.slice(1)])) != digest


def test_texts_that_read_the_same_in_a_row_have_other_digests() -> None:
    assert digest_of(pa.chunked_array([["ab", "c"]])) != digest_of(pa.chunked_array([["a", "bc"]]))


# Trouble that is no damage. ------------------------------------------------------------------

_TROUBLE = """
import os, resource, sys
from embedder.errors import DamagedShard, StoreError
from embedder.store.store import Store
store = Store(sys.argv[1])
list(store.vectors())  # all libraries are loaded
if sys.argv[2] == "files":
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
    taken = []
    try:
        while True:
            taken.append(open("/dev/null"))
    except OSError:
        pass
else:
    os.chmod(store.shards()[0], 0)
    os.seteuid(65534)
try:
    store.read_shard("a.parquet")
except StoreError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("trouble", "reason"), [("files", "Too many open files"), ("permission", "Permission denied")]
)
def test_trouble_with_a_healthy_shard_asks_for_nothing_to_be_deleted(
    mean_colour_recipe: Recipe, trouble: str, reason: str
) -> None:
    if trouble == "permission" and os.geteuid() != 0:
        pytest.skip("only root may become somebody else")
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which others may not enter
        Path(folder).chmod(0o755)
        store = Store.open_or_create(Path(folder) / "features", mean_colour_recipe, {})
        rows = rows_of(store.recipe, IDS, vectors())
        store.write_shard(rows, pa.table({}), "a.parquet")
        done = subprocess.run(
            [sys.executable, "-c", _TROUBLE, str(store.path), trouble],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.stdout.startswith("StoreError "), done.stderr
    assert reason in done.stdout
    assert "Nothing is known to be wrong with what is in it" in done.stdout
    assert "damaged" not in done.stdout


def test_a_name_depends_on_the_rows_that_are_to_be_replaced(mean_colour_recipe: Recipe) -> None:
    plain = shard_name(mean_colour_recipe, ["a", "b"])
    assert shard_name(mean_colour_recipe, ["a", "b"], {}) == plain
    assert shard_name(mean_colour_recipe, ["a", "b"], {"a": "1"}) != plain
