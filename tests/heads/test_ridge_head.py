"""Ridge heads: scikit-learn's own regression, from rows or from sums of parts."""

from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.linear_model import Ridge
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.estimator_checks import parametrize_with_checks

from embedder.errors import RequestError
from embedder.heads.ridge_head import RidgeHead, stratified_folds
from embedder.heads.ridge_statistics import SufficientStatistics, one_vs_rest_targets, sums_by_fold

NAMES = np.array(["ash", "beech", "cedar", "elm"])


def make_rows(num_rows: int = 300, dim: int = 20) -> tuple[NDArray[Any], NDArray[Any]]:
    """Features about a centre for each class, which are not alike in size or spread; classes."""
    random = np.random.default_rng(7)
    codes = np.sort(random.choice(4, num_rows, p=[0.5, 0.3, 0.15, 0.05]))
    centres = random.standard_normal((4, dim)) * 0.7
    rows = centres[codes] + random.standard_normal((num_rows, dim))
    return rows * np.geomspace(0.1, 30, dim) + 5, NAMES[codes]


def reference(
    rows: NDArray[Any], targets: NDArray[Any], alpha: float, weights: NDArray[Any] | None = None
) -> Any:
    """scikit-learn's ridge regression on standardised features."""
    model = make_pipeline(StandardScaler(), Ridge(alpha=alpha))
    return model.fit(
        rows, targets, standardscaler__sample_weight=weights, ridge__sample_weight=weights
    )


@parametrize_with_checks([RidgeHead(), RidgeHead(class_weight="balanced", alphas=(1.0,))])
def test_it_is_an_estimator_of_scikit_learn(estimator: RidgeHead, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("alpha", [0.01, 10.0, 3000.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-11), (np.float32, 2e-5)])
def test_scores_are_those_of_ridge_regression(alpha: float, dtype: Any, tolerance: float) -> None:
    rows, names = make_rows()
    expected = reference(rows, np.where(names[:, None] == NAMES, 1.0, -1.0), alpha).predict(rows)
    head = RidgeHead(alphas=[alpha]).fit(rows.astype(dtype), names)
    scores = head.decision_function(rows.astype(dtype))
    assert scores.dtype == dtype
    np.testing.assert_allclose(scores, expected, atol=tolerance)
    np.testing.assert_array_equal(head.predict(rows.astype(dtype)), NAMES[expected.argmax(1)])


def test_balanced_classes_weigh_the_same() -> None:
    rows, names = make_rows()
    targets = np.where(names[:, None] == NAMES, 1.0, -1.0)
    expected = reference(rows, targets, 10.0, compute_sample_weight("balanced", names))
    head = RidgeHead(alphas=[10.0], class_weight="balanced").fit(rows, names)
    np.testing.assert_allclose(head.decision_function(rows), expected.predict(rows), atol=1e-11)


def test_two_classes_have_one_score() -> None:
    rows, names = make_rows()
    is_ash = names == "ash"
    expected = reference(rows, np.where(is_ash, 1.0, -1.0), 10.0).predict(rows)
    head = RidgeHead(alphas=[10.0]).fit(rows, is_ash)
    assert head.coef_.shape == (1, 20)
    np.testing.assert_allclose(head.decision_function(rows), expected, atol=1e-11)
    probabilities = head.predict_proba(rows)
    np.testing.assert_allclose(probabilities[:, 1], 1 / (1 + np.exp(-2 * expected)), atol=1e-11)
    np.testing.assert_array_equal(head.predict(rows), expected > 0)


def test_a_row_can_have_several_classes() -> None:
    rows, names = make_rows()
    labels = np.stack([names == "ash", rows[:, 0] > 5, rows[:, 1] > 9], axis=1).astype(int)
    expected = reference(rows, 2.0 * labels - 1, 10.0).predict(rows)
    head = RidgeHead(alphas=[10.0, 10.0]).fit(rows, labels)
    np.testing.assert_allclose(head.decision_function(rows), expected, atol=1e-11)
    np.testing.assert_array_equal(head.predict(rows), (expected > 0).astype(int))
    np.testing.assert_allclose(head.predict_proba(rows), 1 / (1 + np.exp(-2 * expected)))
    with pytest.raises(RequestError, match="`class_weight` must be None where"):
        RidgeHead(class_weight="balanced").fit(rows, labels)


