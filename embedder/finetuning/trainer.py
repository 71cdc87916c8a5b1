"""The training of a tunable network: epochs, early stopping, and going on after a kill."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, dataclasses

from embedder.errors import Unfinished
from embedder.files import os_errors_as, whole_file
from embedder.finetuning.augmentation import Augmenter
from embedder.finetuning.gradients import compiled, training_step
from embedder.finetuning.inputs import Examples
from embedder.finetuning.network import TrainableNetwork
from embedder.finetuning.schedule import Group, Schedule, make_optimizer
from embedder.heads import calibrate
from embedder.libraries import import_keras, keras_backend

if TYPE_CHECKING:
    import keras


@dataclasses.dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Epoch:
    """What an epoch came to; other values than these are refused, as of a damaged checkpoint.

    Attributes:
        number: From 1; 0 is what training starts from.
        loss: Mean over its training batches.
        validation_loss: Log-loss at its best temperature, as the finished model is calibrated.
        validation_accuracy: 0 to 1.
        seconds: Of training and validation.
    """

    number: int
    loss: float | None
    validation_loss: float | None
    validation_accuracy: float | None
    seconds: float

    def __str__(self) -> str:
        """In a line."""
        facts = [f"{self.seconds:.1f} s"]
        if self.validation_loss is not None:
            facts.insert(0, f"accuracy {self.validation_accuracy:.3f}")
            facts.insert(0, f"validation log-loss {self.validation_loss:.3f}")
        if self.loss is not None:
            facts.insert(0, f"loss {self.loss:.3f}")
        return f"epoch {self.number}: {', '.join(facts)}"


def train(
    tunable: TrainableNetwork,
    groups: list[Group],
    examples: Examples,
    schedule: Schedule,
    augmenter: Augmenter,
    checkpoint: Path | None = None,
    watch: Callable[[Epoch], None] = lambda _: None,
) -> list[Epoch]:
    """Train until the validation loss no longer falls; the weights of its lowest are kept.

    After each epoch all that decides the rest is written to `checkpoint`, in one rename; where
    there is such a file, training goes on from it. The order of the images, the views and the
    random states of layers are part of it, so that a training that was killed ends as if it had
    not been, up to the rounding of sums in another order.

    Args:
        tunable: Network and heads; its weights change.
        groups: What is trained, and how.
        examples: What is learned from.
        schedule: Epochs, batches, rates and losses.
        augmenter: What is done to training batches of pixels.
        checkpoint: File to continue from and to write; None for none.
        watch: Called after each epoch.

    Returns:
        All epochs, those before a kill too.

    Raises:
        Unfinished: The loss is not finite, or the checkpoint is of another training.
    """
    trainer = _Trainer(tunable, groups, examples, schedule, augmenter)
    if checkpoint is not None and checkpoint.exists():
        trainer.restore(checkpoint)
    else:
        trainer.judge_start()
        watch(trainer.epochs[0])
    while not trainer.is_finished:
        trainer.run_epoch()
        if checkpoint is not None:
            trainer.save(checkpoint)
        watch(trainer.epochs[-1])
    trainer.take_best()
    return trainer.epochs


class _Trainer:
    """A training between two epochs."""

    def __init__(
        self,
        tunable: TrainableNetwork,
        groups: list[Group],
        examples: Examples,
        schedule: Schedule,
        augmenter: Augmenter,
    ) -> None:
        self._tunable, self._examples, self._schedule = tunable, examples, schedule
        self._groups, self._augmenter = groups, augmenter
        steps_per_epoch = -(-len(examples.train) // schedule.batch_size)
        self._optimizers = [make_optimizer(group, schedule, steps_per_epoch) for group in groups]
        models = [tunable.upper, *tunable.heads, *augmenter.layers]
        found = {id(v): v for model in models for v in model.variables}
        self._variables = list(found.values())
        trained = [variable for group in groups for variable in group.variables]
        self._averages = [] if schedule.ema is None else [_copy_of(v) for v in trained]
        self._trained = trained
        self._best: list[NDArray[Any]] = []
        self._logits = compiled(
            lambda inputs: tunable.predicted(inputs, examples.are_pixels), tunable.variables
        )
        self._step: Any = None
        self._active = 0
        self.epochs: list[Epoch] = []

    @property
    def _losses(self) -> list[float]:
        """Of validation, of each epoch; none without validation images."""
        return [x.validation_loss for x in self.epochs if x.validation_loss is not None]

    @property
    def is_finished(self) -> bool:
        if len(self.epochs) > self._schedule.epochs:
            return True
        losses = self._losses[1:]
        return bool(losses) and len(losses) - 1 - int(np.argmin(losses)) >= self._schedule.patience

    def judge_start(self) -> None:
        """Take what training starts from as its epoch 0: what is no better is not kept."""
        began = time.perf_counter()
        validation = self._validate()
        self.epochs = [Epoch(0, None, *validation, round(time.perf_counter() - began, 2))]

    def run_epoch(self) -> None:
        number, began = len(self.epochs), time.perf_counter()
        active = sum(group.from_epoch <= number for group in self._groups)
        if active != self._active:  # a block more is trained from here on
            self._active, self._step = active, self._make_step(number)
        total, num_images = 0.0, 0
        for inputs, targets, weights in self._batches(number):
            total += float(self._step(inputs, targets, weights)) * len(targets)
            num_images += len(targets)
        loss = total / num_images
        if not np.isfinite(loss):
            raise Unfinished(
                f"Training diverged: its loss in epoch {number} is {loss}. Run it anew with a "
                f"lower learning rate than {self._schedule.learning_rate}"
            )
        validation = self._validate()
        seconds = round(time.perf_counter() - began, 2)
        self.epochs.append(Epoch(number, loss, *validation, seconds))

    def _batches(self, number: int) -> Iterator[tuple[NDArray[Any], ...]]:
        examples = self._examples
        random = np.random.default_rng([self._schedule.seed, number])
        order = random.permutation(examples.train)
        views = random.integers(examples.inputs.shape[1], size=len(order))
        for start in range(0, len(order), self._schedule.batch_size):
            part = slice(start, start + self._schedule.batch_size)
            rows = order[part]
            yield examples.inputs[rows, views[part]], examples.targets[rows], examples.weights[rows]

    def _make_step(self, number: int) -> Any:
        schedule, tunable, ops = self._schedule, self._tunable, import_keras().ops
        groups = zip(self._groups, self._optimizers, strict=True)
        active = [(g, o) for g, o in groups if g.from_epoch <= number]
        pairs = [pair for group, _ in active for pair in group.masked]
        variables, masks = [v for v, _ in pairs], [mask for _, mask in pairs]
        positions = {id(v): i for i, v in enumerate(self._trained)}
        averages = [self._averages[positions[id(v)]] for v in variables] if self._averages else []
        momentum = schedule.ema or 0.0
        entropy = self._examples.cross_entropy(schedule.label_smoothing)

        def loss_of(inputs: Any, targets: Any, weights: Any) -> Any:
            activations = inputs
            if self._examples.are_pixels:
                pixels, targets = self._augmenter(ops.cast(inputs, "float32"), targets)
                activations = tunable.below_the_cut(pixels)
            losses = [
                ops.mean(weights * entropy(targets, logits))
                for logits in tunable.logits(activations, training=True)
            ]
            weights_of_losses = reversed(schedule.loss_weights)
            return sum(w * x for w, x in zip(weights_of_losses, losses, strict=False))

        def update(gradients: Any) -> None:
            masked = iter(g if m is None else g * m for g, m in zip(gradients, masks, strict=True))
            for group, optimizer in active:
                optimizer.apply([next(masked) for _ in group.variables], group.variables)
            for average, variable in zip(averages, variables, strict=False):
                # In this form what has not changed is not rounded either.
                average.assign_add((1.0 - momentum) * (variable - average))

        return training_step(loss_of, update, variables, self._state, tunable.variables)

    def _validate(self) -> tuple[float | None, float | None]:
        """Loss and accuracy on the validation images; remembers the best weights."""
        rows = self._examples.validation
        if not len(rows):
            return None, None
        raw = self._swap_averages()
        loss, accuracy = _judge(self._logits, self._examples, rows, self._schedule)
        if all(loss < other for other in self._losses):
            self._best = [_array(variable) for variable in self._variables]
        self._assign(self._trained, raw)
        return loss, accuracy

    def _swap_averages(self) -> list[NDArray[Any]]:
        raw = [_array(v) for v in self._trained] if self._averages else []
        self._assign(self._trained, self._averages)
        return raw

    @staticmethod
    def _assign(variables: "list[keras.Variable]", values: Any) -> None:
        for variable, value in zip(variables, values, strict=False):
            variable.assign(value)

    def take_best(self) -> None:
        """Put the weights that are kept into the network."""
        if self._best:
            self._assign(self._variables, self._best)
        else:
            self._swap_averages()

    @property
    def _state(self) -> "list[keras.Variable]":
        kept = [v for optimizer in self._optimizers for v in optimizer.variables]
        return [*self._variables, *self._averages, *kept]

    def save(self, path: Path) -> None:
        """Write all that decides the rest of the training, in one rename."""
        arrays = {f"state_{i}": _array(v) for i, v in enumerate(self._state)}
        arrays |= {f"best_{i}": value for i, value in enumerate(self._best)}
        arrays["backend"] = np.array(keras_backend())
        arrays["epochs"] = np.array(json.dumps([asdict(epoch) for epoch in self.epochs]))
        unwritable = os_errors_as(Unfinished, f"The checkpoint {path} cannot be written")
        with unwritable, whole_file(path) as file:
            np.savez(file, allow_pickle=False, **arrays)

    def restore(self, path: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            Unfinished: It is damaged or of another training.
        """
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = dict(file)
            epochs = [Epoch(**values) for values in json.loads(str(arrays["epochs"]))]
            num_best = sum(name.startswith("best_") for name in arrays)
            best = [arrays[f"best_{i}"] for i in range(num_best)]
        except Exception as error:  # NumPy, zipfile and zlib raise what a damaged file makes them
            reason = repr(error).splitlines()[0]  # pydantic says more
            raise Unfinished(
                f"The checkpoint {path} cannot be read: {reason}. Delete it, to begin anew"
            ) from error
        if (backend := str(arrays.get("backend", "tensorflow"))) != keras_backend():
            # Random layers draw other numbers there.
            raise Unfinished(
                f"The checkpoint {path} must be of a training on {keras_backend()}, which this is. "
                f"Received: one on {backend}. Delete it, to begin anew"
            )
        state = [arrays.get(f"state_{i}") for i in range(len(self._state))]
        if f"state_{len(state)}" in arrays or not (
            _fit(state, self._state) and (not best or _fit(best, self._variables)) and epochs
        ):
            raise Unfinished(f"The checkpoint {path} is of another network. Delete it")
        self._assign(self._state, state)
        self._best, self.epochs = best, epochs


