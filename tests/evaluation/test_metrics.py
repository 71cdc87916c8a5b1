"""Metrics are what one can work out by hand, and their intervals hold."""

from math import log

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    log_loss,
    top_k_accuracy_score,
)

from embedder.evaluation import metrics
from embedder.evaluation.metrics import (
    hierarchical_scores,
    multilabel_scores,
    paired_difference,
    per_class,
    reliability,
    scores,
)


def values_of(found: metrics.Scores) -> dict[str, float]:
    return {name: score["value"] for name, score in found.items()}


def test_scores_are_those_one_can_work_out_by_hand() -> None:
    # Three of five right: one `0` taken for `1`, the only `2` taken for `0`.
    codes = np.array([0, 0, 0, 1, 2] * 10)
    predicted = np.array([0, 0, 1, 1, 0] * 10)
    five = [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.3, 0.5, 0.2], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2]]
    probabilities = np.tile(five, (10, 1))
    values = values_of(scores(codes, probabilities))
    f1_of_0, f1_of_1, f1_of_2 = 4 / (4 + 1 + 1), 2 / (2 + 1), 0.0  # 2 TP / (2 TP + FP + FN)
    # Bins of 1/15: 0.7 is in one, 0.6 in another, 0.8 too, and 0.5 twice, both wrong.
    ece = (abs(1 - 0.7) + abs(1 - 0.6) + abs(1 - 0.8) + 2 * 0.5) / 5
    assert values == pytest.approx(
        {
            "accuracy": 3 / 5,
            "balanced_accuracy": (2 / 3 + 1 + 0) / 3,
            "macro_f1": (f1_of_0 + f1_of_1 + f1_of_2) / 3,
            "log_loss": -(log(0.7) + log(0.6) + log(0.3) + log(0.8) + log(0.2)) / 5,
            "ece": ece,
        }
    )
    assert values["accuracy"] == pytest.approx(accuracy_score(codes, predicted))
    assert values["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(codes, predicted))
    assert values["macro_f1"] == pytest.approx(f1_score(codes, predicted, average="macro"))
    assert values["log_loss"] == pytest.approx(log_loss(codes, probabilities))


def test_top_5_is_scikit_learns() -> None:
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(9), 200)
    codes = random.integers(0, 9, 200)
    found = scores(codes, probabilities)["top_5"]["value"]
    assert found == pytest.approx(top_k_accuracy_score(codes, probabilities, k=5))
    assert "top_5" not in scores(codes % 5, probabilities[:, :5])


def test_a_resample_may_lack_a_class() -> None:
    codes = np.array([0] * 10 + [1] * 9 + [2])
    probabilities = np.where(codes[:, None] == np.arange(3), 0.9, 0.05)  # every image right
    found = scores(codes, probabilities)
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        assert found[name] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})
    assert found["log_loss"]["high"] == pytest.approx(-log(0.9))


def test_a_resample_may_lack_a_predicted_class() -> None:
    probabilities = np.array([[0.9, 0.1]] * 3 + [[0.1, 0.9]] * 2)
    found = scores(np.array([0, 0, 0, 0, 1]), probabilities)["balanced_accuracy"]
    assert found == pytest.approx({"value": (3 / 4 + 1) / 2, "low": 0.4, "high": 1.0})


def test_the_interval_of_accuracy_is_the_binomial_one() -> None:
    codes = np.arange(500) % 2
    right = np.arange(500) % 5 != 0  # 400 of 500
    of_first = np.where((codes == 0) == right, 0.9, 0.1)
    probabilities = np.stack([of_first, 1 - of_first], axis=1)
    accuracy = scores(codes, probabilities, 10_000)["accuracy"]  # so that 90 % is told from 95 %
    margin = 1.96 * (0.8 * 0.2 / 500) ** 0.5
    assert accuracy["value"] == pytest.approx(0.8)
    assert accuracy["low"] == pytest.approx(0.8 - margin, abs=0.0025)
    assert accuracy["high"] == pytest.approx(0.8 + margin, abs=0.0025)


