"""Are these the right pixels? A network's way from pixels to features, against plain references.

The references are written for reading and take no path through the rest of the package: NumPy for
crop and resize, the network's own `preprocess_input` on a NumPy array, and Keras's `predict`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.backbones import load_network, row_of
from embedder.checks.check import Check
from embedder.columns import EMBEDDING
from embedder.decode import decode_rgb
from embedder.engines import Runtime, available_engines, call_apart, choose, load, runs_here
from embedder.libraries import import_keras
from embedder.machine import Gpu, num_cores
from embedder.recipe import Recipe

MIN_COSINE = 0.9999  # between engines, to plain Keras, and of a stored vector to one made again
_MAX_BATCH_DIFFERENCE = 1e-5  # alone and in a batch, as a share of the largest value
_MAX_STAGE_DIFFERENCE = 1e-5  # of the preprocessed pixels, as a share of the largest value
_MAX_PIXEL_DIFFERENCE = 1  # of 255, for the rounding
_SUPPORT = {"nearest": 0.5, "bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}


def colour_bars(image_size: tuple[int, int]) -> NDArray[np.uint8]:
    """Colour bars, extremes and gradients: uint8 (height, width, 3), with no symmetry."""
    height, width = image_size
    card = np.zeros((height, width, 3), np.uint8)
    bars = np.array(
        [[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0], [255, 0, 255]]
    )
    card[: height // 2] = bars[np.arange(width) * len(bars) // width]
    card[height // 2 :, :, 0] = np.linspace(0, 255, width)
    card[height // 2 :, :, 2] = np.linspace(0, 255, height - height // 2)[:, None]
    return card


def check_input_stage(recipe: Recipe) -> Check:
    """Compare what the graph makes of a test card with the network's own `preprocess_input`.

    Any difference in the order of channels, the range or the mean is far above the tolerance. A
    network that preprocesses within itself has an own function that changes nothing: what goes in
    must then still be 0 to 255, or it would be scaled twice.
    """
    keras = import_keras()
    row = row_of(recipe)
    card = colour_bars(recipe.image_size)[None]
    expected = np.asarray(row.preprocess(card.astype(np.float32)))
    pixels = keras.Input((*recipe.image_size, 3), dtype="uint8")
    stage = keras.Model(pixels, row.preprocess(keras.ops.cast(pixels, "float32")))
    received = np.asarray(stage(card))
    difference = np.abs(received - expected).max() / np.abs(expected).max()
    order = _channel_order(expected, card)
    low, high = expected.min(), expected.max()
    return Check(
        "preprocessing is the network's own",
        bool(difference <= _MAX_STAGE_DIFFERENCE),
        f"{order} in [{low:.2f}, {high:.2f}], means "
        f"{', '.join(f'{mean:.3f}' for mean in expected.mean(axis=(0, 1, 2)))}; "
        f"difference {difference:.1e}, at most {_MAX_STAGE_DIFFERENCE:.0e}",
    )


def _channel_order(preprocessed: NDArray[np.float32], card: NDArray[np.uint8]) -> str:
    """`RGB` or `BGR`: by which of the card's channels the first one follows."""
    follows = [
        np.corrcoef(preprocessed[..., 0].ravel(), card[..., channel].ravel())[0, 1]
        for channel in range(3)
    ]
    return ("RGB", "GRB", "BGR")[int(np.argmax(follows))]


def check_features(recipe: Recipe, gpus: Sequence[Gpu]) -> list[Check]:
    """Compare each engine that is at hand with plain Keras on a test card, alone and in a batch.

    Plain Keras is the network's own `preprocess_input`, `predict`, and the mean over positions.
    Engines take one of `gpus` where they can.
    """
    row = row_of(recipe)
    card = colour_bars(recipe.image_size)
    batch = np.stack([card[:, ::-1], card, 255 - card])
    network = load_network(recipe)
    maps = network.predict(np.asarray(row.preprocess(card[None].astype(np.float32))), verbose=0)
    expected = maps[0].reshape(-1, maps.shape[-1]).mean(axis=0)
    checks, alone = [], {}
    for name in available_engines(gpus):
        runtime = choose(name, gpus)
        (alone[name],), (_, in_batch, _) = embed(recipe, runtime, card[None], batch)
        difference = float(np.abs(in_batch - alone[name]).max() / np.abs(alone[name]).max())
        checks += [
            _check_alike(f"{name}: as plain Keras", alone[name], expected),
            Check(
                f"{name}: alone as in a batch",
                difference <= _MAX_BATCH_DIFFERENCE,
                f"difference {difference:.1e}, at most {_MAX_BATCH_DIFFERENCE:.0e}",
            ),
        ]
    return [*checks, _check_alike(f"{' and '.join(alone)} agree", *alone.values())]


