"""Output channels of a network by their importance, so that only a few of them are tuned."""

from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from embedder.errors import RequestError
from embedder.finetuning.inputs import Examples
from embedder.finetuning.network import TrainableNetwork
from embedder.finetuning.options import Importance
from embedder.finetuning.trainer import compiled
from embedder.libraries import import_keras

if TYPE_CHECKING:
    import keras

CRITERIA = get_args(Importance)
_NUM_BATCHES = 8  # more change a few of the chosen channels, at the cost of an epoch


def channel_masks(
    tunable: TrainableNetwork,
    layers: "list[keras.Layer]",
    examples: Examples,
    fraction: float,
    criterion: Importance,
    batch_size: int,
    seed: int,
) -> "list[tuple[keras.Variable, NDArray[np.float32]]]":
    """Choose the output channels of each layer that matter most to the loss.

    Args:
        tunable: Network and trained head.
        layers: Of which channels are chosen: convolutions and dense layers; others are left out.
        examples: A few batches of its training images are looked at.
        fraction: Share of each layer's channels, above 0 to 1; at least one is chosen.
        criterion: `taylor`, the squared change of the loss that setting a channel's weights to 0
            would make, to first order (arXiv 1906.10771); `fisher`, the squared gradient, which is
            the diagonal of the empirical Fisher information (arXiv 2111.09839).
        batch_size: Images of a batch.
        seed: Of which images.

    Returns:
        Kernels and biases, with 1 where a value belongs to a chosen channel and 0 elsewhere.

    Raises:
        RequestError: No layer has channels.
    """
    kernels = [(layer, kernel) for layer in layers if (kernel := _kernel_of(layer)) is not None]
    if not kernels:
        raise RequestError("The blocks must have layers with channels. Received: none that has any")
    scores = _scores(tunable, kernels, examples, criterion, batch_size, seed)
    masks = []
    for (layer, kernel), score in zip(kernels, scores, strict=True):
        chosen = np.zeros(len(score), np.float32)
        chosen[np.argsort(-score, kind="stable")[: max(1, round(fraction * len(score)))]] = 1
        masks.append((kernel, np.broadcast_to(_spread(layer, kernel, chosen), kernel.shape)))
        bias = getattr(layer, "bias", None)
        if bias is not None:
            masks.append((bias, chosen))
    return [(variable, np.array(mask)) for variable, mask in masks]


def _kernel_of(layer: "keras.Layer") -> "keras.Variable | None":
    """The weights that make a layer's output channels."""
    for name in ("pointwise_kernel", "depthwise_kernel", "kernel"):
        kernel = getattr(layer, name, None)
        # Not `in`, which would compare the values of variables.
        is_own = any(kernel is weights for weights in layer.weights)
        if kernel is not None and is_own and len(kernel.shape) > 1:
            return kernel
    return None


def _spread(layer: "keras.Layer", kernel: "keras.Variable", values: NDArray[Any]) -> NDArray[Any]:
    """Values of the channels (n_channels,), in a shape that broadcasts to the kernel's."""
    return values.reshape(kernel.shape[-2:]) if _is_depthwise(layer) else values


def _is_depthwise(layer: "keras.Layer") -> bool:
    return isinstance(layer, import_keras().layers.DepthwiseConv2D)


def _scores(
    tunable: TrainableNetwork,
    kernels: "list[tuple[keras.Layer, keras.Variable]]",
    examples: Examples,
    criterion: Importance,
    batch_size: int,
    seed: int,
) -> list[NDArray[np.float64]]:
    """Importance of the output channels of each kernel, (n_channels,)."""
    import tensorflow as tf

    variables = [kernel for _, kernel in kernels]
    entropy = examples.cross_entropy()

    def gradients(inputs: Any, targets: Any) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([variable.value for variable in variables])
            # As in inference: what matters to the network as it is.
            logits = tunable.predicted(inputs, examples.are_pixels)
            loss = tf.reduce_mean(entropy(targets, logits))
        return tape.gradient(loss, [variable.value for variable in variables])

    gradients_of = compiled(gradients)
    rows = np.random.default_rng(seed).permutation(examples.train)[: _NUM_BATCHES * batch_size]
    totals = [np.zeros(_num_channels(*pair)) for pair in kernels]
    for batch in np.split(rows, range(batch_size, len(rows), batch_size)):
        found = gradients_of(examples.inputs[batch, 0], examples.targets[batch])
        for total, (layer, kernel), gradient in zip(totals, kernels, found, strict=True):
            if gradient is None:
                raise RequestError(
                    f"Channels can be chosen in layers that the features are made of. "
                    f"Received: {layer.name}"
                )
            values = np.asarray(gradient, np.float64)
            if criterion == "taylor":
                total += _sum_of(layer, values * kernel.numpy()) ** 2
            else:
                total += _sum_of(layer, values**2)
    return totals


def _num_channels(layer: "keras.Layer", kernel: "keras.Variable") -> int:
    return int(np.prod(kernel.shape[-2:])) if _is_depthwise(layer) else int(kernel.shape[-1])


def _sum_of(layer: "keras.Layer", values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over all weights of each output channel."""
    channels = 2 if _is_depthwise(layer) else 1  # the last axes that count them
    return np.asarray(values.sum(axis=tuple(range(values.ndim - channels)))).ravel()
