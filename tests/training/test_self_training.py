"""Self-training: unlabelled rows help where they can, and are taken back where they hurt."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

from embedder.errors import RequestError
from embedder.training.options import SelfTrainOptions
from embedder.training.self_training import Fit, self_train

CLASSES = np.array(["cats", "dogs", "owls"])
METHODS = ["self-training", "label-spreading"]
Rows = tuple[NDArray[np.float32], NDArray[np.str_]]


class Logistic:
    """Logistic regression on features of length 1."""

    def __init__(self, features: Any, labels: Any, weights: Any) -> None:
        self.model = LogisticRegression(C=10.0)
        self.model.fit(normalize(features), labels, sample_weight=weights)
        self.classes_ = self.model.classes_

    def probabilities(self, features: Any) -> NDArray[np.floating]:
        return np.asarray(self.model.predict_proba(normalize(features)))


class Reader:
    """A classifier for two classes that reads the probability of the second off a column."""

    classes_ = np.array(["a", "b"])

    def __init__(self, column: int) -> None:
        self.column = column

    def probabilities(self, features: Any) -> NDArray[np.floating]:
        second = features[:, self.column].astype(np.float64)
        return np.stack([1 - second, second], axis=1)


def readers() -> Fit:
    """Each fit reads the next column: column r is what round r makes of the rows."""
    columns = iter(range(99))
    return lambda *_: Reader(next(columns))


def rows_of(*columns: list[float]) -> NDArray[np.float32]:
    return np.array(columns, np.float32).T


def animals(num: int, seed: int, noise: float = 0.9) -> Rows:
    """So many rows of each class, about three corners, with noise in 12 dimensions."""
    labels = np.repeat(CLASSES, num)
    centres = np.eye(3, 12)[np.searchsorted(CLASSES, labels)] * 3
    noises = np.random.default_rng(seed).normal(size=centres.shape) * noise
    return (centres + noises).astype(np.float32), labels


def accuracy(classifier: Any, rows: Rows) -> float:
    predicted = classifier.classes_[classifier.probabilities(rows[0]).argmax(axis=1)]
    return float((predicted == rows[1]).mean())


def options(**values: Any) -> SelfTrainOptions:
    return SelfTrainOptions(**values)


# What it gives ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "has_guard"),
    [("self-training", True), ("self-training", False), ("label-spreading", True)],
)
def test_unlabelled_rows_help(method: str, has_guard: bool) -> None:
    few = animals(6, seed=0, noise=1.3)
    pool, names = animals(80, seed=1, noise=1.3)
    guard = animals(150, seed=2, noise=1.3) if has_guard else (None, None)
    unseen = animals(500, seed=3, noise=1.3)
    asked = options(method=method, precision=0.9)
    result = self_train(Logistic, *few, pool, *guard, asked)
    assert result.kept_round > 0
    assert accuracy(result.classifier, unseen) > accuracy(Logistic(*few, None), unseen) + 0.02
    assert (names[result.pseudo_labels.rows] == result.pseudo_labels.labels).mean() > 0.85
    assert result.pseudo_labels.confidence.min() >= result.threshold > 1 / 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("has_guard", [True, False])
def test_unlabelled_rows_that_hurt_are_taken_back(method: str, has_guard: bool) -> None:
    few = animals(10, seed=0)
    pool, _ = animals(80, seed=1)
    # What looks a little like a cat lies where the dogs are, and so on around.
    pool = np.roll(pool[:, :3], 1, axis=1) @ np.eye(3, 12, dtype=np.float32) + 0.9 * pool
    guard = animals(40, seed=2) if has_guard else (None, None)
    result = self_train(Logistic, *few, pool, *guard, options(method=method, threshold=0.0))
    assert (result.kept_round, result.is_rolled_back) == (0, True)
    assert len(result.pseudo_labels.rows) == 0
    unseen = animals(50, seed=3)[0]
    alone = Logistic(*few, None).probabilities(unseen)
    np.testing.assert_array_equal(result.classifier.probabilities(unseen), alone)
    last = result.rounds[-1]
    assert last.num_pseudo_labels > 0
    assert last.log_loss_change["value"] == pytest.approx(last.log_loss - result.rounds[0].log_loss)
    text = f"rolled back to round 0 of {len(result.rounds) - 1}; the guard's change from round 0 to"
    assert str(result).startswith(text)
    assert f"log-loss {last.log_loss_change['value']:+.3f} (" in str(result)


def test_the_guard_is_never_trained_on() -> None:
    fitted = []

    def fit(*arrays: Any) -> Logistic:
        fitted.append(arrays)
        return Logistic(*arrays)

    guard = animals(20, seed=2)
    self_train(fit, *animals(6, seed=0), animals(40, seed=1)[0], *guard)
    rows = np.concatenate([features for features, _, _ in fitted])
    assert not (rows[:, None] == guard[0]).all(axis=2).any()


def test_without_a_guard_rows_are_judged_by_classifiers_that_never_saw_them() -> None:
    few, labels = animals(6, seed=0)

    class Suspicious(Logistic):
        def __init__(self, *arrays: Any) -> None:
            super().__init__(*arrays)
            self.trained_on = {row.tobytes() for row in arrays[0]}

        def probabilities(self, features: Any) -> NDArray[np.floating]:
            judged.append([row.tobytes() in self.trained_on for row in features])
            return super().probabilities(features)

    judged: list[list[bool]] = []
    asked = options(precision=0.5, num_rounds=1)
    result = self_train(Suspicious, few, labels, animals(40, seed=1)[0], options=asked)
    held_out = [seen for seen in judged if len(seen) < 40]
    assert sum(map(len, held_out)) == 3 * len(few)  # for the threshold, round 0 and round 1
    assert not any(map(any, held_out))
    assert result.rounds[0].accuracy > 0.5


def test_a_class_of_one_label_is_trained_on_but_not_held_out() -> None:
    features, labels = animals(6, seed=0)
    result = self_train(Logistic, features[:13], labels[:13], animals(40, seed=1)[0])
    assert list(labels[:13]).count("owls") == 1
    assert set(result.classifier.classes_) == set(CLASSES)


# How pseudo-labels are chosen ------------------------------------------------------------------


def few_of(*names: str) -> NDArray[np.str_]:
    return np.array(names)


def test_the_threshold_gives_held_out_labels_the_precision() -> None:
    labels = few_of("a", "a", "a", "b", "b", "b")
    second = [0.05, 0.12, 0.40, 0.90, 0.70, 0.35]  # the last is wrong, at a confidence of 0.65
    pool = rows_of([0.45, 0.40, 0.31, 0.95])  # the second is as sure as the threshold of 0.6
    for precision, threshold in ((1.0, 0.7), (0.8, 0.6), (0.5, 0.6)):
        asked = options(precision=precision, num_rounds=1)
        guard = rows_of([0.1, 0.9]), few_of("a", "b")
        result = self_train(lambda *_: Reader(0), rows_of(second), labels, pool, *guard, asked)
        assert result.threshold == pytest.approx(threshold, abs=1e-6)
        assert result.rounds[1].num_pseudo_labels == {0.7: 1, 0.6: 3}[threshold]


def test_no_pseudo_label_where_no_confidence_gives_the_precision() -> None:
    wrong = rows_of([0.9, 0.8, 0.3, 0.2]), few_of("a", "a", "b", "b")
    result = self_train(lambda *_: Reader(0), *wrong, rows_of([0.0, 1.0]))
    assert (result.threshold, len(result.rounds), result.is_rolled_back) == (np.inf, 1, False)
    assert str(result) == "nothing was added: no row got a label at the threshold of inf"


def test_with_one_label_a_class_the_threshold_is_zero() -> None:
    guard = rows_of([0.1, 0.9]), few_of("a", "b")
    single = rows_of([0.1, 0.9]), few_of("a", "b")
    result = self_train(lambda *_: Reader(0), *single, rows_of([0.5, 0.6]), *guard)
    assert (result.threshold, result.rounds[1].num_pseudo_labels) == (0.0, 2)


def trained_on(
    pool: NDArray[np.float32], labels: NDArray[np.str_], **values: Any
) -> list[tuple[Any, ...]]:
    """The features, labels and weights of each round, by a classifier that reads column 0."""
    fitted = []

    def fit(*arrays: Any) -> Reader:
        fitted.append(arrays)
        return Reader(0)

    features = np.full((len(labels), 1), 0.5, np.float32)
    guard = rows_of([0.1, 0.9]), few_of("a", "b")
    self_train(fit, features, labels, pool, *guard, options(threshold=0.0, **values))
    return fitted


def test_a_class_gets_pseudo_labels_by_its_labels_and_the_round() -> None:
    pool = rows_of([*np.linspace(0.0, 0.4, 30), 0.9, 0.8, 0.7])  # 30 of a, 3 of b
    fitted = trained_on(pool, few_of("a", "a", "b", "b"), num_rounds=3)
    added = [labels[4:].tolist() for _, labels, _ in fitted]
    assert [(names.count("a"), names.count("b")) for names in added] == [
        *((0, 0), (4, 3), (8, 3), (16, 3))
    ]
    np.testing.assert_array_equal(fitted[1][0][4:8], pool[:4])  # the surest


def test_pseudo_labels_leave_each_class_its_share() -> None:
    pool = rows_of([0.1, 0.2, 0.15, 0.12, 0.9])
    first, second = trained_on(pool, few_of("a", "b", "b", "b"), num_rounds=1, growth=9)
    assert first[2] is None
    _, labels, weights = second
    assert (labels == "a").sum() == 5
    assert weights.mean() == pytest.approx(1)
    assert weights[labels == "a"].sum() == pytest.approx(0.25 * len(labels))
    assert np.ptp(weights[labels == "a"]) == 0


def test_a_pseudo_label_can_be_revised_and_dropped() -> None:
    # Probability of b by round, of each row: stays a, turns b, becomes unsure, comes later.
    pool = rows_of([0.1, 0.2, 0.1, 0.5], [0.1, 0.9, 0.5, 0.8], [0.5, 0.5, 0.5, 0.5])
    few = np.full((4, 3), 0.5, np.float32)
    good = np.tile(np.array([[0.1], [0.9]], np.float32), (40, 3))
    good[:, 0] = np.tile([0.9, 0.1, 0.1, 0.9], 20)  # round 0 knows nothing, 1 and 2 all
    good[:, 1] = np.tile([0.3, 0.7], 40)
    good[:20, 1] = 0.5  # round 1 less than round 2
    guard = good, np.tile(few_of("a", "b"), 40)
    asked = options(threshold=0.75, num_rounds=2)
    result = self_train(readers(), few, few_of("a", "a", "b", "b"), pool, *guard, asked)
    kept, pseudo = result.rounds[2], result.pseudo_labels
    assert (result.kept_round, result.is_rolled_back) == (2, False)
    assert str(result).startswith("kept round 2 of 2; the guard's change from round 0 to 2: log")
    assert (kept.num_pseudo_labels, kept.num_added, kept.num_revised, kept.num_dropped) == (
        *(3, 1, 1, 1),
    )
    assert pseudo.rows.tolist() == [0, 1, 3]
    assert pseudo.labels.tolist() == ["a", "b", "b"]
    assert pseudo.rounds.tolist() == [1, 2, 2]
    np.testing.assert_allclose(pseudo.confidence, [0.9, 0.9, 0.8], atol=1e-6)


def test_it_stops_where_nothing_changes() -> None:
    fitted = trained_on(rows_of([0.1, 0.9]), few_of("a", "b"), num_rounds=5)
    assert len(fitted) == 2


# The guard -------------------------------------------------------------------------------------


def judged(*columns: NDArray[np.float64]) -> Any:
    """Self-training whose round r gives the guard's rows, all of b, the probabilities of b."""
    guard = np.stack(columns, axis=1).astype(np.float32)
    few = np.full((4, len(columns)), 0.5, np.float32)
    pool = np.full((99, len(columns)), 0.1, np.float32)  # of which each round takes more
    labels, names = few_of("a", "a", "b", "b"), np.full(len(guard), "b")
    asked = options(threshold=0.0, num_rounds=len(columns) - 1)
    return self_train(readers(), few, labels, pool, guard, names, asked)


