"""This machine, its engines, and a self-test of the way from bytes to vectors."""

import contextlib
import io
import os
import platform
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from embedder import engines
from embedder.backbones import make_recipe
from embedder.checks import conformance
from embedder.checks.check import Check
from embedder.decode import FORMATS, decode_rgb
from embedder.engines import Runtime
from embedder.errors import EngineError, SourceError
from embedder.libraries import versions
from embedder.machine import cache_folder, gpus, memory_bytes, num_cores
from embedder.recipe import Recipe
from embedder.sources import images_folder

_CARD_SIZE = (300, 400)  # (height, width): other than square, so that swapped axes show
_MIN_COSINE_OF_PRECISION = 0.99  # median, to float32; bfloat16 has 8 bits of mantissa
_NUM_DEMO_IMAGES = 32


def machine() -> dict[str, str]:
    """What this machine is: facts by name."""
    runtime = engines.choose("auto", gpus())
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cores": f"{num_cores()} usable of {os.cpu_count()}",
        "memory": f"{memory_bytes() / 2**30:.1f} GiB",
        "precisions": ", ".join(precisions(runtime)),
        "engine": f"{runtime.engine} (chosen by auto)",
        "image formats": ", ".join(FORMATS),
        "model cache": str(cache_folder()),
    } | versions()


def self_test(backbone: str, weights: str | None = None) -> list[Check]:
    """Test a network's way from bytes to vectors against plain references, on generated images.

    Args:
        backbone: Name of a row of `BACKBONES`.
        weights: As in `make_recipe`; `random` where the network's own are not at hand.

    Raises:
        RecipeError: The backbone is unknown.
        WeightsError: The weights are missing or corrupt.
    """
    recipe, found = make_recipe(backbone, weights), gpus()
    card = conformance.colour_bars(_CARD_SIZE)
    upright, on_its_side = _encode(card, 1), _encode(card, 6)
    return [
        _check_rotation(recipe, upright, on_its_side),
        *(
            conformance.check_resize(recipe.model_copy(update={"decode": decode}), card, upright)
            for decode in ("exact", "scaled")
        ),
        conformance.check_input_stage(recipe),
        *conformance.check_features(recipe, found),
        *_check_precisions(recipe, engines.choose("auto", found)),
    ]


def precisions(runtime: Runtime) -> list[str]:
    """Precisions that this machine computes in, with an engine that `choose` gave."""
    found = []
    for precision in get_args(Recipe.model_fields["precision"].annotation):
        with contextlib.suppress(EngineError):
            engines.check_precision(precision, runtime)
            found.append(precision)
    return found


def _check_precisions(recipe: Recipe, runtime: Runtime) -> list[Check]:
    """How far each other precision's vectors are from float32's, on demo images."""
    try:
        files = sorted(images_folder().rglob("*.jpg"))
        chosen = files[:: max(1, len(files) // _NUM_DEMO_IMAGES)]
        encoded = [path.read_bytes() for path in chosen]
        what = f"{len(encoded)} demo images"
    except SourceError:
        encoded, what = [_encode(conformance.colour_bars(_CARD_SIZE), 1)], "the test card"
    pixels = np.stack([decode_rgb(file, recipe).pixels for file in encoded])
    (exact,) = conformance.embed(recipe, runtime, pixels)
    checks = []
    for precision in precisions(runtime):
        if precision == "float32":
            continue
        other = recipe.model_copy(update={"precision": precision})
        (rounded,) = conformance.embed(other, runtime, pixels)
        found = list(map(conformance.cosine, exact, rounded))
        median, lowest = float(np.median(found)), min(found)
        checks.append(
            Check(
                f"{precision} as float32",
                median >= _MIN_COSINE_OF_PRECISION,
                f"cosine on {what}: median {median:.5f}, lowest {lowest:.5f}, "
                f"median at least {_MIN_COSINE_OF_PRECISION}",
            )
        )
    return checks


def _check_rotation(recipe: Recipe, upright: bytes, on_its_side: bytes) -> Check:
    difference = np.abs(
        decode_rgb(upright, recipe).pixels.astype(int) - decode_rgb(on_its_side, recipe).pixels
    ).max()
    return Check("EXIF rotation applied", difference <= 2, f"pixels differ by {difference} of 255")


def _encode(pixels: NDArray[np.uint8], orientation: int) -> bytes:
    """Encode as PNG, stored the way a camera stores an image of that EXIF orientation."""
    image = Image.fromarray(pixels if orientation == 1 else np.rot90(pixels).copy())
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    return file.getvalue()
