"""Peak memory and seconds of decoding the largest images, one alone and several at once.

Makes small files that decode to just under `MAX_PIXELS`, of each kind that takes another way
through `embedder.decode`, and progressive JPEGs with far more scans than a photo has. Each run is a
process of its own, whose memory is limited so that no other process suffers: what asks for more
fails with `MemoryError`.

    python benchmarks/decode_memory.py --together 8

Other checkouts of the package are measured beside the installed one, in turn:

    python benchmarks/decode_memory.py --package ../before .
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

from PIL import Image

GREY, RGB, PALETTE, RGBA = 0, 2, 3, 6  # colour types of PNG

# Decodes the file in so many threads at once, as `embedder extract` does. `VmHWM` is the peak of
# this program alone; `ru_maxrss` would begin with that of the program that started it.
DECODE = """
import json, re, resource, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from embedder.backbones import make_recipe
from embedder.decode import decode_rgb, prepare_decoders
from embedder.errors import DecodeError

file, num_threads, most_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))
prepare_decoders()
recipe = make_recipe()

def decode(_):
    try:
        decode_rgb(Path(file).read_bytes(), recipe)
    except DecodeError as error:
        return str(error)
    return "decoded"

begin = time.perf_counter()
with ThreadPoolExecutor(num_threads) as threads:
    outcomes = sorted(set(threads.map(decode, range(num_threads))))
seconds = time.perf_counter() - begin
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps([peak, seconds, "; ".join(outcomes)]))
"""


def chunk(name: bytes, content: bytes) -> bytes:
    length, checksum = len(content), zlib.crc32(name + content)
    return length.to_bytes(4, "big") + name + content + checksum.to_bytes(4, "big")


def png(side: int, bits: int, colour_type: int, pixel: bytes, *chunks: bytes) -> bytes:
    """A square PNG, black but for one pixel in each row, without the whole image in memory."""
    header = side.to_bytes(4, "big") * 2 + bytes([bits, colour_type, 0, 0, 0])
    row = b"\0" + pixel + bytes(len(pixel) * (side - 1))
    compressor = zlib.compressobj(1)
    rows = b"".join(compressor.compress(row) for _ in range(side)) + compressor.flush()
    parts = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", rows), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_many_scans(path: Path, side: int, num_bytes: int) -> None:
    """A grey progressive JPEG of two scans: the second refines details again and again."""
    Image.new("L", (side, side)).save(path, "JPEG", progressive=True)
    header, *scans = re.split(rb"(?=\xff\xc4)", path.read_bytes()[:-2])  # begin with tables
    first, repeated = header + scans[0], scans[-1]  # which looks at each of 63 coefficients
    path.write_bytes(first + repeated * ((num_bytes - len(first)) // len(repeated)) + b"\xff\xd9")


def make_files(folder: Path, side: int) -> list[Path]:
    colours = chunk(b"PLTE", bytes(range(30))), chunk(b"tRNS", b"\x80\xff")
    contents = {
        "grey, 16 bits": png(side, 16, GREY, b"\x12\x34"),
        "RGB": png(side, 8, RGB, b"\1\2\3"),
        "RGB, one colour transparent": png(
            side, 8, RGB, b"\1\2\3", chunk(b"tRNS", b"\0\1\0\2\0\3")
        ),
        "RGBA": png(side, 8, RGBA, b"\1\2\3\4"),
        "palette, transparent": png(side, 8, PALETTE, b"\1", *colours),
    }
    for name, content in contents.items():
        (folder / name).with_suffix(".png").write_bytes(content)
    square = side, side
    Image.new("CMYK", square).save(folder / "CMYK.tif", compression="tiff_lzw")
    Image.new("F", square).save(folder / "grey, 32 bits.tif", compression="tiff_lzw")
    Image.new("RGB", square).save(folder / "photo.jpg")
    Image.new("RGB", square).save(folder / "photo, progressive.jpg", progressive=True)
    # A smaller image has room for more scans in as many bytes: its first scan is shorter.
    write_many_scans(folder / "many scans.jpg", side * 3 // 5, 400_000)
    write_many_scans(folder / "very many scans.jpg", side * 3 // 5, 2_800_000)
    return sorted(folder.iterdir())


def decode(file: Path, num_threads: int, package: Path, options: argparse.Namespace) -> str:
    """Peak memory, seconds and outcome of one process, as cells of a table."""
    most_bytes = int(options.most_gib * 2**30)
    command = [sys.executable, "-c", DECODE, str(file), str(num_threads), str(most_bytes)]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    run = {"cwd": package, "env": environment, "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, **run, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return f"| | over {options.timeout:.0f} | not waited for"
    if done.returncode:
        return f"| | | ended with {done.returncode}"
    peak, seconds, outcome = json.loads(done.stdout.splitlines()[-1])
    return f"| {peak / 2**30:.2f} | {seconds:.1f} | {outcome}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", type=int, default=13_300, help="of the square images, in pixels")
    parser.add_argument("--together", type=int, default=8, help="files that are decoded at once")
    parser.add_argument("--kinds", default="", help="only files in whose name this regex is found")
    parser.add_argument("--most-gib", type=float, default=12, help="memory of a process, in GiB")
    parser.add_argument("--timeout", type=float, default=60, help="for a process, in seconds")
    parser.add_argument("--package", type=Path, nargs="+", default=[Path(__file__).parents[1]])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        files = make_files(Path(scratch), options.side)
        files = [file for file in files if re.search(options.kinds, file.name)]
        print("| file | kB | at once | package | peak GiB | seconds | outcome |")
        print("|---|---|---|---|---|---|---|")
        for file in files:
            for num_threads in (1, options.together):
                for package in options.package:
                    cells = decode(file, num_threads, package.resolve(), options)
                    size = file.stat().st_size / 1000
                    print(
                        f"| {file.name} | {size:,.0f} | {num_threads} | {package} {cells} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
