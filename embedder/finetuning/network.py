"""A backbone and a head as one network that can be trained."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embedder.backbones import (
    layer_outputs,
    leaf_layers,
    load_network,
    pool,
    row_of,
    tapped_tensors,
)
from embedder.errors import RequestError
from embedder.finetuning.blocks import can_cut
from embedder.libraries import import_keras
from embedder.recipe import Recipe

if TYPE_CHECKING:
    import keras

FEATURES = "features"  # as a cut: above the pooling
_AUXILIARY = "auxiliary"


@dataclass(frozen=True)
class TrainableNetwork:
    """A network from pixels, or from activations at a cut, to logits.

    Attributes:
        network: The whole backbone, from preprocessed pixels on; its weights are what is saved.
        preprocess: Brings float32 RGB (batch, height, width, 3), 0 to 255, to what it takes.
        lower: Its part below the cut, never trained and always in inference mode; None without a
            cut.
        upper: The rest, from preprocessed pixels or from activations at the cut, to features.
        head: From features (batch, dim) to logits (batch, n_classes).
        auxiliary_head: From the pooled output of an earlier layer to logits of its own, in
            training only (deep supervision, arXiv 1409.5185); None for none.
    """

    network: "keras.Model"
    preprocess: Any
    lower: "keras.Model | None"
    upper: "keras.Model"
    head: "keras.Sequential"
    auxiliary_head: "keras.Sequential | None" = None

    @property
    def heads(self) -> "list[keras.Sequential]":
        """The head and, where there is one, the auxiliary head."""
        return [self.head] if self.auxiliary_head is None else [self.head, self.auxiliary_head]

    @property
    def variables(self) -> "list[keras.Variable]":
        """All weights, of heads too, and the states of random layers."""
        return [v for model in (self.network, *self.heads) for v in model.variables]

    def below_the_cut(self, pixels: Any) -> Any:
        """Activations at the cut, of RGB (batch, height, width, 3) of 0 to 255."""
        x = self.preprocess(import_keras().ops.cast(pixels, "float32"))
        return x if self.lower is None else self.lower(x, training=False)

    def logits(self, activations: Any, training: bool = False) -> list[Any]:
        """Logits of each head, float32 (batch, n_classes), the main one's first."""
        outputs = self.upper(activations, training=training)
        ops = import_keras().ops
        found = [self.head(ops.cast(outputs[FEATURES], "float32"), training=training)]
        if self.auxiliary_head is not None:
            found.append(self.auxiliary_head(outputs[_AUXILIARY], training=training))
        return found

    def predicted(self, inputs: Any, are_pixels: bool) -> Any:
        """Logits of the main head in inference, of pixels or of activations at the cut."""
        return self.logits(self.below_the_cut(inputs) if are_pixels else inputs)[0]


def make_trainable(
    recipe: Recipe,
    column: str,
    network: "keras.Model | None" = None,
    cut: str | None = None,
    auxiliary: str | None = None,
) -> TrainableNetwork:
    """Make a recipe's backbone trainable; its heads are still to be added.

    BatchNormalization is frozen, layer by layer: calling the network with `training=False` does
    not keep it in inference mode once `fit` trains it (keras#20285), and a few hundred images must
    not replace the statistics of a million. `thaw_normalisation` undoes it.

    Args:
        recipe: What its features are made with.
        column: Which feature, where there are several.
        network: The backbone, in place of the recipe's own.
        cut: Layer after which the network is cut, or `FEATURES`; None to train from pixels on.
        auxiliary: Layer above the cut whose pooled output is given too.

    Raises:
        RequestError: A layer does not exist, or is not where it must be.
        WeightsError: The weights are not at hand.
    """
    keras = import_keras()
    network = network or load_network(recipe)
    network.trainable = True  # a network of the user's may be saved frozen
    for layer in leaf_layers(network):
        if is_normalisation(layer):
            layer.trainable = False
    top = tapped_tensors(network, recipe)[column]
    features = pool(top, recipe.pooling, column)
    if recipe.l2_normalise:
        features = keras.layers.UnitNormalization()(features)
    outputs = {FEATURES: keras.layers.Identity(dtype="float32")(features)}
    named = dict(layer_outputs(network)) | {FEATURES: features}
    below = keras.Model(network.inputs, top)
    bottom = network.inputs
    if cut is not None:
        bottom = _named(named, cut, "cut")
        if not can_cut(network, bottom, outputs[FEATURES]):
            raise RequestError(f"The network cannot be cut in two there. Received: cut={cut}")
    if auxiliary is not None:
        tensor = _named(named, auxiliary, "auxiliary")
        is_below = all(tensor is not layer.output for layer in below.operations)
        if is_below or (cut is not None and not can_cut(network, bottom, tensor)):
            raise RequestError(
                f"The auxiliary output must be of a layer above the cut and below the features. "
                f"Received: auxiliary={auxiliary}"
            )
        outputs[_AUXILIARY] = pool(tensor, "avg", _AUXILIARY)
    return TrainableNetwork(
        network=network,
        preprocess=row_of(recipe).preprocess,
        lower=None if cut is None else keras.Model(network.inputs, bottom),
        upper=keras.Model(bottom, outputs),
        head=keras.Sequential(),  # still to come
    )


def _named(outputs: "dict[str, keras.KerasTensor]", layer: str, option: str) -> "keras.KerasTensor":
    if layer not in outputs:
        raise RequestError(
            f"`{option}` must name a layer, as `embedder backbones NAME --layers` lists them, such "
            f"as {', '.join(list(outputs)[-5:])}. Received: {option}={layer}"
        )
    return outputs[layer]


def seed_layers(network: "keras.Model", seed: int) -> None:
    """Seed what layers such as dropout draw in training, each by its index in the network."""
    generator = import_keras().random.SeedGenerator
    for number, layer in enumerate(leaf_layers(network)):
        for value in vars(layer).values():
            if isinstance(value, generator):
                value.state.assign([seed, number])


def is_normalisation(layer: "keras.Layer") -> bool:
    """Whether it is BatchNormalization, whose statistics training would change."""
    return isinstance(layer, import_keras().layers.BatchNormalization)


def thaw_normalisation(layers: "list[keras.Layer]") -> None:
    """Let BatchNormalization among these layers learn from batches, statistics and all."""
    for layer in layers:
        if is_normalisation(layer):
            layer.trainable = True
