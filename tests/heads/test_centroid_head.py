"""The nearest class mean, as scikit-learn wants its estimators."""

import numpy as np
import pytest
from sklearn.neighbors import NearestCentroid
from sklearn.utils.estimator_checks import parametrize_with_checks

from embedder.heads.centroid_head import CentroidHead


@parametrize_with_checks([CentroidHead()])
def test_it_keeps_scikit_learns_contract(estimator: CentroidHead, check) -> None:  # type: ignore[no-untyped-def]
    check(estimator)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_the_nearest_mean_wins(num_classes: int) -> None:
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(90, 4)), random.integers(0, num_classes, 90)
    new = random.normal(size=(50, 4))
    head = CentroidHead().fit(features, labels)
    nearest = NearestCentroid().fit(features, labels).predict(new)
    assert head.predict(new).tolist() == nearest.tolist()
    probabilities = head.predict_proba(new)
    assert head.classes_[probabilities.argmax(axis=1)].tolist() == nearest.tolist()
    means = [features[labels == n].mean(axis=0) for n in range(num_classes)]
    distances = np.array([((new - mean) ** 2).sum(axis=1) for mean in means]).T
    ratio = np.log(probabilities[:, 0] / probabilities[:, 1])
    np.testing.assert_allclose(ratio, distances[:, 1] - distances[:, 0], rtol=1e-9)


def test_one_label_a_class_is_enough() -> None:
    head = CentroidHead().fit([[0.0, 0.0], [1.0, 1.0]], ["a", "b"])
    assert head.predict([[0.4, 0.4], [0.6, 0.6]]).tolist() == ["a", "b"]