def logistic(logits: Any) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-logits)))


LOGITS = np.random.default_rng(0).normal(0.5, 1, 100)


def test_being_surer_alone_is_not_better() -> None:
    result = judged(logistic(LOGITS / 9), logistic(LOGITS / 2), logistic(LOGITS))
    assert result.kept_round == 0
    assert result.rounds[2].log_loss_change["value"] == pytest.approx(0, abs=1e-4)


def test_a_change_within_chance_is_not_kept() -> None:
    noise = np.random.default_rng(1).normal(0, 0.5, 100)
    result = judged(logistic(LOGITS), logistic(LOGITS + noise - noise.mean() + 0.1))
    change = result.rounds[1].log_loss_change
    assert change["low"] < change["value"] < -0.02 < 0 < change["high"]
    assert result.kept_round == 0


def test_the_best_of_the_better_rounds_is_kept() -> None:
    result = judged(*(logistic(LOGITS + shift) for shift in (0, 0.4, 0.9, 0.6)))
    assert (result.kept_round, result.is_rolled_back) == (2, True)
    assert str(result).startswith("rolled back to round 2 of 3")
    right = [(LOGITS + shift > 0).mean() for shift in (0, 0.9)]
    assert result.rounds[2].accuracy == pytest.approx(right[1])
    assert result.rounds[2].accuracy_change["value"] == pytest.approx(right[1] - right[0])


