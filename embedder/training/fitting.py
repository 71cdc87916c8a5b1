"""Fitting a head: its settings chosen, its probabilities calibrated, all on training rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.datasets import Folds, Indices, TrainingSet, grouped_folds
from embedder.errors import RequestError
from embedder.evaluation import expand_logits
from embedder.heads import (
    Calibration,
    KerasHead,
    Model,
    Settings,
    calibrate,
    find_head,
    logits_of,
    make_estimator,
)

_NUM_FOLDS = 3  # to choose settings by; more take longer and choose the same


@dataclass(frozen=True)
class HeadSpec:
    """What kind of head is fitted, but for the settings that are chosen.

    Attributes:
        kind: As in `heads.HEADS`.
        class_weight: None or `balanced`.
        seed: Of all that is random.
    """

    kind: str
    class_weight: str | None = None
    seed: int = 0

    def estimator(self, settings: Settings, is_multilabel: bool = False) -> Any:
        """An unfitted estimator of features."""
        return make_estimator(self.kind, settings, self.class_weight, self.seed, is_multilabel)


@dataclass(frozen=True)
class Fitted:
    """A head that was fitted.

    Attributes:
        estimator: Fitted.
        settings: What was chosen.
        known: (n_known,) the classes that the training rows hold.
        temperature: See `heads.fit_temperature`.
        thresholds: As in `heads.Model`, for all classes.
        trials: `settings`, held-out `log_loss` (at its best temperature) and `accuracy` of each
            that was tried.
    """

    estimator: Any
    settings: Settings
    known: NDArray[np.int64]
    temperature: float
    thresholds: NDArray[np.float64] | None
    trials: list[dict[str, Any]]

    def in_model(self, model: Model, images: TrainingSet) -> Model:
        """A model with this head in the place of its own."""
        return replace(
            model,
            estimator=self.estimator,
            temperature=self.temperature,
            thresholds=self.thresholds,
            classes=images.classes[self.known],
        )


def fit_head(spec: HeadSpec, images: TrainingSet) -> Fitted:
    """Choose a head's settings, fit it, and calibrate it.

    Settings and temperature come from held-out images: the validation images, where there are some,
    else folds of the training images that no group of near-duplicates straddles. The head is then
    fitted on all training images, held-out ones included.

    Raises:
        RequestError: The head cannot do what is asked, or there are too few images.
    """
    kind = find_head(spec.kind, spec.class_weight, images.is_multilabel)
    folds = _selection_folds(spec, images)
    held = np.concatenate([test for _, test in folds])
    trials: list[dict[str, Any]] = []
    tried: list[Calibration] = []
    refusal = None
    for settings in kind.grid:
        try:
            logits = [_held_out_logits(spec, settings, images, *fold) for fold in folds]
        except RequestError as error:  # such as more neighbours than images
            refusal = error
            continue
        tried.append(calibrate(np.concatenate(logits), images.codes[held]))
        trials.append({"settings": settings, **tried[-1].scores})
    if refusal is not None and not trials:
        raise refusal
    best = int(np.argmin([trial["log_loss"] for trial in trials]))
    settings, calibration = trials[best]["settings"], tried[best]
    trained_on = images.split.trained_on
    return Fitted(
        fit(spec, spec.estimator(settings, images.is_multilabel), images, trained_on),
        settings,
        images.known_classes(trained_on),
        calibration.temperature,
        calibration.thresholds,
        trials,
    )


def fit(spec: HeadSpec, estimator: Any, images: TrainingSet, indices: Indices) -> Any:
    """Fit an estimator on some images, each of their views being a row of its own.

    A Keras head takes one random view an epoch. Classes are learned by name, or multi-label, as
    their indicators.

    Args:
        spec: What kind of head, for what is said of errors.
        estimator: As `HeadSpec.estimator` makes it.
        images: With their labels, their features in memory.
        indices: (m,), of those to fit to.

    Raises:
        RequestError: The images are too few, or of too few classes.
    """
    features, codes = images.in_memory[indices], images.codes[indices]
    if not images.is_multilabel:
        codes = images.classes[codes]
    if not isinstance(estimator, KerasHead):
        codes = np.repeat(codes, features.shape[1], axis=0)
        features = features.reshape(-1, features.shape[-1])
    with explain_fit_errors(spec.kind, len(indices)):
        if not images.is_multilabel and len(np.unique(codes)) < 2:
            raise ValueError("all of one class")  # which not every head would say
        return estimator.fit(features, codes)


@contextmanager
def explain_fit_errors(head: str, num_images: int) -> Iterator[None]:
    """Say what could not be learned from, where scikit-learn only says that it could not.

    Raises:
        RequestError: In place of scikit-learn's `ValueError`.
    """
    try:
        yield
    except ValueError as error:
        raise RequestError(
            f"The head {head} cannot be trained on so few images, or classes. "
            f"Received: {num_images:,} images: {error}"
        ) from error


def _selection_folds(spec: HeadSpec, images: TrainingSet) -> Folds:
    indices, validation = images.split.trained_on, images.split.validation
    if len(validation):
        return [(images.split.train, validation)]
    codes, groups = images.codes[indices], images.groups[indices]
    folds = grouped_folds(codes, groups, _NUM_FOLDS, spec.seed)
    return [(indices[train], indices[test]) for train, test in folds]


def _held_out_logits(
    spec: HeadSpec, settings: Settings, images: TrainingSet, train: Indices, test: Indices
) -> NDArray[np.float32]:
    fitted = fit(spec, spec.estimator(settings, images.is_multilabel), images, train)
    with explain_fit_errors(spec.kind, len(train)):
        logits = logits_of(fitted, images.unaugmented[test])
    return expand_logits(logits, images.known_classes(train), len(images.classes))
