"""What a model is fine-tuned on: the images of its head, as pixels or as activations at a cut."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.class_weight import compute_class_weight

from embedder.datasets import TEST, TRAIN, VALIDATION, codes_of, grouped_folds
from embedder.decode import DecodedImage
from embedder.errors import ModelError, RecipeError, Unfinished
from embedder.extraction import load_image
from embedder.finetuning.parameter_groups import TuneOptions
from embedder.finetuning.trainer import Examples
from embedder.heads import PREDICTIONS_FILE, PREDICTIONS_SCHEMA, Model, read_table, recorded
from embedder.machine import num_cores
from embedder.recipe import Recipe
from embedder.sources import list_images
from embedder.store import Store, vectors_of

_NUM_HELD_FOLDS = 10  # of which one is held out to stop by, where the model has no such images
_AHEAD = 64  # images that are decoded before they are wanted


@dataclass(frozen=True)
class Labelled:
    """The labelled images of a model, and what each was for.

    Attributes:
        ids: (n,) str.
        sha256: (n,) str, of their bytes.
        codes: As in `datasets.Targets`, of `classes`.
        classes: (n_classes,) str, sorted.
        groups: int (n,), which are near-duplicates of each other.
        train: Places of those to learn from.
        validation: Places of those to stop and to calibrate by.
        test: Places of those to be tested on.
    """

    ids: NDArray[np.object_]
    sha256: NDArray[np.object_]
    codes: NDArray[np.integer]
    classes: NDArray[np.str_]
    groups: NDArray[np.int64]
    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]

    @property
    def learned(self) -> NDArray[np.int64]:
        """Places of those to learn from and to stop by, rising."""
        return np.sort(np.concatenate([self.train, self.validation]))


def read_labelled(path: str | os.PathLike[str], model: Model, seed: int) -> Labelled:
    """Read which images a model was trained and tested on.

    The model's test images stay what they were. Where it has no validation images, a tenth of the
    training images is held out, of which no near-duplicate stays among the others.

    Args:
        path: Folder of the model.
        model: Loaded from there.
        seed: Of what is held out.

    Raises:
        ModelError: The model does not tell.
        RecipeError: It was not tested on images of its own.
    """
    try:
        table = read_table(Path(path) / PREDICTIONS_FILE, PREDICTIONS_SCHEMA).sort_by("image_id")
    except ModelError as error:
        raise ModelError(f"The model must tell what it was trained on: {error}") from error
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    classes, codes = codes_of(columns["label"], model.is_multilabel, model.classes)
    parts = columns["part"]
    test = np.flatnonzero(parts == TEST)
    if not len(test):
        split = recorded(model.record, "options", "split")
        raise RecipeError(
            f"The model must have been tested on images of its own, which fine-tuning is then "
            f"judged by. Received: {path}, trained with {split}; train it with "
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
    return Labelled(
        ids=columns["image_id"],
        sha256=columns["sha256"],
        codes=codes,
        classes=classes,
        groups=columns["group"],
        train=train,
        validation=validation,
        test=test,
    )


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


def targets_of(labelled: Labelled, model: Model) -> NDArray[np.float32]:
    """float32 (n, n_known), 1 for an image's classes, of those that the model knows."""
    known = np.searchsorted(labelled.classes, model.classes)
    return _indicators(labelled.codes, known).astype(np.float32)


def weights_of(
    targets: NDArray[np.float32], train: NDArray[np.int64], class_weight: str | None
) -> NDArray[np.float32]:
    """Weight of each image's loss, (n,): 1, or with `balanced`, more for those of rare classes.

    Images have one label each where class weights are asked for.
    """
    if class_weight is None:
        return np.ones(len(targets), np.float32)
    codes = targets.argmax(axis=1)
    known = np.unique(codes[train])
    weights = np.ones(targets.shape[1])
    weights[known] = compute_class_weight(class_weight, classes=known, y=codes[train])
    return np.asarray(weights[codes], np.float32)


def examples_of(
    labelled: Labelled, model: Model, inputs: NDArray[Any], options: TuneOptions
) -> Examples:
    """What a network learns from.

    Args:
        labelled: The images.
        model: Whose classes they are.
        inputs: As in `Examples`, in the order of `labelled.learned`.
        options: Whether inputs are activations, and the class weights.
    """
    targets, rows = targets_of(labelled, model), labelled.learned
    return Examples(
        inputs=inputs,
        targets=targets[rows],
        weights=weights_of(targets, labelled.train, options.class_weight)[rows],
        train=within(labelled, labelled.train),
        validation=within(labelled, labelled.validation),
        are_pixels=not options.is_cached,
        is_multilabel=model.is_multilabel,
    )


