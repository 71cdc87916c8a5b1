"""The layers of a network: their names, and what they give."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from embedder.libraries import import_keras

if TYPE_CHECKING:  # Keras takes seconds to import, and most commands do not need it
    import keras

_Value = TypeVar("_Value")


def leaf_layers(network: "keras.Layer") -> "Iterator[keras.Layer]":
    """Layers that are not models themselves, in the network's order; of such a layer, itself."""
    if not hasattr(network, "layers"):
        yield network
        return
    for layer in network.layers:
        yield from leaf_layers(layer)


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


def with_canonical_names(
    by_name: dict[str, _Value], layers: "Iterable[keras.Layer] | None" = None
) -> dict[str, _Value]:
    """The same values, those of layers that Keras named by counting counted from nought.

    Keras counts on through a whole process, so that such names depend on what was built before.
    Names are counted of which `layers` are, or the values themselves where they are layers.
    """
    counted = set(map(_counted_name, by_name.values() if layers is None else layers))
    numbers = defaultdict(list)
    for name in by_name:
        stem, _, number = name.rpartition("_")
        if name in counted:
            numbers[name].append((0, name))
        elif stem in counted and number.isdecimal():
            numbers[stem].append((int(number), name))
    new_names = {
        name: f"{stem}_{rank}" if rank else stem
        for stem, found in numbers.items()
        for rank, (_, name) in enumerate(sorted(found))
    }
    return {new_names.get(name, name): value for name, value in by_name.items()}


def _counted_name(layer: Any) -> str:
    """What Keras counts on when a layer is given no name: `conv2d` for Conv2D."""
    words = re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", type(layer).__name__)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", words).lower()
