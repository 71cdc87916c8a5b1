"""What is left to do: the listing minus the store."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedder.store import EMBEDDINGS, FAILURES, Store, extra_columns


@dataclass(frozen=True)
class Plan:
    """What a run has to do so that the store becomes what one run over the listing would make.

    Attributes:
        missing: Refs that the store does not know, or whose failure is to be tried again.
        stale: Refs with rows whose size, time of change or manifest columns differ from the
            listing, with `shard` (the file that holds the row) and `same_file` (the size and the
            time of change are as before, so the bytes need not be read again).
        stale_failures: Ids of failures to be tried again, by shard.
        deleted: Ids of rows that the listing no longer has, by shard.
        deleted_failures: Ids of failures that the listing no longer has, by shard.
        num_done: Images whose row is as it should be.
        num_failed: Images whose failure stands.
    """

    missing: pa.Table
    stale: pa.Table
    stale_failures: dict[str, list[str]]
    deleted: dict[str, list[str]]
    deleted_failures: dict[str, list[str]]
    num_done: int
    num_failed: int

    @property
    def num_deleted(self) -> int:
        """Number of images in the store that the listing no longer has."""
        return sum(map(len, [*self.deleted.values(), *self.deleted_failures.values()]))


def make_plan(
    refs: pa.Table, store: Store, *, limit: int | None = None, retry_failed: bool = False
) -> Plan:
    """Compare a listing with a store.

    Args:
        refs: Table of refs with unique ids.
        store: Its ids are unique; see `drop_repeated`.
        limit: Look at the first so many refs only.
        retry_failed: Whether failures whose file has not changed are tried again.
    """
    rows, failures = store.index(), store.index(FAILURES)
    wanted = refs if limit is None else refs.slice(0, limit)
    row_of = pc.index_in(wanted["image_id"], rows["image_id"].combine_chunks())
    failure_of = pc.index_in(wanted["image_id"], failures["image_id"].combine_chunks())
    has_row, has_failure = pc.is_valid(row_of), pc.is_valid(failure_of)

    with_row, its_row = wanted.filter(has_row), rows.take(row_of.drop_null())
    same_file = _same_file(with_row, its_row)
    same_row = pc.and_(same_file, _same_extras(with_row, its_row))
    stale = with_row.append_column("shard", its_row["shard"]).append_column("same_file", same_file)

    with_failure, its_failure = wanted.filter(has_failure), failures.take(failure_of.drop_null())
    stands = _same_file(with_failure, its_failure)
    if retry_failed:
        stands = pc.and_(stands, False)
    retried = with_failure.filter(pc.invert(stands))
    neither = wanted.filter(pc.invert(pc.or_(has_row, has_failure)))

    return Plan(
        missing=pa.concat_tables([neither, retried]).sort_by("image_id"),
        stale=stale.filter(pc.invert(same_row)),
        stale_failures=_by_shard(its_failure.filter(pc.invert(stands))),
        deleted=_by_shard(_without(rows, refs)),
        deleted_failures=_by_shard(_without(failures, refs)),
        num_done=pc.sum(same_row).as_py() or 0,
        num_failed=pc.sum(stands).as_py() or 0,
    )


def drop_repeated(store: Store) -> int:
    """Keep one row of every image, and no failure of an image that has a row.

    Nothing of the kind is written by one run. Runs at the same time can, when their listings or
    shard sizes differ; the first shard by name is kept, so that all of them keep the same.

    Returns:
        Number of rows and failures dropped.
    """
    num_dropped = 0
    taken = pa.array([], pa.string())
    for kind in (EMBEDDINGS, FAILURES):
        index = store.index(kind)
        ids = index["image_id"].combine_chunks()
        repeated = pc.is_in(ids, taken)
        if pc.count_distinct(ids).as_py() < len(ids):
            codes = ids.dictionary_encode().indices.to_numpy()
            is_first = np.zeros(len(ids), bool)
            is_first[np.unique(codes, return_index=True)[1]] = True
            repeated = pc.or_(repeated, pa.array(~is_first))
        if num_repeated := pc.sum(repeated).as_py():
            store.drop(_by_shard(index.filter(repeated)), kind)
            num_dropped += num_repeated
        taken = ids
    return num_dropped


def _same_file(refs: pa.Table, rows: pa.Table) -> pa.ChunkedArray:
    """Whether size and time of change are as they were; nothing is known of a URL's."""
    is_url = pc.match_substring(refs["path"], "://")
    unknown = pc.and_(is_url, pc.is_null(refs["bytes"]))
    same = pc.and_(_equal(refs["bytes"], rows["bytes"]), _equal(refs["modified"], rows["modified"]))
    return pc.or_(unknown, same)


def _same_extras(refs: pa.Table, rows: pa.Table) -> pa.ChunkedArray:
    """Whether a manifest's columns hold what they held; they can be written without embedding."""
    same = pa.chunked_array([pa.array(np.ones(refs.num_rows, bool))])
    mine, theirs = extra_columns(refs.column_names), extra_columns(rows.column_names)
    if {n: refs.schema.field(n).type for n in mine} != {
        n: rows.schema.field(n).type for n in theirs
    }:
        return pc.and_(same, False)
    for name in mine:
        same = pc.and_(same, _equal(refs[name], rows[name]))
    return same


def _equal(left: pa.ChunkedArray, right: pa.ChunkedArray) -> pa.ChunkedArray:
    """Equal, or both null."""
    both_null = pc.and_(pc.is_null(left), pc.is_null(right))
    return pc.or_(both_null, pc.fill_null(pc.equal(left, right), False))


def _without(index: pa.Table, refs: pa.Table) -> pa.Table:
    return index.filter(pc.invert(pc.is_in(index["image_id"], refs["image_id"])))


def _by_shard(index: pa.Table) -> dict[str, list[str]]:
    if index.num_rows == 0:
        return {}
    grouped = (
        index.select(["shard", "image_id"]).group_by("shard").aggregate([("image_id", "list")])
    )
    return dict(
        zip(grouped["shard"].to_pylist(), grouped["image_id_list"].to_pylist(), strict=True)
    )