def test_alpha_is_that_of_the_least_error_on_held_out_rows() -> None:
    rows, names = make_rows()
    targets = np.where(names[:, None] == NAMES, 1.0, -1.0)
    folds = stratified_folds(np.searchsorted(NAMES, names), 5)
    alphas = [0.1, 10.0, 100.0, 1e5]
    expected = []
    for alpha in alphas:
        residuals = np.empty_like(targets)
        for fold in range(5):
            out = folds == fold
            model = reference(rows[~out], targets[~out], alpha)
            residuals[out] = targets[out] - model.predict(rows[out])
        expected.append((residuals**2).mean())
    head = RidgeHead(alphas=alphas).fit(rows, names)
    np.testing.assert_allclose(head.held_out_errors_, expected, rtol=1e-10)
    assert head.alpha_ == alphas[np.argmin(expected)]
    assert 0 < np.argmin(expected) < 3


@pytest.mark.parametrize("offset", [0, 1000])
def test_sums_of_parts_in_any_order_are_those_of_all_rows(offset: int) -> None:
    rows, names = make_rows()
    rows = (rows + offset).astype(np.float32)
    weights = np.random.default_rng(0).random(len(rows))
    targets = one_vs_rest_targets(np.arange(len(rows)), np.searchsorted(NAMES, names), len(rows), 4)
    whole = SufficientStatistics.of(rows.astype(np.float64), targets, weights)
    parts = [slice(200, 300), slice(0, 0), slice(0, 7), slice(7, 200)]
    total = reduce(
        add, [SufficientStatistics.of(rows[part], targets[part], weights[part]) for part in parts]
    )
    for name, expected in vars(whole).items():
        largest = np.abs(expected).max()
        np.testing.assert_allclose(getattr(total, name), expected, atol=1e-6 * largest)
    about_means = rows - np.average(rows.astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(whole.scatter, (about_means.T * weights) @ about_means, rtol=1e-9)


def test_a_head_is_fitted_to_sums_as_to_rows() -> None:
    rows, names = make_rows()
    codes = np.searchsorted(NAMES, names)
    folds = stratified_folds(codes, 5)
    folds[::7] = -1
    sums = sums_by_fold(rows, one_vs_rest_targets(np.arange(300), codes, 300, 4), folds, 5)
    head = RidgeHead(alphas=[10.0]).fit_sums(sums, NAMES)
    same = RidgeHead(alphas=[10.0]).fit(rows[folds >= 0], names[folds >= 0])
    np.testing.assert_allclose(head.coef_, same.coef_, rtol=1e-9)
    np.testing.assert_array_equal(head.predict(rows), same.predict(rows))


def test_a_constant_feature_is_of_no_account() -> None:
    rows, names = make_rows()
    rows[:, 3] = 0.1
    for dtype in (np.float32, np.float64):
        head = RidgeHead(class_weight="balanced").fit(rows.astype(dtype), names)
        assert np.abs(head.coef_[:, 3]).max() < 1e-9
        without = RidgeHead(class_weight="balanced").fit(np.delete(rows, 3, axis=1), names)
        np.testing.assert_allclose(np.delete(head.coef_, 3, axis=1), without.coef_, atol=1e-5)


def test_folds_have_every_class_and_keep_neighbours_together() -> None:
    codes = np.array([2] * 10 + [0] * 7 + [1])
    folds = stratified_folds(codes, 5)
    assert folds[:10].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert np.bincount(folds[10:17]).tolist() == [2, 2, 1, 1, 1]
    assert (np.diff(folds[10:17]) >= 0).all()


def test_it_works_within_scikit_learns_tools() -> None:
    rows, names = make_rows()
    head = RidgeHead(alphas=(1.0, 10.0), class_weight="balanced")
    assert clone(head).get_params() == head.get_params()
    pipeline = make_pipeline(Normalizer(), clone(head))
    accuracy = accuracy_score(names, cross_val_predict(pipeline, rows, names, cv=3))
    assert accuracy > 0.5
    search = GridSearchCV(RidgeHead(), {"alphas": [(1e7,), (10.0,)]}, cv=3).fit(rows, names)
    assert search.best_params_ == {"alphas": (10.0,)}


def test_what_makes_no_sense_is_told() -> None:
    rows, names = make_rows()
    with pytest.raises(RequestError, match=r"more than 0. Received: alphas=\[0.0, 1.0\]"):
        RidgeHead(alphas=[0.0, 1.0]).fit(rows, names)
    with pytest.raises(ValueError, match="at least two classes. Received: one class"):
        RidgeHead().fit(rows, np.full(len(rows), "ash"))
    sums = sums_by_fold(
        rows, one_vs_rest_targets(np.arange(300), np.arange(300) % 4, 300, 4), np.zeros(300), 5
    )
    with pytest.raises(RequestError, match="At least two folds .* Received: 1 of 5"):
        RidgeHead().fit_sums(sums, NAMES)
