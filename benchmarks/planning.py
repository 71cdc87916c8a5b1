"""Seconds and memory of planning a run over an archive whose images are all done.

For each size a store is written, as a run would have (1,024 rows a shard, but vectors of 8
values, which planning never reads), and a listing that matches it. Then one new process does
what `embedder extract` does between listing and embedding: look for repeated rows, compare the
listing with the store, look again. Nothing may be left to do.

    python benchmarks/planning.py --refs 100000 300000 1000000
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedder.columns import EMBEDDING
from embedder.extraction.options import DEFAULT_SHARD_SIZE
from embedder.extraction.plan import drop_repeated, make_plan
from embedder.recipe import Recipe
from embedder.sources.refs import REF_SCHEMA
from embedder.store import Store
from embedder.store.schema import row_schema
from embedder.store.shard_file import vector_array

DIM = 8


def make_listing(num_refs: int) -> pa.Table:
    """Refs as `list_images` gives them."""
    ids = [f"folder{number // 1000:05d}/image{number:08d}.jpg" for number in range(num_refs)]
    paths = [f"/archive/{image_id}".encode() for image_id in ids]
    sizes = np.arange(num_refs) % 100_000 + 10_000
    modified = pa.array(np.arange(num_refs) + 1_700_000_000_000_000, pa.int64())
    columns = {"image_id": ids, "path": paths, "bytes": sizes, "modified": modified}
    return pa.table(
        [pa.array(columns[field.name]).cast(field.type) for field in REF_SCHEMA], REF_SCHEMA
    )


def write_store(path: Path, refs: pa.Table, vectors: NDArray[np.float32]) -> None:
    """Write vectors (n_refs, dim) in shards, as a run over these refs would."""
    recipe = Recipe(backbone="synthetic", weights="0" * 64, image_size=(224, 224))
    store = Store.open_or_create(path, recipe, {})
    schema = row_schema(recipe, {EMBEDDING: vector_array(vectors[:1]).type})
    for number, start in enumerate(range(0, refs.num_rows, DEFAULT_SHARD_SIZE)):
        part = refs.slice(start, DEFAULT_SHARD_SIZE)
        size = part.num_rows
        columns = [part["image_id"], ["0" * 64] * size, part["bytes"], [500] * size, [375] * size]
        columns += [["JPEG"] * size, part["modified"]]
        columns.append(vector_array(vectors[start : start + size]))
        store.write_shard(pa.table(columns, schema=schema), pa.table({}), f"{number:020x}.parquet")


def plan_again(path: Path) -> None:
    """Plan a run in this process, and print what it took."""
    refs = make_listing(len(Store(path)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store = Store(path)
    times = [time.perf_counter()]
    drop_repeated(store, refs)
    times.append(time.perf_counter())
    plan = make_plan(refs, store)
    times.append(time.perf_counter())
    drop_repeated(store, refs)
    times.append(time.perf_counter())
    if plan.missing.num_rows or plan.stale.num_rows or plan.num_done != refs.num_rows:
        raise SystemExit("the plan should be empty: the store holds the whole listing")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"parts": np.diff(times).tolist(), "listing": before, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--refs", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)  # in a child process
    options = parser.parse_args()
    if options.plan:
        plan_again(options.plan)
        return
    first = None
    for num_refs in options.refs:
        with tempfile.TemporaryDirectory() as scratch:
            store = Path(scratch) / "store"
            vectors = np.zeros((num_refs, DIM), np.float32)
            write_store(store, make_listing(num_refs), vectors)
            command = [sys.executable, __file__, "--plan", str(store)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        measured = json.loads(done.stdout)
        seconds = sum(measured["parts"])
        first = first or seconds
        parts = ", ".join(f"{part:.2f}" for part in measured["parts"])
        print(
            f"{num_refs:>9,} refs: {seconds:6.2f} s (repeated, plan, repeated: {parts}), "
            f"ratio {seconds / first:5.2f}; peak {measured['peak'] / 1024:,.0f} MiB, "
            f"of which {measured['listing'] / 1024:,.0f} before planning"
        )


if __name__ == "__main__":
    main()
