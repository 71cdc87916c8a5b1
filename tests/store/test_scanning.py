"""Reading a store shard by shard: the rows asked for, in order, and no more."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedder.columns import VIEW
from embedder.errors import RequestError, StoreError
from embedder.recipe import Recipe
from embedder.store.scanning import scan, shard_groups, shuffled_batches
from embedder.store.schema import FAILURE_SCHEMA
from embedder.store.shard_file import vectors_of
from embedder.store.store import Store
from tests.support import ANIMALS, rows_of

IMAGES = [f"{n:02d}" for n in range(30)]
LABELS = {image: ANIMALS[n // 10] for n, image in enumerate(IMAGES)}


@pytest.fixture
def store(tmp_path: Path, mean_colour_recipe: Recipe) -> Store:
    """Thirty images in three shards, each of one animal, as an archive in folders has them."""
    return store_of(tmp_path / "features", mean_colour_recipe, 1)


@pytest.fixture
def views(tmp_path: Path, mean_colour_recipe: Recipe) -> Store:
    """The same with three views: image 0 has the values 0, 1, 2, image 1 has 3, 4, 5, ..."""
    return store_of(tmp_path / "views", mean_colour_recipe, 3)


def store_of(folder: Path, recipe: Recipe, num_views: int) -> Store:
    store = Store.open_or_create(folder, recipe.model_copy(update={"views": num_views}), {})
    for number, ids in enumerate(np.split(np.repeat(IMAGES, num_views), 3)):
        values = np.arange(len(ids), dtype=np.float32) + number * len(ids)
        rows = rows_of(recipe, ids.tolist(), values[:, None]).replace_schema_metadata(None)
        if num_views > 1:
            numbers = np.tile(np.arange(num_views, dtype=np.int16), 10)
            rows = rows.add_column(1, VIEW, [numbers])
        store.write_shard(rows, FAILURE_SCHEMA.empty_table(), f"{number}.parquet")
    return store


def values(store: Store, **options: Any) -> list[list[float]]:
    """First value of the vectors of each shard."""
    tables = scan(store, ["embedding"], **options)
    return [vectors_of(table["embedding"])[:, 0].tolist() for table in tables]


def test_a_view_is_a_row_an_image_and_all_views_are_as_many(views: Store) -> None:
    assert values(views)[1] == [*range(30, 60, 3)]
    assert values(views, view=2)[0] == [*range(2, 30, 3)]
    assert values(views, view=None) == [[*range(n, n + 30)] for n in (0, 30, 60)]
    with pytest.raises(RequestError, match="views, 0 to 2, or None for all. Received: view=3"):
        values(views, view=3)


def test_of_some_images_come_their_rows_from_their_shards(store: Store, views: Store) -> None:
    some = np.array([2, 9, 20])
    assert values(store, images=some) == [[2, 9], [20]]
    assert values(views, view=1, images=some) == [[7, 28], [61]]
    assert values(views, view=None, images=some) == [[6, 7, 8, 27, 28, 29], [60, 61, 62]]
    shards = ["2.parquet", "0.parquet"]
    assert values(store, images=np.array([1, 10]), shards=shards) == [[21], [0]]
    assert values(store, images=some[:0]) == []


def test_nothing_is_read_but_what_is_asked_for(
    views: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, read_shard = [], Store.read_shard

    def seen(store: Store, name: str, *, columns: list[str]) -> Any:
        reads.append((name, columns))
        return read_shard(store, name, columns=columns)

    monkeypatch.setattr(Store, "read_shard", seen)
    (table,) = scan(views, ["sha256", "image_id"], images=np.array([10]))
    assert table.column_names == ["sha256", "image_id"]
    assert list(scan(views, ["embedding"], view=None, shards=["2.parquet"]))
    assert reads == [("1.parquet", ["sha256", "image_id", VIEW]), ("2.parquet", ["embedding"])]
    with pytest.raises(StoreError, match="has no column colour"):
        next(scan(views, ["colour"]))


def test_groups_of_shards_have_so_many_rows_but_for_the_last(store: Store, views: Store) -> None:
    names = store.shard_names()
    assert list(shard_groups(store, 15)) == [(names[:2], slice(0, 20)), (names[2:], slice(20, 30))]
    assert [rows for _, rows in shard_groups(views, 60)] == [slice(0, 60), slice(60, 90)]


# Batches. ----------------------------------------------------------------------------------


def batches_of(
    store: Store, labels: Any, batch_size: int, seed: int
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    return list(shuffled_batches(store, labels, batch_size, np.random.default_rng(seed)))


def test_an_epoch_gives_each_labelled_image_once(store: Store) -> None:
    labels = {image: int(image) for image in IMAGES if image > "04"}
    epochs = []
    for epoch in range(2):
        batches = batches_of(store, labels, 4, epoch)
        assert [len(batch) for _, batch in batches] == [4] * 6 + [1]
        numbers = np.concatenate([batch for _, batch in batches])
        assert sorted(numbers) == [*range(5, 30)]
        vectors = np.concatenate([vectors for vectors, _ in batches])
        assert vectors[:, 0].tolist() == numbers.tolist()
        epochs.append(numbers.tolist())
    assert epochs[0] != epochs[1]


def test_images_of_several_shards_are_mixed(store: Store) -> None:
    assert [len(set(animals)) for _, animals in batches_of(store, LABELS, 10, 0)] == [3, 3, 3]


def test_an_epoch_of_a_store_of_views_gives_one_view_of_each_image(views: Store) -> None:
    labels, seen = {"00": 0, "01": 1, "13": 13}, set()
    for epoch in range(20):
        (batch,) = batches_of(views, labels, 8, epoch)
        assert sorted(batch[1].tolist()) == [0, 1, 13]
        assert (batch[0][:, 0] // 3 == batch[1]).all()
        seen |= set(batch[0][:, 0].tolist())
    assert seen == {0, 1, 2, 3, 4, 5, 39, 40, 41}


def test_a_feature_that_the_store_lacks_is_refused(store: Store) -> None:
    with pytest.raises(RequestError, match="`column` must be .*: embedding. Received: top"):
        next(shuffled_batches(store, LABELS, 4, np.random.default_rng(0), column="top"))