def find_paths(source: str | os.PathLike[str], labelled: Labelled) -> list[bytes]:
    """Where each labelled image is.

    Raises:
        SourceError: The source cannot be listed.
        RecipeError: It lacks some of them.
    """
    places = list_images(source).paths()
    missing = [image for image in labelled.ids if image not in places]
    if missing:
        raise RecipeError(
            f"SOURCE must hold the images that the model was trained and tested on. Received: "
            f"{source}, which lacks {len(missing):,} of {len(labelled.ids):,}, such as "
            f"{missing[0]}. Name what the model's features were extracted from, or train the head "
            f"again on what there is"
        )
    return [places[image] for image in labelled.ids]


def decode_pixels(
    paths: list[bytes], labelled: Labelled, recipe: Recipe, file: Path
) -> NDArray[np.uint8]:
    """Decode the images to learn from and to stop by into a file that is mapped.

    Args:
        paths: Of all labelled images.
        labelled: Which.
        recipe: Of the pixels.
        file: To write.

    Returns:
        uint8 (n, 1, height, width, 3), in the order of `labelled.learned`.

    Raises:
        Unfinished: An image cannot be read, or is not the one that the model was trained on.
    """
    rows = labelled.learned
    plain = recipe.model_copy(update={"views": 1})
    shape = (len(rows), 1, *recipe.image_size, 3)
    pixels: NDArray[np.uint8] = mapped(file, np.uint8, shape)
    with ThreadPoolExecutor(num_cores()) as decoders:
        for start in range(0, len(rows), _AHEAD):
            part = rows[start : start + _AHEAD]
            images = decoders.map(lambda row: load_image(paths[row], plain), part)
            for place, (row, image) in enumerate(zip(part, images, strict=True), start=start):
                if not isinstance(image.outcome, DecodedImage):
                    raise Unfinished(
                        f"{labelled.ids[row]} could be embedded before, and now cannot: "
                        f"{image.outcome.error}"
                    )
                _check_bytes(labelled, row, image.sha256)
                pixels[place, 0] = image.outcome.pixels
    return pixels


def mapped(file: Path, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """An array in a file, which has its place on the disk before anything is written to it.

    A disk that was full only then would end the process, with SIGBUS and without a word.

    Raises:
        Unfinished: There is no place for it.
    """
    try:
        array: NDArray[Any] = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with file.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    except OSError as error:
        raise Unfinished(f"{file} cannot be written: {error.strerror or error}") from error
    return array


def _check_bytes(labelled: Labelled, row: int, sha256: str | None) -> None:
    if sha256 != labelled.sha256[row]:
        raise Unfinished(
            f"{labelled.ids[row]} must be the image that the model was trained on, with sha256 "
            f"{labelled.sha256[row]}. Received: {sha256}. Extract the images again, and train the "
            f"head again"
        )


def read_activations(store: Store, labelled: Labelled, file: Path) -> NDArray[np.float32]:
    """Copy activations of the images to learn from and to stop by into a file that is mapped.

    Args:
        store: Of the activations, with any number of views.
        labelled: Which images.
        file: To write.

    Returns:
        float32 (n, n_views, ...), in the order of `labelled.learned`.

    Raises:
        Unfinished: The store lacks an image, or has other bytes of it.
    """
    rows, num_views = labelled.learned, store.recipe.views
    place_of = {labelled.ids[row]: place for place, row in enumerate(rows)}
    (column,), is_there = store.recipe.columns, np.zeros(len(rows), dtype=bool)
    activations = None
    for path in store.shards():
        table = store.read_shard(path.name)
        ids = table["image_id"].to_numpy(zero_copy_only=False)[::num_views]
        wanted = np.flatnonzero([image in place_of for image in ids])
        if not len(wanted):
            continue
        vectors = np.concatenate([vectors_of(chunk) for chunk in table[column].chunks])
        vectors = vectors.reshape(len(ids), num_views, *vectors.shape[1:])
        if activations is None:
            shape = (len(rows), *vectors.shape[1:])
            activations = mapped(file, np.float32, shape)
        checksums = table["sha256"].to_pylist()[::num_views]
        for number in wanted:
            place = place_of[ids[number]]
            _check_bytes(labelled, rows[place], checksums[number])
            activations[place], is_there[place] = vectors[number], True
    if activations is None or not is_there.all():
        lost = labelled.ids[rows[int(np.argmin(is_there))]]
        raise Unfinished(f"{lost} could be embedded before, and now is not in {store.path}")
    return activations


def within(labelled: Labelled, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of labelled rows among `labelled.learned`."""
    return np.searchsorted(labelled.learned, rows)
