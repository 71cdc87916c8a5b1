"""Seconds and memory of a ridge head on a store, in one pass over its shards.

For each size a store is written, as a run would have (1,024 rows a shard), of random float32
vectors about one centre for each class. Then one new process sums it up with 5 folds, chooses
alpha and solves. A second figure of each size is the share of the first shard's rows whose class
it finds. A second new process does all that `embedder train --head ridge --duplicates none` does,
read in parts whatever the size: labels, split, fit, calibration, test and metrics.

    python benchmarks/ridge.py --rows 100000 1000000 --dim 1280
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from planning import make_listing

import embedder
from embedder.columns import EMBEDDING
from embedder.extraction import connect
from embedder.extraction.options import DEFAULT_SHARD_SIZE
from embedder.heads import NUM_FOLDS, RidgeHead
from embedder.recipe import Recipe
from embedder.store import Store
from embedder.store.schema import row_schema
from embedder.store.shard_file import vector_array, vectors_of
from embedder.training import out_of_core
from embedder.training.ridge_pass import ridge_sums

NUM_CLASSES = 80


def codes_of(num_rows: int) -> NDArray[np.int64]:
    return np.arange(num_rows) % NUM_CLASSES


def write_store(path: Path, num_rows: int, dim: int) -> None:
    """Write random vectors shard by shard: all at once, a million would be 5 GB of memory."""
    recipe = Recipe(backbone="synthetic", weights="0" * 64, image_size=(224, 224))
    store = Store.open_or_create(path, recipe, {})
    random = np.random.default_rng(0)
    centres = random.standard_normal((NUM_CLASSES, dim), np.float32) / 4
    refs, codes = make_listing(num_rows), codes_of(num_rows)
    for number, start in enumerate(range(0, num_rows, DEFAULT_SHARD_SIZE)):
        part = refs.slice(start, DEFAULT_SHARD_SIZE)
        size = part.num_rows
        vectors = random.standard_normal((size, dim), np.float32)
        array = vector_array(vectors + centres[codes[start : start + size]])
        columns = [part["image_id"], ["0" * 64] * size, part["bytes"], [500] * size, [375] * size]
        kinds = [f"{code:02d}" for code in codes[start : start + size]]
        columns += [["JPEG"] * size, part["modified"], kinds, array]
        schema = row_schema(recipe, {EMBEDDING: array.type}, [pa.field("kind", pa.string())])
        store.write_shard(pa.table(columns, schema=schema), pa.table({}), f"{number:020x}.parquet")


def fit(path: Path, workers: int) -> None:
    """Fit a head in this process, and print what it took."""
    store = Store(path)
    codes = codes_of(len(store))
    folds = np.arange(len(codes)) // NUM_CLASSES % NUM_FOLDS
    before = peak_memory()
    times = [time.perf_counter()]
    with connect(None, workers) as pool:
        sums = ridge_sums(store, codes, NUM_CLASSES, folds, pool)
    times.append(time.perf_counter())
    head = RidgeHead().fit_sums(sums, np.arange(NUM_CLASSES))
    times.append(time.perf_counter())
    peak = peak_memory()
    of_workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    first = store.read_shard(store.shards()[0].name)[EMBEDDING].chunk(0)
    score = head.score(vectors_of(first), codes[: len(first)])
    print(
        json.dumps(
            {
                "parts": np.diff(times).tolist(),
                "before": before,
                "peak": peak,
                "of_workers": of_workers,
                "alpha": head.alpha_,
                "score": score,
            }
        )
    )


def train(path: Path) -> None:
    """Train and test a head in this process, as the command does, and print what it took."""
    out_of_core.IN_CORE_BYTES = 0
    before, start = peak_memory(), time.perf_counter()
    head = embedder.train(Store(path), "column:kind", "ridge", duplicates=None)
    seconds = [*head.seconds.values()]
    metrics = head.metrics()
    total = time.perf_counter() - start
    found = {"parts": [*seconds, total - sum(seconds)], "total": total, "before": before}
    found |= {"peak": peak_memory(), "score": metrics["test"]["accuracy"]}
    print(json.dumps(found | {"names": [*head.seconds, "metrics"]}))


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(*arguments: object) -> dict[str, Any]:
    """What a new process of this file prints."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=1280)
    parser.add_argument("--workers", type=int, default=1, help="1 works within one process")
    parser.add_argument("--fit", type=Path, help=argparse.SUPPRESS)  # in a child process
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)  # in a child process
    options = parser.parse_args()
    if options.fit:
        fit(options.fit, options.workers)
        return
    if options.train:
        train(options.train)
        return
    for num_rows in options.rows:
        with tempfile.TemporaryDirectory() as scratch:
            store = Path(scratch) / "store"
            write_store(store, num_rows, options.dim)
            found = run("--fit", store, "--workers", options.workers)
            trained = run("--train", store)
        summing, solving = found["parts"]
        of_workers = f", largest worker {found['of_workers'] / 1024:,.0f} MiB"
        of_workers = of_workers if options.workers > 1 else ""
        print(
            f"{num_rows:>9,} rows: {summing + solving:6.1f} s (sums {summing:.1f}, alpha and "
            f"solution {solving:.1f}); peak {found['peak'] / 1024:,.0f} MiB, of which "
            f"{found['before'] / 1024:,.0f} before{of_workers}; alpha {found['alpha']:g}, "
            f"{found['score']:.3f} right"
        )
        pairs = zip(trained["names"], trained["parts"], strict=True)
        steps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in pairs)
        print(
            f"          train: {trained['total']:6.1f} s ({steps}); peak "
            f"{trained['peak'] / 1024:,.0f} MiB, of which {trained['before'] / 1024:,.0f} before; "
            f"{trained['score']:.3f} of the test rows right"
        )


if __name__ == "__main__":
    main()
