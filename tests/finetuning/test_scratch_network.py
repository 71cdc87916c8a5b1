"""The network from random weights: what it is, and that its seed decides all of it."""

import numpy as np
import pytest
from numpy.typing import NDArray

from embedder.finetuning.blocks import layer_groups
from embedder.finetuning.scratch_network import make_network

SIZE = (24, 40)


def pixels(num_images: int = 2) -> NDArray[np.float32]:
    return np.random.default_rng(0).uniform(-1, 1, (num_images, *SIZE, 3)).astype(np.float32)


def test_its_feature_map_is_an_eighth_of_the_image() -> None:
    network = make_network(SIZE, 0)
    assert network.input_shape == (None, *SIZE, 3)
    assert network.output_shape == (None, 3, 5, 128)
    weights = [9 * 3 * 32 + 32, 9 * 32 * 64 + 64, 9 * 64 * 128 + 128]
    assert network.count_params() == sum(weights)


def test_it_is_three_blocks_that_can_be_told_apart() -> None:
    groups = layer_groups(make_network(SIZE, 0))
    assert list(groups) == ["block1", "block2", "block3"]


def test_each_block_takes_the_largest_of_2x2_and_nothing_below_0() -> None:
    network = make_network(SIZE, 0)
    for layer in network.layers:
        if layer.weights:
            kernel, bias = (np.zeros(weights.shape) for weights in layer.get_weights())
            kernel[1, 1, 0, 0] = 1.0  # the first channel goes on as it is
            layer.set_weights([kernel, bias])
    x = pixels()
    x[1] = -np.abs(x[1])
    found = np.asarray(network(x))
    largest = x[0, :, :, 0].reshape(3, 8, 5, 8).max(axis=(1, 3))
    np.testing.assert_array_equal(found[0, :, :, 0], largest)
    assert not found[1].any()
    assert not found[..., 1:].any()


def test_the_seed_decides_the_weights() -> None:
    first, same, other = (make_network(SIZE, seed).get_weights() for seed in (3, 3, 4))
    for ours, again, theirs in zip(first, same, other, strict=True):
        assert np.array_equal(ours, again)
        assert ours.ndim == 1 or not np.array_equal(ours, theirs)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_weights_begin_as_wide_as_he_et_al_have_them(number: int) -> None:
    kernel, bias = make_network(SIZE, 0).get_layer(f"block{number}_conv").get_weights()
    limit = np.sqrt(6 / np.prod(kernel.shape[:3]))  # arXiv 1502.01852, drawn evenly
    assert 0.95 * limit < np.abs(kernel).max() <= limit
    assert kernel.std() == pytest.approx(limit / np.sqrt(3), rel=0.05)
    assert not bias.any()


def test_dropout_is_of_training_alone_and_follows_the_seed() -> None:
    first, same = make_network(SIZE, 1), make_network(SIZE, 1)
    still = np.asarray(first(pixels()))
    np.testing.assert_array_equal(np.asarray(first(pixels())), still)
    dropped = np.asarray(first(pixels(), training=True))
    assert (dropped == 0).mean() > (still == 0).mean() + 0.05
    np.testing.assert_array_equal(np.asarray(same(pixels(), training=True)), dropped)
