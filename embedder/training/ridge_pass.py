"""Sums over a whole store in one pass: shards are read where the workers are, sums come back."""

from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from embedder.errors import RequestError, StoreError
from embedder.extraction import Pool, WorkerContext
from embedder.heads import CHUNK_ROWS, SufficientStatistics, one_vs_rest_targets, sums_by_fold
from embedder.store import Store, scan, shard_groups, vectors_of

Codes = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class _Part:
    """Neighbouring shards, and what is to be known of their rows."""

    store: str
    column: str
    names: list[str]
    num_classes: int
    num_folds: int
    codes: Codes
    folds: Codes
    weights: NDArray[Any] | None


def ridge_sums(
    store: Store,
    codes: Codes,
    num_classes: int,
    folds: Codes,
    pool: Pool,
    weights: NDArray[Any] | None = None,
    column: str | None = None,
) -> list[SufficientStatistics]:
    """Sum up a store's rows by fold, for `RidgeHead.fit_sums`.

    A task takes as many shards as together hold `CHUNK_ROWS` rows, and with them the codes of just
    these. Memory is that of the rows and the sums of the tasks in work, however many there are in
    all: for 5 folds of 1,280 features 84 MB and 66 MB for each.

    Args:
        store: Features; every row counts, of several views too.
        codes: (n_rows,), each row's class, in the order of `store.table()`; or where a row can
            have several, (n_rows, num_classes) of 0 and 1.
        num_classes: Number of classes.
        folds: (n_rows,), each row's fold; -1 leaves a row out, such as one without a label.
        pool: Workers, which must see the store at the same path.
        weights: (n_rows,), each row's weight; None for 1 each.
        column: Name of the feature, where the store has several.

    Returns:
        Sums of each fold, 0 to the largest of `folds`. Tasks end in any order, which the last
        digits of float64 can show.

    Raises:
        RequestError: There is no such feature, it is a feature map, or no row has a fold.
        StoreError: The store does not have as many rows as there are codes, or cannot be read.
    """
    _check(store, codes, folds)
    num_folds = int(folds.max()) + 1
    column = vector_column(store, column)
    parts = (
        _Part(
            *(store.address, column, names, num_classes, num_folds),
            *(codes[rows], folds[rows], None if weights is None else weights[rows]),
        )
        for names, rows in shard_groups(store, CHUNK_ROWS)
    )
    totals: list[SufficientStatistics] = []
    with closing(pool.run(_sum_shards, ((part,) for part in parts), lambda *_: None)) as results:
        for sums in results:
            totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    return totals


def _check(store: Store, codes: Codes, folds: Codes) -> None:
    if not (folds >= 0).any():
        raise RequestError(f"At least one row must have a fold. Received: none of {len(folds)}")
    num_rows = len(store) * store.recipe.views
    if {num_rows} != {len(codes), len(folds)}:
        raise StoreError(
            f"There must be a code and a fold for each row of the store {store}, of which "
            f"there are {num_rows}. Received: {len(codes)} codes, {len(folds)} folds"
        )


def vector_column(store: Store, column: str | None) -> str:
    """Name of a store's feature, or of its only one.

    Raises:
        RequestError: There is no such feature, several of which none is named, or it is a feature
            map.
    """
    name = store.recipe.column(column)
    if store.recipe.pooling == "none":
        raise RequestError(
            f"A head needs features of one vector an image. Received: {name}, a feature map of "
            f"pooling={store.recipe.pooling}; extract with --pooling avg"
        )
    return name


# What runs on the workers. -----------------------------------------------------------------


def _sum_shards(task: WorkerContext, part: _Part) -> list[SufficientStatistics]:
    # Not for this call only: others run in this process too, and want the same.
    threadpool_limits(task.num_threads(), user_api="blas")
    store = Store(part.store)
    tables = scan(store, [part.column], view=None, shards=part.names)
    features = np.concatenate([vectors_of(c) for t in tables for c in t[part.column].chunks])
    num_rows = len(part.codes)
    if len(features) != num_rows:
        raise StoreError(f"The store {store} changed while it was read. Run again")
    is_multilabel = part.codes.ndim == 2
    rows, codes = np.nonzero(part.codes) if is_multilabel else (np.arange(num_rows), part.codes)
    targets = one_vs_rest_targets(rows, codes, num_rows, part.num_classes)
    return sums_by_fold(features, targets, part.folds, part.num_folds, part.weights)
