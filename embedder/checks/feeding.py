"""What feeds the network: how fast it embeds, how fast a core decodes, and which of them waits."""

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from embedder.checks.trial import Speed, colour_bars
from embedder.decode import DecodedImage, prepare_decoders
from embedder.errors import SourceError
from embedder.extraction import load_image
from embedder.libraries import DISTRIBUTION
from embedder.recipe import Recipe
from embedder.sources import images_folder

_NUM_IMAGES = 200
_SECONDS = 1.0  # of decoding
_GENERATED_SIZE = (768, 1024)  # (height, width)
_NUM_GENERATED = 8


@dataclass(frozen=True)
class Decoding:
    """How fast one core reads and decodes.

    Attributes:
        images_per_second: Of one core.
        images: What they were, in words.
    """

    images_per_second: float
    images: str


def feeding(
    engine: str, speed: Speed, decoding: Decoding, cores: int, num_gpus: int
) -> dict[str, str]:
    """What was measured, and what will hold a run back: facts by name.

    Args:
        engine: That the speed is of.
        speed: Of the network alone.
        decoding: Of one core.
        cores: That decode, and on a CPU compute.
        num_gpus: Cards that compute, each as fast; 0 for the CPU.
    """
    where = "1 GPU" if num_gpus else f"{cores} CPU core{'s' if cores > 1 else ''}"
    size = "found here" if speed.is_found else "the default, before a long run finds a better one"
    return {
        "network": f"{speed.images_per_second:,.0f} images/s alone, on black images: {engine} on "
        f"{where}, batches of {speed.batch_size:,} ({size})",
        "decoder": f"{decoding.images_per_second:,.0f} images/s on one core, read and decoded: "
        f"{decoding.images}",
        "feeding": "with such images, "
        + _verdict(speed.images_per_second, decoding.images_per_second, cores, num_gpus),
    }


def _verdict(network: float, decoder: float, cores: int, num_gpus: int) -> str:
    """What will hold a run back, by the images/s of the network and of one decoder."""
    if not num_gpus:
        share = (1 / (cores * decoder)) / (1 / network + 1 / (cores * decoder))
        slower = "decoding" if share > 0.5 else "the network"
        return (
            f"decoding takes {share:.0%} of the cores, which the network and its decoders share: "
            f"{slower} will hold a run back, at about {(1 - share) * network:,.0f} images/s"
        )
    needed = math.ceil(num_gpus * network / decoder)
    cards = f"{num_gpus} GPUs" if num_gpus > 1 else "the GPU"
    decoders = f"{needed:,} decoder{'s' if needed > 1 else ''}"
    there = f"there are {cores:,} cores" if cores > 1 else "there is 1 core"
    slower, rate = "the network", num_gpus * network
    if needed > cores:
        slower, rate = "decoding", cores * decoder
    return (
        f"{decoders} would feed {cards}, and {there}: {slower} will hold a run back, at about "
        f"{rate:,.0f} images/s"
    )


def measure_decoding(recipe: Recipe) -> Decoding:
    """Read and decode images on one core, for a second: those of the demo, or generated ones."""
    try:
        files = sorted(images_folder().rglob("*.jpg"))
    except SourceError:
        with tempfile.TemporaryDirectory() as folder:
            name = "generated JPEG images"
            advice = f", as the demo's are not installed (pip install '{DISTRIBUTION}[demo]')"
            return _measure(_generated(Path(folder)), recipe, name, advice)
    return _measure(files[:: max(1, len(files) // _NUM_IMAGES)], recipe, "demo images")


def _measure(files: list[Path], recipe: Recipe, name: str, advice: str = "") -> Decoding:
    prepare_decoders()
    paths = [bytes(path) for path in files]
    # Once before the clock starts, since the first reads may wait for the disk.
    sizes = [_num_pixels(load_image(path, recipe).outcome) for path in paths]
    num_images, begin = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begin) < _SECONDS:
        load_image(paths[num_images % len(paths)], recipe)
        num_images += 1
    what = f"{len(paths)} {name} of {np.mean(sizes) / 1e6:.2f} megapixels{advice}"
    return Decoding(num_images / seconds, f"{what}; larger ones take longer")


def _num_pixels(outcome: object) -> int:
    return outcome.width * outcome.height if isinstance(outcome, DecodedImage) else 0


def _generated(folder: Path) -> list[Path]:
    """JPEG files of the test card with noise: without it, they would be flat as no photo is."""
    random, files = np.random.default_rng(0), []
    for number in range(_NUM_GENERATED):
        noise = random.normal(0, 8, (*_GENERATED_SIZE, 3))
        pixels = np.clip(colour_bars(_GENERATED_SIZE) + noise, 0, 255).astype(np.uint8)
        files.append(folder / f"{number}.jpg")
        Image.fromarray(pixels).save(files[-1], quality=90)
    return files
