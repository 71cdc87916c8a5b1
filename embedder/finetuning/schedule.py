"""How a network is trained: which variables with which optimizer, for how long and how fast."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from embedder.errors import RequestError
from embedder.libraries import import_keras

if TYPE_CHECKING:
    import keras

_MOMENTUM = 0.9  # of SGD, which is hardly ever wanted without


@dataclass(frozen=True)
class Group:
    """Variables that are trained alike.

    Attributes:
        name: Of the group's block.
        variables: What is trained.
        rate: Factor of the learning rate.
        from_epoch: First epoch in which they are trained, from 1.
        masks: For each variable 1 where it may change and 0 where it must not, broadcast to its
            shape; None where all of it may. Empty where that is so of all of them.
    """

    name: str
    variables: "list[keras.Variable]"
    rate: float = 1.0
    from_epoch: int = 1
    masks: list[NDArray[np.float32] | None] = field(default_factory=list)

    @property
    def masked(self) -> "list[tuple[keras.Variable, NDArray[np.float32] | None]]":
        """Each variable with its mask, of the same shape."""
        masks = self.masks or [None] * len(self.variables)
        return list(zip(self.variables, masks, strict=True))


@dataclass(frozen=True)
class Schedule:
    """How training goes.

    Attributes:
        epochs: The most there can be.
        batch_size: Images of a step.
        learning_rate: Of the head, at its highest: it rises from 0 over a share of `warmup` of a
            group's steps, and falls to 0 by a cosine (arXiv 1608.03983, without restarts).
        optimizer: Name of a Keras optimizer.
        weight_decay: Apart from the gradient, in units of the learning rate, of kernels.
        warmup: Share of the steps, 0 to below 1.
        label_smoothing: Share of a target that is spread over all classes, 0 to below 1.
        loss_weights: Of the auxiliary and the main head's losses.
        ema: Momentum of the average of the weights that is judged and kept, 0 to below 1; None to
            keep the weights themselves.
        patience: Epochs without a lower validation loss after which training stops. What it starts
            from does not count: a head that fits is unsettled first, for several epochs.
        seed: Of order, views and dropout.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    warmup: float = 0.1
    label_smoothing: float = 0.0
    loss_weights: tuple[float, float] = (1.0, 1.0)
    ema: float | None = None
    patience: int = 5
    seed: int = 0


def find_optimizer(name: str) -> "type[keras.Optimizer]":
    """A kind of optimizer by its name.

    Raises:
        RequestError: Keras has no such optimizer.
    """
    try:
        return type(import_keras().optimizers.get(name))
    except ValueError:
        raise RequestError(
            f"`optimizer` must be the name of a Keras optimizer, such as adamw, rmsprop or "
            f"sgd. Received: optimizer={name}"
        ) from None


def make_optimizer(group: Group, schedule: Schedule, steps_per_epoch: int) -> "keras.Optimizer":
    """An optimizer for one group: Keras has one learning rate for each optimizer.

    Args:
        group: Its rate, and the epoch it begins in.
        schedule: The optimizer's name, its rate and its warm-up.
        steps_per_epoch: Batches.

    Raises:
        RequestError: As in `find_optimizer`.
    """
    keras = import_keras()
    steps = max(1, (schedule.epochs + 1 - group.from_epoch) * steps_per_epoch)
    warmup = round(schedule.warmup * steps)
    peak = schedule.learning_rate * group.rate
    rate = keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else peak,
        max(1, steps - warmup),
        warmup_target=peak if warmup else None,
        warmup_steps=warmup,
    )
    kind = find_optimizer(schedule.optimizer)
    extra = {"momentum": _MOMENTUM} if kind is keras.optimizers.SGD else {}
    optimizer = kind(rate, weight_decay=schedule.weight_decay or None, **extra)
    if schedule.weight_decay:
        # A decay would change what a mask keeps, and biases and scales are not to fade.
        kept = [v for v, mask in group.masked if mask is not None or len(v.shape) < 2]
        optimizer.exclude_from_weight_decay(var_list=kept)
    optimizer.build(group.variables)
    return optimizer
