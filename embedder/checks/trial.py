"""What an engine makes of images, and how fast it is.

All is asked of it at once: where Keras runs on something else in this process, an engine needs a
process of its own, which takes seconds to start.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedder import engines
from embedder.columns import EMBEDDING
from embedder.engines import Runtime
from embedder.machine import num_cores
from embedder.recipe import Recipe


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


class Speed(NamedTuple):
    """Of the network alone.

    Attributes:
        device: `CPU` or `GPU`.
        batch_size: That a run begins with.
        is_found: Whether that was found by measuring on this machine; else it is the default.
        images_per_second: On all cores, or on one GPU.
    """

    device: str
    batch_size: int
    is_found: bool
    images_per_second: float


@dataclass(frozen=True)
class Trial:
    """What an engine made of the test card and of images.

    Attributes:
        engine: One of `ENGINES`.
        alone: float32 (dim,), of the card in a batch of its own.
        in_batch: float32 (dim,), of the card in a batch of several images.
        vectors: By precision, float32 (n, dim) of the n images.
        speed: In the recipe's precision; None if it was not asked for.
    """

    engine: str
    alone: NDArray[np.float32]
    in_batch: NDArray[np.float32]
    vectors: dict[str, NDArray[np.float32]]
    speed: Speed | None


def try_engine(
    recipe: Recipe,
    runtime: Runtime,
    images: NDArray[np.uint8] | None = None,
    precisions: tuple[str, ...] = (),
    is_timed: bool = False,
) -> Trial:
    """Embed the test card and images, in a process of its own where the engine needs one.

    Args:
        recipe: Of one feature.
        runtime: As `engines.choose` gives it.
        images: uint8 (n, height, width, 3); None for none.
        precisions: In which the images are embedded besides the recipe's own.
        is_timed: Whether the speed is measured too, for half a second.

    Raises:
        EngineError: The engine cannot run here.
        WeightsError: The weights are missing or are not those of the recipe.
    """
    if images is None:
        images = np.zeros((0, *recipe.image_size, 3), np.uint8)
    arguments = recipe, runtime, images, precisions, is_timed
    if engines.runs_here(runtime.engine):
        return _try(*arguments)
    return engines.call_apart(runtime.engine, _try, *arguments, gpus=runtime.gpus[:1])


def _try(
    recipe: Recipe,
    runtime: Runtime,
    images: NDArray[np.uint8],
    precisions: tuple[str, ...],
    is_timed: bool,
) -> Trial:
    card, cores = colour_bars(recipe.image_size), num_cores()
    batch = np.stack([card[:, ::-1], card, 255 - card, *images])
    # In a run's batch size first, so that the network is built once.
    engine = engines.load(recipe, runtime, None if is_timed else 1, cores)
    speed = None
    if is_timed:
        found = engines.remembered_batch_size(recipe, runtime, cores)
        measured = engines.images_per_second(engine, recipe)
        speed = Speed(engine.device, engine.batch_size, found is not None, measured)
        engine = engine.resized(1)
    alone = engine.embed(card[None])[EMBEDDING][0]
    in_batch = engine.resized(len(batch)).embed(batch)[EMBEDDING]
    vectors: dict[str, NDArray[np.float32]] = {recipe.precision: in_batch[3:]}
    for precision in precisions:
        other = recipe.model_copy(update={"precision": precision})
        rounded = engines.load(other, runtime, len(images), cores)
        vectors[precision] = rounded.embed(images)[EMBEDDING]
    return Trial(runtime.engine, alone, in_batch[1], vectors, speed)
