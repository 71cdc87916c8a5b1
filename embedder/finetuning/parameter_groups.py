"""Strategies of fine-tuning: which weights are trained, from which head on, and how fast."""

from typing import TYPE_CHECKING

import numpy as np

from embedder.backbones import leaf_layers
from embedder.errors import RequestError
from embedder.finetuning.blocks import last_layers, layer_groups, layers_of
from embedder.finetuning.channels import channel_group
from embedder.finetuning.inputs import Examples
from embedder.finetuning.network import TrainableNetwork, is_normalisation, thaw_normalisation
from embedder.finetuning.options import HEAD, TuneOptions
from embedder.finetuning.schedule import Group

if TYPE_CHECKING:
    import keras


def tuned_blocks(tunable: TrainableNetwork, options: TuneOptions) -> "dict[str, list[keras.Layer]]":
    """Layers that are trained beside the heads, from the bottom up, by the name of their group.

    Raises:
        RequestError: There are none, or there is no such block.
    """
    if options.strategy == HEAD:
        return {}
    if options.strategy == "partial":
        named = [x for block in options.blocks for x in layers_of(tunable.network, block)]
        return {"channels": list(dict.fromkeys(named)) or last_layers(tunable.upper)}
    layers = list(leaf_layers(tunable.upper))
    if options.train_norm and not any(is_normalisation(layer) for layer in layers):
        raise RequestError(
            f"`train_norm` is of networks with BatchNormalization. Received: train_norm=True for "
            f"{tunable.network.name}"
        )
    blocks = layer_groups(tunable.upper)
    if not any(_trained(layer, options) for found in blocks.values() for layer in found):
        raise RequestError(
            f"The network must have weights that the strategy trains. Received: "
            f"strategy={options.strategy} for {tunable.network.name}, which has none"
        )
    return blocks


def plan_groups(tunable: TrainableNetwork, examples: Examples, options: TuneOptions) -> list[Group]:
    """What is trained, and how: a group for each few blocks, from the top, the heads first.

    Args:
        tunable: Network and heads.
        examples: What `partial` chooses channels by.
        options: Give the strategy, and how rates fall from the top down.

    Raises:
        RequestError: As in `tuned_blocks` and `channels.channel_group`.
    """
    heads = [variable for head in tunable.heads for variable in head.trainable_variables]
    groups, blocks = [Group("head", heads)], tuned_blocks(tunable, options)
    if options.strategy == "partial":
        return [*groups, channel_group(tunable, blocks["channels"], examples, options)]
    decay = options.resolved("rate_decay")
    if options.train_norm:
        thaw_normalisation(list(leaf_layers(tunable.upper)))
    # Gradual: all are unfrozen by the middle of the training, and are trained together from there.
    step = options.resolved("epochs") / 2 / max(1, len(blocks))
    for number, name in enumerate(reversed(blocks), start=1):
        variables = [v for layer in blocks[name] for v in _trained(layer, options)]
        if variables:
            start = 1 + int(number * step) if options.strategy == "gradual" else 1
            groups.append(Group(name, variables, decay**number, start))
    return groups


def _trained(layer: "keras.Layer", options: TuneOptions) -> "list[keras.Variable]":
    """Weights of a layer that a strategy trains."""
    if is_normalisation(layer):
        scales = [v for v in (layer.gamma, layer.beta) if v is not None]
        if options.strategy == "norm":
            return scales
        if options.strategy == "bias":
            return [] if layer.beta is None else [layer.beta]
        # Statistics are changed by calling the layer, not by the optimizer.
        return scales if options.train_norm else []
    if options.strategy == "norm":
        is_norm = type(layer).__name__ in ("LayerNormalization", "GroupNormalization")
        return list(layer.trainable_variables) if is_norm else []
    if options.strategy == "bias":
        return [
            v for v in layer.trainable_variables if v.path.rpartition("/")[2] in ("bias", "beta")
        ]
    return list(layer.trainable_variables)


def num_tuned(groups: list[Group]) -> int:
    """Number of weights that training may change."""
    return sum(
        int(np.prod(variable.shape)) if mask is None else int(mask.sum())
        for group in groups
        for variable, mask in group.masked
    )
