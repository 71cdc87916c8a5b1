"""What is left to do: the listing minus the store."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedder.columns import PASSING, extra_columns
from embedder.sources import are_urls
from embedder.store import EMBEDDINGS, FAILURES, Part, Store, share_of


@dataclass(frozen=True)
class Plan:
    """What a run has to do so that the store becomes what one run over the listing would make.

    Attributes:
        missing: Refs that the store does not know, or whose failure is to be tried again.
        stale: Refs with rows whose size, time of change or manifest columns differ from the
            listing, with `shard` (the file that holds the row) and `same_file` (the size and the
            time of change are as before, so the bytes need not be read again).
        stale_failures: Shards of failures to be tried again, by id.
        deleted: Shards of rows that the listing no longer has, by id.
        deleted_failures: Shards of failures that the listing no longer has, by id.
        num_stored: Images that the store knows, as rows or as failures.
        num_done: Images whose row is as it should be.
        num_failed: Images whose failure stands.
    """

    missing: pa.Table
    stale: pa.Table
    stale_failures: dict[str, str]
    deleted: dict[str, str]
    deleted_failures: dict[str, str]
    num_stored: int
    num_done: int
    num_failed: int

    @property
    def num_deleted(self) -> int:
        """Number of images in the store that the listing no longer has."""
        return len(self.deleted) + len(self.deleted_failures)


def make_plan(
    refs: pa.Table,
    store: Store,
    *,
    part: Part | None = None,
    limit: int | None = None,
    retry_failed: bool = False,
) -> Plan:
    """Compare a listing with a store.

    Args:
        refs: Table of refs with unique ids; with a part, its own.
        store: Its ids are unique; see `drop_repeated`.
        part: Look at this part of the store only.
        limit: Look at the first so many refs only.
        retry_failed: Whether failures whose file has not changed are tried again, though what was
            in the way is not known to pass.
    """
    rows, failures = (share_of(store.index(kind), part) for kind in (EMBEDDINGS, FAILURES))
    wanted = refs if limit is None else refs.slice(0, limit)
    row_of = pc.index_in(wanted["image_id"], rows["image_id"].combine_chunks())
    failure_of = pc.index_in(wanted["image_id"], failures["image_id"].combine_chunks())
    has_row, has_failure = pc.is_valid(row_of), pc.is_valid(failure_of)

    with_row, its_row = wanted.filter(has_row), rows.take(row_of.drop_null())
    same_file = _same_file(with_row, its_row)
    same_row = pc.and_(same_file, _same_extras(with_row, its_row))
    stale = with_row.append_column("shard", its_row["shard"]).append_column("same_file", same_file)

    with_failure, its_failure = wanted.filter(has_failure), failures.take(failure_of.drop_null())
    stands = pc.and_(_same_file(with_failure, its_failure), pc.invert(its_failure[PASSING]))
    if retry_failed:
        stands = pc.and_(stands, False)
    is_retried = pc.invert(stands)
    neither = wanted.filter(pc.invert(pc.or_(has_row, has_failure)))

    return Plan(
        missing=pa.concat_tables([neither, with_failure.filter(is_retried)]).sort_by("image_id"),
        stale=stale.filter(pc.invert(same_row)),
        stale_failures=shards_by_id(its_failure.filter(is_retried)),
        deleted=shards_by_id(_without(rows, refs)),
        deleted_failures=shards_by_id(_without(failures, refs)),
        num_stored=rows.num_rows + failures.num_rows,
        num_done=pc.sum(same_row).as_py() or 0,
        num_failed=pc.sum(stands).as_py() or 0,
    )


# Repeated images. --------------------------------------------------------------------------


def drop_repeated(store: Store, refs: pa.Table, part: Part | None = None) -> int:
    """Keep one row of every image, and no failure of an image that has a row.

    A run that is killed between writing what became of a changed image and dropping its old row
    leaves both. What fits the listing is kept; of several that do, or where none does, a row
    before a failure, and then the first shard by name.

    Args:
        store: The store.
        refs: Table of refs with unique ids; with a part, its own.
        part: Drop of this part only.

    Returns:
        Number of rows and failures dropped.
    """
    found = pa.concat_tables(
        [_entries(share_of(store.index(kind), part), kind, refs) for kind in (EMBEDDINGS, FAILURES)]
    )
    counts = found["image_id"].combine_chunks().value_counts()
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(repeated) == 0:
        return 0
    again = found.filter(pc.is_in(found["image_id"], repeated))
    kept: set[str] = set()
    dropped: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for entry in again.sort_by([("rank", "ascending"), ("shard", "ascending")]).to_pylist():
        image_id = entry["image_id"]
        if image_id in kept:
            dropped[entry["kind"]].add((image_id, entry["shard"]))
        kept.add(image_id)
    for kind, images in dropped.items():
        store.drop(images, kind)
    return sum(map(len, dropped.values()))


def _entries(index: pa.Table, kind: str, refs: pa.Table) -> pa.Table:
    """Where each image is, and a rank, of which the least is kept."""
    ref_of = pc.index_in(index["image_id"], refs["image_id"].combine_chunks())
    fits = pc.and_(pc.is_valid(ref_of), _same_file(refs.take(ref_of), index))
    if kind == EMBEDDINGS:
        rank = pc.if_else(fits, 0, 2)
    else:
        # Only of bytes that were read can it be said that they are of no use.
        is_known = pc.and_(pc.is_valid(index["sha256"]), pc.invert(index[PASSING]))
        rank = pc.if_else(pc.and_(fits, is_known), 1, 3)
    columns = {
        "image_id": index["image_id"],
        "shard": index["shard"].cast(pa.string()),
        "kind": pa.repeat(kind, index.num_rows),
        "rank": rank,
    }
    return pa.table(columns)


def _same_file(refs: pa.Table, rows: pa.Table) -> pa.ChunkedArray:
    """Whether size and time of change are as they were; nothing is known of a URL's."""
    unknown = pc.and_(are_urls(refs), pc.is_null(refs["bytes"]))
    same = pc.and_(_equal(refs["bytes"], rows["bytes"]), _equal(refs["modified"], rows["modified"]))
    return pc.or_(unknown, same)


