"""How a model is fine-tuned: strategies, and what is usual with them."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from embedder.errors import RequestError
from embedder.options import Name, checked
from embedder.training import ClassWeight, Seed

if TYPE_CHECKING:
    from embedder.finetuning.schedule import Schedule

SCRATCH = "scratch"
HEAD = "head"
StrategyName = Literal["head", "gradual", "full", "partial", "norm", "bias", "cut", "scratch"]
Augmentation = Literal["flip", "vertical-flip", "crop", "rotation", "colour", "mixup", "cutmix"]
Importance = Literal["taylor", "fisher"]
Count = Annotated[int, Field(ge=1)]
Factor = Annotated[float, Field(gt=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
LossWeight = Annotated[float, Field(ge=0.0)]


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


STRATEGIES: dict[StrategyName, Strategy] = {
    "head": Strategy(False, True, 30, 1e-3, optimizer="rmsprop"),
    "gradual": Strategy(True, False, 8, 1e-3, rate_decay=0.8),
    "full": Strategy(True, False, 6, 3e-4),
    "partial": Strategy(True, False, 8, 1e-2),
    "norm": Strategy(True, False, 6, 5e-3, rate_decay=0.8),
    "bias": Strategy(True, False, 6, 5e-3, rate_decay=0.8),
    "cut": Strategy(False, True, 20, 1e-3, rate_decay=0.5, hidden=128, dropout=0.5),
    "scratch": Strategy(False, False, 15, 1e-3, optimizer="adam", hidden=128, dropout=0.5),
}


@checked
class TuneOptions:
    """How a model is fine-tuned; None takes what is usual with the strategy."""

    strategy: Annotated[
        StrategyName, Field(description="Which weights are trained, and from which head on.")
    ] = "gradual"
    epochs: Annotated[Count | None, Field(description="The most there can be.")] = None
    batch_size: Annotated[Count, Field(description="Images of a step.")] = 32
    learning_rate: Annotated[
        float | None, Field(gt=0.0, description="Of the head, at its highest.")
    ] = None
    rate_decay: Annotated[
        Factor | None,
        Field(description="Factor of the rate from a group of blocks to the one below, to 1."),
    ] = None
    optimizer: Annotated[
        str | None, Field(description="Name of a Keras optimizer, such as adamw or sgd.")
    ] = None
    weight_decay: Annotated[
        float,
        Field(
            ge=0.0,
            description="Of kernels, apart from the gradient, in units of the learning rate.",
        ),
    ] = 1e-4
    label_smoothing: Annotated[BelowOne, Field(description="Share of a target, 0 to below 1.")] = (
        0.1
    )
    class_weight: ClassWeight = None
    unlabelled: Annotated[
        Name | None,
        Field(
            description="Images without labels, as extract takes them, that get pseudo-labels from "
            "the model where its guard finds that they help it."
        ),
    ] = None
    augment: Annotated[
        tuple[Augmentation, ...] | None,
        Field(description="Where training is from pixels; flip if absent."),
    ] = None
    views: Annotated[
        Count | None, Field(description="Of head and cut: views an image, 4 if absent.")
    ] = None
    cut: Annotated[
        str | None,
        Field(
            description="Of cut: the lowest block that is trained, such as conv5; found by "
            "itself if absent."
        ),
    ] = None
    from_pixels: Annotated[
        bool, Field(description="Of head and cut: compute what is below anew in each epoch.")
    ] = False
    blocks: Annotated[
        tuple[str, ...],
        Field(description="Of partial: blocks to choose channels in; those above the cut if none."),
    ] = ()
    fraction: Annotated[
        Factor, Field(description="Of partial: share of the channels, above 0 to 1.")
    ] = 0.05
    importance: Annotated[
        Importance, Field(description="Of partial: by what it chooses channels.")
    ] = "taylor"
    auxiliary: Annotated[
        str | None,
        Field(
            description="Layer whose pooled output gets a classifier of its own, in training only."
        ),
    ] = None
    loss_weights: Annotated[
        tuple[LossWeight, LossWeight],
        Field(description="Of the losses of the auxiliary and the main classifier."),
    ] = (1.0, 10.0)
    pooling: Annotated[
        Literal["avg", "max", "gem", "flatten"] | None,
        Field(description="Of a new head's features; the model's if absent."),
    ] = None
    hidden: Annotated[
        int | None,
        Field(ge=0, description="Of a new head: units of its hidden layer, 0 for none."),
    ] = None
    dropout: Annotated[BelowOne | None, Field(description="Of a new head, 0 to below 1.")] = None
    train_norm: Annotated[bool, Field(description="Train BatchNormalization's statistics too.")] = (
        False
    )
    ema: Annotated[
        BelowOne | None,
        Field(description="Momentum of the average of the weights to keep, 0 to below 1."),
    ] = None
    patience: Annotated[Count, Field(description="Epochs without gain before the end.")] = 5
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="Of training; auto is bfloat16 on GPUs that have it."),
    ] = "auto"
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Refuse options that would not be heeded.

        Raises:
            RequestError: One would not.
        """
        kind, name = self.kind, self.strategy
        with_new_head = not kind.keeps_head, "strategies with a new head"
        with_whole_blocks = name not in (HEAD, "partial"), "strategies that train whole blocks"
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
                name not in (HEAD, SCRATCH),
                "strategies that train a pretrained network",
            ),
            "loss_weights": (self.auxiliary is not None, "training with `auxiliary`"),
        }
        for field in fields(self):
            is_heeded, whose = heeded.get(field.name, (True, ""))
            value = getattr(self, field.name)
            if not is_heeded and value != field.default:
                raise RequestError(
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

    def schedule(self) -> "Schedule":
        """How training goes."""
        from embedder.finetuning.schedule import Schedule  # numpy is for those who train

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
