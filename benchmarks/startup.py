"""Seconds from the command to the first shard, on few images: what a user waits for at the least.

Each round starts `embedder extract --limit N` in a process of its own, on a new store, and notes
when the first file appears in its `embeddings` folder. The first of all, which exports the
network, is printed apart.

    python benchmarks/startup.py SOURCE --images 32 --rounds 5
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

POLL_SECONDS = 0.005


def start(source: str, store: Path, num_images: int, cache: Path) -> tuple[float, float]:
    """Seconds to the first shard, and to the end of the command."""
    command = [sys.executable, "-m", "embedder", "extract", source, str(store), "--quiet"]
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--limit", str(num_images)],
        env={**os.environ, "EMBEDDER_CACHE": str(cache)},
    )
    first = None
    while process.poll() is None:
        if first is None and any((store / "embeddings").glob("*.parquet")):
            first = time.perf_counter() - begin
        time.sleep(POLL_SECONDS)
    end = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return first or end, end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="folder of images")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        stores = (Path(scratch) / f"store-{number}" for number in range(options.rounds + 1))
        cache = Path(scratch) / "cache"
        times = [start(options.source, store, options.images, cache) for store in stores]
    for name, measured in (("not cached", times[:1]), ("cached", times[1:])):
        for what, values in zip(
            ("first shard", "whole command"), zip(*measured, strict=True), strict=True
        ):
            print(
                f"{name}, {what}: median {statistics.median(values):.2f} s "
                f"({min(values):.2f} to {max(values):.2f})"
            )


if __name__ == "__main__":
    main()
