"""A backbone that can be trained: its features are the store's, wherever it is cut."""

from pathlib import Path

import numpy as np
import pytest

import embedder
from embedder.backbones.graph import load_network
from embedder.backbones.resolve import make_recipe
from embedder.backbones.weight_files import save_network
from embedder.decode.decode import decode_rgb
from embedder.finetuning.network import FEATURES, make_trainable, seed_layers
from embedder.libraries import import_keras
from embedder.recipe import Recipe
from tests.support import assert_same_vectors, make_archive, picture

SIZE = (64, 96)


@pytest.mark.parametrize("is_normalised", [False, True])
def test_features_are_the_stores_wherever_the_network_is_cut(
    lite0: Recipe, tmp_path: Path, is_normalised: bool
) -> None:
    photos = make_archive(tmp_path / "photos", 4)
    store = embedder.extract(
        photos, tmp_path / "store", image_size=SIZE, l2_normalise=is_normalised
    )
    pixels = np.stack(
        [decode_rgb((photos / image).read_bytes(), lite0).pixels for image in store.ids()]
    )
    for cut in (None, "stage5_block3_add", FEATURES):
        tunable = make_trainable(store.recipe, "embedding", cut=cut)
        found = tunable.upper(tunable.below_the_cut(pixels), training=True)[FEATURES]
        assert_same_vectors(np.asarray(found), store.vectors())


@pytest.fixture
def noisy(tmp_path: Path) -> Recipe:
    """A network that drops what it sees in training, below and above a place to cut."""
    keras = import_keras()
    pixels = keras.Input((32, 48, 3))
    x = keras.layers.Conv2D(4, 3, name="block1_conv")(pixels)
    x = keras.layers.Dropout(0.5, name="block1_drop")(x)
    x = keras.layers.Conv2D(4, 3, name="block2_conv")(x)
    x = keras.layers.Dropout(0.5, name="block2_drop")(x)
    save_network(keras.Model(pixels, x), tmp_path / "noisy.keras")
    return make_recipe("mobilenet", str(tmp_path / "noisy.keras"), image_size=(32, 48))


def test_a_network_that_was_saved_frozen_can_be_trained(noisy: Recipe, tmp_path: Path) -> None:
    network = load_network(noisy)
    network.trainable = False
    save_network(network, tmp_path / "frozen.keras")
    frozen = make_recipe("mobilenet", str(tmp_path / "frozen.keras"), image_size=(32, 48))
    tunable = make_trainable(frozen, "embedding")
    names = {variable.path for variable in tunable.upper.trainable_variables}
    assert names == {f"block{n}_conv/{name}" for n in (1, 2) for name in ("kernel", "bias")}


def test_what_layers_draw_is_decided_by_the_seed(noisy: Recipe) -> None:
    pixels = np.ones((2, 32, 48, 3), np.float32)
    drawn = []
    for seed in (1, 1, 2):
        network = load_network(noisy)
        seed_layers(network, seed)
        drawn.append(np.asarray(network(pixels, training=True)))
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    states = [
        layer.seed_generator.state.numpy().tolist()
        for layer in network.layers
        if hasattr(layer, "seed_generator")
    ]
    assert states[0] != states[1]  # layers do not draw the same


def test_what_is_below_a_cut_drops_nothing(noisy: Recipe) -> None:
    tunable = make_trainable(noisy, "embedding", cut="block1_drop")
    pixels = np.stack([picture(seed, 32, 48) for seed in range(3)])
    activations = np.asarray(tunable.below_the_cut(pixels))
    assert (activations != 0).all()
    x = tunable.preprocess(pixels.astype(np.float32))
    wanted = tunable.network.get_layer("block1_conv")(x)
    np.testing.assert_allclose(activations, np.asarray(wanted), rtol=1e-5, atol=1e-4)
    trained = [tunable.upper(activations, training=True)[FEATURES] for _ in range(2)]
    assert not np.allclose(*trained)
