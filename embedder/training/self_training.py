"""Self-training: what unlabelled images add to a head, and a guard that takes it back.

A classifier labels the unlabelled rows, the surest of these pseudo-labels join the training rows,
and it is fitted again (Lee, "Pseudo-Label", ICML 2013 workshop); of each class as many as its
labels allow (class-balanced self-training, Zou et al. 2018, arXiv 1810.07911). Pseudo-labels can
do harm, most of all where the unlabelled images show something else: rows that are never trained
on decide which round is kept, and round 0, the labelled rows alone, is one of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.special import log_softmax
from sklearn.neighbors import NearestNeighbors
from sklearn.semi_supervised import LabelSpreading

from embedder.errors import RequestError
from embedder.evaluation import paired_difference
from embedder.heads import fit_temperature
from embedder.training.options import SelfTrainOptions

_NUM_FOLDS = 5  # of the labelled rows, where they calibrate the threshold or are the guard
_SMALLEST = 1e-15  # a probability of 0 has no logarithm
# With 5 labels a class better on Grocery's val list than 10 or 20 neighbours, the cosine itself,
# alpha 0.95 or 0.99, and scikit-learn's own `knn` kernel, whose edges all weigh 1 and lead one way.
_NUM_NEIGHBOURS, _POWER, _ALPHA = 5, 4, 0.8

Features = NDArray[np.float32]
Labels = NDArray[np.str_]
Probabilities = NDArray[np.floating]


class Classifier(Protocol):
    """What a fit gives: `classes_` (n_classes,), sorted, and calibrated probabilities of them."""

    @property
    def classes_(self) -> Labels:
        """(n_classes,) str, sorted."""

    def probabilities(self, features: Features) -> Probabilities:
        """(n, n_classes), rows that sum to 1, of features (n, dim)."""


# Features (n, dim), labels (n,), and weights (n,) of mean 1, or None where all rows weigh the same.
Fit = Callable[[Features, Labels, NDArray[np.float64] | None], Classifier]


@dataclass(frozen=True)
class PseudoLabels:
    """Labels that unlabelled rows got.

    Attributes:
        rows: int64 (n,), indices of the unlabelled rows.
        labels: str (n,).
        confidence: float64 (n,), the probability of the label when the round began.
        rounds: int64 (n,), since which round the row has had this label without a break.
    """

    rows: NDArray[np.int64]
    labels: Labels
    confidence: NDArray[np.float64]
    rounds: NDArray[np.int64]


@dataclass(frozen=True)
class Round:
    """What one round was trained on, and how the guard saw it; round 0 has no pseudo-labels.

    Attributes:
        num_pseudo_labels: Of these, `num_added` rows had none in the round before and
            `num_revised` another one; `num_dropped` rows lost theirs.
        accuracy: Of the guard.
        log_loss: Of the guard, in nats, at the temperature that makes it least.
        accuracy_change: Against round 0: `value`, and `low` and `high`, the bounds of the paired
            95 % bootstrap interval over the guard's images.
        log_loss_change: As `accuracy_change`.
    """

    num_pseudo_labels: int
    num_added: int
    num_revised: int
    num_dropped: int
    accuracy: float
    log_loss: float
    accuracy_change: dict[str, float]
    log_loss_change: dict[str, float]


@dataclass(frozen=True)
class SelfTraining:
    """The classifier of the kept round, and the record of all rounds.

    Attributes:
        classifier: Of the kept round.
        pseudo_labels: That it was trained on.
        threshold: Lowest confidence of a pseudo-label; infinite if none gives the precision.
        rounds: All that ran, round 0 first.
        kept_round: 0 if no round is better than the labelled rows alone.
    """

    classifier: Classifier
    pseudo_labels: PseudoLabels
    threshold: float
    rounds: tuple[Round, ...]
    kept_round: int

    @property
    def is_rolled_back(self) -> bool:
        """Whether a later round ran than the kept one."""
        return self.kept_round < len(self.rounds) - 1

    def __str__(self) -> str:
        """Which round was kept, with the guard's figures of the last."""
        last = len(self.rounds) - 1
        if last == 0:
            return f"nothing was added: no row got a label at the threshold of {self.threshold:.2f}"
        what = "rolled back to" if self.is_rolled_back else "kept"
        judged = self.rounds[last]
        changes = {"log-loss": judged.log_loss_change, "accuracy": judged.accuracy_change}
        figures = [
            f"{name} {change['value']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"
            for name, change in changes.items()
        ]
        return (
            f"{what} round {self.kept_round} of {last}; "
            f"the guard's change from round 0 to {last}: {', '.join(figures)}"
        )


