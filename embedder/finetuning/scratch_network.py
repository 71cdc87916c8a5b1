"""A small convolutional network from random weights: what transfer must be better than."""

from typing import TYPE_CHECKING

import numpy as np

from embedder.libraries import import_keras

if TYPE_CHECKING:
    import keras

_FILTERS = (32, 64, 128)  # of a block each
_DROPOUT = 0.25


def make_network(image_size: tuple[int, int], seed: int) -> "keras.Model":
    """Make the network: blocks of a 3x3 convolution, ReLU, 2x2 maximum and dropout.

    Args:
        image_size: (height, width), in pixels.
        seed: Of the weights and of dropout.

    Returns:
        Input: float32 (batch, height, width, 3), preprocessed. Output: the feature map,
        (batch, height / 8, width / 8, 128).
    """
    keras = import_keras()
    seeds = np.random.default_rng(seed).integers(2**31, size=2 * len(_FILTERS)).tolist()
    pixels = keras.Input((*image_size, 3))
    x = pixels
    for number, filters in enumerate(_FILTERS, start=1):
        x = keras.layers.Conv2D(
            filters,
            3,
            padding="same",
            activation="relu",
            kernel_initializer=keras.initializers.HeUniform(seeds.pop()),
            name=f"block{number}_conv",
        )(x)
        x = keras.layers.MaxPooling2D(name=f"block{number}_pool")(x)
        x = keras.layers.Dropout(_DROPOUT, seed=seeds.pop(), name=f"block{number}_dropout")(x)
    return keras.Model(pixels, x, name="scratch")
