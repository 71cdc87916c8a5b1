"""What the tests ask of the JAX engine, in a process of its own."""

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.engines import Runtime, load
from embedder.errors import OutOfMemory
from embedder.recipe import Recipe

JAX = Runtime("jax")


def facts(recipe: Recipe, pixels: NDArray[np.uint8]) -> dict[str, Any]:
    """Vectors of six images in several ways, and what else can be seen in this process."""
    import jax

    hits: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    whole = load(recipe, JAX, 6, 2)
    num_hits = hits.count("/jax/compilation_cache/cache_hits")
    num_misses = hits.count("/jax/compilation_cache/cache_misses")
    half = whole.resized(3)
    before = pixels.copy()
    found = {
        "whole": whole.embed(pixels)["embedding"],
        "again": whole.embed(pixels)["embedding"],
        "uploaded": whole.embed(whole.upload(pixels))["embedding"],
        "halves": np.concatenate([half.embed(pixels[i : i + 3])["embedding"] for i in (0, 3)]),
        "is_unchanged": np.array_equal(pixels, before),
        "sizes": [whole.batch_size, half.batch_size],
        "device": whole.device,
        "backend": sys.modules["keras"].config.backend(),
        "has_tensorflow": "tensorflow" in sys.modules,
        "num_hits": num_hits,
        "num_misses": num_misses,
    }
    other = load(recipe.model_copy(update={"precision": "bfloat16"}), JAX, 6, 2)
    return found | {"bfloat16": other.embed(pixels)["embedding"]}


def vectors(recipe: Recipe, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Vectors of six images."""
    return load(recipe, JAX, 6, 2).embed(pixels)["embedding"]


def with_damaged_cache(
    recipe: Recipe, pixels: NDArray[np.uint8], folder: Path
) -> tuple[list[int], list[NDArray[np.float32]]]:
    """Vectors before the cache is cut off, then and later; and the sizes of its files then."""
    found = [vectors(recipe, pixels)]
    for file in folder.rglob("jit_*-cache"):
        file.write_bytes(file.read_bytes()[:100])
    found += [vectors(recipe, pixels), vectors(recipe, pixels)]
    return [file.stat().st_size for file in folder.rglob("jit_*-cache")], found


def sleep(file: str) -> None:
    """Say which process this is, and stay for a while."""
    Path(file).write_text(str(os.getpid()))
    time.sleep(60)


def embed_in(recipe: Recipe, gibibytes: float, batch_size: int) -> Any:
    """Try a batch that is too large for a limit on memory, and then one image."""
    engine = load(recipe, JAX, 1, 1)
    status = Path("/proc/self/status").read_text()
    mapped = int(status.split("VmSize:")[1].split()[0]) * 1024
    limit = mapped + int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        engine.resized(batch_size)
    except OutOfMemory as error:
        reason = str(error)
    pixels = np.full((1, *recipe.image_size, 3), 200, np.uint8)
    return reason, engine.embed(pixels)["embedding"]