@dataclass(frozen=True)
class _Task:
    fit: Fit
    features: Features
    labels: Labels
    unlabelled: Features
    options: SelfTrainOptions

    def without(self, held: NDArray[np.bool_]) -> "_Task":
        return replace(self, features=self.features[~held], labels=self.labels[~held])


_State = tuple[Classifier, PseudoLabels]


def self_train(
    fit: Fit,
    features: Features,
    labels: Labels,
    unlabelled: Features,
    guard_features: Features | None = None,
    guard_labels: Labels | None = None,
    options: SelfTrainOptions | None = None,
) -> SelfTraining:
    """Train on labelled and unlabelled rows, and keep the round that held-out rows speak for.

    Each round labels all unlabelled rows anew: a pseudo-label can be revised, or dropped. Rows are
    weighted so that pseudo-labels leave each class the share that it has of the labels.

    Kept is the round of least log-loss on the guard, among those that are better than round 0
    beyond chance: the paired 95 % interval of the log-loss lies below 0. Each round is judged at
    its own best temperature: pseudo-labels make a classifier surer, which alone can lower the
    log-loss of an unsure one while its accuracy falls. Accuracy itself hears only the few images
    whose prediction changes.

    Args:
        fit: Fits the classifier.
        features: float32 (n, dim), of the labelled rows.
        labels: str (n,), at least two classes.
        unlabelled: float32 (n_unlabelled, dim).
        guard_features: float32 (n_guard, dim) of rows to judge by, which nothing is trained on.
            None: all rounds also run without each fifth of the labelled rows, which then judges
            them; that is six times as many fits.
        guard_labels: str (n_guard,).
        options: How pseudo-labels are chosen.

    Raises:
        RequestError: The arrays do not fit each other, or there is nothing to judge by.
    """
    task = _Task(fit, features, labels, unlabelled, options or SelfTrainOptions())
    _check(task, guard_features, guard_labels)
    folds = _folds(labels, task.options.seed)
    threshold = task.options.threshold
    if threshold is None:
        threshold = _calibrated_threshold(task, folds)
    states = list(_states(task, threshold))
    if guard_features is None or guard_labels is None:
        seen, known = _cross_guard(task, folds, threshold, len(states)), labels[folds >= 0]
    else:
        seen, known = [state[0].probabilities(guard_features) for state in states], guard_labels
    rounds = _judge(states, seen, np.searchsorted(np.unique(labels), known))
    better = [i for i, judged in enumerate(rounds) if judged.log_loss_change["high"] < 0]
    kept = min(better, key=lambda i: rounds[i].log_loss, default=0)
    return SelfTraining(*states[kept], threshold, rounds, kept)


