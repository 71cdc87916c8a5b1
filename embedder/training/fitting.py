"""Fitting a head: its settings chosen, its probabilities calibrated, all on training rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone

from embedder.datasets import Folds, Targets, grouped_folds
from embedder.errors import RecipeError
from embedder.evaluation import expand_logits
from embedder.heads import (
    Calibration,
    KerasHead,
    Settings,
    calibrate,
    find_head,
    logits_of,
    make_estimator,
)
from embedder.store import Store

_NUM_FOLDS = 3  # to choose settings by; more take longer and choose the same


@dataclass(frozen=True)
class Task:
    """What is to be learned.

    Attributes:
        head: Kind, as in `heads.HEADS`.
        features: float32 (n, dim), or (n, n_views, dim) with augmented views, of which the first
            is the plain one: heads are trained on all, and chosen and calibrated on the plain one.
        codes: (n,) or (n, n_classes), as in `datasets.Targets`.
        groups: int (n,), which rows are near-duplicates of each other.
        classes: (n_classes,) str, sorted; rows may lack some.
        class_weight: None or `balanced`.
        seed: Of all that is random.
    """

    head: str
    features: NDArray[np.float32]
    codes: NDArray[np.integer]
    groups: NDArray[np.integer]
    classes: NDArray[np.str_]
    class_weight: str | None = None
    seed: int = 0

    @property
    def is_multilabel(self) -> bool:
        """Whether a row can have several labels."""
        return self.codes.ndim == 2

    @property
    def plain(self) -> NDArray[np.float32]:
        """(n, dim), the features of the pictures as they are."""
        return self.features if self.features.ndim == 2 else self.features[:, 0]


def features_of(store: Store, targets: Targets, column: str) -> NDArray[np.float32]:
    """`Task.features` of the labelled rows of a store."""
    features = store.vectors(column, view=None)
    num_views = store.recipe.views
    if num_views > 1:
        features = features.reshape(-1, num_views, features.shape[1])
    return np.ascontiguousarray(features[targets.rows], dtype=np.float32)


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


def fit_head(task: Task, rows: NDArray[np.int64], validation: NDArray[np.int64]) -> Fitted:
    """Choose a head's settings, fit it, and calibrate it.

    Settings and temperature come from held-out rows: the validation rows, where there are some,
    else folds of the training rows that no group of near-duplicates straddles. The head is then
    fitted on all rows, held-out ones included.

    Args:
        task: What is to be learned.
        rows: Places of the rows to train on, validation included.
        validation: Those among `rows` that settings are chosen by; may be empty.

    Raises:
        RecipeError: The head cannot do what is asked, or there are too few rows.
    """
    kind = find_head(task.head, task.class_weight, task.is_multilabel)
    folds = _selection_folds(task, rows, validation)
    held = np.concatenate([test for _, test in folds])
    trials: list[dict[str, Any]] = []
    tried: list[Calibration] = []
    refusal = None
    for settings in kind.grid:
        estimator = _make(task, settings)
        try:
            logits = np.concatenate([_held_out_logits(task, estimator, *fold) for fold in folds])
        except RecipeError as error:  # such as more neighbours than images
            refusal = error
            continue
        tried.append(calibrate(logits, task.codes[held]))
        trials.append({"settings": settings, **tried[-1].scores})
    if refusal is not None and not trials:
        raise refusal
    best = int(np.argmin([trial["log_loss"] for trial in trials]))
    settings, calibration = trials[best]["settings"], tried[best]
    fitted = fit(task, _make(task, settings), rows)
    return Fitted(
        fitted,
        settings,
        known_classes(task, rows),
        calibration.temperature,
        calibration.thresholds,
        trials,
    )


def known_classes(task: Task, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The classes that a head can learn from these rows."""
    if task.is_multilabel:
        return np.arange(len(task.classes))
    return np.unique(task.codes[rows]).astype(np.int64)


def _make(task: Task, settings: Settings) -> Any:
    return make_estimator(task.head, settings, task.class_weight, task.seed, task.is_multilabel)


def fit(task: Task, estimator: Any, rows: NDArray[np.int64]) -> Any:
    """Fit an estimator on rows, each of their views being a row of its own.

    A Keras head takes one random view an epoch. Classes are learnt by name, or with several labels
    an image, as their indicators.

    Raises:
        RecipeError: The images are too few, or of too few classes.
    """
    features, codes = task.features[rows], task.codes[rows]
    if not task.is_multilabel:
        codes = task.classes[codes]
    if features.ndim == 3 and not isinstance(estimator, KerasHead):
        num_views = features.shape[1]
        features = features.reshape(-1, features.shape[-1])
        codes = np.repeat(codes, num_views, axis=0)
    with explain_fit_errors(task, len(rows)):
        if not task.is_multilabel and len(np.unique(codes)) < 2:
            raise ValueError("all of one class")  # which not every head would say
        return estimator.fit(features, codes)


@contextmanager
def explain_fit_errors(task: Task, num_rows: int) -> Iterator[None]:
    """Say what could not be learnt from, where scikit-learn only says that it could not."""
    try:
        yield
    except ValueError as error:
        raise RecipeError(
            f"The head {task.head} cannot be trained on so few images, or classes. "
            f"Received: {num_rows:,} images: {error}"
        ) from error


def _selection_folds(task: Task, rows: NDArray[np.int64], validation: NDArray[np.int64]) -> Folds:
    if len(validation):
        return [(np.setdiff1d(rows, validation), validation)]
    folds = grouped_folds(task.codes[rows], task.groups[rows], _NUM_FOLDS, task.seed)
    return [(rows[train], rows[test]) for train, test in folds]


def _held_out_logits(
    task: Task, estimator: Any, train: NDArray[np.int64], test: NDArray[np.int64]
) -> NDArray[np.float32]:
    fitted = fit(task, clone(estimator), train)
    with explain_fit_errors(task, len(train)):
        logits = logits_of(fitted, task.plain[test])
    return expand_logits(logits, known_classes(task, train), len(task.classes))
