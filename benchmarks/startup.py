"""Seconds from the command to the first shard, on few images: what a user waits for at the least.

Each round starts `embedder extract --limit N` in a process of its own, on a new store, and notes
when the first file appears in its `embeddings` folder. The first of all, which exports the
network and compiles it, is printed apart. Another checkout is measured in turn with this, `now`:

    python benchmarks/startup.py SOURCE --images 32 --rounds 5 --before CHECKOUT
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runs import add_arguments, environment_of, packages_of, print_table, ratios, spread

POLL_SECONDS = 0.005


def start(package: Path, source: str, store: Path, *options: str) -> tuple[float, float]:
    """Seconds to the first shard, and to the end of the command; its cache is beside the store."""
    command = [sys.executable, "-m", "embedder", "extract", source, str(store), "--quiet"]
    environment = environment_of(package, {"EMBEDDER_CACHE": str(store.parent / "cache")})
    begin = time.perf_counter()
    process = subprocess.Popen([*command, *options], env=environment, cwd=store.parent)
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
    parser.add_argument("--engine", default="auto", help="as in extract")
    add_arguments(parser, rounds=5)
    options = parser.parse_args()
    packages = packages_of(options.before)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in packages}
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, package) in itertools.product(
            range(options.rounds + 1), packages.items()
        ):
            store = Path(scratch) / name / f"store-{number}"
            store.parent.mkdir(exist_ok=True)
            source = str(Path(options.source).resolve())
            chosen = "--limit", str(options.images), "--engine", options.engine
            times[name].append(start(package, source, store, *chosen))
    rows = []
    for network, part in (("not cached", slice(1)), ("cached", slice(1, None))):
        for name, measured in times.items():
            of_first = times[next(iter(times))][part]
            row = [network, name]
            for values, bases in zip(
                zip(*measured[part], strict=True), zip(*of_first, strict=True), strict=True
            ):
                row += [spread(values, ".2f"), ratios(values, bases)]
            rows.append(row)
    print_table(("network", "", "first shard, s", "ratio", "whole command, s", "ratio"), rows)


if __name__ == "__main__":
    main()
