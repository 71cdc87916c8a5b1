"""Peak memory of a run as the archive grows: it should not grow with it. And of huge pictures.

The memory is that of all processes of one `embedder extract` (`peak_bytes` in `runs.py`). `ratio`
is to the first size of the same checkout, `beside before` to the other checkout at the same size.
With `--pictures N`, runs over N hard links to one file of `--side` squared pixels follow: a
progressive JPEG, whose coefficients have to be in memory as a whole, a JPEG with `--decode
exact`, which decodes each pixel, and a PNG.

    python benchmarks/memory.py SOURCE --images 1000 5000 20000 --pictures 200 --before CHECKOUT
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from runs import Run, add_arguments, extract, packages_of, print_table, ratios, spread
from throughput import link_images

WARM_UP = "warm-up"
PICTURES: dict[str, tuple[str, dict[str, bool], tuple[str, ...]]] = {
    "progressive JPEG": ("jpg", {"progressive": True}, ()),
    "JPEG, --decode exact": ("jpg", {}, ("--decode", "exact")),
    "PNG": ("png", {}, ()),
}


def link_picture(kind: str, side: int, folder: Path, count: int) -> Path:
    """Write one square picture of smooth colours, and hard links to it."""
    extension, settings, _ = PICTURES[kind]
    coarse = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    folder.mkdir()
    first = folder / f"000000.{extension}"
    picture.save(first, compress_level=1, **settings)
    for number in range(1, count):
        os.link(first, folder / f"{number:06d}.{extension}")
    return folder


def subjects(
    options: argparse.Namespace, scratch: Path
) -> Iterator[tuple[str, Path, tuple[str, ...]]]:
    """What is embedded: its name, the folder, made when it is asked for, and options."""
    # It exports the network, and where long enough measures batch sizes: neither is to be counted.
    yield WARM_UP, link_images(options.source, scratch / WARM_UP, min(2048, *options.images)), ()
    for count in options.images:
        yield f"{count:,} images", link_images(options.source, scratch / f"{count}", count), ()
    for kind in options.kinds if options.pictures else ():
        folder = link_picture(kind, options.side, scratch / kind, options.pictures)
        name = f"{options.pictures:,} of {options.side:,} x {options.side:,}, {kind}"
        yield name, folder, PICTURES[kind][2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="folder of images")
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--pictures", type=int, default=0, help="huge ones, of each kind")
    parser.add_argument("--side", type=int, default=10_000, help="of these, in pixels")
    parser.add_argument("--kinds", nargs="+", choices=PICTURES, default=list(PICTURES))
    add_arguments(parser, rounds=1)
    options = parser.parse_args()
    runs: dict[str, dict[str, list[Run]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for subject, images, more in subjects(options, Path(folder)):
            measured = runs[subject] = {name: [] for name in packages_of(options.before)}
            for number in range(1 if subject == WARM_UP else options.rounds):
                for name, package in packages_of(options.before).items():
                    store = Path(folder) / f"{subject}-{name}-{number}"
                    measured[name].append(extract(package, images, store, *more, memory=True))
    del runs[WARM_UP]
    rows = []
    for subject, measured in runs.items():
        for name, of_checkout in measured.items():
            peaks = [run.peak_bytes for run in of_checkout]
            smallest = [run.peak_bytes for run in next(iter(runs.values()))[name]]
            others = [run.peak_bytes for run in next(iter(measured.values()))]
            row = [subject, name, spread((peak / 2**20 for peak in peaks), ".0f")]
            row += [ratios(peaks, smallest), ratios(peaks, others)]
            row += [spread(run.seconds for run in of_checkout)]
            rows.append((*row, sum(run.record["counts"]["failed"] for run in of_checkout)))
    print_table(("", "", "peak MiB", "ratio", "beside before", "seconds", "failed"), rows)


if __name__ == "__main__":
    main()