# Label spreading -------------------------------------------------------------------------------


def test_labels_spread_along_the_neighbours() -> None:
    """Two strips side by side, labelled at one end: a straight border would cut across both."""
    angle = np.linspace(0, 1.5, 30)
    strips = [
        np.stack([np.cos(angle), np.sin(angle), np.full(30, height)], axis=1)
        for height in (0.0, 0.5)
    ]
    ends = np.array([strips[0][0], strips[1][-1]], np.float32)
    pool = np.concatenate([strips[0][1:], strips[1][:-1]]).astype(np.float32)
    truth = np.repeat(["flat", "high"], 29)
    asked = options(method="label-spreading", threshold=0.0)
    guard = pool[::3], truth[::3]
    result = self_train(Logistic, ends, few_of("flat", "high"), pool, *guard, asked)
    assert accuracy(Logistic(ends, few_of("flat", "high"), None), (pool, truth)) < 0.7
    assert result.kept_round == 1
    np.testing.assert_array_equal(result.pseudo_labels.labels, truth)


def test_a_label_reaches_rows_that_have_nearer_neighbours() -> None:
    few = np.array([[1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 1.0]], np.float32)
    noise = np.random.default_rng(0).normal(0, 0.01, (20, 4))
    pool = (np.eye(4)[[0] * 10 + [3] * 10] + noise).astype(np.float32)
    asked = options(method="label-spreading", threshold=0.0)
    guard = few, few_of("a", "b")
    result = self_train(Logistic, few, few_of("a", "b"), pool, *guard, asked)
    assert result.rounds[1].num_pseudo_labels == 20