def _check(task: _Task, guard_features: Features | None, guard_labels: Labels | None) -> None:
    classes, counts = np.unique(task.labels, return_counts=True)
    arrays = [task.features, task.unlabelled, guard_features]
    shapes = [array.shape for array in arrays if array is not None]
    sizes = [len(task.labels)] + ([] if guard_labels is None else [len(guard_labels)])
    if (
        any(len(shape) != 2 or shape[0] == 0 or shape[1] != shapes[0][1] for shape in shapes)
        or [shape[0] for shape in shapes[::2]] != sizes
        or len(classes) < 2
    ):
        raise RequestError(
            "Features must be (n, dim), not empty, of the same dim, with a label each, or none if "
            f"unlabelled, and of at least two classes. Received: features {shapes}, "
            f"labels {sizes} of {len(classes)} class(es)"
        )
    if guard_labels is None and counts.max() < 2:
        raise RequestError(
            "Without a guard, a class must have at least two labels, so that one can be held out. "
            f"Received: {len(classes)} classes of one label"
        )
    strange = [] if guard_labels is None else sorted(set(guard_labels) - set(classes))
    if strange:
        raise RequestError(
            "The guard must be of classes that are trained on. "
            f"Received: {len(strange)} other class(es), such as {strange[0]}"
        )


def _folds(labels: Labels, seed: int) -> NDArray[np.int64]:
    """Fold of each row, all classes alike; -1 for the only row of a class."""
    order = np.random.default_rng(seed).permutation(len(labels))
    folds = np.full(len(labels), -1)
    for name in np.unique(labels):
        rows = order[labels[order] == name]
        if len(rows) > 1:
            folds[rows] = np.arange(len(rows)) % _NUM_FOLDS
    return folds


def _calibrated_threshold(task: _Task, folds: NDArray[np.int64]) -> float:
    """The lowest confidence above which held-out labelled rows have the precision asked for."""
    is_judged = folds >= 0
    if not is_judged.any():
        return 0.0
    confidence, is_right = np.zeros(len(folds)), np.zeros(len(folds), dtype=bool)
    probabilities: Probabilities
    for number in np.unique(folds[is_judged]):
        held = folds == number
        rest = task.without(held)
        classes = np.unique(rest.labels)
        if task.options.method == "label-spreading":
            pool = np.concatenate([task.features[held], task.unlabelled])
            probabilities = _spread(replace(rest, unlabelled=pool))[: held.sum()]
        else:
            classifier = rest.fit(rest.features, rest.labels, None)
            probabilities = classifier.probabilities(task.features[held])
        confidence[held] = probabilities.max(axis=1)
        is_right[held] = classes[probabilities.argmax(axis=1)] == task.labels[held]
    confidence, is_right = confidence[is_judged], is_right[is_judged]
    order = np.argsort(-confidence, kind="stable")
    precision = np.cumsum(is_right[order]) / np.arange(1, len(order) + 1)
    enough = np.flatnonzero(precision >= task.options.precision)
    return float(confidence[order[enough[-1]]]) if len(enough) else np.inf


def _states(task: _Task, threshold: float) -> Iterator[_State]:
    """The classifier of each round, with what it was trained on beside the labelled rows."""
    classes, counts = np.unique(task.labels, return_counts=True)
    classifier = task.fit(task.features, task.labels, None)
    codes = np.full(len(task.unlabelled), -1)  # class of each unlabelled row, -1 for none
    since = np.zeros(len(codes), dtype=np.int64)
    probabilities: Probabilities
    yield classifier, PseudoLabels(since[:0], classes[:0], np.zeros(0), since[:0])
    is_graph = task.options.method == "label-spreading"
    for number in range(1, 2 if is_graph else task.options.num_rounds + 1):
        if is_graph:
            probabilities, quotas = _spread(task), np.full(len(classes), len(codes))
        else:
            probabilities = classifier.probabilities(task.unlabelled)
            quotas = np.ceil(counts * task.options.growth**number).astype(np.int64)
        before, codes = codes, _surest(probabilities, quotas, threshold)
        if np.array_equal(before, codes):
            return
        since[codes != before] = number
        rows = np.flatnonzero(codes >= 0)
        names = np.concatenate([task.labels, classes[codes[rows]]])
        classifier = task.fit(
            np.concatenate([task.features, task.unlabelled[rows]]), names, _weights(names, counts)
        )
        confidence = probabilities[rows, codes[rows]].astype(np.float64)
        yield classifier, PseudoLabels(rows, classes[codes[rows]], confidence, since[rows])