def _check_alike(name: str, *vectors: NDArray[np.float32]) -> Check:
    found = min(cosine(vector, vectors[0]) for vector in vectors)
    return Check(name, found >= MIN_COSINE, f"cosine {found:.7f}, at least {MIN_COSINE}")


def check_resize(recipe: Recipe, card: NDArray[np.uint8], encoded: bytes) -> Check:
    """Compare crop and resize with a plain reference.

    Args:
        recipe: Gives crop, size, filter and decoding.
        card: uint8 (height, width, 3).
        encoded: The same image as a file, without loss.
    """
    received = decode_rgb(encoded, recipe).pixels.astype(int)
    # Libraries resize rows or columns first, and round in between.
    difference = min(
        int(np.abs(received - reference_resize(card, recipe, rows_first)).max())
        for rows_first in (True, False)
    )
    return Check(
        f"{recipe.decode} {recipe.crop} crop and {recipe.interpolation} resize",
        difference <= _MAX_PIXEL_DIFFERENCE,
        f"pixels differ from a plain reference by {difference} of 255, "
        f"at most {_MAX_PIXEL_DIFFERENCE}",
    )


def reference_resize(
    pixels: NDArray[np.uint8], recipe: Recipe, rows_first: bool
) -> NDArray[np.uint8]:
    """Crop and antialiased resize as two products with matrices: uint8 `image_size` + (3,).

    Each output pixel is the mean of the input weighted by the filter, which is stretched where the
    image becomes smaller. A filter reaches over the edge of the crop, not of the image. Values
    are rounded to uint8 after each product, which cuts off what the filter overshoots.

    Args:
        pixels: uint8 (height, width, 3).
        recipe: Gives `image_size`, `crop` (not `pad`), `crop_fraction` and `interpolation`.
        rows_first: Whether rows are resized before columns.
    """
    height, width = recipe.image_size
    if recipe.crop == "center":
        scale = min(pixels.shape[0] / height, pixels.shape[1] / width) * recipe.crop_fraction
        crop = height * scale, width * scale
    else:  # squash
        crop = float(pixels.shape[0]), float(pixels.shape[1])
    down = _filter_matrix(pixels.shape[0], crop[0], height, recipe.interpolation)
    across = _filter_matrix(pixels.shape[1], crop[1], width, recipe.interpolation)
    steps = [("hwc,xw->hxc", across), ("hwc,yh->ywc", down)]
    for step, matrix in steps if rows_first else reversed(steps):
        pixels = np.clip(np.einsum(step, pixels, matrix) + 0.5, 0, 255).astype(np.uint8)
    return pixels


def _filter_matrix(length: int, crop: float, size: int, name: str) -> NDArray[np.float64]:
    """Weights (size, length) that bring the central `crop` of `length` pixels to `size`."""
    scale = crop / size
    stretch = max(scale, 1.0)
    centres = (length - crop) / 2 + (np.arange(size) + 0.5) * scale
    distances = (np.arange(length) + 0.5 - centres[:, None]) / stretch
    weights = np.where(np.abs(distances) <= _SUPPORT[name], _filter(distances, name), 0.0)
    normalised: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return normalised


def _filter(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """Values of a filter at distances in pixels: triangle, Keys's cubic of -0.5, or Lanczos 3."""
    x = np.abs(x)
    if name == "bilinear":
        return np.maximum(0.0, 1.0 - x)
    if name == "bicubic":
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    return np.sinc(x) * np.sinc(x / 3.0)


def embed(
    recipe: Recipe, runtime: Runtime, *batches: NDArray[np.uint8]
) -> list[NDArray[np.float32]]:
    """Embed batches of images, each on a fresh engine.

    Args:
        recipe: Of one feature.
        runtime: As `engines.choose` gives it.
        *batches: uint8 (n, height, width, 3), each of its own n.

    Returns:
        For each float32 (n, dim).
    """
    if not runs_here(runtime.engine):
        return call_apart(runtime.engine, _embed, recipe, runtime, batches, gpus=runtime.gpus[:1])
    return _embed(recipe, runtime, batches)


def _embed(
    recipe: Recipe, runtime: Runtime, batches: Sequence[NDArray[np.uint8]]
) -> list[NDArray[np.float32]]:
    return [
        load(recipe, runtime, len(pixels), num_cores()).embed(pixels)[EMBEDDING]
        for pixels in batches
    ]


def cosine(vector: NDArray[Any], other: NDArray[Any]) -> float:
    """Cosine of two vectors, or feature maps, of one shape; of noughts, 1 to noughts and else 0."""
    one, two = vector.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    norms = float(np.linalg.norm(one) * np.linalg.norm(two))
    return float(one @ two) / norms if norms else float(np.array_equal(one, two))
