"""Heads: classifiers trained on cached features, and tested on images they have not seen."""

from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from embedder.datasets import TrainingSet, coarse_classes, make_split, read_training_set
from embedder.errors import RequestError
from embedder.evaluation import Evaluation
from embedder.heads import Model, Provenance, Record, RecordedOptions, find_head, read_logits
from embedder.libraries import versions
from embedder.neighbours import near_duplicate_groups
from embedder.store import Store
from embedder.training.cross_validation import judge
from embedder.training.fitting import HeadSpec, fit_head
from embedder.training.options import TrainOptions
from embedder.training.out_of_core import fit_out_of_core, is_read_in_parts, make_out_of_core_split
from embedder.training.ridge_pass import vector_column
from embedder.training.semi_supervised import check_head, fit_semi_supervised, read_unlabelled
from embedder.training.timing import Stopwatch
from embedder.training.trained_head import TrainedHead


def train(
    store: Store,
    labels: str = "folder",
    head: str = "logistic",
    options: TrainOptions | None = None,
) -> TrainedHead:
    """Train a head on frozen features, and test it on images it was not trained on.

    Of more than `IN_CORE_BYTES` of features the heads `ridge`, `linear` and `mlp` read a part at a
    time: see `out_of_core`. Other heads need them in memory, all at once.

    Args:
        store: Features.
        labels: As in `datasets.read_training_set`.
        head: `logistic`, `svm`, `ridge`, `lda`, `knn`, `centroid`, `linear` or `mlp`.
        options: Split, near-duplicates, weights and seed; None for the defaults.

    Raises:
        RequestError: The request makes no sense, or the labels name fewer than two classes.
        SourceError: A label file or a list cannot be read.
        StoreError: The store has no rows.
    """
    options = options or TrainOptions()
    find_head(head, options.class_weight, options.separator is not None)
    if options.unlabelled is not None:
        check_head(head, options.separator is not None)
        if options.split.startswith("kfold:"):
            raise RequestError("Unlabelled images need a split with one part to test on, not kfold")
    column = vector_column(store, options.column)
    watch = Stopwatch()
    is_out_of_core = is_read_in_parts(store, column, head, options)
    images = read_training_set(store, labels, options.separator)
    coarse_of = None
    if options.coarse is not None:
        coarse_of = coarse_classes(store, options.coarse, images)
    if not is_out_of_core:
        images = images.with_features(store, column)
    watch.lap("read")
    if options.duplicates is not None:
        groups = near_duplicate_groups(images.unaugmented, options.duplicates)
        images = replace(images, groups=groups)
    watch.lap("near-duplicates")
    spec = HeadSpec(head, options.class_weight, options.seed)
    divide = make_out_of_core_split if is_out_of_core else make_split
    images = replace(images, split=divide(options.split, store, images, options.seed))
    split = images.split
    if is_out_of_core:
        fitted = fit_out_of_core(spec, images, store, column)
    else:
        fitted = fit_head(spec, images)
    watch.lap("fit")
    model = Model(
        estimator=fitted.estimator,
        recipe=store.recipe,
        column=column,
        classes=images.classes[fitted.known],
        temperature=fitted.temperature,
        thresholds=fitted.thresholds,
        head=head,
        settings=fitted.settings,
        record=_record(store, labels, options, images, coarse_of),
    )
    if is_out_of_core:
        logits = read_logits(model.estimator, store, column, images.rows[split.tested_on])
        test = Evaluation.of_logits(model, logits, images, split.tested_on)
    else:
        test = judge(spec, images, model)
    watch.lap("test")
    trained = TrainedHead(
        model=model,
        store=store,
        options=options,
        images=images,
        fitted=fitted,
        test=test,
        is_out_of_core=is_out_of_core,
        coarse_of=coarse_of,
        seconds=watch.seconds,
    )
    if options.unlabelled is not None:
        trained = _with_unlabelled(trained, options.unlabelled)
        watch.lap("unlabelled")
    return trained


def _with_unlabelled(head: TrainedHead, path: str) -> TrainedHead:
    """The head with what it learns from the images of a store that have no label."""
    images = head.images
    found = fit_semi_supervised(
        head.spec,
        images,
        images.split.trained_on,
        head.fitted,
        read_unlabelled(path, head.model, set(images.sha256)),
        head.options.unlabelled_method,
    )
    model = found.fitted.in_model(head.model, images)
    return replace(
        head,
        model=model,
        fitted=found.fitted,
        test=judge(head.spec, images, model),
        semi_supervised=found,
        supervised_test=head.test,
        pseudo_labels=found.pseudo_labels(),
    )


def _record(
    store: Store,
    labels: str,
    options: TrainOptions,
    images: TrainingSet,
    coarse_of: NDArray[np.int64] | None,
) -> Record:
    sources = [run["source"] for run in store.runs()]
    return Record(
        labels=labels,
        options=RecordedOptions(**asdict(options)),
        coarse_of=None if coarse_of is None else coarse_of.tolist(),
        provenance=Provenance(
            store=store.address,
            source=sources[-1] if sources else None,
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions() | {name: version(name) for name in ("scikit-learn", "skops")},
            num_trained_on=len(images.split.trained_on),
            num_unlabelled=images.num_unlabelled,
        ),
    )
