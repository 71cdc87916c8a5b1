"""Heads on stores larger than memory: trained and tested shard by shard, never on all rows at once.

A ridge head needs one pass over the store. A Keras head needs one for each epoch and one more.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.datasets import Indices, Split, TrainingSet, grouped_folds, make_split, strata_of
from embedder.errors import RequestError
from embedder.extraction import connect
from embedder.heads import (
    NUM_FOLDS,
    Batch,
    KerasHead,
    RidgeHead,
    Settings,
    calibrate,
    read_logits,
    stratified_folds,
)
from embedder.machine import memory_bytes
from embedder.store import Store, scan, shuffled_batches, vectors_of
from embedder.training.fitting import Fitted, HeadSpec
from embedder.training.options import TrainOptions
from embedder.training.ridge_pass import ridge_sums

OUT_OF_CORE_HEADS = ("ridge", "linear", "mlp")
IN_CORE_BYTES = 2 * 2**30  # of features, as float32: more are read in parts
_HELD_OUT_ROWS = 20_000  # to calibrate by, at most: a temperature is one number
_HELD_OUT_SHARE = 0.1
# What a split divides: with a million images alone, StratifiedGroupKFold takes minutes.
_NUM_BLOCKS = 1000


# Reading. ----------------------------------------------------------------------------------


def read_features(store: Store, column: str, rows: Indices) -> NDArray[np.float32]:
    """Features of a few images, of the images as they are; other shards than theirs are not read.

    Args:
        store: Features.
        column: Which.
        rows: (m,), indices in `store.ids()`, rising.

    Returns:
        float32 (m, dim), in the order of `rows`.
    """
    parts = [vectors_of(table[column]) for table in scan(store, [column], images=rows)]
    return np.concatenate(parts).astype(np.float32, copy=False)


def is_read_in_parts(store: Store, column: str, head: str, options: TrainOptions) -> bool:
    """Whether a head reads features in parts, as they are too many to be all in memory.

    Args:
        store: Features.
        column: Which.
        head: Kind, as in `heads.HEADS`.
        options: What is asked of it.

    Raises:
        RequestError: They are too many for the head, or for what is asked of it.
    """
    num_values = len(store) * store.recipe.views * store.dim(column)
    num_bytes = num_values * np.dtype(np.float32).itemsize
    received = f"Received: {store}, with {num_bytes / 2**30:,.1f} GiB of features"
    if num_bytes <= IN_CORE_BYTES or head not in OUT_OF_CORE_HEADS:
        if num_bytes > memory_bytes() / 2:
            raise RequestError(
                f"The head {head} needs all features in at most half of the memory. Take one of "
                f"{', '.join(OUT_OF_CORE_HEADS)}, which read them in parts. {received} and "
                f"{memory_bytes() / 2**30:,.1f} GiB of memory"
            )
        return False
    limit = f"more than {IN_CORE_BYTES / 2**30:,.1f} GiB of features, which are read in parts"
    if options.duplicates is not None:
        raise RequestError(
            f"Near-duplicates cannot be looked for in {limit}. Go without, with duplicates=None or "
            f"--duplicates none. {received}, and duplicates={options.duplicates}"
        )
    if options.split.startswith("kfold:"):
        raise RequestError(
            f"There is no cross-validation on {limit}. Test on a share, such as 0.2. {received}, "
            f"and split={options.split}"
        )
    return True


# Splitting. --------------------------------------------------------------------------------


def make_out_of_core_split(spec: str, store: Store, images: TrainingSet, seed: int) -> Split:
    """A split as of `make_split`, which always has validation images.

    Where nobody else decided it, blocks of neighbouring images of a class are divided, not single
    images, if a class has more than a thousand. Where there is no list of validation images, a
    share of the training images is taken, about 20,000 at most.

    Args:
        spec: As in `make_split`; not `kfold:K`.
        store: Where the columns are.
        images: What is to be divided.
        seed: Of the shuffling.

    Raises:
        RequestError: As in `make_split`; also where no image can be held out.
        SourceError: A list cannot be read.
    """
    split = make_split(spec, store, replace(images, groups=_blocks(images.codes)), seed)
    train, held = split.trained_on, split.validation
    if not len(held):
        share = min(_HELD_OUT_SHARE, _HELD_OUT_ROWS / len(train))
        codes = images.codes[train]
        held = train[grouped_folds(codes, _blocks(codes), math.ceil(1 / share), seed)[0][1]]
    if not images.is_multilabel:
        # The head learns from the others only, and has to know each class.
        held = held[np.isin(images.codes[held], images.codes[np.setdiff1d(train, held)])]
    if not len(held):
        raise RequestError(
            f"Some training images must be held out, of classes that have others. Received: "
            f"{len(train)} training images of {len(images.known_classes(train))} classes"
        )
    return replace(split, validation=held)


def _blocks(codes: NDArray[np.integer]) -> Indices:
    return stratified_folds(strata_of(codes), _NUM_BLOCKS)


# Fitting. ----------------------------------------------------------------------------------


def fit_out_of_core(spec: HeadSpec, images: TrainingSet, store: Store, column: str) -> Fitted:
    """Fit a head to a store's training images, and calibrate it by the validation images.

    A ridge head calibrates what it learned without the validation images, and then learns from
    all, with the same alpha. A Keras head never learns from them: they say when to stop.

    Args:
        spec: What kind of head.
        images: With a split that has validation images.
        store: Features.
        column: Which.

    Raises:
        RequestError: Class weights are asked for with multi-label targets.
    """
    if images.is_multilabel and spec.class_weight is not None:
        raise RequestError(
            f"`class_weight` must be None where labels are multi-label. "
            f"Received: class_weight={spec.class_weight!r}"
        )
    fit = _fit_ridge if spec.kind == "ridge" else _fit_keras
    estimator, settings, logits = fit(spec, images, store, column)
    known = images.known_classes(images.split.trained_on)
    truth = images.codes[images.split.validation]
    if not images.is_multilabel:
        truth = np.searchsorted(known, truth)
    temperature, thresholds, scores = calibrate(logits, truth)
    trial = {"settings": settings, **scores}
    return Fitted(estimator, settings, known, temperature, thresholds, [trial])


# What either gives: the estimator, its settings, and logits of the validation images.
_Learned = tuple[Any, Settings, NDArray[np.float32]]


def _fit_ridge(spec: HeadSpec, images: TrainingSet, store: Store, column: str) -> _Learned:
    split, rows = images.split, images.rows
    train, held = split.trained_on, split.validation
    known = images.known_classes(train)
    codes = np.zeros((len(store), *images.codes.shape[1:]), images.codes.dtype)
    folds = np.full(len(store), -1)
    weights = np.ones(len(store))
    own = images.codes[train]
    if not images.is_multilabel:
        own = np.searchsorted(known, own)
    codes[rows[train]] = own
    if spec.class_weight == "balanced":
        weights[rows[train]] = (len(own) / len(known) / np.bincount(own))[own]
    rest = split.train
    folds[rows[rest]] = stratified_folds(strata_of(images.codes[rest]), NUM_FOLDS)
    folds[rows[held]] = NUM_FOLDS
    codes, folds, weights = (
        np.repeat(a, store.recipe.views, axis=0) for a in (codes, folds, weights)
    )
    with connect(None, 1) as pool:
        sums = ridge_sums(store, codes, len(known), folds, pool, weights, column)
    classes = known if images.is_multilabel else images.classes[known]
    chosen = RidgeHead().fit_sums(sums[:NUM_FOLDS], classes, images.is_multilabel)
    logits = read_logits(chosen, store, column, rows[held])
    head = RidgeHead(alphas=[chosen.alpha_]).fit_sums(sums, classes, images.is_multilabel)
    return head, {"scaling": "standard"}, logits


def _fit_keras(spec: HeadSpec, images: TrainingSet, store: Store, column: str) -> _Learned:
    held, rows = images.split.validation, images.rows
    names = images.codes if images.is_multilabel else images.classes[images.codes].tolist()
    by_id = {images.ids[i]: names[i] for i in images.split.train}
    head: KerasHead = spec.estimator({}, images.is_multilabel)

    def make_batches(epoch: int) -> Iterator[Batch]:
        random = np.random.default_rng((spec.seed, epoch))
        return shuffled_batches(store, by_id, head.batch_size, random, column)

    random = np.random.default_rng(spec.seed)
    watched = np.sort(random.permutation(held)[:_HELD_OUT_ROWS])  # all the time in memory
    labels = np.array([names[i] for i in watched])
    head.fit_stream(make_batches, (read_features(store, column, rows[watched]), labels))
    return head, {}, read_logits(head, store, column, rows[held])
