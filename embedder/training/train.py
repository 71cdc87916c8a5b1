"""Heads: classifiers trained on cached features, and tested on images they have not seen."""

from dataclasses import fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder import engines
from embedder.datasets import Targets, make_split, read_targets
from embedder.errors import RecipeError
from embedder.evaluation import Evaluation
from embedder.heads import Model, find_head
from embedder.machine import memory_bytes
from embedder.neighbours import near_duplicate_groups
from embedder.store import Store
from embedder.training.cross_validation import coarse_classes, judge
from embedder.training.fitting import Task, features_of, fit_head
from embedder.training.out_of_core import (
    STREAMED_HEADS,
    fit_streamed,
    make_streamed_split,
    read_logits,
    shape_of,
)
from embedder.training.ridge_pass import vector_column
from embedder.training.semi_supervised import check_head, fit_semi_supervised, read_unlabelled
from embedder.training.trained_head import Stopwatch, TrainedHead, TrainOptions

STREAM_BYTES = 2 * 2**30  # of features, as float32: more are read in parts


def train(
    store: Store,
    labels: str = "folder",
    head: str = "logistic",
    options: TrainOptions | None = None,
) -> TrainedHead:
    """Train a head on frozen features, and test it on images it was not trained on.

    Of more than `STREAM_BYTES` of features the heads `ridge`, `linear` and `mlp` read a part at a
    time: see `streamed`. Other heads need them in memory, all at once.

    Args:
        store: Features.
        labels: As in `datasets.read_targets`.
        head: `logistic`, `svm`, `ridge`, `lda`, `knn`, `centroid`, `linear` or `mlp`.
        options: How.

    Raises:
        RecipeError: The request makes no sense, or the labels name fewer than two classes.
        SourceError: A label file or a list cannot be read.
        StoreError: The store has no rows.
    """
    options = options or TrainOptions()
    find_head(head, options.class_weight, options.separator is not None)
    if options.unlabelled is not None:
        check_head(head, options.separator is not None)
        if options.split.startswith("kfold:"):
            raise RecipeError("Unlabelled images need a split with one part to test on, not kfold")
    column = vector_column(store, options.column)
    watch = Stopwatch()
    is_streamed = _is_streamed(store, column, head, options)
    targets = read_targets(store, labels, options.separator)
    ids = store.ids()[targets.rows]
    coarse_of = None
    if options.coarse is not None:
        coarse_of = coarse_classes(store, options.coarse, targets, ids)
    nothing = np.empty((0, shape_of(store, column)[1]), np.float32)
    task = Task(
        head=head,
        features=nothing if is_streamed else features_of(store, targets, column),
        codes=targets.codes,
        groups=np.arange(len(ids)),
        classes=targets.classes,
        class_weight=options.class_weight,
        seed=options.seed,
    )
    watch.lap("read")
    if options.duplicates is not None:
        task = replace(task, groups=near_duplicate_groups(task.plain, options.duplicates))
    watch.lap("near-duplicates")
    if is_streamed:
        split = make_streamed_split(options.split, store, ids, task)
        rows = split.folds[0][0]
        fitted = fit_streamed(task, split, store, column, targets.rows)
    else:
        split = make_split(options.split, store, ids, targets.codes, task.groups, options.seed)
        rows = split.folds[0][0] if len(split.folds) == 1 else np.arange(len(ids))
        fitted = fit_head(task, rows, split.validation)
    watch.lap("fit")
    model = Model(
        estimator=fitted.estimator,
        recipe=store.recipe,
        column=column,
        classes=targets.classes[fitted.known],
        temperature=fitted.temperature,
        thresholds=fitted.thresholds,
        head=head,
        settings=fitted.settings,
        record=_record(store, labels, options, targets, rows, coarse_of),
    )
    if is_streamed:
        test_rows = split.folds[0][1]
        logits = read_logits(model.estimator, store, column, targets.rows[test_rows])
        test = Evaluation.of_logits(model, logits, targets, test_rows)
    else:
        test_rows, test = judge(task, targets, split, model, None)
    watch.lap("test")
    helped, unhelped = None, None
    if options.unlabelled is not None:
        labelled = set(store.sha256()[targets.rows])
        images = read_unlabelled(options.unlabelled, model, labelled)
        helped = fit_semi_supervised(task, rows, fitted, images, options.unlabelled_method)
        fitted, unhelped = helped.fitted, test
        model = replace(model, estimator=fitted.estimator, temperature=fitted.temperature)
        test_rows, test = judge(task, targets, split, model, None)
        watch.lap("unlabelled")
    return TrainedHead(
        model=model,
        store=store,
        options=options,
        targets=targets,
        ids=ids,
        task=task,
        split=split,
        fitted=fitted,
        test_rows=test_rows,
        test=test,
        coarse_of=coarse_of,
        seconds=watch.seconds,
        helped=helped,
        unhelped=unhelped,
        pseudo_labels=None if helped is None else helped.pseudo_labels(),
    )


def _is_streamed(store: Store, column: str, head: str, options: TrainOptions) -> bool:
    """Whether features are read in parts.

    Raises:
        RecipeError: They are too many for the head, or for what is asked of it.
    """
    num_rows, dim = shape_of(store, column)
    num_bytes = num_rows * dim * np.dtype(np.float32).itemsize
    received = f"Received: {store.path}, with {num_bytes / 2**30:,.1f} GiB of features"
    if num_bytes <= STREAM_BYTES or head not in STREAMED_HEADS:
        if num_bytes > memory_bytes() / 2:
            raise RecipeError(
                f"The head {head} needs all features in at most half of the memory. Take one of "
                f"{', '.join(STREAMED_HEADS)}, which read them in parts. {received} and "
                f"{memory_bytes() / 2**30:,.1f} GiB of memory"
            )
        return False
    limit = f"more than {STREAM_BYTES / 2**30:,.1f} GiB of features, which are read in parts"
    if options.duplicates is not None:
        raise RecipeError(
            f"Near-duplicates cannot be looked for in {limit}. Go without, with duplicates=None or "
            f"--duplicates none. {received}, and duplicates={options.duplicates}"
        )
    if options.split.startswith("kfold:"):
        raise RecipeError(
            f"There is no cross-validation on {limit}. Test on a share, such as 0.2. {received}, "
            f"and split={options.split}"
        )
    return True


def _record(
    store: Store,
    labels: str,
    options: TrainOptions,
    targets: Targets,
    rows: NDArray[np.int64],
    coarse_of: NDArray[np.int64] | None,
) -> dict[str, Any]:
    sources = [run["source"] for run in store.runs()]
    return {
        "labels": labels,
        "options": {field.name: getattr(options, field.name) for field in fields(options)},
        "coarse_of": None if coarse_of is None else coarse_of.tolist(),
        "provenance": {
            "store": str(store.path.absolute()),
            "source": sources[-1] if sources else None,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": engines.versions()
            | {name: version(name) for name in ("scikit-learn", "skops")},
            "num_trained_on": len(rows),
            "num_unlabelled": targets.num_unlabelled,
        },
    }
