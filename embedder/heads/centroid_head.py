"""The nearest class mean: a head for a handful of labels."""

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data


class CentroidHead(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """Gives an image the class whose mean is nearest (prototypes: Snell et al., arXiv 1703.05175).

    Logits are the negative squared Euclidean distances to the class means, so that unlike
    scikit-learn's `NearestCentroid`, whose scores divide by deviations that one label a class
    cannot tell, the most probable class is the nearest.

    Attributes:
        classes_: (n_classes,), sorted.
        centroids_: (n_classes, n_features), the mean of each class.
        n_features_in_: Number of features.
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:  # noqa: N803 - scikit-learn's name
        """Take the mean of each class.

        Args:
            X: (n, n_features).
            y: (n,) classes.
        """
        features, labels = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(labels)
        self.classes_ = np.unique(labels)
        means = [features[labels == name].mean(axis=0) for name in self.classes_]
        self.centroids_ = np.stack(means)
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """Logits (n, n_classes); with two classes (n,), the second's less the first's."""
        check_is_fitted(self)
        features = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        # ||x - c||^2 less ||x||^2, which is the same for all classes.
        logits = 2 * features @ self.centroids_.T - (self.centroids_**2).sum(axis=1)
        return np.asarray(logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits)

    def predict(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """Classes (n,)."""
        logits = self.decision_function(X)
        indices = (logits > 0).astype(int) if logits.ndim == 1 else logits.argmax(axis=1)
        return np.asarray(self.classes_[indices])

    def predict_proba(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """Softmax of the logits, (n, n_classes); not calibrated."""
        logits = self.decision_function(X)
        if logits.ndim == 1:
            logits = np.stack([np.zeros_like(logits), logits], axis=1)
        return np.asarray(softmax(logits, axis=1))
