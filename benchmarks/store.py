"""Writing and reading vectors: the store's format beside others, in one run.

The same random float32 vectors are written and read back whole, in turn, several rounds:

- `store`: `Store.write_shard` in shards of 1,024 rows, and `Store.vectors`.
- `nullable lists`: one Parquet file with a column of variable, nullable lists.
- `dictionary`: fixed-size lists as in the store, but with PyArrow's default dictionary encoding.
- `npy`: one `.npy` file, no ids, no checksums.

Only the store waits until the disk has the bytes (fsync); all files are read from the page cache.

    python benchmarks/store.py --rows 20000 --dim 1280 --rounds 3
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from planning import make_listing, write_store

from embedder.store import Store
from embedder.store.shard_file import vector_array


def read_store(folder: Path) -> NDArray[np.float32]:
    return Store(folder).vectors()


def write_lists(folder: Path, vectors: NDArray[np.float32]) -> None:
    folder.mkdir()
    offsets = pa.array(np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1])
    lists = pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1)))
    table = pa.table({"embedding": lists})
    pq.write_table(table, folder / "a.parquet", compression="zstd", use_dictionary=False)


def write_dictionary(folder: Path, vectors: NDArray[np.float32]) -> None:
    folder.mkdir()
    table = pa.table({"embedding": vector_array(vectors)})
    pq.write_table(table, folder / "a.parquet", compression="zstd")


def read_parquet(folder: Path) -> NDArray[np.float32]:
    column = pq.read_table(folder / "a.parquet")["embedding"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def write_npy(folder: Path, vectors: NDArray[np.float32]) -> None:
    folder.mkdir()
    np.save(folder / "a.npy", vectors)


def read_npy(folder: Path) -> NDArray[np.float32]:
    return np.load(folder / "a.npy")


OTHERS = {
    "nullable lists": (write_lists, read_parquet),
    "dictionary": (write_dictionary, read_parquet),
    "npy": (write_npy, read_npy),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=1280)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    vectors = np.random.default_rng(0).random((options.rows, options.dim), np.float32)
    refs = make_listing(options.rows)
    ours = lambda folder, vectors: write_store(folder, refs, vectors), read_store
    formats = {"store": ours} | OTHERS
    seconds: dict[tuple[str, str], list[float]] = {}
    sizes = {}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(options.rounds):
            for name, (write, read) in formats.items():
                folder = Path(scratch) / "folder"
                shutil.rmtree(folder, ignore_errors=True)
                begin = time.perf_counter()
                write(folder, vectors)
                written = time.perf_counter()
                back = read(folder)
                end = time.perf_counter()
                np.testing.assert_array_equal(back, vectors)
                seconds.setdefault((name, "write"), []).append(written - begin)
                seconds.setdefault((name, "read"), []).append(end - written)
                sizes[name] = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    print(f"{options.rows:,} vectors of {options.dim:,} float32, {vectors.nbytes / 1e6:,.0f} MB")
    for name in formats:
        line = f"{name:<15}"
        for step in ("write", "read"):
            values = seconds[name, step]
            median = statistics.median(values)
            ratio = median / statistics.median(seconds["npy", step])
            line += f" {step} {median:.3f} s ({min(values):.3f} to {max(values):.3f}), "
            line += f"{ratio:5.1f} times npy;"
        print(f"{line} {sizes[name] / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
