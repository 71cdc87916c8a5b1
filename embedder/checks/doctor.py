"""This machine, its engines, and a self-test of the way from bytes to vectors."""

import contextlib
import importlib.util
import io
import os
import platform
from collections.abc import Iterable, Sequence
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from embedder import engines
from embedder.backbones import make_recipe
from embedder.checks import conformance
from embedder.checks.check import Check
from embedder.checks.feeding import feeding, measure_decoding
from embedder.checks.trial import Trial, colour_bars, try_engine
from embedder.decode import FORMATS, decode_rgb
from embedder.engines import Runtime
from embedder.errors import EngineError, RequestError, SourceError, WeightsError
from embedder.libraries import DISTRIBUTION, versions
from embedder.machine import Gpu, cache_folder, memory_bytes, num_cores
from embedder.recipe import Recipe
from embedder.sources import images_folder

_CARD_SIZE = (300, 400)  # (height, width): other than square, so that swapped axes show
_NUM_DEMO_IMAGES = 16
_INSTALL = {
    "openvino": "pip install openvino",
    "tensorflow": "pip install tensorflow",
    "jax": f"pip install '{DISTRIBUTION}[jax]'",
}


class Examination(NamedTuple):
    """What an examination found.

    Attributes:
        feeding: How fast network and decoders are, and which holds a run back: facts by name;
            empty where the engine that `auto` takes cannot compute.
        checks: All checks, passed or not.
    """

    feeding: dict[str, str]
    checks: list[Check]


def machine(gpus: Sequence[Gpu]) -> dict[str, str]:
    """What this machine is, and which engines can compute on it: facts by name.

    Args:
        gpus: Those there are, such as `machine.gpus` finds.
    """
    runtime = engines.choose("auto", gpus)
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cores": f"{num_cores()} usable of {os.cpu_count()}",
        "memory": f"{memory_bytes() / 2**30:.1f} GiB",
        **{f"GPU {number}": _card(gpu) for number, gpu in enumerate(gpus)},
        **{f"engine {name}": _use_of(name, gpus) for name in engines.ENGINES},
        "engine auto": f"takes {runtime.engine}",
        "precisions": f"{', '.join(precisions(runtime))} on {runtime.engine}",
        "image formats": ", ".join(FORMATS),
        "model cache": str(cache_folder()),
    } | versions()


def _card(gpu: Gpu) -> str:
    facts = [str(gpu)]
    if gpu.memory_bytes:
        facts.append(f"{gpu.memory_bytes / 2**30:.1f} GiB")
    if gpu.compute_capability is not None:
        facts.append("compute capability {}.{}".format(*gpu.compute_capability))
    if gpu.driver:
        facts.append(f"driver {gpu.driver}")
    return ", ".join(facts)


def _use_of(engine: str, gpus: Sequence[Gpu]) -> str:
    """Where an engine can compute, and why not on each of the GPUs."""
    if engine not in engines.available_engines([]):
        if not gpus or engine == "openvino":
            return f"is not installed; {_INSTALL[engine]}"
    elif engine == "openvino" or not gpus:
        return "can compute on the CPU"
    numbers_by_reason: dict[str | None, list[str]] = {}
    for number, gpu in enumerate(gpus):
        numbers_by_reason.setdefault(engines.why_not(engine, gpu), []).append(str(number))
    return "; ".join(
        f"can use GPU {', '.join(numbers)}"
        if reason is None
        else f"cannot use GPU {', '.join(numbers)}: {reason}"
        for reason, numbers in numbers_by_reason.items()
    )


def self_test(backbone: str, weights: str | None, gpus: Sequence[Gpu]) -> Examination:
    """Test a network's way from bytes to vectors against plain references, on generated images.

    Each engine that is at hand embeds the same images. How fast the network is, and how fast a
    core decodes, is measured too, for about two seconds.

    Args:
        backbone: Name of a row of `BACKBONES`.
        weights: As in `make_recipe`; `random` where the network's own are not at hand.
        gpus: Those there are, such as `machine.gpus` finds.

    Raises:
        RecipeError: The backbone is unknown.
        WeightsError: The weights are missing or corrupt.
    """
    recipe = make_recipe(backbone, weights)
    card = colour_bars(_CARD_SIZE)
    upright, on_its_side = _encode(card, 1), _encode(card, 6)
    checks = [
        _check_rotation(recipe, upright, on_its_side),
        *(
            conformance.check_resize(recipe.model_copy(update={"decode": decode}), card, upright)
            for decode in ("exact", "scaled")
        ),
    ]
    images, what = _some_images(recipe, upright)
    chosen = engines.choose("auto", gpus)
    taken = engines.fastest(recipe, gpus, chosen, num_cores(), is_worth_it=False)
    trials, broken = _try_engines(recipe, gpus, taken, images)
    checks += [*_check_against_keras(recipe, gpus, trials), *broken]
    for trial in trials:
        checks += conformance.check_precisions(trial, what)
    facts: dict[str, str] = {}
    for trial in trials:
        if trial.speed is not None:
            decoding, num_gpus = measure_decoding(recipe), len(taken.gpus)
            facts = feeding(trial.engine, trial.speed, decoding, num_cores(), num_gpus)
    return Examination(facts, checks)


def _try_engines(
    recipe: Recipe, gpus: Sequence[Gpu], taken: Runtime, images: NDArray[np.uint8]
) -> tuple[list[Trial], list[Check]]:
    """What each engine at hand makes of the images, and a failed check for each that cannot."""
    trials, broken = [], []
    for name in engines.available_engines(gpus):
        runtime = engines.choose(name, gpus)
        others = tuple(precision for precision in precisions(runtime) if precision != "float32")
        try:
            trials.append(try_engine(recipe, runtime, images, others, runtime == taken))
        except (RequestError, WeightsError):
            raise
        except Exception as error:  # noqa: BLE001 - of a framework that does not fit its card
            broken.append(Check(f"{name}: computes", False, str(error)))
    return trials, broken


def _check_against_keras(
    recipe: Recipe, gpus: Sequence[Gpu], trials: list[Trial]
) -> Iterable[Check]:
    if not gpus:
        return _check_here(recipe, trials)
    # Plain Keras would take all memory of the card, or end the process if it does not know it.
    backend = "tensorflow" if importlib.util.find_spec("tensorflow") else "jax"
    return engines.call_apart(backend, _check_here, recipe, trials)


def _check_here(recipe: Recipe, trials: list[Trial]) -> list[Check]:
    return [conformance.check_input_stage(recipe), *conformance.check_features(recipe, trials)]


def precisions(runtime: Runtime) -> list[str]:
    """Precisions that this machine computes in, with an engine that `choose` gave."""
    found = []
    for precision in get_args(Recipe.model_fields["precision"].annotation):
        with contextlib.suppress(EngineError):
            engines.check_precision(precision, runtime)
            found.append(precision)
    return found


def _some_images(recipe: Recipe, card: bytes) -> tuple[NDArray[np.uint8], str]:
    """Demo images, or the test card where they are not installed; and what they are."""
    try:
        files = sorted(images_folder().rglob("*.jpg"))
    except SourceError:
        return decode_rgb(card, recipe).pixels[None], "the test card"
    chosen = files[:: -(-len(files) // _NUM_DEMO_IMAGES)]
    pixels = [decode_rgb(path.read_bytes(), recipe).pixels for path in chosen]
    return np.stack(pixels), f"{len(pixels)} demo images"


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
