"""Small Keras networks on cached features, as scikit-learn classifiers.

A head is one Keras model, the scaling of the features included: what is saved needs nothing else
to be right. All training goes one way, through batches: `KerasHead.fit` cuts them from arrays,
`store.shuffled_batches` reads them from a feature store that may be larger than memory.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import sklearn.utils.validation as checks
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets

from embedder.backbones import load_keras_model, save_network
from embedder.errors import RequestError, WeightsError
from embedder.libraries import import_keras

if TYPE_CHECKING:
    import keras

SCALINGS = ("standard", "l2", "none")
_LAYERS = ("Normalization", "UnitNormalization", "Rescaling", "Dense", "Dropout")
_ROWS_AT_ONCE = 8192  # through the network when nothing is learned: 40 MB at 1,280 features

Batch: TypeAlias = tuple[NDArray[Any], NDArray[Any]]  # features (n, dim) and labels of n images
MakeBatches: TypeAlias = Callable[[int], Iterable[Batch]]  # from the number of the epoch


class _TooFewClasses(RequestError, ValueError):  # noqa: N818 - says what it is
    """Both: the command line reports the one, scikit-learn's contract wants the other."""


class KerasHead(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """A linear or multi-layer classifier, trained with AdamW and a cosine learning rate.

    AdamW is of arXiv 1711.05101, the schedule of arXiv 1608.03983 without restarts, label smoothing
    of arXiv 1512.00567. The same seed and data give the same head on the same CPU, and no global
    random state is used.

    Args:
        hidden: Units of the hidden layers, each with ReLU; none for a linear head.
        dropout: Share of the values before the last layer that are set to 0: 0 to below 1.
        label_smoothing: Share of a target that is spread evenly over all classes: 0 to below 1.
        learning_rate: At the start; it falls to 0 over all epochs.
        weight_decay: Apart from the gradient, in units of the learning rate.
        batch_size: Images of one step, where batches are cut from arrays.
        epochs: The most epochs there can be, unless they are fewer steps than `min_steps`.
        min_steps: Batches that training may take at least: few images are gone through more often,
            and patience is as much longer.
        patience: Epochs without a lower validation loss after which training stops. The weights of
            the lowest loss are kept.
        validation_fraction: Share of the images, alike in every class, that is held out for that
            where no validation data are given; 0 trains for all `epochs`.
        class_weight: None, `balanced` or weights by class, as scikit-learn has them. Must be None
            where labels are multi-label.
        scaling: `standard` brings each feature to mean 0 and variance 1, `l2` each vector to the
            length sqrt(dim), so that its values are near 1 too; `none` leaves them.
        seed: Of initial weights, order, views, dropout and what is held out; at least 0.

    Attributes:
        classes_: (n_classes,) sorted; if multi-label, 0 to n_labels - 1.
        n_features_in_: Length of a vector.
        is_multilabel_: Whether an image can have several labels (multi-label).
        validation_losses_: One for each epoch; none where there were no validation data.
        network_: `keras.Sequential` from features (n, dim) to logits (n, n_classes), float32.
    """

    def __init__(
        self,
        *,
        hidden: tuple[int, ...] = (),
        dropout: float = 0.5,
        label_smoothing: float = 0.0,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.5,
        batch_size: int = 64,
        epochs: int = 30,
        min_steps: int = 0,
        patience: int = 10,
        validation_fraction: float = 0.1,
        class_weight: str | Mapping[Any, float] | None = None,
        scaling: str = "l2",
        seed: int = 0,
    ) -> None:
        """Keep the parameters; `fit` checks them."""
        self.hidden = hidden
        self.dropout = dropout
        self.label_smoothing = label_smoothing
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.epochs = epochs
        self.min_steps = min_steps
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.class_weight = class_weight
        self.scaling = scaling
        self.seed = seed

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that labels can be multi-label."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    def fit(self, X: ArrayLike, y: ArrayLike, validation: Batch | None = None) -> Self:  # noqa: N803
        """Train on arrays.

        Args:
            X: (n, dim); or (n, views, dim), of which each epoch sees one random view an image.
            y: (n,) labels of any type; or (n, n_labels), 1 where the image has the label.
            validation: Features (m, dim) and labels like `y`. Without them a share of the images is
                held out, and seen in its first view.

        Raises:
            RequestError: A parameter is out of its range, or there are fewer than two classes.
            ValueError: The arrays are not finite, or do not belong together.
        """
        self._check_parameters()
        features, labels = self._checked(X, y)
        is_held = np.zeros(len(labels), dtype=bool)
        if validation is None:
            is_held = _held_out(labels, self.validation_fraction, np.random.default_rng(self.seed))
        if is_held.any():
            validation = features[is_held, 0], labels[is_held]
        rows = np.flatnonzero(~is_held)

        def make_batches(epoch: int) -> Iterator[Batch]:
            random = np.random.default_rng((self.seed, epoch))
            order = random.permutation(rows)
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                views = random.integers(features.shape[1], size=len(chosen))
                yield features[chosen, views], labels[chosen]

        return self.fit_stream(make_batches, validation)

    def _checked(self, X: ArrayLike, y: ArrayLike) -> Batch:  # noqa: N803
        """Features (n, views, dim) and labels (n,) or (n, n_labels), as scikit-learn wants them."""
        if isinstance(X, np.ndarray) and X.ndim == 3:
            views = checks.check_array(X, dtype=np.float32, allow_nd=True)
            _, labels = checks.validate_data(self, views[:, 0], y, multi_output=True)
        else:
            features, labels = checks.validate_data(self, X, y, dtype=np.float32, multi_output=True)
            views = features[:, np.newaxis]
        check_classification_targets(labels)
        if labels.ndim == 1 or labels.shape[1] == 1:
            labels = checks.column_or_1d(labels, warn=True)
        elif not np.isin(labels, (0, 1)).all():
            raise ValueError("A matrix of labels must be of 0 and 1: multi-label")
        return views, labels

    def fit_stream(self, make_batches: MakeBatches, validation: Batch | None = None) -> Self:
        """Train on batches that are made anew for each epoch, such as by `store.shuffled_batches`.

        The batches of epoch 0 are gone through once before training: for the classes, their sizes
        and the scale of the features.

        Args:
            make_batches: Called with the number of each epoch, from 0. Features (n, dim) and labels
                as for `fit`.
            validation: Features (m, dim) and labels; without them training lasts all `epochs`.

        Raises:
            RequestError: A parameter is out of its range, or there are fewer than two classes.
            ValueError: Features are not finite.
        """
        self._check_parameters()
        scaler, num_batches, class_weights = self._survey(make_batches)
        self.network_ = self._network(scaler)
        num_epochs = max(self.epochs, math.ceil(self.min_steps / num_batches))
        patience = math.ceil(self.patience * num_epochs / self.epochs)
        trainer = self._trainer(num_epochs * num_batches)
        held_out = self._encoded(*validation, class_weights) if validation else None
        self.validation_losses_: list[float] = []
        best_weights = None
        for epoch in range(num_epochs):
            # Not `trainer.fit`: an error of `make_batches` would reach the caller as TensorFlow's.
            for features, labels in make_batches(epoch):
                trainer.train_on_batch(*self._encoded(features, labels, class_weights))
            if held_out is None:
                continue
            self.validation_losses_.append(_mean_loss(trainer, *held_out))
            best = int(np.argmin(self.validation_losses_))
            if best == epoch:
                best_weights = self.network_.get_weights()
            elif epoch - best >= patience:
                break
        if best_weights is not None:
            self.network_.set_weights(best_weights)
        return self

    def _check_parameters(self) -> None:
        allowed = {
            "hidden": ("numbers of units", all(units >= 1 for units in self.hidden)),
            "dropout": ("0 to below 1", 0 <= self.dropout < 1),
            "label_smoothing": ("0 to below 1", 0 <= self.label_smoothing < 1),
            "learning_rate": ("above 0", self.learning_rate > 0),
            "weight_decay": ("at least 0", self.weight_decay >= 0),
            "batch_size": ("at least 1", self.batch_size >= 1),
            "epochs": ("at least 1", self.epochs >= 1),
            "min_steps": ("at least 0", self.min_steps >= 0),
            "patience": ("at least 1", self.patience >= 1),
            "validation_fraction": ("0 to below 1", 0 <= self.validation_fraction < 1),
            "scaling": (f"one of {', '.join(SCALINGS)}", self.scaling in SCALINGS),
            "seed": ("at least 0", self.seed >= 0),
        }
        for name, (rule, is_kept) in allowed.items():
            if not is_kept:
                raise RequestError(f"`{name}` must be {rule}. Received: {getattr(self, name)!r}")

    def _survey(self, make_batches: MakeBatches) -> tuple[StandardScaler, int, NDArray[np.float32]]:
        """One epoch's scale of features, number of batches and weights of the classes."""
        scaler, num_batches = StandardScaler(), 0
        sizes: dict[Any, int] = {}
        self.is_multilabel_ = False
        for features, labels in make_batches(0):
            scaler.partial_fit(checks.check_array(features, dtype=np.float32))
            num_batches += 1
            self.is_multilabel_ = labels.ndim == 2
            found = np.arange(labels.shape[1]) if self.is_multilabel_ else labels
            for label, size in zip(*np.unique(found, return_counts=True), strict=True):
                sizes[label] = sizes.get(label, 0) + int(size)
        if len(sizes) < 2:
            raise _TooFewClasses(
                f"Labels must name at least two classes. Received: {len(sizes)} class(es)"
            )
        self.classes_ = np.array(sorted(sizes))
        self.n_features_in_ = scaler.n_features_in_
        labels = np.repeat(self.classes_, [sizes[label] for label in self.classes_])
        if self.is_multilabel_ and self.class_weight is not None:
            raise RequestError(
                f"`class_weight` must be None where labels are multi-label. "
                f"Received: {self.class_weight!r}"
            )
        weights = compute_class_weight(self.class_weight, classes=self.classes_, y=labels)
        return scaler, num_batches, weights.astype(np.float32)

    def _encoded(
        self, features: NDArray[Any], labels: NDArray[Any], class_weights: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], ...]:
        """What Keras learns from: features, targets (n, n_classes) and weights (n,), float32."""
        features = np.asarray(features, np.float32)
        if self.is_multilabel_:
            return features, np.asarray(labels, np.float32), np.ones(len(labels), np.float32)
        codes = np.searchsorted(self.classes_, labels).clip(max=len(self.classes_) - 1)
        is_unknown = self.classes_[codes] != labels
        if is_unknown.any():
            raise RequestError(
                f"Every label must be one of the classes of training. "
                f"Received: {np.unique(labels[is_unknown]).tolist()}"
            )
        return features, np.eye(len(self.classes_), dtype=np.float32)[codes], class_weights[codes]

    def _network(self, scaler: StandardScaler) -> "keras.Sequential":
        keras = import_keras()
        # Without seeds Keras draws them from Python's global state.
        random = np.random.default_rng(self.seed)
        seeds = random.integers(2**31, size=len(self.hidden) + 2).tolist()
        layers = [keras.Input((self.n_features_in_,))]
        if self.scaling == "standard":
            # `scale_` is 1 where a feature is constant, so that no noise in it is blown up.
            mean, variance = scaler.mean_.tolist(), (scaler.scale_**2).tolist()
            layers.append(keras.layers.Normalization(mean=mean, variance=variance))
        elif self.scaling == "l2":
            layers.append(keras.layers.UnitNormalization())
            layers.append(keras.layers.Rescaling(math.sqrt(self.n_features_in_)))
        num_classes = len(self.classes_)
        layers += classifier_layers(self.hidden, self.dropout, num_classes, seeds[::-1])
        return keras.Sequential(layers)

    def _trainer(self, num_steps: int) -> "keras.Model":
        """A model of the same layers, so that no optimizer is saved with the network."""
        keras = import_keras()
        entropy = "BinaryCrossentropy" if self.is_multilabel_ else "CategoricalCrossentropy"
        loss = getattr(keras.losses, entropy)
        schedule = keras.optimizers.schedules.CosineDecay(self.learning_rate, num_steps)
        trainer = keras.Model(self.network_.inputs, self.network_.outputs)
        trainer.compile(
            keras.optimizers.AdamW(schedule, weight_decay=self.weight_decay),
            loss(from_logits=True, label_smoothing=self.label_smoothing),
            jit_compile=False,  # XLA would compile once more for each last, smaller batch
        )
        # Else the first step makes its variables, and is traced a second time for that.
        trainer.optimizer.build(trainer.trainable_variables)
        return trainer

    def _logits(self, X: ArrayLike) -> NDArray[np.float32]:  # noqa: N803
        checks.check_is_fitted(self)
        features = checks.validate_data(self, X, dtype=np.float32, reset=False)
        starts = range(0, len(features), _ROWS_AT_ONCE)
        blocks = [self.network_(features[start : start + _ROWS_AT_ONCE]) for start in starts]
        return np.concatenate([np.asarray(block) for block in blocks])

    def decision_function(self, X: ArrayLike) -> NDArray[np.float32]:  # noqa: N803
        """The network's logits of features (n, dim).

        Returns:
            float32 (n, n_classes), in the order of `classes_`; of two classes (n,), the second's
            less the first's, as scikit-learn has it.
        """
        logits = self._logits(X)
        is_binary = len(self.classes_) == 2 and not self.is_multilabel_
        return logits[:, 1] - logits[:, 0] if is_binary else logits

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float32]:  # noqa: N803
        """The probabilities of the classes, of features (n, dim).

        Returns:
            float32 (n, n_classes), 0 to 1. They sum to 1, unless labels are multi-label.
        """
        logits = self._logits(X)
        return np.asarray(expit(logits) if self.is_multilabel_ else softmax(logits, axis=1))

    def predict(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """The likeliest class of each image (n,); or int64 (n, n_labels), 1 for those above 0.5."""
        logits = self._logits(X)
        if self.is_multilabel_:
            return (logits > 0).astype(np.int64)
        return np.asarray(self.classes_[logits.argmax(axis=1)])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the network to a `.keras` file; `to_json` has the rest."""
        checks.check_is_fitted(self)
        save_network(self.network_, Path(path))

    def to_json(self) -> dict[str, Any]:
        """What `load` needs besides the network, in values of JSON."""
        checks.check_is_fitted(self)
        parameters = self.get_params() | {"hidden": list(self.hidden)}
        labels = {"classes": self.classes_.tolist(), "is_multilabel": self.is_multilabel_}
        return {"parameters": parameters, **labels}

    @classmethod
    def load(cls, path: str | os.PathLike[str], description: Any) -> Self:
        """Bring back a head; no code of the file is run.

        Args:
            path: What `save` wrote.
            description: What `to_json` gave.

        Raises:
            WeightsError: The file is damaged, holds other layers than a head has, or does not
                belong to the description.
        """
        try:
            parameters = description["parameters"]
            head = cls(**parameters | {"hidden": tuple(parameters["hidden"])})
            head._check_parameters()
            head.classes_ = np.array(list(description["classes"]))
            head.is_multilabel_ = bool(description["is_multilabel"])
        except (KeyError, TypeError, ValueError, RequestError) as error:
            raise WeightsError(
                f"A head's description must be what `to_json` gave. "
                f"Received: {repr(description)[:200]}"
            ) from error
        head.network_ = network = load_keras_model(Path(path))
        names = {type(layer).__name__ for layer in network.layers}
        if refused := sorted(names.difference(_LAYERS)):
            raise WeightsError(
                f"A head may have the layers {', '.join(_LAYERS)}. "
                f"Received: {path} with {', '.join(refused)}"
            )
        if network.output_shape != (None, len(head.classes_)):
            raise WeightsError(
                f"A head of {len(head.classes_)} classes must give as many values an image. "
                f"Received: {path}, which gives {network.output_shape[1:]}"
            )
        if len(network.input_shape) != 2 or not network.input_shape[1]:
            raise WeightsError(
                f"A head must take vectors. Received: {path}, which takes {network.input_shape[1:]}"
            )
        head.n_features_in_ = network.input_shape[1]
        return head


def classifier_layers(
    hidden: tuple[int, ...], dropout: float, num_classes: int, seeds: list[int]
) -> "list[keras.Layer]":
    """Hidden layers with ReLU, dropout, and a last layer of logits, from random weights.

    Args:
        hidden: Units of each hidden layer.
        dropout: Share of the values before the last layer that are set to 0; 0 for no such layer.
        num_classes: Units of the last layer.
        seeds: At least as many as there are layers, in their order.
    """
    keras, seeded = import_keras(), iter(seeds)
    layers = [
        keras.layers.Dense(
            units, "relu", kernel_initializer=keras.initializers.GlorotUniform(next(seeded))
        )
        for units in hidden
    ]
    if dropout:
        layers.append(keras.layers.Dropout(dropout, seed=next(seeded)))
    kernel = keras.initializers.GlorotUniform(next(seeded))
    return [*layers, keras.layers.Dense(num_classes, kernel_initializer=kernel)]


def _mean_loss(trainer: "keras.Model", *arrays: NDArray[np.float32]) -> float:
    total, num_images = 0.0, len(arrays[0])
    for start in range(0, num_images, _ROWS_AT_ONCE):
        block = [array[start : start + _ROWS_AT_ONCE] for array in arrays]
        total += float(trainer.test_on_batch(*block)) * len(block[0])
    return total / num_images


def _held_out(
    labels: NDArray[Any], fraction: float, random: np.random.Generator
) -> NDArray[np.bool_]:
    """Choose a share of the images, alike in every class but never the whole of one: bool (n,)."""
    is_multilabel = labels.ndim == 2
    strata = np.zeros(len(labels)) if is_multilabel else np.unique(labels, return_inverse=True)[1]
    order = random.permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]
    candidates = order[np.diff(strata[order], prepend=-1) == 0]  # all but the first of each class
    num_held = min(int(fraction * len(strata)), len(candidates))
    is_held = np.zeros(len(strata), dtype=bool)
    is_held[candidates[np.arange(num_held) * len(candidates) // max(num_held, 1)]] = True
    return is_held