def test_no_label_spreads_to_what_has_no_labelled_neighbour() -> None:
    few, labels = animals(4, seed=0, noise=0.1)
    noise = np.random.default_rng(2).normal(0, 0.01, (9, 12))
    elsewhere = (np.eye(12)[[11] * 9] + noise).astype(np.float32)
    pool = np.concatenate([few + 0.01, elsewhere])
    asked = options(method="label-spreading", threshold=0.0)
    guard = animals(20, seed=1)
    result = self_train(Logistic, few, labels, pool, *guard, asked)
    assert result.rounds[1].num_pseudo_labels == len(few)


# Errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"method": "magic"},
        {"num_rounds": 0},
        {"growth": 0.0},
        {"precision": 0.0},
        {"precision": 1.1},
        {"threshold": -0.1},
        {"threshold": 1.1},
    ],
)
def test_options_that_make_no_sense_are_refused(values: dict[str, Any]) -> None:
    (name, value), *_ = values.items()
    with pytest.raises(RequestError, match=rf"`{name}`.*Received: .*{name}='?{value}"):
        SelfTrainOptions(**values)


Change = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.mark.parametrize(
    "change",
    [
        lambda a: {"labels": a["labels"][:-1]},
        lambda a: {"labels": np.full(len(a["labels"]), "cats")},
        lambda a: {"unlabelled": a["unlabelled"][:0]},
        lambda a: {"unlabelled": a["unlabelled"][:, :5]},
        lambda a: {"features": a["features"][:, 0]},
        lambda _: {"guard_features": None},
        lambda _: {"guard_labels": None},
        lambda a: {"guard_labels": a["guard_labels"][1:]},
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(change: Change) -> None:
    features, labels = animals(3, seed=0)
    guard = animals(2, seed=1)
    arrays = {"features": features, "labels": labels, "unlabelled": features + 1}
    arrays |= {"guard_features": guard[0], "guard_labels": guard[1]}
    with pytest.raises(RequestError, match=r"with a label each.*Received: features \[\("):
        self_train(Logistic, **(arrays | change(arrays)))


def test_a_guard_of_another_class_is_refused() -> None:
    few = animals(3, seed=0)
    with pytest.raises(RequestError, match=r"Received: 1 other class\(es\), such as yaks"):
        self_train(Logistic, *few, few[0], few[0][:2], few_of("owls", "yaks"))


def test_without_a_guard_one_label_a_class_is_refused() -> None:
    few = animals(1, seed=0)
    with pytest.raises(RequestError, match="at least two labels.*Received: 3 classes of one label"):
        self_train(Logistic, *few, few[0] + 1)
