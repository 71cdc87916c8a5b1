"""Ridge classifier in closed form, from sums that are streamed: its memory is that of the sums.

Ridge regression on targets of -1 and 1, one for each class (Hoerl and Kennard, "Ridge Regression",
Technometrics 1970), needs the rows only as `SufficientStatistics`. Those of
cross-validation's folds give the held-out squared error of every alpha as well, without another
pass.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from threadpoolctl import threadpool_limits

from embedder.errors import RequestError
from embedder.heads.ridge_statistics import SufficientStatistics, one_vs_rest_targets, sums_by_fold

# Standardised features have a scatter matrix of trace `rows * dim`: these go from hardly any
# penalty for thousands of rows to a strong one for a million.
DEFAULT_ALPHAS = tuple(float(alpha) for alpha in 10.0 ** np.arange(0, 6.5, 0.5))
NUM_FOLDS = 5


def stratified_folds(codes: NDArray[np.integer[Any]], num_folds: int) -> NDArray[np.int64]:
    """Give each row a fold, so that every fold has its share of every class.

    A class's neighbouring rows go into one fold, not into different ones: images taken one after
    the other are alike, and would tell a held-out image's class. scikit-learn's `StratifiedKFold`
    does so too, but refuses classes of fewer rows than folds.

    Args:
        codes: (n_rows,), each row's class.
        num_folds: Number of folds.

    Returns:
        (n_rows,), 0 to `num_folds` - 1.
    """
    by_class = np.argsort(codes, kind="stable")
    numbers = np.arange(len(codes)) % num_folds
    folds = np.empty(len(codes), np.int64)
    folds[by_class] = numbers[np.lexsort((numbers, codes[by_class]))]
    return folds


class RidgeHead(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Linear classifier by ridge regression on targets of -1 and 1, in closed form.

    Features are standardised first; the intercept is not penalised. Of several alphas the one
    with the least held-out squared error over all classes is taken, which costs no pass over the
    rows; that of the best accuracy would, and can be another.

    Args:
        alphas: Strengths of the penalty to choose from, as of `sklearn.linear_model.Ridge` on
            standardised features; more than 0.
        num_folds: Folds of the cross-validation that chooses.
        class_weight: None, `balanced` (each class weighs the same) or weights by class. Only of
            `fit` with one class per row: sums come weighted to `fit_sums`.

    Attributes:
        classes_: (num_classes,), sorted; for an indicator matrix, the numbers of its columns.
        coef_: float64 (num_classes, dim), of features that are not standardised; (1, dim) of two
            classes.
        intercept_: float64 (num_classes,); (1,) of two classes.
        alpha_: The chosen alpha.
        held_out_errors_: float64 (num_alphas,), mean squared error over rows and targets; nan
            where there was nothing to choose.
        multilabel_: Whether a row can have any number of classes.
        n_features_in_: dim.
    """

    def __init__(  # noqa: D107 - the class tells of them
        self,
        alphas: Sequence[float] = DEFAULT_ALPHAS,
        num_folds: int = NUM_FOLDS,
        class_weight: str | dict[Any, float] | None = None,
    ) -> None:
        self.alphas = alphas
        self.num_folds = num_folds
        self.class_weight = class_weight

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:  # noqa: N803 - scikit-learn's name
        """Fit to rows that are in memory.

        Args:
            X: (n_rows, dim); float64 is computed in float64, all else in float32.
            y: (n_rows,), the classes; or (n_rows, num_classes) of 0 and 1, where a row can have
                any number of classes.

        Raises:
            RequestError: The alphas, or class weights of an indicator matrix, make no sense.
            ValueError: Not such arrays, or a single class; scikit-learn's contract asks for this.
        """
        features, labels = validate_data(
            self, X, y, dtype=[np.float32, np.float64], multi_output=True, ensure_min_samples=2
        )
        check_classification_targets(labels)
        is_multilabel = type_of_target(labels) == "multilabel-indicator"
        weights = None
        if is_multilabel:
            if self.class_weight is not None:
                raise RequestError(
                    "`class_weight` must be None where a row can have several classes. "
                    f"Received: class_weight={self.class_weight!r}"
                )
            classes = np.arange(labels.shape[1])
            strata = np.unique(labels, axis=0, return_inverse=True)[1]  # sets of classes
            rows, codes = np.nonzero(labels)
        else:
            labels = column_or_1d(labels, warn=True)
            classes, strata = np.unique(labels, return_inverse=True)
            if len(classes) < 2:
                raise ValueError(
                    f"`y` must have at least two classes. Received: one class, {classes}"
                )
            rows, codes = np.arange(len(labels)), strata
            if self.class_weight is not None:
                by_class = compute_class_weight(self.class_weight, classes=classes, y=labels)
                weights = by_class[strata]
        targets = one_vs_rest_targets(rows, codes, len(labels), len(classes))
        folds = stratified_folds(strata, self.num_folds)
        sums = sums_by_fold(features, targets, folds, self.num_folds, weights)
        return self.fit_sums(sums, classes, is_multilabel)

    def fit_sums(
        self,
        sums: Sequence[SufficientStatistics],
        classes: ArrayLike,
        is_multilabel: bool = False,
    ) -> Self:
        """Fit to sums of rows that were read elsewhere.

        Args:
            sums: Of each fold, as of `ridge_statistics.sums_by_fold`; weighted as wanted.
            classes: (num_classes,), names of the targets, sorted.
            is_multilabel: Whether a row can have any number of classes.

        Raises:
            RequestError: An alpha is not above 0, or there are several and fewer than two folds
                that have rows.
        """
        alphas = np.asarray(self.alphas, np.float64)
        if len(alphas) == 0 or not (alphas > 0).all():
            raise RequestError(f"Every alpha must be more than 0. Received: alphas={self.alphas}")
        folds = [of_fold for of_fold in sums if of_fold.weight > 0]
        if len(folds) < 2 and (len(alphas) > 1 or not folds):
            raise RequestError(
                "At least two folds must have rows, for an alpha to be chosen. "
                f"Received: {len(folds)} of {len(sums)}"
            )
        self.held_out_errors_ = np.full(len(alphas), np.nan)
        if len(alphas) > 1:
            self.held_out_errors_ = _held_out_errors(folds, alphas)
        self.alpha_ = float(alphas[np.nan_to_num(self.held_out_errors_).argmin()])
        coef, intercept = _Equations(reduce(add, folds)).solve(self.alpha_)
        self.classes_ = np.asarray(classes)
        self.multilabel_ = is_multilabel
        # Of two classes, the second's score; the first's is its negative.
        first = 1 if len(self.classes_) == 2 and not is_multilabel else 0
        self.coef_, self.intercept_ = coef.T[first:], intercept[first:]
        self.n_features_in_ = self.coef_.shape[1]
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """Scores: about 1 for the class, -1 for others.

        Returns:
            (n_rows, num_classes), or of two classes (n_rows,), of the second; float32, or float64
            where `X` is.
        """
        check_is_fitted(self)
        features = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        scores = features @ self.coef_.T.astype(features.dtype)
        scores += self.intercept_.astype(features.dtype)
        return np.asarray(scores[:, 0] if len(self.coef_) < len(self.classes_) else scores)

    def predict(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """The class of each row, (n_rows,); or (n_rows, num_classes) of 0 and 1."""
        scores = self.decision_function(X)
        if self.multilabel_:
            return (scores > 0).astype(np.int64)
        codes = scores.argmax(axis=1) if scores.ndim == 2 else (scores > 0).astype(np.int64)
        return np.asarray(self.classes_[codes])

    def predict_proba(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """Softmax of the scores, of temperature 1: an order, until a temperature is fitted.

        Returns:
            (n_rows, num_classes), rows of sum 1. Where a row can have several classes, each one's
            own probability against its absence, softmax of a score and its negative.
        """
        scores = self.decision_function(X)
        if self.multilabel_:
            return np.asarray(expit(2 * scores))
        both = np.stack([-scores, scores], axis=-1) if scores.ndim == 1 else scores
        return np.asarray(softmax(both, axis=-1))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = self.class_weight is None
        return tags


class _Equations:
    """Normal equations of standardised features, decomposed: every further alpha is cheap."""

    def __init__(self, sums: SufficientStatistics) -> None:
        deviations = np.sqrt(np.diag(sums.scatter) / sums.weight)
        # What float32 cannot tell from a constant is not made larger.
        is_constant = deviations <= np.finfo(np.float32).eps * np.abs(sums.means)
        self._scale = np.where(is_constant, 1.0, deviations)[:, None]
        correlations = sums.scatter / self._scale / self._scale.T
        # Threads save little here, and wait for each other so often that where other programs use
        # the cores too, it takes ten times as long with two as with one.
        with threadpool_limits(1, user_api="blas"):
            self._eigenvalues, self._vectors = np.linalg.eigh(correlations)
        self._cross = self._vectors.T @ (sums.cross / self._scale)
        self._sums = sums

    def solve(self, alpha: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Coefficients (dim, num_targets), of features as they are, and intercepts."""
        # Rounding can leave an eigenvalue of 0 slightly negative.
        penalised = np.maximum(self._eigenvalues, 0)[:, None] + alpha
        coef = self._vectors @ (self._cross / penalised) / self._scale
        return coef, self._sums.target_means - self._sums.means @ coef


def _held_out_errors(
    folds: Sequence[SufficientStatistics], alphas: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean squared error of each alpha, on each fold by the equations of all others."""
    errors = np.zeros(len(alphas))
    for number, held_out in enumerate(folds):
        equations = _Equations(reduce(add, [*folds[:number], *folds[number + 1 :]]))
        for index, alpha in enumerate(alphas):
            errors[index] += _squared_error(held_out, *equations.solve(alpha))
    num_targets = len(folds[0].target_means)
    return errors / (sum(sums.weight for sums in folds) * num_targets)


def _squared_error(
    sums: SufficientStatistics, coef: NDArray[np.float64], intercept: NDArray[np.float64]
) -> float:
    """Sum of squared residuals over all rows and targets, without the rows."""
    offsets = sums.target_means - sums.means @ coef - intercept
    about_means = (
        sums.target_scatter.sum()
        - 2 * (coef * sums.cross).sum()
        + (coef * (sums.scatter @ coef)).sum()
    )
    return float(about_means + sums.weight * (offsets**2).sum())
