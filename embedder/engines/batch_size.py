"""The batch size at the knee: the smallest at which an engine is as fast as it gets."""

import contextlib
import hashlib
import json
import math
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from embedder.engines.engine import Engine, Runtime
from embedder.errors import OutOfMemory
from embedder.files import whole_file
from embedder.libraries import installed
from embedder.machine import cache_folder, gpus
from embedder.recipe import Recipe

# What is tried. On a GPU each is compiled, which can take half a minute, and a small one leaves
# most of a card idle.
_BATCH_SIZES = {
    ("openvino", "CPU"): (2, 4, 8, 16, 32),
    ("tensorflow", "CPU"): (16, 32, 64, 128),
    ("tensorflow", "GPU"): (32, 64, 128, 256, 512, 1024),
    ("jax", "CPU"): (4, 8, 16, 32, 64),
    ("jax", "GPU"): (32, 64, 128, 256, 512, 1024),
}
# Whose versions decide how fast an engine is, and whether it knows a card.
_PACKAGES = {
    "openvino": ["openvino"],
    "tensorflow": ["tensorflow", "tensorflow-cpu", "nvidia-cudnn-cu12", "nvidia-curand-cu12"],
    "jax": ["jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin"],
}
_KNEE = 1.03  # a larger batch must be faster by so much: it costs memory and idle time at the end
_KNEE_SECONDS = 0.5  # of measuring, at each batch size


def find_batch_size(engine: Engine, recipe: Recipe, runtime: Runtime, num_threads: int) -> Engine:
    """Find the smallest batch size at which the engine is as fast as it gets, and remember it.

    Batch sizes are tried in ascending order on black images, each for half a second, until a
    larger one is no faster by 3 %, twice in a row, or does not fit into memory. What was found
    is kept in the cache folder, for this recipe, engine, device and number of threads; it is
    what `load` uses from then on.

    Args:
        engine: Compiled, at any batch size.
        recipe: What it computes.
        runtime: What it was loaded for.
        num_threads: CPU threads that it uses.

    Returns:
        The engine at that batch size.
    """
    best, best_speed, num_worse = engine, 0.0, 0
    speeds = {}
    for batch_size in _BATCH_SIZES[engine.name, engine.device]:
        try:
            candidate = engine.resized(batch_size)
            speed = speeds[batch_size] = images_per_second(candidate, recipe)
        except OutOfMemory:
            break
        if speed > best_speed * _KNEE:
            best, best_speed, num_worse = candidate, speed, 0
        elif (num_worse := num_worse + 1) == 2:
            break
    _remember(recipe, runtime, num_threads, best.batch_size, speeds)
    return best


def remember_failure(recipe: Recipe, runtime: Runtime, num_threads: int) -> None:
    """Remember that an engine cannot compute here, until other parts of it are installed.

    Args:
        recipe: Of the network.
        runtime: Engine and devices.
        num_threads: That it was tried with.
    """
    _remember(recipe, runtime, num_threads, 1, {1: 0.0})


def _remember(
    recipe: Recipe, runtime: Runtime, num_threads: int, batch_size: int, speeds: dict[int, float]
) -> None:
    file = _batch_size_file(recipe, runtime, num_threads)
    content = {"batch_size": batch_size, "images_per_second": speeds}
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, no more
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as new:
            new.write(json.dumps(content).encode())


def images_per_second(engine: Engine, recipe: Recipe) -> float:
    """Speed of the network alone, on black images, for half a second or a call in each thread."""
    pixels = np.zeros((engine.batch_size, *recipe.image_size, 3), np.uint8)
    begin = time.perf_counter()

    def embed_for_a_while(_: int) -> int:
        num_images = 0
        while time.perf_counter() - begin < _KNEE_SECONDS:
            engine.embed(pixels)
            num_images += len(pixels)
        return num_images

    with ThreadPoolExecutor(engine.num_parallel) as threads:
        num_images = sum(threads.map(embed_for_a_while, range(engine.num_parallel)))
    return num_images / (time.perf_counter() - begin)


def remembered_batch_size(recipe: Recipe, runtime: Runtime, num_threads: int) -> int | None:
    """What `find_batch_size` found; None if it was never here.

    Args:
        recipe: Of the network.
        runtime: Engine and devices.
        num_threads: That it was found with.
    """
    found = _remembered(recipe, runtime, num_threads)
    return found[0] if found and found[1] else None


def remembered_speed(recipe: Recipe, runtime: Runtime, num_threads: int) -> float | None:
    """Images/s of the network alone at what `find_batch_size` found; None if it was never here.

    0 where the engine cannot compute here.

    Args:
        recipe: Of the network.
        runtime: Engine and devices.
        num_threads: That it was found with.
    """
    found = _remembered(recipe, runtime, num_threads)
    return None if found is None else found[1]


def _remembered(recipe: Recipe, runtime: Runtime, num_threads: int) -> tuple[int, float] | None:
    """The batch size that was found, and its images/s."""
    try:
        content = json.loads(_batch_size_file(recipe, runtime, num_threads).read_bytes())
        batch_size = int(content["batch_size"])
        speed = float(content["images_per_second"][str(batch_size)])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return (batch_size, speed) if batch_size >= 1 and math.isfinite(speed) else None


def _batch_size_file(recipe: Recipe, runtime: Runtime, num_threads: int) -> Path:
    device = platform.processor() or "CPU"
    if runtime.gpus:
        card = next(iter(gpus()), None)
        device = f"{card} {card.memory_bytes}" if card else "GPU"
    name, version = runtime.engine, installed(_PACKAGES[runtime.engine]).items()
    parts = [recipe.fingerprint, name, *version, device, platform.node(), num_threads]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return cache_folder() / "batch-sizes" / f"{recipe.label}-{key}.json"
