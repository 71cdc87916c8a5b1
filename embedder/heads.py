"""Heads: classifiers trained on cached features."""

import csv
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, log_loss, recall_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from embedder.errors import RecipeError, SourceError
from embedder.store import Store

_NUM_FOLDS = 5
_NUM_RESAMPLES = 1000
_SEED = 0


@dataclass(frozen=True)
class Head:
    """A classifier on the features of a store, with what it was trained on.

    Attributes:
        estimator: Fitted scikit-learn pipeline: standardisation and logistic regression.
        features: float32 (n_images, dim), the labelled rows of the store.
        labels: str (n_images,), their classes.
        num_unlabelled: Rows of the store that have no label, and were left out.
    """

    estimator: Pipeline
    features: NDArray[np.float32]
    labels: NDArray[np.str_]
    num_unlabelled: int

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Score the head by stratified 5-fold cross-validation on its own data.

        Returns:
            For `accuracy`, `balanced_accuracy`, `macro_f1` and `log_loss`: `value`, and `low` and
            `high`, the bounds of the 95 % bootstrap interval over images.

        Raises:
            RecipeError: A class has fewer images than there are folds.
        """
        classes, counts = np.unique(self.labels, return_counts=True)
        if counts.min() < _NUM_FOLDS:
            raise RecipeError(
                f"Every class must have at least {_NUM_FOLDS} images, one for each fold. "
                f"Received: {counts.min()} of {classes[counts.argmin()]}"
            )
        folds = StratifiedKFold(_NUM_FOLDS, shuffle=True, random_state=_SEED)
        probabilities = cross_val_predict(
            self.estimator, self.features, self.labels, cv=folds, method="predict_proba"
        )
        return scores(self.labels, probabilities, classes)


def train(store: Store, labels: str = "folder") -> Head:
    """Train a linear probe, a logistic regression on frozen features.

    Args:
        store: Features.
        labels: `folder` (first folder under the source's root), `parent` (the containing folder),
            `FILE.csv:COLUMN` (joined on its `path` column) or `column:NAME` (of the store).

    Raises:
        RecipeError: The labels make no sense, or name fewer than two classes.
        SourceError: The label file cannot be read.
        StoreError: The store has no rows.
    """
    by_id = read_labels(store, labels)
    features, ids = store.vectors(), store.ids()
    is_labelled = np.array([image_id in by_id for image_id in ids])
    features = features[is_labelled].astype(np.float32, copy=False)
    targets = np.array([by_id[image_id] for image_id in ids[is_labelled]], dtype=np.str_)
    if len(np.unique(targets)) < 2:
        raise RecipeError(
            f"Labels must name at least two classes. "
            f"Received: labels={labels!r}, which gives {len(targets)} of {len(ids)} images a label "
            f"and {len(np.unique(targets))} class(es)"
        )
    estimator = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    estimator.fit(features, targets)
    return Head(estimator, features, targets, int((~is_labelled).sum()))


def read_labels(store: Store, labels: str) -> dict[str, str]:
    """Labels by image id, for those images that have one; see `train` for their spelling."""
    if labels in ("folder", "parent"):
        parts = {image_id: PurePosixPath(image_id).parts for image_id in store.ids()}
        index = 0 if labels == "folder" else -2
        return {image_id: part[index] for image_id, part in parts.items() if len(part) > 1}
    kind, _, name = labels.rpartition(":")
    if kind == "column":
        table = store.table()
        if name not in table.column_names:
            raise RecipeError(
                f"`labels` must name a column of the store. Received: {name}. "
                f"It has: {', '.join(table.column_names)}"
            )
        values = zip(table["image_id"].to_pylist(), table[name].to_pylist(), strict=True)
        return {image_id: str(value) for image_id, value in values if value is not None}
    if kind.endswith(".csv"):
        return _read_label_file(Path(kind), name)
    raise RecipeError(
        f"`labels` must be folder, parent, FILE.csv:COLUMN or column:NAME. "
        f"Received: labels={labels!r}"
    )


def _read_label_file(file: Path, column: str) -> dict[str, str]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            # A path that begins with a space must be quoted: `path, label` is more common.
            reader = csv.DictReader(lines, skipinitialspace=True)
            names = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"The label file {file} cannot be read: {error}") from error
    if "path" not in names or column not in names:
        raise SourceError(
            f"A label file must have the columns `path` and `{column}`. "
            f"Received: {file} with {', '.join(map(str, names))}"
        )
    labels = {row["path"]: (row[column] or "").strip() for row in rows}
    return {path: label for path, label in labels.items() if label}


def scores(
    labels: NDArray[np.str_], probabilities: NDArray[np.float64], classes: NDArray[np.str_]
) -> dict[str, dict[str, float]]:
    """Score predictions.

    Args:
        labels: (n_images,), true classes.
        probabilities: (n_images, n_classes), in the order of `classes`.
        classes: (n_classes,), sorted.

    Returns:
        As `Head.evaluate`.
    """
    predicted = classes[probabilities.argmax(axis=1)]
    metrics: dict[str, Any] = {
        "accuracy": lambda rows: accuracy_score(labels[rows], predicted[rows]),
        # A resample can lack a class: averages go over the classes it holds.
        "balanced_accuracy": lambda rows: recall_score(
            labels[rows], predicted[rows], average="macro", labels=np.unique(labels[rows])
        ),
        "macro_f1": lambda rows: f1_score(
            labels[rows], predicted[rows], average="macro", labels=np.unique(labels[rows])
        ),
        "log_loss": lambda rows: log_loss(labels[rows], probabilities[rows], labels=classes),
    }
    everything = np.arange(len(labels))
    random = np.random.default_rng(_SEED)
    resamples = [random.choice(everything, len(everything)) for _ in range(_NUM_RESAMPLES)]
    result = {}
    for name, metric in metrics.items():
        low, high = np.quantile([metric(rows) for rows in resamples], [0.025, 0.975])
        result[name] = {"value": float(metric(everything)), "low": float(low), "high": float(high)}
    return result
