"""How often something can be called in a second: for `engines.py`, also in processes of its own."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from embedder import engines
from embedder.backbones import make_recipe
from embedder.machine import num_cores
from embedder.recipe import DEFAULT_BACKBONE


def per_second(call: Callable[[], Any], num_parallel: int, seconds: float) -> float:
    """Calls per second in so many threads at the same time."""

    def repeat(_: int) -> int:
        num_calls = 0
        while time.perf_counter() - begin < seconds:
            call()
            num_calls += 1
        return num_calls

    with ThreadPoolExecutor(num_parallel) as threads:
        begin = time.perf_counter()
        num_calls = sum(threads.map(repeat, range(num_parallel)))
        return num_calls / (time.perf_counter() - begin)


def images_per_second_on_jax(name: str, batch_size: int, seconds: float) -> float:
    """Of a network alone, in a process in which Keras runs on JAX."""
    recipe = make_recipe(name, None if name == DEFAULT_BACKBONE else "random")
    engine = engines.load(recipe, engines.Runtime("jax"), batch_size, num_cores())
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (batch_size, *recipe.image_size, 3), dtype=np.uint8)
    return per_second(lambda: engine.embed(pixels), 1, seconds) * batch_size