def _surest(
    probabilities: Probabilities, quotas: NDArray[np.int64], threshold: float
) -> NDArray[np.int64]:
    """Class of each row (n,), or -1: the surest of each class, up to its quota."""
    codes: NDArray[np.int64] = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    codes[(confidence < threshold) | (confidence == 0)] = -1  # 0: no label spread to the row
    for code, quota in enumerate(quotas):
        rows = np.flatnonzero(codes == code)
        codes[rows[np.argsort(-confidence[rows], kind="stable")[quota:]]] = -1
    return codes


def _weights(labels: Labels, counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weights of mean 1 that give classes the shares of `counts` (n_classes,)."""
    _, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return np.asarray((counts / counts.sum() * len(labels) / sizes)[codes])


def _spread(task: _Task) -> NDArray[np.float64]:
    """Share of each class (n_unlabelled, n_classes) in what reaches a row over the graph."""
    rows = np.concatenate([task.features, task.unlabelled])
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _SMALLEST)
    num = min(_NUM_NEIGHBOURS, len(rows) - 1)
    distances, indices = NearestNeighbors(n_neighbors=num).fit(rows).kneighbors()
    cosine = np.clip(1 - distances.ravel() ** 2 / 2, 0, 1)
    ends = np.repeat(np.arange(len(rows)), num), indices.ravel()
    edges = csr_matrix((cosine**_POWER, ends), shape=(len(rows), len(rows)))
    graph = edges.maximum(edges.T)
    codes = np.full(len(rows), -1)
    codes[: len(task.labels)] = np.unique(task.labels, return_inverse=True)[1]
    spreading = LabelSpreading(kernel=lambda *_: graph, alpha=_ALPHA, max_iter=1000)
    spreading.fit(rows, codes)
    return np.asarray(spreading.label_distributions_[len(task.labels) :])


def _cross_guard(
    task: _Task, folds: NDArray[np.int64], threshold: float, num_states: int
) -> list[Probabilities]:
    """Probabilities of the labelled rows, for each round, by classifiers that never saw them."""
    seen = np.zeros((num_states, len(folds), len(np.unique(task.labels))))
    for number in np.unique(folds[folds >= 0]):
        held = folds == number
        states = list(_states(task.without(held), threshold))
        for i in range(num_states):  # a fold that came to rest sooner stays as it is
            classifier = states[min(i, len(states) - 1)][0]
            seen[i, held] = classifier.probabilities(task.features[held])
    return list(seen[:, folds >= 0])


def _judge(
    states: list[_State], seen: list[Probabilities], codes: NDArray[np.int64]
) -> tuple[Round, ...]:
    is_right = [probabilities.argmax(axis=1) == codes for probabilities in seen]
    losses = [_losses(probabilities, codes) for probabilities in seen]
    rounds = []
    for i, (_, pseudo) in enumerate(states):
        now = dict(zip(pseudo.rows, pseudo.labels, strict=True))
        last = states[max(i - 1, 0)][1]
        before = dict(zip(last.rows, last.labels, strict=True))
        rounds.append(
            Round(
                num_pseudo_labels=len(now),
                num_added=len(now.keys() - before.keys()),
                num_revised=sum(now[row] != before[row] for row in now.keys() & before.keys()),
                num_dropped=len(before.keys() - now.keys()),
                accuracy=float(is_right[i].mean()),
                log_loss=float(losses[i].mean()),
                accuracy_change=paired_difference(is_right[i], is_right[0]),
                log_loss_change=paired_difference(losses[i], losses[0]),
            )
        )
    return tuple(rounds)


def _losses(probabilities: Probabilities, codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Log-loss of each row (n,) at the best temperature."""
    logits = np.log(np.maximum(probabilities, _SMALLEST))
    scaled = log_softmax(logits / fit_temperature(logits, codes), axis=1)
    return -np.asarray(scaled[np.arange(len(codes)), codes])
