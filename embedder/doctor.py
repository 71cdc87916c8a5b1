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
from embedder.cluster import NUM_CORES
from embedder.decode import FORMATS, decode_rgb
from embedder.demo import images_folder
from embedder.errors import EngineError, SourceError, WeightsError
from embedder.pipeline import finished_vectors
from embedder.recipe import Recipe
from embedder.verify import Check

_CARD_SIZE = (300, 400)  # (height, width): other than square, so that swapped axes show
_MIN_COSINE = 0.9999  # between engines
_MIN_COSINE_OF_PRECISION = 0.99  # median, to float32; bfloat16 has 8 bits of mantissa
_NUM_DEMO_IMAGES = 32
_MAX_DIFFERENCE = 1e-5  # between batch sizes, as a share of the largest value


def machine() -> dict[str, str]:
    """What this machine is: facts by name."""
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cores": f"{NUM_CORES} usable of {os.cpu_count()}",
        "memory": _memory(),
        "precisions": ", ".join(precisions()),
        "engine": f"{engines.choose('auto')} (chosen by auto)",
        "image formats": ", ".join(FORMATS),
        "model cache": str(engines.cache_folder()),
    } | engines.versions()


def self_test(backbone: str) -> list[Check]:
    """Embed a generated picture on every engine, alone and in a batch, and compare.

    Args:
        backbone: Name of a row of `BACKBONES`, whose weights are at hand.

    Raises:
        RecipeError: The backbone is unknown.
        WeightsError: Its weights are missing or corrupt.
    """
    recipe = make_recipe(backbone)
    upright, on_its_side = _encode(test_card(_CARD_SIZE), 1), _encode(test_card(_CARD_SIZE), 6)
    pixels = decode_rgb(upright, recipe).pixels
    checks = [_check_rotation(recipe, upright, on_its_side)]
    alone = {}
    for name in engines.ENGINES:
        alone[name] = _embed(recipe, name, pixels[None])[0]
        batch = np.stack([pixels[:, ::-1], pixels, 255 - pixels])
        difference = np.abs(_embed(recipe, name, batch)[1] - alone[name]).max()
        share = float(difference / np.abs(alone[name]).max())
        checks.append(
            Check(
                f"{name}: alone as in a batch",
                share <= _MAX_DIFFERENCE,
                f"difference {share:.1e}, at most {_MAX_DIFFERENCE:.0e}",
            )
        )
    first, second = alone.values()
    cosine = float(_cosines(first[None], second[None])[0])
    checks.append(
        Check(
            f"{' and '.join(alone)} agree",
            cosine >= _MIN_COSINE,
            f"cosine {cosine:.7f}, at least {_MIN_COSINE}",
        )
    )
    return checks + _check_precisions(recipe)


def precisions() -> list[str]:
    """Precisions that the engine chosen by `auto` computes in on this machine."""
    found = []
    for precision in get_args(Recipe.model_fields["precision"].annotation):
        with contextlib.suppress(EngineError):
            engines.check_precision(precision, "auto")
            found.append(precision)
    return found


def weights_at_hand(backbone: str) -> str:
    """`yes`, or what to do about a backbone's weights."""
    try:
        make_recipe(backbone)
    except WeightsError as error:
        return str(error)
    return "yes"


def test_card(image_size: tuple[int, int]) -> NDArray[np.uint8]:
    """Colour bars over gradients: uint8 (height, width, 3), with no symmetry."""
    height, width = image_size
    card = np.zeros((height, width, 3), np.uint8)
    bars = np.array([[255, 255, 255], [255, 255, 0], [0, 255, 255], [0, 255, 0], [255, 0, 255]])
    card[: height // 2] = bars[np.arange(width) * len(bars) // width]
    card[height // 2 :, :, 0] = np.linspace(0, 255, width)
    card[height // 2 :, :, 2] = np.linspace(0, 255, height - height // 2)[:, None]
    return card


def _embed(recipe: Recipe, engine_name: str, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    engine = engines.load(recipe, engine_name, len(pixels), NUM_CORES)
    return finished_vectors(engine.embed(pixels), recipe)


def _cosines(vectors: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of each vector to the other in its row: two of (n, dim) to (n,)."""
    one, other = vectors.astype(np.float64), others.astype(np.float64)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    cosines: NDArray[np.float64] = (one * other).sum(axis=1) / norms
    return cosines


def _check_precisions(recipe: Recipe) -> list[Check]:
    """How far each other precision's vectors are from float32's, on demo images."""
    try:
        files = sorted(images_folder().rglob("*.jpg"))
        chosen = files[:: max(1, len(files) // _NUM_DEMO_IMAGES)]
        encoded = [path.read_bytes() for path in chosen]
        what = f"{len(encoded)} demo images"
    except SourceError:
        encoded, what = [_encode(test_card(_CARD_SIZE), 1)], "the test card"
    pixels = np.stack([decode_rgb(file, recipe).pixels for file in encoded])
    exact = _embed(recipe, "auto", pixels)
    checks = []
    for precision in precisions():
        if precision == "float32":
            continue
        other = recipe.model_copy(update={"precision": precision})
        cosines = _cosines(exact, _embed(other, "auto", pixels))
        median, lowest = float(np.median(cosines)), float(cosines.min())
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
    """Encode as PNG, stored the way a camera stores a picture of that EXIF orientation."""
    image = Image.fromarray(pixels if orientation == 1 else np.rot90(pixels).copy())
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    return file.getvalue()


def _memory() -> str:
    try:
        pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return "unknown"
    return f"{pages * page_bytes / 2**30:.1f} GiB"
