"""Strategies of fine-tuning: which weights are trained, from which head on, and how fast."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from embedder.backbones import leaf_layers
from embedder.errors import RecipeError
from embedder.finetuning.augmentation import check_augmentations
from embedder.finetuning.blocks import last_layers, layer_groups, layers_of
from embedder.finetuning.channels import CRITERIA, channel_masks
from embedder.finetuning.inputs import Examples
from embedder.finetuning.network import TrainableNetwork, is_normalisation, thaw_normalisation
from embedder.finetuning.schedule import Group, Schedule

if TYPE_CHECKING:
    import keras

SCRATCH = "scratch"
_HEAD = "head"


@dataclass(frozen=True)
class Strategy:
    """One way to fine-tune, and what is usual with it.

    Attributes:
        keeps_head: Whether it starts from the model's head, or from a new one.
        is_cut: Whether only what is above a cut is trained, from activations that are computed
            once.
        epochs: The most there are.
        learning_rate: Of the head.
        rate_decay: Factor of the learning rate from one group of blocks to the one below it
            (discriminative rates, arXiv 1801.06146).
        optimizer: Name of a Keras optimizer.
        hidden: Units of a new head's hidden layer; 0 for none.
        dropout: Of a new head.
    """

    keeps_head: bool
    is_cut: bool
    epochs: int
    learning_rate: float
    rate_decay: float = 1.0
    optimizer: str = "adamw"
    hidden: int = 0
    dropout: float = 0.0


STRATEGIES = {
    _HEAD: Strategy(False, True, 30, 1e-3, optimizer="rmsprop"),
    "gradual": Strategy(True, False, 8, 1e-3, rate_decay=0.8),
    "full": Strategy(True, False, 6, 3e-4),
    "partial": Strategy(True, False, 8, 1e-2),
    "norm": Strategy(True, False, 6, 5e-3, rate_decay=0.8),
    "bias": Strategy(True, False, 6, 5e-3, rate_decay=0.8),
    "cut": Strategy(False, True, 20, 1e-3, rate_decay=0.5, hidden=128, dropout=0.5),
    SCRATCH: Strategy(False, False, 15, 1e-3, optimizer="adam", hidden=128, dropout=0.5),
}


@dataclass(frozen=True)
class TuneOptions:
    """How a model is fine-tuned; None takes what is usual with the strategy.

    Attributes:
        strategy: Of `STRATEGIES`.
        epochs: The most there can be.
        batch_size: Images of a step.
        learning_rate: Of the head, at its highest.
        rate_decay: Factor of the rate from one group of blocks to the one below, above 0 to 1.
        optimizer: Name of a Keras optimizer.
        weight_decay: Apart from the gradient, in units of the learning rate.
        label_smoothing: 0 to below 1.
        class_weight: None, or `balanced`.
        unlabelled: Images without labels, as `extract` takes them, that get pseudo-labels from the
            model where its guard finds that they help it; None for none.
        augment: Of `finetuning.AUGMENTATIONS`, where training is from pixels; None for flip.
        views: Views an image, where activations are computed once; None for 4.
        cut: Lowest block that is trained above a cut; None for `finetuning.find_cut`'s own choice.
        from_pixels: Whether what is below a cut is computed anew in each epoch.
        blocks: Blocks in which `partial` chooses channels; none for those above the cut.
        fraction: Share of the channels that `partial` trains, above 0 to 1.
        importance: By what it chooses them; see `finetuning.channel_masks`.
        auxiliary: Layer whose pooled output gets a classifier of its own, in training only.
        loss_weights: Of the auxiliary and the main classifier's losses.
        pooling: Of a new head's features, as in `Recipe`; None for the model's.
        hidden: Units of a new head's hidden layer; 0 for none.
        dropout: Of a new head, 0 to below 1.
        train_norm: Whether BatchNormalization's statistics are trained too.
        ema: Momentum of the average of the weights that is kept, 0 to below 1; None for none.
        patience: As in `finetuning.Schedule`.
        precision: Of training: `float32`, `bfloat16`, or `auto`, which is bfloat16 on GPUs that
            have it.
        seed: Of all that is random.
    """

    strategy: str = "gradual"
    epochs: int | None = None
    batch_size: int = 32
    learning_rate: float | None = None
    rate_decay: float | None = None
    optimizer: str | None = None
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    class_weight: str | None = None
    unlabelled: str | None = None
    augment: tuple[str, ...] | None = None
    views: int | None = None
    cut: str | None = None
    from_pixels: bool = False
    blocks: tuple[str, ...] = ()
    fraction: float = 0.05
    importance: str = "taylor"
    auxiliary: str | None = None
    loss_weights: tuple[float, float] = (1.0, 10.0)
    pooling: str | None = None
    hidden: int | None = None
    dropout: float | None = None
    train_norm: bool = False
    ema: float | None = None
    patience: int = 5
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            RecipeError: A value makes no sense.
        """
        if self.strategy not in STRATEGIES:
            raise RecipeError(
                f"`strategy` must be one of {', '.join(STRATEGIES)}. Received: {self.strategy}"
            )
        check_augmentations(self.augment or ())
        allowed = {
            "epochs": ("at least 1", self.epochs is None or self.epochs >= 1),
            "batch_size": ("at least 1", self.batch_size >= 1),
            "learning_rate": ("above 0", self.learning_rate is None or self.learning_rate > 0),
            "rate_decay": ("above 0 to 1", self.rate_decay is None or 0 < self.rate_decay <= 1),
            "weight_decay": ("at least 0", self.weight_decay >= 0),
            "label_smoothing": ("0 to below 1", 0 <= self.label_smoothing < 1),
            "class_weight": ("balanced", self.class_weight in (None, "balanced")),
            "views": ("at least 1", self.views is None or self.views >= 1),
            "fraction": ("above 0 to 1", 0 < self.fraction <= 1),
            "importance": (f"one of {', '.join(CRITERIA)}", self.importance in CRITERIA),
            "loss_weights": ("at least 0", min(self.loss_weights) >= 0),
            "pooling": (
                "one of avg, max, gem, flatten",
                self.pooling in (None, "avg", "max", "gem", "flatten"),
            ),
            "hidden": ("at least 0", self.hidden is None or self.hidden >= 0),
            "dropout": ("0 to below 1", self.dropout is None or 0 <= self.dropout < 1),
            "ema": ("0 to below 1", self.ema is None or 0 <= self.ema < 1),
            "patience": ("at least 1", self.patience >= 1),
            "precision": (
                "one of auto, float32, bfloat16",
                self.precision in ("auto", "float32", "bfloat16"),
            ),
            "seed": ("at least 0", self.seed >= 0),
        }
        for name, (rule, is_kept) in allowed.items():
            if not is_kept:
                raise RecipeError(f"`{name}` must be {rule}. Received: {getattr(self, name)!r}")
        self._check_use()

    def _check_use(self) -> None:
        """Refuse options that would not be heeded."""
        kind, name = self.kind, self.strategy
        with_new_head = not kind.keeps_head, "strategies with a new head"
        with_whole_blocks = name not in (_HEAD, "partial"), "strategies that train whole blocks"
        with_partial = name == "partial", "the strategy partial"
        heeded = {
            "pooling": with_new_head,
            "hidden": with_new_head,
            "dropout": with_new_head,
            "cut": (name == "cut", "the strategy cut"),
            "from_pixels": (kind.is_cut, "the strategies head and cut"),
            "augment": (not self.is_cached, "training from pixels; activations have `views`"),
            "unlabelled": (not self.is_cached, "training from pixels"),
            "views": (self.is_cached, "training from activations; pixels have `augment`"),
            "train_norm": with_whole_blocks,
            "rate_decay": with_whole_blocks,
            "blocks": with_partial,
            "fraction": with_partial,
            "importance": with_partial,
            "auxiliary": (
                name not in (_HEAD, SCRATCH),
                "strategies that train a pretrained network",
            ),
            "loss_weights": (self.auxiliary is not None, "training with `auxiliary`"),
        }
        for field in fields(self):
            is_heeded, whose = heeded.get(field.name, (True, ""))
            value = getattr(self, field.name)
            if not is_heeded and value != field.default:
                raise RecipeError(
                    f"`{field.name}` is of {whose}. Received: strategy={name}, "
                    f"{field.name}={value!r}"
                )

    @property
    def kind(self) -> Strategy:
        """The strategy, as a row of the table."""
        return STRATEGIES[self.strategy]

    def resolved(self, name: str) -> Any:
        """An option's value, or what is usual with the strategy."""
        given = getattr(self, name)
        return getattr(self.kind, name) if given is None else given

    @property
    def is_cached(self) -> bool:
        """Whether training is from activations that are computed once."""
        return self.kind.is_cut and not self.from_pixels

    def schedule(self) -> Schedule:
        """How training goes."""
        return Schedule(
            epochs=self.resolved("epochs"),
            batch_size=self.batch_size,
            learning_rate=self.resolved("learning_rate"),
            optimizer=self.resolved("optimizer"),
            weight_decay=self.weight_decay,
            label_smoothing=self.label_smoothing,
            loss_weights=self.loss_weights if self.auxiliary else (0.0, 1.0),
            ema=self.ema,
            patience=self.patience,
            seed=self.seed,
        )


