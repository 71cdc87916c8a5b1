"""From a recipe to one Keras model, from pixels to vectors."""

import difflib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedder.backbones import hub
from embedder.backbones.options import RecipeOptions
from embedder.backbones.table import BACKBONES, Backbone
from embedder.backbones.weight_files import load_keras_model, with_canonical_names
from embedder.backbones.weights import (
    IMAGENET,
    RANDOM,
    PackagedWeights,
    digest_of,
    leaf_layers,
    randomise,
    seed_of,
)
from embedder.columns import EMBEDDING, RESERVED_COLUMNS
from embedder.errors import RecipeError, WeightsError
from embedder.libraries import import_keras, logger
from embedder.recipe import DEFAULT_BACKBONE, Recipe

if TYPE_CHECKING:  # Keras takes seconds to import, and most commands do not need it
    import keras

_GEM_POWER = 3.0  # arXiv 1711.02512
_GEM_MIN = 1e-6
_PREPROCESSING_LAYERS = ("Rescaling", "Normalization")


def make_recipe(
    backbone: str = DEFAULT_BACKBONE, weights: str | None = None, **options: Any
) -> Recipe:
    """Make a recipe, with the backbone's own size, crop, interpolation and weights as defaults.

    Args:
        backbone: Name of a row of `BACKBONES`; capitals, `-` and `_` make no difference. Or
            `hub:PRESET`, an image network of KerasHub with weights of its own.
        weights: `imagenet` (the published ones), a `.weights.h5`, `.h5` or `.keras` file, or
            `random` or `random:SEED`. A `.keras` file brings a network of its own, whose pixels
            are preprocessed as the backbone's.
        **options: Further attributes of `RecipeOptions`.

    Raises:
        RecipeError: The backbone is unknown or an option makes no sense.
        WeightsError: The weights are not at hand, or their file is not the published one.
    """
    checked = asdict(RecipeOptions(backbone=backbone, weights=weights, **options))
    given = {name: value for name, value in checked.items() if value is not None}
    name, row, digest, source = _find(backbone, weights or IMAGENET)
    crop = given.get("crop", row.crop)
    defaults = {
        "image_size": row.image_size,
        "crop": crop,
        "crop_fraction": row.crop_fraction if crop == "center" else 1.0,
        "interpolation": row.interpolation,
    }
    values = defaults | given | {"backbone": name, "weights": digest, "weights_source": source}
    recipe = Recipe(**values)
    if min(recipe.image_size) < row.min_side:
        raise RecipeError(
            f"`image_size` of {name} must be at least {row.min_side}x{row.min_side} pixels. "
            f"Received: image_size={recipe.image_size}"
        )
    if taken := RESERVED_COLUMNS.intersection(recipe.columns) - {EMBEDDING}:
        raise RecipeError(
            f"A layer's name is its column's in the store, which has columns of its own. "
            f"Received: layers={', '.join(sorted(taken))}"
        )
    return recipe


def _find(backbone: str, source: str) -> tuple[str, Backbone, str, str]:
    """A network's name and row, what a recipe says of its weights, and where they are."""
    if backbone.startswith(hub.PREFIX):
        if source != IMAGENET:
            raise RecipeError(f"A preset brings its own weights. Received: weights={source}")
        preset = backbone.removeprefix(hub.PREFIX)
        _, row = find_backbone(backbone)
        digest = hub.open_preset(preset).sha256
        if Path(preset).is_dir():  # where it is makes no other recipe
            path = Path(preset).resolve()
            return f"{hub.PREFIX}{path.name}", row, digest, str(path)
        return backbone, row, digest, preset
    name, row = find_backbone(backbone)
    if (seed := seed_of(source)) is not None:
        source = digest = f"{RANDOM}:{seed}"
        logger.warning("%s has random weights: its vectors are for tests only", name)
        return name, row, digest, source
    path = weights_file(name, source)
    if source != IMAGENET:
        return name, row, digest_of(path), str(path)
    if isinstance(row.weights, PackagedWeights):  # finding it has compared its hash
        return name, row, row.weights.sha256, source
    return name, row, digest_of(path), source


