"""What Dask costs: two worker processes beside one, and its overhead on a shard.

First the same images are embedded by one process with all cores and by two with half of them
each, in turn, several rounds; `images_per_second` of the run's record, which leaves out starting
the processes. Then empty tasks with 2,048 refs each, as a shard's task has them, go to the same
workers and send back a receipt: that is Dask's own part of a shard, and its share of the
shard's time at the measured speed.

    python benchmarks/workers.py SOURCE --images 4096 --rounds 3
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from throughput import link_images

import embedder
from embedder.backbones import make_recipe
from embedder.extraction import cluster
from embedder.extraction.record import Receipt
from embedder.extraction.worker import Job
from embedder.sources import list_images

SHARD_SIZE = 2048
NUM_EMPTY_SHARDS = 100


def empty_shard(task: cluster.WorkerContext, _: Job, refs: pa.Table) -> Receipt:
    """A shard's task without its work; a shard of ten seconds would report twenty times."""
    for _report in range(20):
        task.report(0, 0)
    return Receipt("", num_embedded=refs.num_rows)


def overhead_seconds(folder: Path, num_workers: int) -> float:
    """Seconds of Dask per task, in a row on so many workers."""
    refs = list_images(folder).refs
    refs = pa.concat_tables([refs] * (SHARD_SIZE // refs.num_rows + 1)).slice(0, SHARD_SIZE)
    job = Job(make_recipe(), "store", "auto", None)
    tasks = ((job, refs.combine_chunks()) for _ in range(NUM_EMPTY_SHARDS))
    with cluster.connect(None, num_workers) as pool:
        results = pool.run(empty_shard, tasks, lambda *_: None)
        next(results)
        begin = time.perf_counter()
        num_rows = sum(receipt.num_embedded for receipt in results)
        seconds = time.perf_counter() - begin
    return seconds / (num_rows / SHARD_SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="folder of images")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shard-size", type=int, default=512)
    options = parser.parse_args()
    speeds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = link_images(options.source, Path(scratch) / "images", options.images)
        store = Path(scratch) / "store"
        run: dict[str, Any] = {"shard_size": options.shard_size, "batch_size": 8}
        embedder.extract(folder, store, limit=64, **run)  # a warm-up that is not counted
        for _ in range(options.rounds):
            for num_workers, values in speeds.items():
                shutil.rmtree(store)
                embedder.extract(folder, store, workers=num_workers, **run)
                values.append(embedder.Store(store).runs()[-1]["images_per_second"])
        overheads = {number: overhead_seconds(folder, number) for number in speeds}
    base = statistics.median(speeds[1])
    for num_workers, values in speeds.items():
        median = statistics.median(values)
        shard_seconds = SHARD_SIZE / median
        print(
            f"{num_workers} processes: median {median:6.1f} images/s "
            f"({min(values):.1f} to {max(values):.1f}), ratio {median / base:.3f}; "
            f"Dask takes {overheads[num_workers] * 1000:.1f} ms of a {SHARD_SIZE:,}-image shard's "
            f"{shard_seconds:.1f} s: {overheads[num_workers] / shard_seconds:.2%}"
        )


if __name__ == "__main__":
    main()