def test_resamples_are_the_same_however_many_fit_into_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_once = np.concatenate(list(metrics.resamples(50)))
    assert at_once.shape == (metrics.NUM_RESAMPLES, 50)
    assert (at_once.sum(axis=1) == 50).all()
    assert len(np.unique(at_once, axis=0)) == metrics.NUM_RESAMPLES
    monkeypatch.setattr(metrics, "_WEIGHTS_AT_ONCE", 50 * 7)
    in_parts = list(metrics.resamples(50))
    assert len(in_parts) > 100
    np.testing.assert_array_equal(np.concatenate(in_parts), at_once)


def test_a_difference_is_paired() -> None:
    # Each alone has an interval of some 0.1; ours is right on all that theirs is, and on 10 more.
    ours = np.arange(200) < 110
    theirs = np.arange(200) < 100
    found = paired_difference(ours, theirs)
    assert found["value"] == pytest.approx(0.05)
    assert 0.01 < found["low"] < 0.05 < found["high"] < 0.09


def test_several_labels_are_scored_one_by_one_and_together() -> None:
    random = np.random.default_rng(1)
    codes = (random.random((80, 3)) > 0.6).astype(np.uint8)
    probabilities = np.clip(codes * 0.4 + random.random((80, 3)) * 0.6, 0.01, 0.99)
    chosen = probabilities > 0.5
    values = values_of(multilabel_scores(codes, probabilities, chosen))
    assert values["accuracy"] == pytest.approx(accuracy_score(codes, chosen))
    assert values["macro_f1"] == pytest.approx(f1_score(codes, chosen, average="macro"))
    assert values["micro_f1"] == pytest.approx(f1_score(codes, chosen, average="micro"))
    assert values["mean_average_precision"] == pytest.approx(
        average_precision_score(codes, probabilities, average="macro")
    )
    each = [log_loss(codes[:, n], probabilities[:, n]) for n in range(3)]
    assert values["log_loss"] == pytest.approx(np.mean(each))


def test_a_label_that_no_image_has_counts_in_no_mean() -> None:
    random = np.random.default_rng(2)
    codes = (random.random((60, 3)) > [0.4, 0.7, 1.0]).astype(np.uint8)
    probabilities = np.clip(codes * 0.4 + random.random((60, 3)) * 0.6, 0.01, 0.99)
    chosen = probabilities > 0.5
    assert chosen[:, 2].any()
    values = values_of(multilabel_scores(codes, probabilities, chosen))
    assert values["macro_f1"] == pytest.approx(
        f1_score(codes[:, :2], chosen[:, :2], average="macro")
    )
    assert values["mean_average_precision"] == pytest.approx(
        average_precision_score(codes[:, :2], probabilities[:, :2], average="macro")
    )


def test_the_tree_counts_half_where_only_the_coarse_class_is_right() -> None:
    coarse_of = np.array([0, 0, 1])  # two fine classes of one coarse, and another
    codes, predicted = np.array([0, 0, 0, 2]), np.array([0, 1, 2, 2])
    values = values_of(hierarchical_scores(codes, predicted, coarse_of))
    assert values["coarse_accuracy"] == pytest.approx(3 / 4)
    assert values["hierarchical_f1"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)


def test_a_class_that_never_occurs_has_no_row() -> None:
    rows = per_class(np.array([0, 0, 2]), np.array([0, 2, 2]), np.array(["a", "b", "c"]))
    assert rows == [
        {"class": "a", "precision": 1.0, "recall": 0.5, "f1": 2 / 3, "num_images": 2},
        {"class": "c", "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "num_images": 1},
    ]


def test_bins_of_the_reliability_diagram_hold_their_images() -> None:
    bins = reliability(np.array([0.97, 0.99, 1.0, 0.1]), np.array([True, False, True, False]))
    assert [row["num_images"] for row in bins] == [1, 3]
    assert bins[1] == pytest.approx(
        {"confidence": (0.97 + 0.99 + 1.0) / 3, "accuracy": 2 / 3, "num_images": 3}
    )


def test_of_several_labels_each_that_an_image_has_or_is_given_is_scored_by_itself() -> None:
    codes = np.array([[1, 0, 1, 0], [1, 0, 0, 0]])
    predicted = np.array([[1, 1, 0, 0], [0, 0, 0, 0]])
    rows = per_class(codes, predicted, np.array(["a", "b", "c", "d"]))
    assert [(row["class"], row["num_images"]) for row in rows] == [("a", 2), ("b", 0), ("c", 1)]
    assert (rows[0]["precision"], rows[0]["recall"]) == (1.0, 0.5)