def _same_extras(refs: pa.Table, rows: pa.Table) -> pa.ChunkedArray:
    """Whether a manifest's columns hold what they held; they can be written without embedding."""
    same = pa.chunked_array([pa.array(np.ones(refs.num_rows, bool))])
    mine, theirs = (
        {name: table.schema.field(name).type for name in extra_columns(table.column_names)}
        for table in (refs, rows)
    )
    if mine != theirs:
        return pc.and_(same, False)
    for name in mine:
        same = pc.and_(same, _equal_values(refs[name], rows[name]))
    return same


def _equal(left: pa.ChunkedArray, right: pa.ChunkedArray) -> pa.ChunkedArray:
    """Equal, or both null."""
    both_null = pc.and_(pc.is_null(left), pc.is_null(right))
    return pc.or_(both_null, pc.fill_null(pc.equal(left, right), False))


def _equal_values(left: pa.ChunkedArray, right: pa.ChunkedArray) -> pa.ChunkedArray:
    """Equal in any type that a manifest can have; a NaN equals a NaN."""
    if pa.types.is_string(left.type) or pa.types.is_integer(left.type):
        return _equal(left, right)
    # Arrow does not compare lists, structs and float16; their texts are the same where they are.
    pairs = zip(left, right, strict=True)
    same = [repr(mine.as_py()) == repr(theirs.as_py()) for mine, theirs in pairs]
    return pa.chunked_array([pa.array(same, pa.bool_())])


def _without(index: pa.Table, refs: pa.Table) -> pa.Table:
    return index.filter(pc.invert(pc.is_in(index["image_id"], refs["image_id"])))


def shards_by_id(table: pa.Table) -> dict[str, str]:
    """The shard of each image, of a table that has `shard`."""
    return dict(zip(table["image_id"].to_pylist(), table["shard"].to_pylist(), strict=True))
