"""Several features of one pass: two layers, and two networks, at once and one after the other.

    python benchmarks/several.py .../grocery/train

Weights are random: speed does not depend on them. Each way runs once to compile, then in rounds,
alternating; seconds are from the first byte read to the last shard written.
"""

import argparse
import itertools
import logging
import platform
import statistics
import tempfile
from pathlib import Path

from embedder.backbones import make_recipe
from embedder.extraction import RunOptions, run_extraction
from embedder.libraries import versions
from embedder.machine import num_cores
from embedder.recipe import Recipe
from embedder.sources import list_images

PARTS = ["layers", "networks"]
SHALLOW, DEEP = "conv4_block6_out", "conv5_block3_out"


def write_manifest(archive: Path, num_images: int, folder: Path) -> Path:
    """Name so many images of an archive, some of them again under other names if it has fewer."""
    paths = [path.decode() for path in list_images(archive).refs["path"].to_pylist()]
    file = folder / "images.txt"
    for number, path in enumerate(itertools.islice(itertools.cycle(paths), num_images)):
        (folder / f"{number:06d}{Path(path).suffix}").symlink_to(path)
    names = sorted(path.name for path in folder.iterdir())
    file.write_text("\n".join(names))
    return file


def seconds_of(manifest: Path, recipes: list[Recipe], num_images: int) -> float:
    """Embed into new stores, and tell how long it took."""
    with tempfile.TemporaryDirectory() as scratch:
        stores = {f"{scratch}/{number}": recipe for number, recipe in enumerate(recipes)}
        summaries = run_extraction(manifest, stores, RunOptions())
    return max(num_images / summary.images_per_second for summary in summaries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--image-size", type=int, help="in place of the networks' own")
    options = parser.parse_args()
    logging.getLogger("embedder").setLevel(logging.ERROR)  # random weights are meant
    size = (options.image_size,) * 2 if options.image_size else None

    def recipe(name: str, *layers: str) -> Recipe:
        return make_recipe(name, "random", layers=layers, image_size=size, interpolation="bicubic")

    layers = {
        "resnet50": [recipe("resnet50")],
        "vgg16": [recipe("vgg16")],
        f"resnet50 {SHALLOW}": [recipe("resnet50", SHALLOW)],
        f"resnet50 {DEEP}": [recipe("resnet50", DEEP)],
        "resnet50, both layers at once": [recipe("resnet50", SHALLOW, DEEP)],
    }
    networks = {
        "mobilenet": [recipe("mobilenet")],
        "mobilenet-v2": [recipe("mobilenet-v2")],
        "mobilenet and mobilenet-v2 at once": [recipe("mobilenet"), recipe("mobilenet-v2")],
    }
    parts = {"layers": layers, "networks": networks}
    ways = {name: recipes for part in options.parts for name, recipes in parts[part].items()}
    print(f"{platform.machine()}, {num_cores()} cores, {versions()}")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as scratch:
        manifest = write_manifest(options.archive, options.images, Path(scratch))
        for number in range(options.rounds + 1):
            for name, recipes in ways.items():
                took = seconds_of(manifest, recipes, options.images)
                if number:  # the first round compiles
                    seconds[name].append(took)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.1f} to {max(seconds[name]):.1f}"
        print(f"{name:40} {median:6.1f} s ({spread}), {options.images / median:6.1f} images/s")
    for part in options.parts:
        one, other, at_once = list(parts[part])[-3:]
        ratio = medians[at_once] / (medians[one] + medians[other])
        print(f"{at_once}: ratio {ratio:.2f} of one after the other")


if __name__ == "__main__":
    main()
