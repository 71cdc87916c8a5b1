"""From a recipe to one Keras model, from pixels to vectors."""

import difflib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from embedder.backbones import hub
from embedder.backbones.layers import layer_outputs, leaf_layers
from embedder.backbones.resolve import find_backbone, row_of, weights_file
from embedder.backbones.table import Backbone
from embedder.backbones.weight_files import load_keras_model
from embedder.backbones.weights import digest_of, randomise, seed_of
from embedder.columns import EMBEDDING
from embedder.errors import RecipeError, WeightsError
from embedder.libraries import import_keras, logger
from embedder.recipe import Recipe

if TYPE_CHECKING:  # Keras takes seconds to import, and most commands do not need it
    import keras

_GEM_POWER = 3.0  # arXiv 1711.02512
_GEM_MIN = 1e-6
_PREPROCESSING_LAYERS = ("Rescaling", "Normalization")


def build(recipe: Recipe) -> "keras.Model":
    """Build the frozen model of a recipe, from pixels to vectors.

    Returns:
        Input: uint8 (batch, height, width, 3), RGB, at the recipe's `image_size`. Output: a dict
        with one float32 tensor for each of the recipe's `columns`, whatever its precision:
        (batch, dim), or with `pooling="none"` the feature map (batch, height, width, channels).

    Raises:
        RecipeError: The network has no such layer.
        WeightsError: The weights at hand are not those of the recipe, or do not fit.
    """
    keras = import_keras()
    row = row_of(recipe)
    pixels = keras.Input((*recipe.image_size, 3), dtype="uint8", name="pixels")
    with dtype_policy(recipe.precision):
        network = load_network(recipe)
        if recipe.weights_source.endswith(".keras"):  # it says what its layers computed in before
            for layer in network._flatten_layers():
                layer.dtype_policy = keras.config.dtype_policy()
        _check_finite(recipe, network)
        tapped = keras.Model(network.inputs, tapped_tensors(network, recipe))
        maps = tapped(row.preprocess(keras.ops.cast(pixels, "float32")))
    outputs = {column: pool(maps[column], recipe.pooling, column) for column in recipe.columns}
    model = keras.Model(pixels, outputs, name=network.name)
    model.trainable = False
    return model


def load_network(recipe: Recipe) -> "keras.Model":
    """Make a recipe's network, from preprocessed pixels to the last feature map, with its weights.

    Raises:
        WeightsError: The weights at hand are not those of the recipe, or do not fit.
    """
    row = row_of(recipe)
    if hub.is_preset(recipe.backbone):
        _check_digest(recipe, hub.open_preset(recipe.weights_source).sha256, recipe.weights_source)
        network = row.make(recipe.image_size)
        _check_size(recipe, network, recipe.weights_source)
        return network
    if (seed := seed_of(recipe.weights)) is not None:
        network = row.make(recipe.image_size)
        randomise(network, seed)
        return network
    path = weights_file(recipe.backbone, recipe.weights_source)
    _check_digest(recipe, digest_of(path), str(path))
    if path.suffix == ".keras":
        network = load_keras_model(path)
        _check_size(recipe, network, str(path))
        _warn_of_double_preprocessing(recipe, network, row)
        return network
    network = row.make(recipe.image_size)
    row.load(network, path)
    return network


def _check_finite(recipe: Recipe, network: "keras.Model") -> None:
    """Refuse weights that are no numbers: an engine can make vectors of them that look like any."""
    bad = [weight.path for weight in network.weights if not np.isfinite(weight.numpy()).all()]
    if bad:
        raise WeightsError(
            f"All weights of a network must be finite. Received: {recipe.weights_source}, in which "
            f"{len(bad):,} of {len(network.weights):,} arrays hold nan or inf, such as {bad[0]}"
        )


def _check_digest(recipe: Recipe, digest: str, source: str) -> None:
    if digest != recipe.weights:
        raise WeightsError(
            f"The recipe was made with weights {recipe.weights} of {recipe.backbone}. "
            f"Those at hand, {source}, are {digest}"
        )


