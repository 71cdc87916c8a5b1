"""Sums over rows, of which ridge regression needs no more: of any parts, added in any order."""

from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

# Rows of one matrix product: at 1,280 float32 84 MB. Its rounding is float32's, that of adding the
# products is float64's.
CHUNK_ROWS = 16_384


@dataclass(frozen=True, eq=False)
class SufficientStatistics:
    """What ridge regression needs of a set of rows; sums of disjoint sets can be added.

    Scatter and products are about the means of the set itself: about zero, float32 would lose
    the spread of a feature that is far from zero.

    Attributes:
        weight: Sum of the rows' weights; their number, where each weighs 1.
        means: float64 (dim,), of the features.
        target_means: float64 (num_targets,).
        scatter: float64 (dim, dim), sum of the products of each two features.
        cross: float64 (dim, num_targets), sum of the products of features and targets.
        target_scatter: float64 (num_targets,), sum of each target's square.
    """

    weight: float
    means: NDArray[np.float64]
    target_means: NDArray[np.float64]
    scatter: NDArray[np.float64]
    cross: NDArray[np.float64]
    target_scatter: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        features: NDArray[Any],
        targets: NDArray[Any],
        weights: NDArray[Any] | None = None,
    ) -> Self:
        """Sum up rows.

        Args:
            features: (n_rows, dim), n_rows may be 0. Matrix products are computed in float64 where
                these are float64, in float32 otherwise.
            targets: (n_rows, num_targets).
            weights: (n_rows,), at least 0; None for 1 each.
        """
        weights = np.ones(len(features)) if weights is None else weights.astype(np.float64)
        total = float(weights.sum())
        shares = weights / total if total else weights
        dtype = np.float64 if features.dtype == np.float64 else np.float32
        # A mean in float64, not in float32: a constant feature has a scatter of exactly 0.
        means = np.einsum("n,nd->d", shares, features, dtype=np.float64)
        target_means = shares @ targets
        roots = np.sqrt(weights).astype(dtype)[:, None]
        centred = (features.astype(dtype, copy=False) - means.astype(dtype)) * roots
        centred_targets = (targets - target_means).astype(dtype) * roots
        return cls(
            total,
            means,
            target_means,
            # NumPy sees that this is symmetric, and computes only one half (BLAS syrk).
            (centred.T @ centred).astype(np.float64),
            (centred.T @ centred_targets).astype(np.float64),
            np.square(centred_targets).sum(axis=0, dtype=np.float64),
        )

    def __add__(self, other: "SufficientStatistics") -> "SufficientStatistics":
        """Sums of both sets (Chan, Golub and LeVeque, "Updating formulae", 1979)."""
        total = self.weight + other.weight
        share = other.weight / total if total else 0.0
        shift = other.means - self.means
        target_shift = other.target_means - self.target_means
        between = self.weight * share
        return SufficientStatistics(
            total,
            self.means + share * shift,
            self.target_means + share * target_shift,
            self.scatter + other.scatter + between * np.outer(shift, shift),
            self.cross + other.cross + between * np.outer(shift, target_shift),
            self.target_scatter + other.target_scatter + between * target_shift**2,
        )


def one_vs_rest_targets(
    rows: NDArray[np.integer[Any]], codes: NDArray[np.integer[Any]], num_rows: int, num_classes: int
) -> NDArray[np.int8]:
    """Targets of a classifier from pairs of a row and its class.

    Args:
        rows: (n_pairs,), numbers of rows; one with several classes occurs several times.
        codes: (n_pairs,), numbers of their classes.
        num_rows: Rows of the result.
        num_classes: Columns of the result.

    Returns:
        (num_rows, num_classes), 1 for the pairs and -1 for all others.
    """
    targets = np.full((num_rows, num_classes), -1, np.int8)
    targets[rows, codes] = 1
    return targets


def sums_by_fold(
    features: NDArray[Any],
    targets: NDArray[Any],
    folds: NDArray[np.integer[Any]],
    num_folds: int,
    weights: NDArray[Any] | None = None,
) -> list[SufficientStatistics]:
    """Sum up the rows of each fold.

    Args:
        features: As in `SufficientStatistics.of`.
        targets: As in `SufficientStatistics.of`.
        folds: (n_rows,), each row's fold, 0 to `num_folds` - 1; -1 leaves a row out.
        num_folds: Length of the result.
        weights: As in `SufficientStatistics.of`.
    """
    if weights is None:
        weights = np.ones(len(features))
    result = []
    for fold in range(num_folds):
        rows = np.flatnonzero(folds == fold)
        parts = [rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS)]
        sums = [
            SufficientStatistics.of(features[part], targets[part], weights[part])
            for part in parts or [rows]
        ]
        result.append(reduce(add, sums))
    return result
