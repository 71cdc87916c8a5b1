"""Are these the right pixels? A network's way from pixels to features, against plain references.

The references are written for reading and take no path through the rest of the package: NumPy for
crop and resize, the network's own `preprocess_input` on a NumPy array, and Keras's `predict`.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.backbones import load_network, row_of
from embedder.checks.check import Check
from embedder.checks.trial import Trial, colour_bars
from embedder.decode import decode_rgb
from embedder.libraries import import_keras
from embedder.recipe import Recipe

MIN_COSINE = 0.9999  # between engines, to plain Keras, and of a stored vector to one made again
_MIN_COSINE_OF_PRECISION = 0.99  # median, to float32; bfloat16 has 8 bits of mantissa
_MAX_BATCH_DIFFERENCE = 1e-5  # alone and in a batch, as a share of the largest value
_MAX_STAGE_DIFFERENCE = 1e-5  # of the preprocessed pixels, as a share of the largest value
_MAX_PIXEL_DIFFERENCE = 1  # of 255, for the rounding
_SUPPORT = {"nearest": 0.5, "bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}


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


def check_features(recipe: Recipe, trials: Sequence[Trial]) -> list[Check]:
    """Compare what engines made of the test card, alone and in a batch, with plain Keras.

    Plain Keras is the network's own `preprocess_input`, `predict`, and the mean over positions.

    Args:
        recipe: Of one feature.
        trials: Of the engines, with this recipe.
    """
    card = colour_bars(recipe.image_size)[None].astype(np.float32)
    network = load_network(recipe)
    maps = network.predict(np.asarray(row_of(recipe).preprocess(card)), verbose=0)
    expected = maps[0].reshape(-1, maps.shape[-1]).mean(axis=0)
    checks = []
    for trial in trials:
        difference = np.abs(trial.in_batch - trial.alone).max() / np.abs(trial.alone).max()
        checks += [
            _check_alike(f"{trial.engine}: as plain Keras", trial.alone, expected),
            Check(
                f"{trial.engine}: alone as in a batch",
                bool(difference <= _MAX_BATCH_DIFFERENCE),
                f"difference {difference:.1e}, at most {_MAX_BATCH_DIFFERENCE:.0e}",
            ),
        ]
    if len(trials) > 1:
        *names, last = (trial.engine for trial in trials)
        name = f"{', '.join(names)} and {last} agree"
        checks.append(_check_alike(name, *(trial.alone for trial in trials)))
    return checks


def _check_alike(name: str, *vectors: NDArray[np.float32]) -> Check:
    found = min(cosine(*pair) for pair in itertools.combinations(vectors, 2))
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


def check_precisions(trial: Trial, what: str) -> list[Check]:
    """How far an engine's vectors in other precisions are from those in float32.

    Args:
        trial: With vectors of float32 and of others.
        what: The images are.
    """
    exact, checks = trial.vectors["float32"], []
    for precision, vectors in trial.vectors.items():
        if precision == "float32":
            continue
        found = list(map(cosine, exact, vectors))
        median, lowest = float(np.median(found)), min(found)
        checks.append(
            Check(
                f"{trial.engine}: {precision} as float32",
                median >= _MIN_COSINE_OF_PRECISION,
                f"cosine on {what}: median {median:.5f}, lowest {lowest:.5f}, "
                f"median at least {_MIN_COSINE_OF_PRECISION}",
            )
        )
    return checks


def cosine(vector: NDArray[Any], other: NDArray[Any]) -> float:
    """Cosine of two vectors, or feature maps, of one shape; of noughts, 1 to noughts and else 0."""
    one, two = vector.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    norms = float(np.linalg.norm(one) * np.linalg.norm(two))
    return float(one @ two) / norms if norms else float(np.array_equal(one, two))
