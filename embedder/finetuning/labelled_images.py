"""The labelled images of a model: what each was for, what it is of, and where it is."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.class_weight import compute_sample_weight

from embedder.columns import TEST, TRAIN, VALIDATION
from embedder.datasets import Split, TrainingSet, codes_of, grouped_folds, share_of
from embedder.errors import ModelError, RequestError, Unfinished
from embedder.heads import PREDICTIONS_FILE, Model, ModelFolder
from embedder.sources import Listing
from embedder.store import Store

_NUM_HELD_FOLDS = 10  # of which one is held out to stop by, where the model has no such images


def read_labelled(path: str | os.PathLike[str], model: Model, seed: int) -> TrainingSet:
    """Read which images a model was trained and tested on, sorted by id.

    The model's test images stay what they were. Where it has no validation images, a tenth of the
    training images is held out, of which no near-duplicate stays among the others.

    Args:
        path: Folder of the model.
        model: Loaded from there.
        seed: Of what is held out.

    Raises:
        ModelError: The model does not tell.
        RequestError: It was not tested on images of its own.
    """
    try:
        columns = ModelFolder(path).read_predictions()
    except ModelError as error:
        raise ModelError(f"The model must tell what it was trained on: {error}") from error
    classes, codes = codes_of(columns["label"], model.is_multilabel, model.classes)
    parts = columns["part"]
    name = model.recorded().options.split
    test = np.flatnonzero(parts == TEST)
    if not len(test):
        raise RequestError(
            f"The model must have been tested on images of its own, which fine-tuning is then "
            f"judged by. Received: {path}, trained with {name}; train it with "
            f"--split 0.2 or with official lists"
        )
    if len(set(columns["image_id"])) < len(parts) or not (parts == TRAIN).any():
        raise ModelError(
            f"The model must tell each image once, and which it was trained on. Received: "
            f"{Path(path) / PREDICTIONS_FILE}, with {len(parts):,} rows of "
            f"{len(set(columns['image_id'])):,} images, {(parts == TRAIN).sum():,} trained on"
        )
    train, validation = np.flatnonzero(parts == TRAIN), np.flatnonzero(parts == VALIDATION)
    if not len(validation):
        groups = columns["group"][train]
        _, held = grouped_folds(codes[train], groups, _NUM_HELD_FOLDS, seed)[0]
        has = _indicators(codes[train], np.arange(len(classes)))
        held = _without_last_of_a_class(has, groups, held)
        train, validation = np.delete(train, held), train[held]
    learned = np.sort(np.concatenate([train, validation]))
    return TrainingSet(
        ids=columns["image_id"],
        sha256=columns["sha256"],
        classes=classes,
        codes=codes,
        groups=columns["group"],
        split=Split(name, [(learned, test)], validation, share_of(name) is None),
    )


def in_store(images: TrainingSet, store: Store) -> TrainingSet:
    """The same images in a store's order.

    Raises:
        Unfinished: As in `rows_in`.
    """
    rows = rows_in(images, store)
    order = np.argsort(rows)
    num_unlabelled = len(store) - len(rows)
    return replace(images.reordered(order), rows=rows[order], num_unlabelled=num_unlabelled)


def rows_in(images: TrainingSet, store: Store) -> NDArray[np.int64]:
    """Where the images are in `Store.ids()`, (n,).

    Raises:
        Unfinished: The store lacks an image, or has other bytes of it.
    """
    ids, sha256 = store.texts("image_id", "sha256")
    row_of = {image: row for row, image in enumerate(ids)}
    lost = [image for image in images.ids if image not in row_of]
    if lost:
        raise Unfinished(
            f"{lost[0]} could be embedded before, and now is not in {store}, as "
            f"{len(lost):,} images in all"
        )
    rows = np.array([row_of[image] for image in images.ids], np.int64)
    changed = np.flatnonzero(sha256[rows] != images.sha256)
    if len(changed):
        raise Unfinished(
            f"Images must not change while a model is fine-tuned. Received: other bytes of "
            f"{images.ids[changed[0]]}, as of {len(changed):,} images in all"
        )
    return rows


def _indicators(codes: NDArray[np.integer], classes: NDArray[np.integer]) -> NDArray[np.bool_]:
    """(n, n_classes), which of these classes each image is of."""
    return codes[:, None] == classes if codes.ndim == 1 else codes[:, classes] > 0


def _without_last_of_a_class(
    has: NDArray[np.bool_], groups: NDArray[np.int64], held: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Rows to hold out, but for those whose class has no other row, and their near-duplicates."""
    lost = ~np.delete(has, held, axis=0).any(axis=0)
    needed = groups[held][has[held][:, lost].any(axis=1)]
    return held[~np.isin(groups[held], needed)]


def targets_of(images: TrainingSet, model: Model) -> NDArray[np.float32]:
    """float32 (n, n_known), 1 for an image's classes, of those that the model knows."""
    known = np.searchsorted(images.classes, model.classes)
    return _indicators(images.codes, known).astype(np.float32)


def weights_of(
    targets: NDArray[np.float32], train: NDArray[np.int64], class_weight: str | None
) -> NDArray[np.float32]:
    """Weight of each image's loss: 1, or with `balanced`, more for those of rare classes.

    Images of classes that are not trained on weigh 0.

    Args:
        targets: (n, n_classes); images have one label each where class weights are asked for.
        train: (m,), indices of the images that the classes' frequencies are of.
        class_weight: None or `balanced`.

    Returns:
        (n,).
    """
    if class_weight is None:
        return np.ones(len(targets), np.float32)
    weights = compute_sample_weight(class_weight, targets.argmax(axis=1), indices=train)
    return np.asarray(weights, np.float32)


def find_paths(listing: Listing, images: TrainingSet) -> list[bytes]:
    """Where each labelled image is.

    Raises:
        RequestError: The source lacks some of them.
    """
    path_of = listing.paths()
    missing = [image for image in images.ids if image not in path_of]
    if missing:
        raise RequestError(
            f"SOURCE must hold the images that the model was trained and tested on. Received: "
            f"{listing.source}, which lacks {len(missing):,} of {len(images.ids):,}, such as "
            f"{missing[0]}. Name what the model's features were extracted from, or train the head "
            f"again on what there is"
        )
    return [path_of[image] for image in images.ids]
