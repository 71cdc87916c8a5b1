"""The README's table of networks, with the speed of each on this machine.

    python benchmarks/backbones.py

Inference alone, by the engine that `auto` chooses, at each network's own size and the default
batch size, on random weights: speed does not depend on them. Prints Markdown.
"""

import argparse
import logging
import os
import platform
import statistics
import tempfile

from embedder import engines
from embedder.backbones import BACKBONES, make_recipe
from embedder.engines import images_per_second
from embedder.libraries import versions
from embedder.machine import gpus, num_cores


def speed_of(name: str, image_size: tuple[int, int] | None, rounds: int) -> float:
    recipe = make_recipe(name, "random", image_size=image_size)
    with tempfile.TemporaryDirectory() as scratch:  # exports of the whole table are 6 GB
        os.environ["EMBEDDER_CACHE"] = scratch
        engine = engines.load(recipe, engines.choose("auto", gpus()), None, num_cores())
        return statistics.median(images_per_second(engine, recipe) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--rounds", type=int, default=5, help="of half a second or one batch")
    parser.add_argument("--image-size", type=int, help="in place of the networks' own")
    options = parser.parse_args()
    logging.getLogger("embedder").setLevel(logging.ERROR)  # random weights are meant
    size = (options.image_size,) * 2 if options.image_size else None
    print(f"{platform.machine()}, {num_cores()} cores, {versions()}\n")
    print("| backbone | dim | size | parameters | images/s | licence |")
    print("|---|---:|---:|---:|---:|---|")
    for name in options.networks:
        row = BACKBONES[name]
        speed = speed_of(name, size, options.rounds)
        print(
            f"| {name} | {row.dim:,} | {row.image_size[0]} | {row.num_parameters / 1e6:.1f} M "
            f"| {speed:.1f} | {row.licence} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
