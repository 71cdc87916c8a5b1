"""The plan: the listing minus the store."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from embedder.extraction.plan import Plan, drop_repeated, make_plan
from embedder.recipe import Recipe
from embedder.sources.refs import REF_SCHEMA
from embedder.store.schema import FAILURES
from embedder.store.store import Store
from tests.store.test_store import make_failures, make_rows


@pytest.fixture
def store(tmp_path: Path, mean_colour_recipe: Recipe) -> Store:
    """Rows `a`, `b`, and the failure `f`, all of 1 byte and unknown time of change."""
    store = Store.open_or_create(tmp_path / "features", mean_colour_recipe, {})
    store.write_shard(make_rows(store.recipe, ["a", "b"]), make_failures(["f"]), "x.parquet")
    return store


def listing(*ids: str, extras: dict[str, list[Any]] | None = None, **changes: Any) -> pa.Table:
    """Refs of files of 1 byte and unknown time of change, but for the changes."""
    row = {"path": b"/somewhere", "bytes": 1, "modified": None} | changes
    refs = pa.Table.from_pylist([{"image_id": i} | row for i in ids], schema=REF_SCHEMA)
    for name, values in (extras or {}).items():
        refs = refs.append_column(name, pa.array(values))
    return refs


def ids_of(table: pa.Table) -> list[str]:
    ids: list[str] = table["image_id"].to_pylist()
    return ids


def test_what_the_store_has_is_done(store: Store) -> None:
    plan = make_plan(listing("a", "b", "f"), store)
    assert (plan.num_done, plan.num_failed, plan.num_deleted) == (2, 1, 0)
    assert plan.missing.num_rows == plan.stale.num_rows == 0


def test_everything_is_missing_from_an_empty_store(
    tmp_path: Path, mean_colour_recipe: Recipe
) -> None:
    store = Store.open_or_create(tmp_path / "empty", mean_colour_recipe, {})
    plan = make_plan(listing("a", "b"), store)
    assert ids_of(plan.missing) == ["a", "b"]
    assert plan.num_done == 0


def test_new_images_are_missing(store: Store) -> None:
    assert ids_of(make_plan(listing("0", "a", "b", "c", "f"), store).missing) == ["0", "c"]


@pytest.mark.parametrize("change", [{"bytes": 2}, {"modified": datetime(2024, 1, 1, tzinfo=UTC)}])
def test_a_changed_file_makes_its_row_stale(store: Store, change: dict[str, Any]) -> None:
    plan = make_plan(pa.concat_tables([listing("a", **change), listing("b", "f")]), store)
    assert ids_of(plan.stale) == ["a"]
    assert plan.stale["shard"].to_pylist() == ["x.parquet"]
    assert plan.stale["same_file"].to_pylist() == [False]
    assert plan.num_done == 1


def test_new_manifest_columns_make_rows_stale_but_not_their_files(store: Store) -> None:
    plan = make_plan(listing("a", "b", "f", extras={"label": ["cat", "dog", "cat"]}), store)
    assert ids_of(plan.stale) == ["a", "b"]
    assert plan.stale["same_file"].to_pylist() == [True, True]


def test_nothing_is_known_of_a_url_so_its_row_stands(store: Store) -> None:
    plan = make_plan(listing("a", "b", "f", path=b"https://host/a", bytes=None), store)
    assert plan.num_done == 2


def test_a_file_that_vanished_from_under_a_manifest_is_stale(store: Store) -> None:
    plan = make_plan(listing("a", "b", "f", bytes=None), store)
    assert ids_of(plan.stale) == ["a", "b"]


def test_failures_stand_until_asked_or_changed(store: Store) -> None:
    assert make_plan(listing("f"), store).missing.num_rows == 0
    for plan in (
        make_plan(listing("f"), store, retry_failed=True),
        make_plan(listing("f", bytes=2), store),
    ):
        assert ids_of(plan.missing) == ["f"]
        assert plan.stale_failures == {"f": "x.parquet"}
        assert plan.num_failed == 0


def test_deleted_images_are_told_with_their_shards(store: Store) -> None:
    plan = make_plan(listing("b"), store)
    assert plan.deleted == {"a": "x.parquet"}
    assert plan.deleted_failures == {"f": "x.parquet"}
    assert plan.num_deleted == 2


def test_a_limit_deletes_nothing(store: Store) -> None:
    plan = make_plan(listing("a", "b", "c", "f"), store, limit=1)
    assert (plan.num_done, plan.num_deleted, plan.missing.num_rows) == (1, 0, 0)


def test_repeated_rows_are_dropped_and_the_first_shard_is_kept(store: Store) -> None:
    rows = make_rows(store.recipe, ["b", "c"], first=10)
    store.write_shard(rows, make_failures(["a", "g"]), "y.parquet")
    assert (
        drop_repeated(store, listing("a", "b", "c", "f", "g")) == 2
    )  # the row b in y, and the failure a that has a row
    vectors = dict(zip(store.ids(), store.vectors()[:, 0], strict=True))
    assert vectors == {"a": 0, "b": 1, "c": 11}
    assert sorted(store.index(FAILURES)["image_id"].to_pylist()) == ["f", "g"]
    assert drop_repeated(store, listing("a", "b", "c", "f", "g")) == 0


def test_every_image_is_in_one_place_of_the_plan(store: Store) -> None:
    refs = pa.concat_tables([listing("a", "new"), listing("b", "f", bytes=5)])
    plan: Plan = make_plan(refs, store)
    assert plan.num_done + plan.stale.num_rows + plan.missing.num_rows + plan.num_failed == 4