def _check_size(recipe: Recipe, network: "keras.Model", source: str) -> None:
    if network.input_shape[1:] not in [(*recipe.image_size, 3), (None, None, 3)]:
        raise RecipeError(
            f"`image_size` must be what {source} takes, {network.input_shape[1:]} as (height, "
            f"width, channels). Received: image_size={recipe.image_size}"
        )


def _warn_of_double_preprocessing(recipe: Recipe, network: "keras.Model", row: Backbone) -> None:
    own = [x.name for x in leaf_layers(network) if type(x).__name__ in _PREPROCESSING_LAYERS]
    raw = np.array([[[[0.0, 128.0, 255.0]]]], np.float32)
    if own and not np.array_equal(row.preprocess(raw.copy()), raw):
        logger.warning(
            "%s seems to preprocess its pixels itself (%s), and %s preprocesses them before: name "
            "a backbone that takes pixels as they are, such as efficientnet-b0",
            *(recipe.weights_source, ", ".join(own), recipe.backbone),
        )


def layer_shapes(backbone: str) -> dict[str, tuple[int, ...]]:
    """Layers that `layers` can name, in the network's order.

    Returns:
        For each, the shape of its output for one image of the network's own size: (height, width,
        channels) or (channels,).
    """
    _, row = find_backbone(backbone)
    return {
        name: tuple(tensor.shape[1:]) for name, tensor in layer_outputs(row.make(row.image_size))
    }


def tapped_tensors(network: "keras.Model", recipe: Recipe) -> "dict[str, keras.KerasTensor]":
    """The tensors, (batch, ...), that become the recipe's columns, by column.

    Raises:
        RecipeError: The network has no such layer.
    """
    if not recipe.layers:
        is_own = recipe.weights_source.endswith(".keras")
        return {EMBEDDING: _before_the_classifier(network) if is_own else network.outputs[0]}
    outputs = dict(layer_outputs(network))
    for layer in recipe.layers:
        if layer not in outputs:
            near = difflib.get_close_matches(layer, outputs, n=3) or list(outputs)[-3:]
            raise RecipeError(
                f"`layers` must be names of layers of {recipe.backbone}, as "
                f"`embedder backbones {recipe.backbone} --layers` lists them, such as "
                f"{', '.join(near)}. Received: {layer}"
            )
    return {
        column: outputs[layer] for column, layer in zip(recipe.columns, recipe.layers, strict=True)
    }


def _before_the_classifier(network: "keras.Model") -> "keras.KerasTensor":
    """The output of a user's own network or, where it is a classifier, what its pooling takes."""
    output = network.outputs[0]
    if len(output.shape) > 2:
        return output
    for layer in reversed(network.layers):
        tensor = getattr(layer, "input", None)
        if isinstance(tensor, type(output)) and len(tensor.shape) == 4:
            return tensor
    return output


def pool(features: "keras.KerasTensor", pooling: str, name: str) -> "keras.KerasTensor":
    """Pool over all axes but the first and the last: positions of a map, or tokens.

    Args:
        features: (batch, ..., channels).
        pooling: As in `Recipe`.
        name: Of the output.

    Returns:
        float32 (batch, channels); with `flatten` (batch, values), with `none` as it was.
    """
    keras = import_keras()
    ops = keras.ops
    features = ops.cast(features, "float32")
    positions = tuple(range(1, len(features.shape) - 1))
    if pooling == "flatten":
        features = ops.reshape(features, (-1, math.prod(features.shape[1:])))
    elif positions and pooling == "avg":
        features = ops.mean(features, positions)
    elif positions and pooling == "max":
        features = ops.max(features, positions)
    elif positions and pooling == "gem":
        powers = ops.power(ops.maximum(features, _GEM_MIN), _GEM_POWER)
        features = ops.power(ops.mean(powers, positions), 1 / _GEM_POWER)
    return keras.layers.Identity(name=name, dtype="float32")(features)


@contextmanager
def dtype_policy(precision: str) -> Iterator[None]:
    """Layers made within compute in this precision, and keep their weights in float32."""
    keras = import_keras()
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32" if precision == "float32" else f"mixed_{precision}")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
