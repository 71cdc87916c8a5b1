"""Vectors of many networks on one engine, in a process whose Keras runs on what it needs."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.backbones import load_network, make_recipe, save_network
from embedder.engines import Runtime, load
from embedder.libraries import import_keras
from embedder.recipe import Recipe
from tests.support import picture

Embedded = dict[str, tuple[Recipe, NDArray[np.float32]]]


def pictures(image_size: tuple[int, int]) -> NDArray[np.uint8]:
    """Two images: uint8 (2, height, width, 3)."""
    return np.stack([picture(seed, *image_size) for seed in (0, 1)])


def embed_each(engine: str, networks: dict[str, dict[str, Any]]) -> Embedded:
    """Embed the same two images by each network.

    Args:
        engine: One of `ENGINES`.
        networks: What `make_recipe` takes, by any name.

    Returns:
        For each its recipe, as it is in this process, and vectors (2, dim).
    """
    found = {}
    for name, options in networks.items():
        recipe = make_recipe(**options)
        loaded = load(recipe, Runtime(engine), 2, 2)
        found[name] = recipe, loaded.embed(pictures(recipe.image_size))["embedding"]
        del loaded
        import_keras().backend.clear_session()
        gc.collect()  # of some networks two do not fit
    return found


def save_and_embed_each(
    engine: str, saved: dict[str, Any], path: Path, networks: dict[str, dict[str, Any]]
) -> Embedded:
    """The same, and before save a network that they may use."""
    save_network(load_network(make_recipe(**saved)), path)
    return embed_each(engine, networks)
