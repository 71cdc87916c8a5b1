"""Heads on stores larger than memory: trained and tested shard by shard, never on all rows at once.

A ridge head needs one pass over the store. A Keras head needs one for each epoch and one more.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.datasets import Split, grouped_folds, make_split, strata_of
from embedder.errors import RecipeError
from embedder.extraction import connect
from embedder.heads import (
    NUM_FOLDS,
    Batch,
    KerasHead,
    RidgeHead,
    Settings,
    calibrate,
    logits_of,
    make_estimator,
    store_batches,
    stratified_folds,
)
from embedder.store import Store, vectors_of
from embedder.training.fitting import Fitted, Task, known_classes
from embedder.training.ridge_pass import ridge_sums

STREAMED_HEADS = ("ridge", "linear", "mlp")
_HELD_OUT_ROWS = 20_000  # to calibrate by, at most: a temperature is one number
_HELD_OUT_SHARE = 0.1
# What a split divides: with a million images alone, StratifiedGroupKFold takes minutes.
_NUM_BLOCKS = 1000

Rows = NDArray[np.int64]


# Reading. ----------------------------------------------------------------------------------


def shape_of(store: Store, column: str | None) -> tuple[int, int]:
    """Number of rows, views too, and length of a vector, without reading any.

    Returns:
        (n_rows, dim); of a feature map all its values, of a feature that is not there 0.
    """
    num_rows = len(store) * store.recipe.views
    column = column or store.recipe.columns[0]
    if num_rows == 0 or column not in store.recipe.columns:
        return num_rows, 0
    return num_rows, store.dim(column)


def parts_of(store: Store, column: str, rows: Rows) -> Iterator[NDArray[np.float32]]:
    """Features of some images, of the pictures as they are, a shard at a time.

    Args:
        store: Features.
        column: Which.
        rows: (m,), places in `store.ids()`, rising.

    Yields:
        float32 (k, dim), in the order of `rows`.
    """
    num_views, start = store.recipe.views, 0  # rows of an image, one after the other
    for path in store.shards():
        stop = start + store.num_rows_of(path.name) // num_views
        first, last = np.searchsorted(rows, [start, stop])
        if first < last:
            vectors = vectors_of(store.read_shard(path.name)[column].combine_chunks())
            yield vectors[num_views * (rows[first:last] - start)].astype(np.float32)
        start = stop


def read_features(store: Store, column: str, rows: Rows) -> NDArray[np.float32]:
    """Features (m, dim) of a few images; see `parts_of`."""
    return np.concatenate([*parts_of(store, column, rows)])


def read_logits(estimator: Any, store: Store, column: str, rows: Rows) -> NDArray[np.float32]:
    """Logits (m, n_classes) of any number of images; see `parts_of`."""
    return np.concatenate([logits_of(estimator, part) for part in parts_of(store, column, rows)])


# Splitting. --------------------------------------------------------------------------------


def make_streamed_split(spec: str, store: Store, ids: NDArray[np.object_], task: Task) -> Split:
    """A split as of `make_split`, which always has validation rows.

    Where nobody else decided it, blocks of neighbouring images of a class are divided, not single
    images, if a class has more than a thousand. Where there is no list of validation rows, a
    share of the training rows is taken, about 20,000 at most.

    Args:
        spec: As in `make_split`; not `kfold:K`.
        store: Where the columns are.
        ids: (n,) image ids of the labelled rows.
        task: Their codes.

    Raises:
        RecipeError: As in `make_split`; also where no row can be held out.
        SourceError: A list cannot be read.
    """
    split = make_split(spec, store, ids, task.codes, _blocks(task.codes), task.seed)
    train, held = split.folds[0][0], split.validation
    if not len(held):
        share = min(_HELD_OUT_SHARE, _HELD_OUT_ROWS / len(train))
        codes = task.codes[train]
        _, places = grouped_folds(codes, _blocks(codes), math.ceil(1 / share), task.seed)[0]
        held = train[places]
    if not task.is_multilabel:
        # The head learns from the others only, and has to know each class.
        held = held[np.isin(task.codes[held], task.codes[np.setdiff1d(train, held)])]
    if not len(held):
        raise RecipeError(
            f"Some training images must be held out, of classes that have others. "
            f"Received: {len(train)} training images of {len(known_classes(task, train))} classes"
        )
    return Split(split.name, split.folds, held, split.is_official)


def _blocks(codes: NDArray[np.integer]) -> NDArray[np.int64]:
    return stratified_folds(strata_of(codes), _NUM_BLOCKS)


# Fitting. ----------------------------------------------------------------------------------


def fit_streamed(task: Task, split: Split, store: Store, column: str, rows: Rows) -> Fitted:
    """Fit a head to a store's training rows, and calibrate it by the validation rows.

    A ridge head calibrates what it learnt without the validation rows, and then learns from all,
    with the same alpha. A Keras head never learns from them: they say when to stop.

    Args:
        task: What is to be learned; its features are not looked at.
        split: With validation rows.
        store: Features.
        column: Which.
        rows: (n,), the labelled rows' places in `store.ids()`.

    Raises:
        RecipeError: Class weights are asked for with several labels an image.
    """
    if task.is_multilabel and task.class_weight is not None:
        raise RecipeError(
            f"`class_weight` must be None where an image can have several labels. "
            f"Received: class_weight={task.class_weight!r}"
        )
    fit = _fit_ridge if task.head == "ridge" else _fit_keras
    estimator, settings, logits = fit(task, split, store, column, rows)
    known = known_classes(task, split.folds[0][0])
    truth = task.codes[split.validation]
    if not task.is_multilabel:
        truth = np.searchsorted(known, truth)
    temperature, thresholds, scores = calibrate(logits, truth)
    trial = {"settings": settings, **scores}
    return Fitted(estimator, settings, known, temperature, thresholds, [trial])


# What either gives: the estimator, its settings, and logits of the validation rows.
_Learnt = tuple[Any, Settings, NDArray[np.float32]]


def _fit_ridge(task: Task, split: Split, store: Store, column: str, rows: Rows) -> _Learnt:
    train, held = split.folds[0][0], split.validation
    known = known_classes(task, train)
    codes = np.zeros((len(store), *task.codes.shape[1:]), task.codes.dtype)
    folds = np.full(len(store), -1)
    weights = np.ones(len(store))
    own = task.codes[train] if task.is_multilabel else np.searchsorted(known, task.codes[train])
    codes[rows[train]] = own
    if task.class_weight == "balanced":
        weights[rows[train]] = (len(own) / len(known) / np.bincount(own))[own]
    rest = np.setdiff1d(train, held)
    folds[rows[rest]] = stratified_folds(strata_of(task.codes[rest]), NUM_FOLDS)
    folds[rows[held]] = NUM_FOLDS
    codes, folds, weights = (
        np.repeat(a, store.recipe.views, axis=0) for a in (codes, folds, weights)
    )
    with connect(None, 1) as pool:
        sums = ridge_sums(store, codes, len(known), folds, pool, weights, column)
    classes = known if task.is_multilabel else task.classes[known]
    chosen = RidgeHead().fit_sums(sums[:NUM_FOLDS], classes, task.is_multilabel)
    logits = read_logits(chosen, store, column, rows[held])
    head = RidgeHead(alphas=[chosen.alpha_]).fit_sums(sums, classes, task.is_multilabel)
    return head, {"scaling": "standard"}, logits


def _fit_keras(task: Task, split: Split, store: Store, column: str, rows: Rows) -> _Learnt:
    held = split.validation
    rest = np.setdiff1d(split.folds[0][0], held)
    names = task.codes if task.is_multilabel else task.classes[task.codes].tolist()
    ids = store.ids()
    by_id = {ids[rows[place]]: names[place] for place in rest}
    head: KerasHead = make_estimator(
        task.head, {}, task.class_weight, task.seed, task.is_multilabel
    )

    def make_batches(epoch: int) -> Iterator[Batch]:
        random = np.random.default_rng((task.seed, epoch))
        return store_batches(store, by_id, head.batch_size, random, column)

    random = np.random.default_rng(task.seed)
    watched = np.sort(random.permutation(held)[:_HELD_OUT_ROWS])  # all the time in memory
    labels = np.array([names[place] for place in watched])
    head.fit_stream(make_batches, (read_features(store, column, rows[watched]), labels))
    return head, {}, read_logits(head, store, column, rows[held])
