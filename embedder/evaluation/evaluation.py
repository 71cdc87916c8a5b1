"""Evaluation: a model's predictions on labelled rows, and what they are worth."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

from embedder.datasets import TrainingSet, texts_of
from embedder.evaluation.metrics import (
    Scores,
    hierarchical_scores,
    multilabel_scores,
    per_class,
    reliability,
    scores,
)
from embedder.heads import Model, probabilities_of

_BELOW_ALL = 5.0  # logits of a class that the head has never seen are this far below its lowest


@dataclass(frozen=True)
class Evaluation:
    """Predictions on rows whose labels are known.

    Attributes:
        classes: (n_classes,) str, of the labels; the head may know fewer.
        codes: (n,) or (n, n_classes), as in `datasets.TrainingSet`.
        logits: (n, n_classes).
        calibrated: (n, n_classes) probabilities.
        chosen: bool (n, n_classes), the classes given to each image.
    """

    classes: NDArray[np.str_]
    codes: NDArray[np.integer]
    logits: NDArray[np.float32]
    calibrated: NDArray[np.float64]
    chosen: NDArray[np.bool_]

    @classmethod
    def of(cls, model: Model, images: TrainingSet, indices: NDArray[Any]) -> "Evaluation":
        """Predict labelled images.

        Args:
            model: Trained.
            images: With their labels, their features in memory.
            indices: (n,) which of them.
        """
        return cls.of_logits(model, model.logits(images.unaugmented[indices]), images, indices)

    @classmethod
    def of_logits(
        cls, model: Model, logits: NDArray[np.float32], images: TrainingSet, indices: NDArray[Any]
    ) -> "Evaluation":
        """As `of`, where the model's logits have been computed already.

        Args:
            model: Trained.
            logits: (n, n_known), as the model gives them.
            images: With their labels.
            indices: (n,) which of them the logits are of.
        """
        known = np.searchsorted(images.classes, model.classes)
        logits = expand_logits(logits, known, len(images.classes))
        calibrated = probabilities_of(logits, model.temperature, model.is_multilabel)
        if model.thresholds is None:
            chosen = calibrated.argmax(axis=1)[:, None] == np.arange(len(images.classes))
        else:
            thresholds = np.full(len(images.classes), 1.0)
            thresholds[known] = model.thresholds
            chosen = calibrated > thresholds
        return cls(images.classes, images.codes[indices], logits, calibrated, chosen)

    @classmethod
    def pooled(cls, parts: "list[Evaluation]") -> "Evaluation":
        """All predictions of several rounds of cross-validation, one after the other."""
        columns = zip(*(part._arrays for part in parts), strict=True)
        return cls(parts[0].classes, *map(np.concatenate, columns))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.codes)

    def rows(self, indices: NDArray[Any]) -> "Evaluation":
        """Some of the images: indices, or booleans (n,)."""
        return Evaluation(self.classes, *(array[indices] for array in self._arrays))

    @property
    def _arrays(self) -> tuple[NDArray[Any], ...]:
        return self.codes, self.logits, self.calibrated, self.chosen

    @property
    def is_multilabel(self) -> bool:
        """Whether an image can have several labels (multi-label)."""
        return self.codes.ndim == 2

    @property
    def uncalibrated(self) -> NDArray[np.float64]:
        """(n, n_classes) probabilities of the logits as the head gives them."""
        return probabilities_of(self.logits, 1.0, self.is_multilabel)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """(n,) the most probable class."""
        return np.asarray(self.calibrated.argmax(axis=1))

    @property
    def predicted_texts(self) -> NDArray[np.str_]:
        """(n,) str, the predicted class; several labels are joined."""
        return texts_of(self.chosen if self.is_multilabel else self.predicted, self.classes)

    @property
    def is_right(self) -> NDArray[np.bool_]:
        """(n,) whether the prediction, or all of an image's labels, are right."""
        if self.is_multilabel:
            return np.asarray((self.codes.astype(bool) == self.chosen).all(axis=1))
        return np.asarray(self.predicted == self.codes)

    @cached_property
    def scores(self) -> Scores:
        """Metrics with their 95 % intervals."""
        if self.is_multilabel:
            return multilabel_scores(self.codes, self.calibrated, self.chosen)
        return scores(self.codes, self.calibrated)

    @cached_property
    def scores_before_calibration(self) -> Scores:
        """Log-loss and calibration error of the logits as the head gives them."""
        before = self.uncalibrated
        if self.is_multilabel:
            all_scores = multilabel_scores(self.codes, before, before > 0.5)
        else:
            all_scores = scores(self.codes, before)
        return {name: all_scores[name] for name in ("log_loss", "ece")}

    def hierarchical(self, coarse_of: NDArray[np.integer]) -> Scores:
        """Scores on the tree of coarse and fine classes; see `hierarchical_scores`."""
        return hierarchical_scores(self.codes, self.predicted, coarse_of)

    def per_class(self) -> list[dict[str, Any]]:
        """Precision, recall and F1 of each class."""
        predicted = self.chosen.astype(np.int64) if self.is_multilabel else self.predicted
        return per_class(self.codes, predicted, self.classes)

    def confusion(self) -> NDArray[np.int64]:
        """Number of images by true class (rows) and predicted class (columns); not multi-label."""
        labels = np.arange(len(self.classes))
        return np.asarray(confusion_matrix(self.codes, self.predicted, labels=labels))

    def metrics(self, coarse_of: NDArray[np.integer] | None) -> dict[str, Any]:
        """What `metrics.json` says of how good the predictions are.

        Args:
            coarse_of: (n_classes,) the coarse class of each class; None for no coarser level.
        """
        found = dict(self.scores)
        if coarse_of is not None:
            found |= self.hierarchical(coarse_of)
        before = self.scores_before_calibration
        return {
            "test": {"num_images": len(self), **{n: score["value"] for n, score in found.items()}},
            "intervals": {
                "test": {name: [score["low"], score["high"]] for name, score in found.items()}
            },
            "before_calibration": {name: score["value"] for name, score in before.items()},
            "per_class": self.per_class(),
        }

    def reliability(self) -> dict[str, list[dict[str, float]]]:
        """Bins of the reliability diagram, before and after calibration."""
        bins = {}
        for name, probabilities in (("before", self.uncalibrated), ("after", self.calibrated)):
            if self.is_multilabel:
                bins[name] = reliability(probabilities.ravel(), self.codes.astype(bool).ravel())
            else:
                is_right = probabilities.argmax(axis=1) == self.codes
                bins[name] = reliability(probabilities.max(axis=1), is_right)
        return bins


def expand_logits(
    logits: NDArray[np.float32], known: NDArray[np.integer], num_classes: int
) -> NDArray[np.float32]:
    """Logits of all classes, where the head knows only some.

    Args:
        logits: (n, n_known).
        known: (n_known,) indices of the head's classes among all.
        num_classes: How many there are.

    Returns:
        (n, num_classes); classes that are not known are far below those that are.
    """
    if len(known) == num_classes:
        return logits
    wide = np.repeat(logits.min(axis=1, keepdims=True) - _BELOW_ALL, num_classes, axis=1)
    wide[:, known] = logits
    return wide