def tuned_blocks(tunable: TrainableNetwork, options: TuneOptions) -> "dict[str, list[keras.Layer]]":
    """Layers that are trained beside the heads, from the bottom up, by the name of their group.

    Raises:
        RecipeError: There are none, or there is no such block.
    """
    if options.strategy == _HEAD:
        return {}
    if options.strategy == "partial":
        named = [x for block in options.blocks for x in layers_of(tunable.network, block)]
        return {"channels": list(dict.fromkeys(named)) or last_layers(tunable.upper)}
    layers = list(leaf_layers(tunable.upper))
    if options.train_norm and not any(is_normalisation(layer) for layer in layers):
        raise RecipeError(
            f"`train_norm` is of networks with BatchNormalization. Received: train_norm=True for "
            f"{tunable.network.name}"
        )
    blocks = layer_groups(tunable.upper)
    if not any(_trained(layer, options) for found in blocks.values() for layer in found):
        raise RecipeError(
            f"The network must have weights that the strategy trains. Received: "
            f"strategy={options.strategy} for {tunable.network.name}, which has none"
        )
    return blocks


def plan_groups(tunable: TrainableNetwork, examples: Examples, options: TuneOptions) -> list[Group]:
    """What is trained, and how: a group for each few blocks, from the top, the heads first.

    Args:
        tunable: Network and heads.
        examples: What `partial` chooses channels by.
        options: How.

    Raises:
        RecipeError: As in `tuned_blocks` and `finetuning.channel_masks`.
    """
    heads = [variable for head in tunable.heads for variable in head.trainable_variables]
    groups, blocks = [Group("head", heads)], tuned_blocks(tunable, options)
    if options.strategy == "partial":
        return [*groups, _channels(tunable, blocks["channels"], examples, options)]
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


def _channels(
    tunable: TrainableNetwork, layers: "list[keras.Layer]", examples: Examples, options: TuneOptions
) -> Group:
    masked = channel_masks(
        tunable,
        layers,
        examples,
        options.fraction,
        options.importance,
        options.batch_size,
        options.seed,
    )
    variables, masks = zip(*masked, strict=True)
    return Group("channels", list(variables), masks=list(masks))


def num_tuned(groups: list[Group]) -> int:
    """Number of weights that training may change."""
    return sum(
        int(np.prod(variable.shape)) if mask is None else int(mask.sum())
        for group in groups
        for variable, mask in group.masked
    )
