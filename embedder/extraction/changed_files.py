"""Rows whose file looks changed: which hold the same bytes, which others, which cannot be read.

A copied or unpacked archive has new times of change and old content. Reading and hashing it is
all that such files cost: their vectors are kept. A row whose file holds other bytes stays until
the new vector is written, and one whose file cannot be read stays.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedder.columns import extra_columns
from embedder.errors import ReadError
from embedder.extraction.decoders import DEFAULT_FEEDING, Feeding
from embedder.extraction.shard import Stopped
from embedder.sources import ByteBudget, is_local, sha256_of
from embedder.store import Store, own_fields, rewriting

# Of images behind URLs, which are whole in memory while they are read and hashed; local files
# never are.
_MAX_BYTES = 256 * 2**20
_POLL_SECONDS = 0.2


@dataclass
class Refreshed:
    """What the files of a shard's stale rows hold.

    Attributes:
        replaced: sha256 of the rows whose files hold other bytes now, by id.
        num_same: Rows whose files hold what they held.
        unreadable: Number of rows whose files cannot be read, by (stage, error).
    """

    replaced: dict[str, str] = field(default_factory=dict)
    num_same: int = 0
    unreadable: Counter[tuple[str, str]] = field(default_factory=Counter)


def refresh_shard(
    store: Store,
    name: str,
    stale: pa.Table,
    is_stopped: Callable[[], bool],
    num_threads: int,
    feeding: Feeding = DEFAULT_FEEDING,
) -> Refreshed:
    """Read the files of a shard's stale rows, and bring up to date what needs no new vector.

    Rows take a manifest's columns from their refs; those whose files hold the same bytes take the
    time of change too.

    Args:
        store: The store.
        name: File name of the shard.
        stale: Part of `Plan.stale` that this shard holds.
        is_stopped: Asked again and again; once true, the shard is left as it is.
        num_threads: Local files that are read at once: as many as the worker has cores.
        feeding: How many files behind URLs are read at once, and where redirects may lead.

    Raises:
        Stopped: `is_stopped` said so.
        StoreError: The shard cannot be read or written.
    """
    table = store.read_shard(name, columns=["image_id", "sha256"])
    positions = pc.index_in(stale["image_id"], table["image_id"].combine_chunks())
    stored_hashes = table["sha256"].take(positions).to_pylist()
    found = Refreshed()
    is_same = np.ones(stale.num_rows, bool)
    refs = stale.select(["image_id", "path", "same_file"]).to_pylist()
    with _hashing(refs, num_threads, feeding) as hashes:
        for number, stored_hash in enumerate(stored_hashes):
            if (reading := hashes[number]) is None:
                continue
            while not is_stopped() and not wait([reading], _POLL_SECONDS).done:
                pass
            if is_stopped():
                raise Stopped(f"stopped while shard {name} was being compared")
            try:
                is_same[number] = reading.result() == stored_hash
            except ReadError as error:
                is_same[number] = False
                found.unreadable["read", str(error)] += 1
            else:
                if not is_same[number]:
                    found.replaced[refs[number]["image_id"]] = stored_hash
    with rewriting(store.path):
        table = store.read_shard(name)
        refreshed = _with_columns_of(stale, pa.array(is_same), table, store)
        if not refreshed.equals(table):
            store.replace_shard(name, refreshed)
    found.num_same = int(is_same.sum())
    return found


@contextmanager
def _hashing(
    refs: list[dict[str, Any]], num_threads: int, feeding: Feeding
) -> Iterator[list["Future[str] | None"]]:
    """Hash the files of refs in threads; None for those that are known to be the same.

    What is still being read at the end is not waited for.
    """
    local, remote = ThreadPoolExecutor(num_threads), ThreadPoolExecutor(feeding.read_ahead)
    budget = ByteBudget(_MAX_BYTES)

    def hash_remote(path: bytes) -> str:
        claim = budget.claim()
        try:
            return sha256_of(path, allow_private=feeding.allow_private, claim=claim.need)
        finally:
            claim.release()

    def hashed(ref: dict[str, Any]) -> "Future[str] | None":
        if ref["same_file"]:
            return None
        path = ref["path"]
        return local.submit(sha256_of, path) if is_local(path) else remote.submit(hash_remote, path)

    try:
        yield [hashed(ref) for ref in refs]
    finally:
        for threads in (local, remote):
            threads.shutdown(wait=False, cancel_futures=True)


def _with_columns_of(
    refs: pa.Table, is_same: pa.BooleanArray, table: pa.Table, store: Store
) -> pa.Table:
    """Take a manifest's columns from the refs, and `modified` of those that are the same."""
    ref_of = pc.index_in(table["image_id"], refs["image_id"].combine_chunks())
    same_of = pc.if_else(is_same.take(ref_of), ref_of, None)
    modified = _merged(refs["modified"], same_of, table["modified"])
    place = table.column_names.index("modified")
    updated = table.set_column(place, table.schema.field("modified"), modified)
    updated = updated.select([field.name for field in own_fields(store.recipe)])
    for name in extra_columns(refs.column_names):
        field = refs.schema.field(name)
        theirs = pa.nulls(len(table), field.type)
        if name in table.column_names and table.schema.field(name).type == field.type:
            theirs = table[name]
        updated = updated.append_column(field, _merged(refs[name], ref_of, theirs))
    for name in store.recipe.columns:
        updated = updated.append_column(table.schema.field(name), table[name])
    return updated


def _merged(ours: pa.ChunkedArray, place: pa.ChunkedArray, theirs: pa.Array) -> pa.ChunkedArray:
    """Values of `ours` at places that are given, and of `theirs` where none is, of any type."""
    chunks = theirs.chunks if isinstance(theirs, pa.ChunkedArray) else [theirs]
    both = pa.chunked_array([*ours.chunks, *chunks], ours.type)
    own = pa.array(np.arange(len(theirs)) + len(ours), pa.int32())
    return both.take(pc.if_else(pc.is_valid(place), place, own))
