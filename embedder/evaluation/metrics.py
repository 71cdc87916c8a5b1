"""Metrics: how good predictions are, each with an interval over images."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_fscore_support

NUM_RESAMPLES = 1000
_NUM_SLOW = 200  # resamples at a time of what is not a sum over images
NUM_BINS = 15  # of the calibration error, as in Guo et al. (arXiv 1706.04599)
_WEIGHTS_AT_ONCE = 20_000_000  # of resamples: 160 MB
_SEED = 0
_SMALLEST = 1e-15  # a probability of 0 has no logarithm

Scores = dict[str, dict[str, float]]
# A metric takes how often each image was drawn, (n_resamples, n_images), to (n_resamples,).
_Metric = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def scores(
    codes: NDArray[np.integer],
    probabilities: NDArray[np.floating],
    num_resamples: int = NUM_RESAMPLES,
) -> Scores:
    """Score single-label predictions.

    Args:
        codes: int (n_images,), the true classes, as columns of `probabilities`.
        probabilities: (n_images, n_classes); rows sum to 1.
        num_resamples: Of the bootstrap.

    Returns:
        For `accuracy`, `balanced_accuracy` and `macro_f1` (means over the classes that the images
        hold), `top_5` (where there are more than 5 classes), `log_loss` (nats) and `ece` (expected
        calibration error of the predicted class, 15 bins of equal width, arXiv 1706.04599):
        `value`, and `low` and `high`, the bounds of the 95 % bootstrap interval over images.
    """
    num_classes = probabilities.shape[1]
    one_hot = np.eye(num_classes, dtype=bool)
    predicted = probabilities.argmax(axis=1)
    own = probabilities[np.arange(len(codes)), codes]
    metrics: dict[str, _Metric] = {
        "accuracy": _mean(predicted == codes),
        "balanced_accuracy": _balanced_accuracy(one_hot[codes], one_hot[predicted]),
        "macro_f1": _macro_f1(one_hot[codes], one_hot[predicted]),
        "log_loss": _mean(-np.log(np.clip(own, _SMALLEST, 1.0))),
        "ece": _calibration_error(probabilities.max(axis=1), predicted == codes),
    }
    if num_classes > 5:
        rank = (probabilities > own[:, None]).sum(axis=1)
        metrics["top_5"] = _mean(rank < 5)
    return with_intervals(metrics, len(codes), num_resamples)


def multilabel_scores(
    codes: NDArray[np.integer], probabilities: NDArray[np.floating], chosen: NDArray[np.bool_]
) -> Scores:
    """Score multi-label predictions.

    Args:
        codes: (n_images, n_classes), one where an image has the label.
        probabilities: (n_images, n_classes), of each label for itself.
        chosen: bool (n_images, n_classes), the labels above their thresholds.

    Returns:
        As `scores`, of `accuracy` (all of an image's labels right), `macro_f1` and `micro_f1`,
        `mean_average_precision` (over labels that occur), `log_loss` and `ece` (over all pairs).
    """
    truth = codes.astype(bool)
    clipped = np.clip(probabilities, _SMALLEST, 1 - _SMALLEST)
    loss = -np.where(truth, np.log(clipped), np.log1p(-clipped)).mean(axis=1)
    num_hits = (truth & chosen).sum(axis=1)
    num_labels = truth.sum(axis=1) + chosen.sum(axis=1)
    errors = [_calibration_error(p, t) for p, t in zip(probabilities.T, truth.T, strict=True)]

    def micro_f1(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(2 * (weights @ num_hits) / np.maximum(weights @ num_labels, 1))

    metrics: dict[str, _Metric] = {
        "accuracy": _mean((truth == chosen).all(axis=1)),
        "macro_f1": _macro_f1(truth, chosen),
        "micro_f1": micro_f1,
        "mean_average_precision": _mean_average_precision(truth, probabilities),
        "log_loss": _mean(loss),
        "ece": lambda weights: np.mean([error(weights) for error in errors], axis=0),
    }
    return with_intervals(metrics, len(codes))


def with_intervals(
    metrics: dict[str, _Metric], num_images: int, num_resamples: int = NUM_RESAMPLES
) -> Scores:
    """Value and 95 % bootstrap interval of each metric, over the same resamples of the images."""
    values = {name: float(metric(np.ones((1, num_images)))[0]) for name, metric in metrics.items()}
    drawn: dict[str, list[NDArray[np.float64]]] = {name: [] for name in metrics}
    for weights in resamples(num_images, num_resamples):
        for name, metric in metrics.items():
            drawn[name].append(metric(weights))
    result = {}
    for name, several in drawn.items():
        low, high = np.quantile(np.concatenate(several), [0.025, 0.975])
        result[name] = {"value": values[name], "low": float(low), "high": float(high)}
    return result


def accuracy_in_words(metrics: dict[str, Any]) -> str:
    """The accuracy and its interval, of metrics as `metrics.json` has them."""
    low, high = metrics["intervals"]["test"]["accuracy"]
    return f"accuracy {metrics['test']['accuracy']:.3f} ({low:.3f} to {high:.3f})"


def resamples(num_images: int, num_resamples: int = NUM_RESAMPLES) -> Iterator[NDArray[np.float64]]:
    """How often each image is drawn: (k, num_images) at a time, `num_resamples` in all."""
    random = np.random.default_rng(_SEED)
    step = max(1, min(num_resamples, _WEIGHTS_AT_ONCE // num_images))
    for start in range(0, num_resamples, step):
        shape = min(step, num_resamples - start), num_images
        drawn = random.integers(0, num_images, shape) + num_images * np.arange(shape[0])[:, None]
        counts = np.bincount(drawn.ravel(), minlength=shape[0] * num_images)
        yield counts.reshape(shape).astype(np.float64)


def paired_difference(ours: NDArray[Any], theirs: NDArray[Any]) -> dict[str, float]:
    """Mean of `ours - theirs` over the same images, and its 95 % bootstrap interval.

    Args:
        ours: (n_images,) numbers or booleans, such as whether a prediction is right.
        theirs: (n_images,), of the same images in the same order.
    """
    difference = ours.astype(np.float64) - theirs.astype(np.float64)
    return with_intervals({"difference": _mean(difference)}, len(difference))["difference"]


def per_class(
    codes: NDArray[np.integer], predicted: NDArray[np.integer], classes: NDArray[np.str_]
) -> list[dict[str, Any]]:
    """Score each class by itself.

    Args:
        codes: (n_images,), the true classes; or if multi-label, int (n_images, n_classes) of 0
            and 1.
        predicted: The predicted classes, likewise.
        classes: (n_classes,), their names.

    Returns:
        `class`, `precision`, `recall`, `f1` (0 to 1) and `num_images` of each that occurs.
    """
    codes, labels = codes.astype(np.int64), np.arange(len(classes))
    made = predicted if predicted.ndim == 1 else predicted.nonzero()[1]
    values = precision_recall_fscore_support(codes, predicted, labels=labels, zero_division=0.0)
    return [
        {
            "class": str(name),
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "num_images": int(num_images),
        }
        for name, is_made, precision, recall, f1, num_images in zip(
            classes, np.isin(labels, made), *values, strict=True
        )
        if num_images or is_made
    ]


def reliability(
    confidence: NDArray[np.floating], is_right: NDArray[np.bool_]
) -> list[dict[str, float]]:
    """Bins of the reliability diagram: mean confidence, accuracy and number of images of each.

    Args:
        confidence: (n_images,), 0 to 1.
        is_right: (n_images,).
    """
    bins = _bins(confidence)
    return [
        {
            "confidence": float(confidence[bins == number].mean()),
            "accuracy": float(is_right[bins == number].mean()),
            "num_images": int((bins == number).sum()),
        }
        for number in np.unique(bins)
    ]


def hierarchical_scores(
    codes: NDArray[np.integer], predicted: NDArray[np.integer], coarse_of: NDArray[np.integer]
) -> Scores:
    """Score predictions on a tree of two levels.

    Args:
        codes: (n_images,), the true fine classes.
        predicted: (n_images,), the predicted fine classes.
        coarse_of: (n_classes,), the coarse class of each fine one.

    Returns:
        As `scores`: `coarse_accuracy`, the predicted class has the true one's coarse class; and
        `hierarchical_f1`, the share of an image's classes on the path from the root that the
        prediction shares, 1 if the fine class is right and 0.5 if only the coarse one is
        (arXiv 1306.6802).
    """
    is_coarse_right = coarse_of[codes] == coarse_of[predicted]
    overlap = (is_coarse_right.astype(float) + (codes == predicted)) / 2
    metrics = {"coarse_accuracy": _mean(is_coarse_right), "hierarchical_f1": _mean(overlap)}
    return with_intervals(metrics, len(codes))


def _mean(values: NDArray[Any]) -> _Metric:
    numbers = values.astype(np.float64)
    return lambda weights: weights @ numbers / len(numbers)


def _balanced_accuracy(truth: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> _Metric:
    """Mean recall of the classes, of both arrays bool (n_images, n_classes).

    A resample can lack a class, which is then left out, here and in `_macro_f1`.
    """
    hits, wanted = (truth & chosen).astype(float), truth.astype(float)

    def metric(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        num_wanted = weights @ wanted
        return _masked_mean(weights @ hits / np.maximum(num_wanted, 1), num_wanted > 0)

    return metric


def _macro_f1(truth: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> _Metric:
    hits, wanted, made = (x.astype(float) for x in (truth & chosen, truth, chosen))

    def metric(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        num_wanted = weights @ wanted
        f1 = 2 * (weights @ hits) / np.maximum(num_wanted + weights @ made, 1)
        return _masked_mean(f1, num_wanted > 0)

    return metric


def _masked_mean(values: NDArray[np.float64], is_counted: NDArray[np.bool_]) -> NDArray[np.float64]:
    total = (values * is_counted).sum(axis=1)
    return np.asarray(total / np.maximum(is_counted.sum(axis=1), 1))


def _bins(confidence: NDArray[np.floating]) -> NDArray[np.int64]:
    return np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)


def _calibration_error(confidence: NDArray[np.floating], is_right: NDArray[np.bool_]) -> _Metric:
    in_bin = np.eye(NUM_BINS)[_bins(confidence)]
    gap = in_bin * (confidence - is_right)[:, None]
    return lambda weights: np.abs(weights @ gap).sum(axis=1) / len(confidence)


def _mean_average_precision(
    truth: NDArray[np.bool_], probabilities: NDArray[np.floating]
) -> _Metric:
    """As scikit-learn's, of each of many resamples at once, over the labels that occur in it."""
    columns = [
        (order, np.flatnonzero(np.diff(column[order], append=-np.inf)))
        for column in probabilities.T
        for order in [np.argsort(-column, kind="stable")]
    ]

    def metric(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        weights = weights[:_NUM_SLOW]
        found, occurs = [], weights @ truth.astype(float) > 0
        for (order, lasts), is_true in zip(columns, truth.T, strict=True):
            drawn = weights[:, order]
            made = drawn.cumsum(axis=1)[:, lasts]  # above each threshold that there is
            hits = (drawn * is_true[order]).cumsum(axis=1)[:, lasts]
            steps = np.diff(hits, axis=1, prepend=0) / np.maximum(hits[:, -1:], 1)
            found.append((steps * hits / np.maximum(made, 1)).sum(axis=1))
        return _masked_mean(np.stack(found, axis=1), occurs)

    return metric
