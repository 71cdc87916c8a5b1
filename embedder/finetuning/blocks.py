"""A network as blocks: where it can be cut in two, and which layers are tuned alike."""

import re
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from embedder.backbones import layer_outputs, leaf_layers, single_output, with_canonical_names
from embedder.errors import RequestError
from embedder.libraries import import_keras

if TYPE_CHECKING:
    import keras

_WIDE = re.compile(r".*?\d+[a-z]?(?=_|$)")  # such as `conv5` or `block6a`
_NARROW = re.compile(r".*?\d+[a-z]?_block\d+_|.*?\d+[a-z]?_")  # such as `conv5_block1_`
MAX_GROUPS = 8  # of layers with a learning rate each; more make more optimizers and gain nothing

# Layers between a block and a cut: more than a block has. NASNet, whose every cell needs the two
# before it, has no place to be cut but its stem, below which is next to nothing.
_MAX_BETWEEN = 100


def block_name(layer_name: str) -> str:
    """The block that a layer's name begins with.

    `conv5` of `conv5_block1_out`, `stage6` of `stage6_block1_expand_conv`, `block6a` of
    `block6a_se_reduce`; the first word where there is no number, such as `stem`.
    """
    found = _WIDE.match(layer_name)
    return found.group() if found else layer_name.partition("_")[0]


def layer_groups(network: "keras.Model") -> "dict[str, list[keras.Layer]]":
    """Layers with weights, from the bottom to the top, in at most `MAX_GROUPS` groups of blocks.

    Returns:
        By the name of the group's first block; of its first layer, where a group below has the
        block's name: Keras names layers by counting, such as `conv2d_7`, kinds in turn.
    """
    layers = [layer for layer in leaf_layers(network) if layer.weights]
    blocks = [list(found) for _, found in groupby(layers, lambda layer: block_name(layer.name))]
    if not blocks:
        return {}
    groups: dict[str, list[keras.Layer]] = {}
    for group in np.array_split(np.arange(len(blocks)), min(MAX_GROUPS, len(blocks))):
        first = blocks[group[0]][0].name
        name = first if block_name(first) in groups else block_name(first)
        groups[name] = [layer for i in group for layer in blocks[i]]
    return groups


def layers_of(network: "keras.Model", block: str) -> "list[keras.Layer]":
    """Layers whose name is `block`, or begins with it: `conv5` does not name `conv50_relu`.

    Names are those of `backbones.layer_outputs`.

    Raises:
        RequestError: There are none.
    """
    begins = re.compile(rf"{re.escape(block)}(?![0-9a-zA-Z])")
    named = with_canonical_names({layer.name: layer for layer in network.layers})
    layers = [layer for name, layer in named.items() if begins.match(name)]
    if not layers:
        names = dict.fromkeys(block_name(name) for name in named)
        raise RequestError(
            f"A block must be the name of layers of {network.name}, or their beginning, such as "
            f"{', '.join(list(names)[-8:])}. Received: {block}"
        )
    return layers


def find_cut(network: "keras.Model", top: "keras.KerasTensor", block: str | None) -> str:
    """The layer after which a network is cut, so that a block and all above it can be trained.

    Args:
        network: From preprocessed pixels to its last feature map.
        top: The tensor that features are made of.
        block: The lowest block to train; None for the one that brings the last layer with weights
            below `top` to its resolution: most of the weights are there, a fifth of the work is.

    Returns:
        Name of a layer, as `--layer` has it: the last one below the block whose output is all that
        the layers above it need.

    Raises:
        RequestError: There is no such block, or nothing close below it to cut at.
    """
    below = import_keras().Model(network.inputs, top)
    start = _last_resolution(below) if block is None else layers_of(below, block)[0]
    names = {id(output): name for name, output in layer_outputs(network)}
    order = below.operations
    index = order.index(start)
    for layer in reversed(order[max(0, index - _MAX_BETWEEN) : index]):
        name = names.get(id(layer.output))
        if name is not None and can_cut(network, layer.output, top):
            return name
    raise RequestError(
        f"The network must have a place at most {_MAX_BETWEEN} layers below the block where it can "
        f"be cut in two; other strategies need none. Received: {network.name}, with none below "
        f"{start.name}"
    )


def last_layers(network: "keras.Model") -> "list[keras.Layer]":
    """Layers from the block up that brings the last layer with weights to its resolution.

    Raises:
        RequestError: The network has no feature maps.
    """
    layers = network.layers
    above = layers[layers.index(_last_resolution(network)) :]
    return [leaf for layer in above for leaf in leaf_layers(layer)]


def can_cut(network: "keras.Model", output: "keras.KerasTensor", top: "keras.KerasTensor") -> bool:
    """Whether `top` can be computed from `output` alone, and without what is trained below it.

    Args:
        network: What both are of.
        output: (batch, ...), of a layer.
        top: (batch, ...), of a layer above.
    """
    keras = import_keras()
    try:
        above = keras.Model(output, top)
    except ValueError:  # another path leads around it
        return False
    below = leaf_layers(keras.Model(network.inputs, output))
    shared = {id(layer) for layer in below if layer.weights}
    return not any(id(layer) in shared for layer in leaf_layers(above))


def _last_resolution(network: "keras.Model") -> "keras.Layer":
    """First layer of the block in which the last layer with weights gets its resolution."""
    layers = network.layers
    outputs = {layer: single_output(layer) for layer in layers if layer.weights}
    sizes = {x: y.shape[1:3] for x, y in outputs.items() if y is not None and len(y.shape) == 4}
    if not sizes:
        raise RequestError(
            f"The network must have feature maps for its last blocks to be found, or a block must "
            f"be named. Received: {network.name}"
        )
    resolution = list(sizes.values())[-1]
    index = layers.index(next(layer for layer, size in sizes.items() if size == resolution))
    block = _NARROW.match(layers[index].name)
    while block and layers[index - 1].name.startswith(block.group()):
        index -= 1
    return layers[index]
