"""Output channels of a network by their importance, so that only a few of them are tuned."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embedder.backbones import leaf_layers
from embedder.errors import RequestError
from embedder.finetuning.gradients import gradients_of
from embedder.finetuning.inputs import Examples
from embedder.finetuning.network import FEATURES, TrainableNetwork
from embedder.finetuning.options import TuneOptions
from embedder.finetuning.schedule import Group
from embedder.libraries import import_keras

if TYPE_CHECKING:
    import keras

_NUM_BATCHES = 8  # more change a few of the chosen channels, at the cost of an epoch


def channel_group(
    tunable: TrainableNetwork,
    layers: "list[keras.Layer]",
    examples: Examples,
    options: TuneOptions,
) -> Group:
    """Choose the output channels of each layer that matter most to the loss.

    Args:
        tunable: Network and trained head.
        layers: Of which channels are chosen: convolutions and dense layers; others are left out.
        examples: A few batches of its training images are looked at.
        options: The `fraction` of each layer's channels, of which at least one is chosen; the size
            of a batch, and the seed of which images; and their `importance`: `taylor`, the squared
            change of the loss that setting a channel's weights to 0 would make, to first order
            (arXiv 1906.10771), or `fisher`, the squared gradient, which is the diagonal of the
            empirical Fisher information (arXiv 2111.09839).

    Returns:
        Kernels and biases, with masks of 1 where a value belongs to a chosen channel.

    Raises:
        RequestError: No layer has channels.
    """
    kernels = [(layer, kernel) for layer in layers if (kernel := _kernel_of(layer)) is not None]
    if not kernels:
        raise RequestError("The blocks must have layers with channels. Received: none that has any")
    _check_reach(tunable, [layer for layer, _ in kernels])
    scores = _scores(tunable, kernels, examples, options)
    group = Group("channels", [])
    for (layer, kernel), score in zip(kernels, scores, strict=True):
        chosen = np.zeros(len(score), np.float32)
        num_chosen = max(1, round(options.fraction * len(score)))
        chosen[np.argsort(-score, kind="stable")[:num_chosen]] = 1
        spread = chosen.reshape(kernel.shape[-2:]) if _is_depthwise(layer) else chosen
        group.variables.append(kernel)
        group.masks.append(np.array(np.broadcast_to(spread, kernel.shape)))
        if getattr(layer, "bias", None) is not None:
            group.variables.append(layer.bias)
            group.masks.append(chosen)
    return group


def _check_reach(tunable: TrainableNetwork, layers: "list[keras.Layer]") -> None:
    """Refuse layers that the features, as they are trained, do not depend on."""
    upper = tunable.upper
    whole = import_keras().Model(upper.inputs, upper.output[FEATURES])
    reached = {id(layer) for layer in leaf_layers(whole)}
    for layer in layers:
        if id(layer) not in reached:
            raise RequestError(
                f"Channels can be chosen in layers that the features are made of. "
                f"Received: {layer.name}"
            )


def _kernel_of(layer: "keras.Layer") -> "keras.Variable | None":
    """The weights that make a layer's output channels."""
    for name in ("pointwise_kernel", "depthwise_kernel", "kernel"):
        kernel = getattr(layer, name, None)
        # Not `in`, which would compare the values of variables.
        is_own = any(kernel is weights for weights in layer.weights)
        if kernel is not None and is_own and len(kernel.shape) > 1:
            return kernel
    return None


def _is_depthwise(layer: "keras.Layer") -> bool:
    return isinstance(layer, import_keras().layers.DepthwiseConv2D)


def _scores(
    tunable: TrainableNetwork,
    kernels: "list[tuple[keras.Layer, keras.Variable]]",
    examples: Examples,
    options: TuneOptions,
) -> list[NDArray[np.float64]]:
    """Importance of the output channels of each kernel, (n_channels,)."""
    variables, ops = [kernel for _, kernel in kernels], import_keras().ops
    entropy = examples.cross_entropy()

    def loss_of(inputs: Any, targets: Any) -> Any:
        # As in inference: what matters to the network as it is.
        return ops.mean(entropy(targets, tunable.predicted(inputs, examples.are_pixels)))

    gradients = gradients_of(loss_of, variables, tunable.variables)
    batch_size = options.batch_size
    order = np.random.default_rng(options.seed).permutation(examples.train)
    rows = order[: _NUM_BATCHES * batch_size]
    totals: list[Any] = [0.0] * len(kernels)
    for batch in np.split(rows, range(batch_size, len(rows), batch_size)):
        found = gradients(examples.inputs[batch, 0], examples.targets[batch])
        for i, ((layer, kernel), gradient) in enumerate(zip(kernels, found, strict=True)):
            values = np.asarray(gradient, np.float64)
            if options.importance == "taylor":
                totals[i] += _sum_of(layer, values * np.asarray(kernel.value)) ** 2
            else:
                totals[i] += _sum_of(layer, values**2)
    return totals


def _sum_of(layer: "keras.Layer", values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over all weights of each output channel."""
    channels = 2 if _is_depthwise(layer) else 1  # the last axes that count them
    return np.asarray(values.sum(axis=tuple(range(values.ndim - channels)))).ravel()
