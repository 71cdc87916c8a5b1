"""Near-duplicates: how many, and how large the groups, by threshold; recall, seconds and memory.

First of stores that are given, then of random vectors of no structure, the worst for inverted
lists, a twentieth of them changed copies at a cosine of 0.9 to 0.99.

    python benchmarks/neighbours.py --stores grocery-store demo-store --rows 100000
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedder.neighbours import near_duplicate_groups
from embedder.store import Store

THRESHOLDS = (0.98, 0.95, 0.92, 0.9, 0.88, 0.85, 0.8)
LEAST, MOST = 0.9, 0.99


def with_copies(num_rows: int, dim: int) -> NDArray[np.float32]:
    """Random vectors (num_rows, dim), of which the last twentieth are copies of the first."""
    random = np.random.default_rng(0)
    vectors = random.standard_normal((num_rows, dim), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    num_copies = num_rows // 20
    originals = vectors[:num_copies]
    across = random.standard_normal(originals.shape, np.float32)
    across -= (across * originals).sum(axis=1, keepdims=True) * originals
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    cosines = random.uniform(LEAST, MOST, (num_copies, 1)).astype(np.float32)
    vectors[-num_copies:] = cosines * originals + np.sqrt(1 - cosines**2) * across
    return vectors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stores", type=Path, nargs="*", default=[])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=1280)
    options = parser.parse_args()
    for path in options.stores:
        vectors = Store(path).vectors()
        for threshold in THRESHOLDS:
            sizes = np.bincount(near_duplicate_groups(vectors, threshold))
            print(
                f"{path.name}, {len(vectors):,} rows, threshold {threshold}: "
                f"{sizes[sizes > 1].sum():,} in groups, the largest of {sizes.max():,}"
            )
    vectors = with_copies(options.rows, options.dim)
    num_copies = options.rows // 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin, begin_cpu = time.perf_counter(), time.process_time()
    groups = near_duplicate_groups(vectors, LEAST - 0.001)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = (groups[:num_copies] == groups[-num_copies:]).mean()
    print(
        f"{options.rows:,} random rows: {found:.4f} of copies found, {seconds:.1f} s "
        f"({cpu:.1f} s of all cores); peak {peak / 1024:,.0f} MiB, of which {before / 1024:,.0f} "
        f"before, {vectors.nbytes / 2**20:,.0f} of them vectors"
    )


if __name__ == "__main__":
    main()