def _fit(arrays: list[NDArray[Any] | None], variables: "list[keras.Variable]") -> bool:
    """Whether arrays are of the shapes of these variables, and of numbers."""
    return len(arrays) == len(variables) and all(
        array is not None and array.shape == tuple(variable.shape) and array.dtype.kind in "fiub"
        for array, variable in zip(arrays, variables, strict=True)
    )


def _array(variable: "keras.Variable") -> NDArray[Any]:
    found: NDArray[Any] = np.asarray(variable.value)
    return found.copy()


def _copy_of(variable: "keras.Variable") -> "keras.Variable":
    return import_keras().Variable(_array(variable), trainable=False, dtype="float32")


def _judge(
    logits_of: Any, examples: Examples, rows: NDArray[np.int64], schedule: Schedule
) -> tuple[float, float]:
    """Log-loss at its best temperature and accuracy on examples, seen in their first view."""
    batches = np.split(rows, range(schedule.batch_size, len(rows), schedule.batch_size))
    logits = np.concatenate([np.asarray(logits_of(examples.inputs[b, 0])) for b in batches])
    targets = examples.targets[rows]
    codes = targets.astype(np.int64) if examples.is_multilabel else targets.argmax(axis=1)
    scores = calibrate(logits, codes).scores
    return scores["log_loss"], scores["accuracy"]
