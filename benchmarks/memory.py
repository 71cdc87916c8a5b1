"""Peak memory of a run as the archive grows: it should not grow with it.

python benchmarks/memory.py SOURCE --images 1000 5000
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from throughput import link_images


def peak_bytes(folder: Path, store: Path) -> int:
    """Largest resident memory of one `embedder extract`, all in one process."""
    command = [sys.executable, "-m", "embedder", "extract", str(folder), str(store), "--quiet"]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="folder of images")
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 5000])
    options = parser.parse_args()
    first = None
    with tempfile.TemporaryDirectory() as scratch:
        # Once before, so that no run pays for exporting the network.
        peak_bytes(link_images(options.source, Path(scratch) / "w", 32), Path(scratch) / "w-out")
        for number, count in enumerate(options.images):
            folder = link_images(options.source, Path(scratch) / f"in-{number}", count)
            peak = peak_bytes(folder, Path(scratch) / f"out-{number}")
            first = first or peak
            print(f"{count:>8,} images: peak {peak / 2**20:7.1f} MiB, ratio {peak / first:.3f}")


if __name__ == "__main__":
    main()