def row_of(recipe: Recipe) -> Backbone:
    """The network of a recipe, as a row of the table."""
    if recipe.backbone.startswith(hub.PREFIX):
        return _hub_row(recipe.weights_source)
    return find_backbone(recipe.backbone)[1]


def _hub_row(preset: str) -> Backbone:
    opened = hub.open_preset(preset)  # in float32: for the facts alone
    return Backbone(
        make=lambda _: _preset_network(preset),
        preprocess=opened.preprocess,
        load=lambda *_: None,
        dim=int(opened.network.output_shape[-1]),
        image_size=opened.image_size,
        crop_fraction=1.0,
        crop=opened.crop,
        interpolation=opened.interpolation,
        num_parameters=opened.network.count_params(),
        licence="see the preset",
        weights=None,
    )


def _preset_network(preset: str) -> "keras.Model":
    return hub.open_preset(preset, import_keras().config.dtype_policy().name).network


def find_backbone(name: str) -> tuple[str, Backbone]:
    """Find a network by name; capitals, `-` and `_` make no difference.

    Returns:
        Its name in `BACKBONES`, and its row; for `hub:PRESET`, a row made from the preset.

    Raises:
        RecipeError: There is none of this name.
    """
    if name.startswith(hub.PREFIX):
        return name, _hub_row(name.removeprefix(hub.PREFIX))
    wanted = _plain(name)
    for known, row in BACKBONES.items():
        if _plain(known) == wanted:
            return known, row
    near = difflib.get_close_matches(name.lower(), BACKBONES, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise RecipeError(
        f"`backbone` must be one of: {', '.join(BACKBONES)}. Received: backbone={name!r}.{hint}"
    )


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def weights_file(backbone: str, source: str = IMAGENET) -> Path:
    """Locate a weights file; the published one is checked, and downloaded where Keras does so.

    Args:
        backbone: Name of a row of `BACKBONES`.
        source: `imagenet`, or a file.

    Raises:
        WeightsError: It is not at hand, or its hash is not the published one.
    """
    _, row = find_backbone(backbone)
    if source == IMAGENET and row.weights:
        try:
            return row.weights.find()
        except WeightsError as error:
            raise WeightsError(f"{backbone}: {error}") from error
    path = Path(source).absolute()
    if not path.is_file():
        raise WeightsError(
            f"`weights` must be imagenet, random, random:SEED or a file. "
            f"Received: {source}, which is not there"
        )
    if path.suffix not in (".h5", ".keras"):
        raise WeightsError(
            f"A weights file must end in .weights.h5, .h5 or .keras. Received: {source}"
        )
    return path


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
    if recipe.backbone.startswith(hub.PREFIX):
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


def layer_outputs(network: "keras.Model") -> "Iterator[tuple[str, keras.KerasTensor]]":
    """What `--layer` can name: layers with one output, by names that do not depend on the process.

    Sums and the like that a network makes without a layer, such as the ends of ConvNeXt's blocks,
    count as layers too. Keras names a layer without a name by counting, such as `conv2d_7`, and
    counts on through a whole process: these are counted from nought within the network.
    """
    keras = import_keras()
    layers = {
        layer.name: layer
        for layer in network.operations
        # The output of a model within the model is a tensor of its own graph.
        if not isinstance(layer, keras.layers.InputLayer) and not hasattr(layer, "layers")
    }
    for name, layer in with_canonical_names(layers).items():
        if (output := single_output(layer)) is not None:
            yield name, output


def single_output(layer: "keras.Operation") -> "keras.KerasTensor | None":
    """What a layer gives, at its first use; None where that is several, or of unknown shape."""
    output = layer.output
    is_tensor = isinstance(output, import_keras().KerasTensor)
    return output if is_tensor and None not in output.shape[1:] else None


def tapped_tensors(network: "keras.Model", recipe: Recipe) -> "dict[str, keras.KerasTensor]":
    """The tensors that become the recipe's columns."""
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
    """Pool over all axes but the first and the last: positions of a map, or tokens."""
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
