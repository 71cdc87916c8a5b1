"""The store: whole or not at all, readable by anyone, and only of one recipe."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedder.errors import EmbedderError, RecipeMismatch, StoreError
from embedder.recipe import Recipe
from embedder.store.schema import FAILURE_SCHEMA, FAILURES, shard_name
from embedder.store.store import Store
from tests.support import ROOT, rows_of

DIM = 6


@pytest.fixture
def store(tmp_path: Path, mean_colour_recipe: Recipe) -> Store:
    return Store.open_or_create(tmp_path / "features", mean_colour_recipe, {"embedder": "0"})


def make_rows(recipe: Recipe, ids: list[str], first: float = 0.0) -> pa.Table:
    """Rows whose vectors are first, first + 1, ... in every component."""
    values = np.arange(first, first + len(ids), dtype=np.float32)
    return rows_of(recipe, ids, np.repeat(values[:, None], DIM, axis=1))


def make_failures(ids: list[str], **changes: Any) -> pa.Table:
    """Failures of images of 1 byte that are gone, but for the changes."""
    failure = {"bytes": 1, "stage": "read", "error": "gone", "passing": False} | changes
    rows = [{"image_id": image_id} | failure for image_id in ids]
    return pa.Table.from_pylist(rows, schema=FAILURE_SCHEMA)


def write(store: Store, rows: list[str], failures: list[str] | None = None) -> str:
    name = shard_name(store.recipe, [*rows, *(failures or [])])
    store.write_shard(make_rows(store.recipe, rows), make_failures(failures or []), name)
    return name


def test_vectors_and_ids_come_back_in_the_same_order(store: Store) -> None:
    write(store, ["a", "b"])
    store.write_shard(make_rows(store.recipe, ["c", "d"], first=10), make_failures([]), "0.parquet")
    by_id = dict(zip(store.ids(), store.vectors()[:, 0], strict=True))
    assert by_id == {"a": 0, "b": 1, "c": 10, "d": 11}
    assert store.vectors().shape == (4, DIM)
    assert len(store) == 4


def test_a_single_shard_is_read_without_a_copy(store: Store) -> None:
    write(store, ["a", "b"])
    assert not store.vectors().flags.owndata


def test_anyone_can_read_the_parquet_files(store: Store) -> None:
    write(store, ["a", "b"], ["c"])
    rows = duckdb.sql(
        f"select image_id, embedding[1], len(embedding) from '{store.path}/embeddings/*.parquet'"
    ).fetchall()
    assert rows == [("a", 0.0, DIM), ("b", 1.0, DIM)]


def test_the_vector_column_is_as_the_contract_says(store: Store) -> None:
    name = write(store, ["a"])
    file = pq.ParquetFile(store.path / "embeddings" / name)
    field = file.schema_arrow.field("embedding")
    assert field.type == pa.list_(pa.field("item", pa.float32(), nullable=False), DIM)
    assert not field.nullable
    column = file.metadata.row_group(0).column(file.metadata.num_columns - 1)
    assert column.path_in_schema.startswith("embedding")
    assert column.compression == "ZSTD"
    assert not any("DICTIONARY" in encoding for encoding in column.encodings)


def test_a_shard_explains_itself(store: Store) -> None:
    name = write(store, ["a"], ["b"])
    for kind in ("embeddings", "failures"):
        metadata = pq.read_schema(store.path / kind / name).metadata
        assert metadata[b"embedder.fingerprint"].decode() == store.recipe.fingerprint
        assert Recipe(**json.loads(metadata[b"embedder.recipe"])) == store.recipe


def test_float16_is_stored_as_float16(tmp_path: Path, mean_colour_recipe: Recipe) -> None:
    recipe = mean_colour_recipe.model_copy(update={"store_dtype": "float16"})
    store = Store.open_or_create(tmp_path / "half", recipe, {})
    write(store, ["a"])
    assert store.vectors().dtype == np.float16


def test_another_recipe_is_refused_and_the_difference_shown(store: Store) -> None:
    other = store.recipe.model_copy(update={"pooling": "max"})
    with pytest.raises(RecipeMismatch, match="pooling: avg, not max"):
        Store.open_or_create(store.path, other, {})


def test_a_folder_that_holds_something_else_is_refused(
    tmp_path: Path, mean_colour_recipe: Recipe
) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StoreError, match="holds something else"):
        Store.open_or_create(tmp_path, mean_colour_recipe, {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_without_a_recipe_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"not a feature store: it has no recipe\.json"):
        Store(tmp_path)


def test_a_store_that_was_being_made_when_its_run_was_killed_is_made(
    tmp_path: Path, mean_colour_recipe: Recipe
) -> None:
    for name in ("embeddings", "failures", "runs"):
        (tmp_path / "half" / name).mkdir(parents=True)
    (tmp_path / "half" / ".lock").touch()
    (tmp_path / "half" / f".recipe.json.{socket.gethostname()}.1.tmp").touch()
    store = Store.open_or_create(tmp_path / "half", mean_colour_recipe, {})
    assert store.recipe == mean_colour_recipe


def test_shards_without_a_recipe_are_no_new_store(store: Store) -> None:
    name = write(store, ["a"])
    (store.path / "recipe.json").unlink()
    with pytest.raises(StoreError, match=rf"holds something else, such as embeddings/{name}"):
        Store.open_or_create(store.path, store.recipe, {})


@pytest.mark.parametrize(
    "content", ['{"recipe": {"backbone": ', "[]", "null", "3", '{"recipe": []}', "[" * 100_000, ""]
)
def test_a_recipe_that_cannot_be_read_is_told(store: Store, content: str) -> None:
    (store.path / "recipe.json").write_text(content)
    with pytest.raises(StoreError, match=r"recipe\.json cannot be read"):
        Store(store.path)


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"recipe": []}'])
def test_a_recipe_that_is_something_else_is_told_in_plain_words(store: Store, content: str) -> None:
    (store.path / "recipe.json").write_text(content)
    with pytest.raises(StoreError, match=r"recipe\.json cannot be read: it is not as a store has"):
        Store(store.path)


def test_a_fingerprint_that_is_not_the_recipes_is_told(store: Store) -> None:
    file = store.path / "recipe.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"fingerprint": "0" * 16}))
    with pytest.raises(StoreError, match=rf"{store.recipe.fingerprint}\. Received: 0{{16}}"):
        Store(store.path)
    file.write_text(json.dumps(content | {"recipe": content["recipe"] | {"crop": "pad"}}))
    with pytest.raises(StoreError, match="one of the two was changed by hand"):
        Store(store.path)


@pytest.mark.parametrize("path", ["s3://bucket/store", "https://host/store", "file:///store"])
def test_a_url_does_not_become_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mean_colour_recipe: Recipe, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EmbedderError, match=f"Received: {path}"):
        Store.open_or_create(path, mean_colour_recipe, {})
    with pytest.raises(EmbedderError, match=f"Received: {path}"):
        Store(path)
    assert not list(tmp_path.iterdir())


def test_records_that_are_none_are_left_out_and_named(store: Store) -> None:
    record = {
        "when": "2026-01-01",
        "status": "done",
        "source": "photos",
        "counts": {"embedded": 1, "failed": 0},
        "images_per_second": 1.0,
        "seconds_total": 1,
        "bottleneck": "nothing to embed",
    }
    store.write_run(record, "0")
    strange = {"a": "", "b": "[]", "c": "null", "d": "{}", "e": json.dumps(record | {"counts": 1})}
    for name, content in strange.items():
        (store.path / "runs" / f"{name}.json").write_text(content)
    assert store.runs() == [record]
    assert store.unreadable_runs() == [f"{name}.json" for name in strange]


def test_damaged_files_are_put_aside_by_name(store: Store) -> None:
    good, bad = write(store, ["a"]), write(store, ["b"], ["c"])
    for kind in ("embeddings", "failures"):
        path = store.path / kind / bad
        path.write_bytes(path.read_bytes()[:100])
    damaged = store.put_damaged_aside()
    assert list(damaged) == [f"embeddings/{bad}", f"failures/{bad}"]
    assert all("is damaged" in reason for reason in damaged.values())
    assert list(store.ids()) == ["a"]
    assert [path.name for path in store.shards()] == [good]
    aside = {path.name for path in (store.path / "damaged").iterdir()}
    assert aside == {f"embeddings-{bad}", f"failures-{bad}"}
    assert store.put_damaged_aside() == {}
    write(store, ["b"], ["c"])
    (store.path / "embeddings" / bad).write_bytes(b"PAR1")
    store.put_damaged_aside()
    assert (store.path / "damaged" / f"again-embeddings-{bad}").read_bytes() == b"PAR1"


def test_a_store_is_moved_and_takes_the_place_of_another(store: Store, tmp_path: Path) -> None:
    write(store, ["a"])
    older, place = str(store), tmp_path / "new" / "place"
    Store.open_or_create(place, store.recipe.model_copy(update={"views": 2}), {})
    store.move(place)
    assert str(store) == str(place)
    for moved in (store, Store(place)):
        assert list(moved.ids()) == ["a"]
    assert Store(older).recipe.views == 2
    store.move(tmp_path / "far" / "away")
    assert not Store.exists(place)


def test_a_store_exists_where_it_has_a_recipe(store: Store, tmp_path: Path) -> None:
    assert Store.exists(store.path)
    for other in (tmp_path, tmp_path / "x", tmp_path / ("n" * 300), "https://elsewhere/store"):
        assert not Store.exists(other)


def test_a_store_shows_what_it_holds(store: Store) -> None:
    name, recipe = write(store, ["a", "b"]), store.recipe
    shown = (
        f"<Store {store.path}: 2 images, {recipe.backbone} with weights {recipe.weights_source}>"
    )
    assert repr(store) == shown
    (store.path / "embeddings" / name).write_bytes(b"PAR1")
    assert repr(store) == shown.replace("2 images", "not all of which can be read")


def test_an_address_opens_a_store_from_any_folder(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.path.parent)
    address = Store(store.path.name).address
    monkeypatch.chdir("/")
    assert str(Store(address)) == str(store)


def test_the_size_of_each_file_is_known(store: Store) -> None:
    name = write(store, ["a"], ["b"])
    files = [f"embeddings/{name}", f"failures/{name}"]
    assert store.file_sizes() == {f: len((store.path / f).read_bytes()) for f in files}


def test_reading_an_empty_store_says_so(store: Store) -> None:
    with pytest.raises(StoreError, match="no rows yet"):
        store.vectors()
    assert len(store.ids()) == 0
    assert store.failures().num_rows == 0


@pytest.mark.parametrize("read", [Store.ids, Store.index, Store.__len__])
def test_a_damaged_shard_is_named_with_what_to_do(
    store: Store, read: Callable[[Store], Any]
) -> None:
    name = write(store, ["a", "b"])
    path = store.path / "embeddings" / name
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(StoreError, match=rf"{name} is damaged.*--repair"):
        read(store)


def test_a_flipped_bit_is_noticed(store: Store) -> None:
    name = write(store, [f"image-{number}" for number in range(50)])
    path = store.path / "embeddings" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 8] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        store.table()


def test_index_tells_each_rows_shard(store: Store) -> None:
    first, second = write(store, ["a", "b"]), write(store, ["c"])
    index = store.index()
    shards = dict(zip(index["image_id"].to_pylist(), index["shard"].to_pylist(), strict=True))
    assert shards == {"a": first, "b": first, "c": second}


def test_index_has_every_column_of_a_manifest_whatever_its_name(store: Store) -> None:
    extras = {"label": ["x", "y"], "label.fine": [1, 2], "bytes.old": [3, 4], "tags": [["t"], []]}
    vectors = np.zeros((2, DIM), np.float32)
    store.write_shard(
        rows_of(store.recipe, ["a", "b"], vectors, extras), make_failures([]), "0.parquet"
    )
    index = store.index()
    assert index.column_names == ["image_id", "bytes", "modified", *extras, "shard"]
    assert index.select(list(extras)).to_pydict() == extras


def test_dropping_rows_keeps_the_others_and_their_vectors(store: Store) -> None:
    name = write(store, ["a", "b", "c"])
    store.drop([("b", name)])
    assert dict(zip(store.ids(), store.vectors()[:, 0], strict=True)) == {"a": 0, "c": 2}


def test_a_shard_without_rows_leaves_no_file(store: Store) -> None:
    name = write(store, ["a"], ["b"])
    store.drop([("b", name)], FAILURES)
    assert store.shards(FAILURES) == []
    store.drop([("a", name)])
    assert store.shards() == []


def test_a_failed_write_leaves_nothing_behind(store: Store) -> None:
    """A limit on the size of files stands in for a full disk: the same call fails."""
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.store.test_store import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store({str(store.path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write(store, [f"image-{{number}}" for number in range(200)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "StoreError" in done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert list((store.path / "embeddings").iterdir()) == []


def test_leftovers_of_dead_processes_are_removed_and_those_of_living_ones_kept(
    store: Store,
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = store.path / "embeddings"
    left = folder / f".a.parquet.{socket.gethostname()}.{dead.pid}.tmp"
    alive = folder / f".b.parquet.{socket.gethostname()}.{os.getpid()}.tmp"
    elsewhere = folder / f".c.parquet.another-host.{dead.pid}.tmp"
    for path in (left, alive, elsewhere):
        path.touch()
    Store.open_or_create(store.path, store.recipe, {})
    assert sorted(folder.iterdir()) == [alive, elsewhere]


def test_shard_names_depend_on_recipe_and_refs_alone(mean_colour_recipe: Recipe) -> None:
    name = shard_name(mean_colour_recipe, ["a", "b"])
    assert name == shard_name(mean_colour_recipe, ["a", "b"])
    other = mean_colour_recipe.model_copy(update={"pooling": "max"})
    names = {name, shard_name(mean_colour_recipe, ["ab"]), shard_name(other, ["a", "b"])}
    assert len(names) == 3
