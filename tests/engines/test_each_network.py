"""Every network of the table on JAX, against TensorFlow: the same recipes, the same vectors.

A few of them are tested by default; `-m slow` tests all, and takes minutes.
"""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedder.backbones import BACKBONES, leaf_layers, load_network, make_recipe, save_network
from embedder.engines import call_apart
from tests.engines.each_network import Embedded, embed_each, save_and_embed_each
from tests.engines.test_engine import cosines, needs_precision
from tests.support import SHARED

# Height and width differ, so that swapped axes show; 75 is the most that a network asks for.
SIZE = (80, 112)
MOBILENET = SHARED / "weights" / "mobilenet_1.0_224_imagenet.weights.h5"
SOME = ["mobilenet", "convnext-tiny"]


def family(name: str) -> str:
    """The module of a network, of which one process takes all."""
    preprocess = BACKBONES[name].preprocess
    return str(preprocess.args[0]) if isinstance(preprocess, partial) else "efficientnet-lite"


FAMILIES: dict[str, list[str]] = {}
for each in BACKBONES:
    FAMILIES.setdefault(family(each), []).append(each)


def random_network(name: str, folder: Path) -> dict[str, Any]:
    """What `make_recipe` takes for a network with random weights, at a small size.

    With ConvNeXt's own layer scale, 1e-6, all its blocks could be wrong and nothing would show.
    """
    options = {"backbone": name, "weights": "random:3", "image_size": SIZE}
    if not name.startswith("convnext"):
        return options
    network = load_network(make_recipe(**options))
    for layer in leaf_layers(network):
        if type(layer).__name__ == "LayerScale":
            layer.set_weights([np.full_like(values, 0.5) for values in layer.get_weights()])
    file = folder / f"{name}.weights.h5"
    save_network(network, file)
    return options | {"weights": str(file)}


def check_alike(ours: Embedded, theirs: Embedded) -> None:
    """Compare recipes and vectors; also what distinguishes the two images, which can be little."""
    assert ours.keys() <= theirs.keys()
    lines, failed = [], []
    for name, (recipe, vectors) in ours.items():
        expected_recipe, expected = theirs[name]
        cosine = cosines(vectors, expected).min()
        of_difference = cosines(vectors[:1] - vectors[1:], expected[:1] - expected[1:]).min()
        is_same = recipe.fingerprint == expected_recipe.fingerprint
        lines.append(
            f"{name:24} 1 - {1 - cosine:.1e}, of the difference 1 - {1 - of_difference:.1e}"
        )
        if cosine < 0.9999 or of_difference < 0.999 or not is_same:
            failed.append(name)
    print("\n".join(lines))  # noqa: T201 - `-s` shows it
    assert failed == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("networks")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def networks(folder: Path) -> dict[str, dict[str, Any]]:
    """One of each kind, and weights of each kind: drawn, in a package, in files of three sorts."""
    found = {name: random_network(name, folder) for name in SOME}
    random, lite0 = found["mobilenet"], "efficientnet-lite0"
    save_network(load_network(make_recipe(**random)), folder / "tensorflow.keras")
    found[lite0] = {"backbone": lite0, "image_size": SIZE}
    for name in ("tensorflow.keras", "jax.keras"):
        found[name] = random | {"weights": str(folder / name)}
    if MOBILENET.is_file():
        found["mobilenet"] = random | {"weights": str(MOBILENET)}
    return found


@pytest.fixture(scope="module")
def on_jax(folder: Path, networks: dict[str, dict[str, Any]]) -> Embedded:
    needs_precision("bfloat16")
    every = networks | {"bfloat16": networks["jax.keras"] | {"precision": "bfloat16"}}
    saved, path = networks["mobilenet"] | {"weights": "random:4"}, folder / "jax.keras"
    return call_apart("jax", save_and_embed_each, "jax", saved, path, every)


def test_networks_give_the_same_vectors_on_jax_as_on_tensorflow(
    on_jax: Embedded, networks: dict[str, dict[str, Any]]
) -> None:
    check_alike(embed_each("tensorflow", networks), on_jax)


def test_bfloat16_on_jax_is_close_to_float32_and_not_the_same(on_jax: Embedded) -> None:
    (_, exact), (_, rounded) = on_jax["jax.keras"], on_jax["bfloat16"]
    assert cosines(exact, rounded).min() > 0.99
    assert np.abs(exact - rounded).max() > 1e-4 * np.abs(exact).max()


@pytest.mark.slow
@pytest.mark.parametrize("names", FAMILIES.values(), ids=FAMILIES)
def test_every_network_gives_the_same_vectors_on_jax_as_on_tensorflow(
    names: list[str], tmp_path: Path
) -> None:
    networks = {name: random_network(name, tmp_path) for name in names}
    on_jax = call_apart("jax", embed_each, "jax", networks)
    check_alike(embed_each("tensorflow", networks), on_jax)
    shutil.rmtree(tmp_path)
