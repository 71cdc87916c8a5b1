"""Calibration: logits to probabilities that mean what they say."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, softmax

_LARGEST_FACTOR = 1000.0  # a temperature of 1/1000 to 1000; margins of an SVM want about 1/5


def probabilities_of(
    logits: NDArray[np.floating], temperature: float, is_multilabel: bool
) -> NDArray[np.float64]:
    """Probabilities of logits at a temperature.

    Args:
        logits: (n, n_classes).
        temperature: What they are divided by.
        is_multilabel: Whether each probability is its own; else each row sums to 1.

    Returns:
        (n, n_classes).
    """
    scaled = logits.astype(np.float64) / temperature
    result: NDArray[np.float64] = expit(scaled) if is_multilabel else softmax(scaled, axis=1)
    return result


class Calibration(NamedTuple):
    """What held-out logits tell of a head.

    Attributes:
        temperature: See `fit_temperature`.
        thresholds: See `fit_thresholds`; None where each image has one label.
        scores: Held-out `log_loss` at that temperature, and `accuracy`: of all labels of an image,
            where it can have several.
    """

    temperature: float
    thresholds: NDArray[np.float64] | None
    scores: dict[str, float]


def calibrate(logits: NDArray[np.floating], codes: NDArray[np.integer]) -> Calibration:
    """Calibrate a head by logits (n, n_classes) of rows that it was not trained on."""
    temperature, thresholds = fit_temperature(logits, codes), None
    if codes.ndim == 2:
        thresholds = fit_thresholds(probabilities_of(logits, temperature, True), codes)
        is_right = ((logits > 0) == codes.astype(bool)).all(axis=1)
    else:
        is_right = logits.argmax(axis=1) == codes
    loss = log_loss(logits / temperature, codes)
    scores = {"log_loss": loss, "accuracy": float(is_right.mean())}
    return Calibration(temperature, thresholds, scores)


def fit_temperature(logits: NDArray[np.floating], codes: NDArray[np.integer]) -> float:
    """Temperature by which held-out logits are divided, so that their log-loss is least.

    It changes no prediction, only how sure it is (Guo et al., arXiv 1706.04599). That n held-out
    rows are right does not make the head certain: as in Platt scaling (Platt 1999), the truth
    counts as (n + 1) / (n + 2).

    Args:
        logits: (n, n_classes), of rows that the head was not trained on.
        codes: (n,) true classes, or (n, n_classes) if multi-label.
    """
    span, smoothing = np.log(_LARGEST_FACTOR), 1 / (len(codes) + 2)
    found = minimize_scalar(
        lambda log_temperature: log_loss(logits / np.exp(log_temperature), codes, smoothing),
        bounds=(-span, span),
        method="bounded",
    )
    return float(np.exp(found.x))


def log_loss(
    logits: NDArray[np.floating], codes: NDArray[np.integer], smoothing: float = 0.0
) -> float:
    """Mean log-loss in nats: of the true class, or over all labels of all images.

    Args:
        logits: (n, n_classes).
        codes: (n,) true classes, or (n, n_classes) if multi-label.
        smoothing: Share of each truth, 0 to 1, that goes to the other classes.
    """
    wide = logits.astype(np.float64)
    if codes.ndim == 2:
        right = np.logaddexp(0, np.where(codes, -wide, wide)).mean()
        wrong = np.logaddexp(0, np.where(codes, wide, -wide)).mean()
        return float((1 - smoothing) * right + smoothing * wrong)
    losses = -log_softmax(wide, axis=1)
    right = losses[np.arange(len(codes)), codes]
    wrong = (losses.sum(axis=1) - right) / (losses.shape[1] - 1)
    return float(((1 - smoothing) * right + smoothing * wrong).mean())


def fit_thresholds(
    probabilities: NDArray[np.floating], codes: NDArray[np.integer]
) -> NDArray[np.float64]:
    """For each label, the probability above which F1 on these held-out rows is highest.

    Args:
        probabilities: (n, n_labels).
        codes: (n, n_labels), one where an image has the label.

    Returns:
        (n_labels,); 0.5 for a label that no row has.
    """
    return np.array([_threshold(p, c) for p, c in zip(probabilities.T, codes.T, strict=True)])


def _threshold(probability: NDArray[np.floating], has: NDArray[Any]) -> float:
    if not has.any():
        return 0.5
    order = np.argsort(-probability, kind="stable")
    hits = np.cumsum(has[order])
    f1 = 2 * hits / (np.arange(1, len(has) + 1) + has.sum())
    best = int(f1.argmax())
    above = float(probability[order[best]])
    below = float(probability[order[best + 1]]) if best + 1 < len(has) else 0.0
    return (above + below) / 2
