"""Rows whose file looks changed: keep those whose bytes are the same, drop the others.

A copied or unpacked archive has new times of change and old content. Reading and hashing it is
all that such files cost: their vectors are kept.
"""

import hashlib
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

from embedder.errors import ReadError
from embedder.pipeline import Stopped
from embedder.sources import read_bytes
from embedder.store import Store, extra_columns


def refresh_shard(
    store: Store, name: str, stale: pa.Table, is_stopped: Callable[[], bool]
) -> list[str]:
    """Bring a shard's stale rows up to date, or drop them.

    Args:
        store: The store.
        name: File name of the shard.
        stale: Part of `Plan.stale` that this shard holds.
        is_stopped: Asked before each file; once true, the shard is left as it is.

    Returns:
        Ids of the rows dropped: their files hold other bytes now, or cannot be read.

    Raises:
        Stopped: `is_stopped` said so.
        StoreError: The shard cannot be read or written.
    """
    table = store.read_shard(name)
    positions = pc.index_in(stale["image_id"], table["image_id"].combine_chunks())
    stored_hashes = table["sha256"].take(positions).to_pylist()
    changed_ids = []
    for ref, stored_hash in zip(
        stale.select(["image_id", "path", "same_file"]).to_pylist(), stored_hashes, strict=True
    ):
        if is_stopped():
            raise Stopped(f"stopped while shard {name} was being compared")
        if not ref["same_file"] and hash_of(ref["path"]) != stored_hash:
            changed_ids.append(ref["image_id"])
    keep = pc.invert(pc.is_in(table["image_id"], pa.array(changed_ids, pa.string())))
    store.replace_shard(name, _with_columns_of(stale, table, store).filter(keep))
    return changed_ids


def hash_of(path: bytes) -> str | None:
    """sha256 of the bytes behind a ref's path, or None where they cannot be read."""
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except ReadError:
        return None


def _with_columns_of(refs: pa.Table, table: pa.Table, store: Store) -> pa.Table:
    """Take `modified` and a manifest's columns from the refs; other rows keep what they have."""
    row_of = pc.index_in(table["image_id"], refs["image_id"].combine_chunks())
    is_stale = pc.is_valid(row_of)
    columns = {f.name: (f, table[f.name]) for f in table.schema}
    last = {name: columns.pop(name) for name in store.recipe.columns}
    for name in store.extra_columns(columns):
        del columns[name]
    for name in ["modified", *extra_columns(refs.drop_columns(["same_file"]).column_names)]:
        field = refs.schema.field(name)
        ours = refs[name].take(row_of)
        theirs = pa.nulls(len(table), field.type)
        if name in table.column_names and table.schema.field(name).type == field.type:
            theirs = table[name]
        columns[name] = field, pc.if_else(is_stale, ours, theirs)
    fields, arrays = zip(*columns.values(), *last.values(), strict=True)
    return pa.table(list(arrays), schema=pa.schema(fields, metadata=table.schema.metadata))
