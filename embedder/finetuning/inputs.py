"""What a network is fine-tuned on: pixels, or activations at a cut, in files that are mapped."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embedder.datasets import TrainingSet
from embedder.decode import DecodedImage
from embedder.errors import Unfinished
from embedder.extraction import load_image
from embedder.files import os_errors_as
from embedder.finetuning.labelled_images import rows_in, targets_of, weights_of
from embedder.heads import Model
from embedder.libraries import import_keras
from embedder.machine import num_cores
from embedder.recipe import Recipe
from embedder.store import Store, scan, vectors_of

if TYPE_CHECKING:
    import keras

_AHEAD = 64  # images that are decoded before they are wanted


@dataclass(frozen=True)
class Examples:
    """What is learned from.

    Attributes:
        inputs: uint8 (n, n_views, height, width, 3) RGB, or activations at the cut (n, n_views,
            ...); an array in memory or a file that is mapped. Training sees a random view in each
            epoch, validation the first.
        targets: float32 (n, n_classes), 1 for an image's classes.
        weights: float32 (n,), of each image's loss.
        train: Indices of those to learn from.
        validation: Indices of those to stop by; may be empty.
        are_pixels: Whether inputs are pixels.
        is_multilabel: Whether an image can have several labels (multi-label).
    """

    inputs: NDArray[Any]
    targets: NDArray[np.float32]
    weights: NDArray[np.float32]
    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    are_pixels: bool
    is_multilabel: bool = False

    def cross_entropy(self, label_smoothing: float = 0.0) -> "keras.Loss":
        """The loss of targets and logits, (batch, n_classes) each, as (batch,)."""
        kind = "BinaryCrossentropy" if self.is_multilabel else "CategoricalCrossentropy"
        loss: keras.Loss = getattr(import_keras().losses, kind)(
            from_logits=True, label_smoothing=label_smoothing, reduction=None
        )
        return loss


def examples_of(
    images: TrainingSet,
    model: Model,
    inputs: NDArray[Any],
    are_pixels: bool,
    class_weight: str | None = None,
) -> Examples:
    """What a network learns from.

    Args:
        images: With their labels.
        model: Whose classes they are.
        inputs: As in `Examples`, in the order of `Split.trained_on`.
        are_pixels: Whether inputs are pixels, or activations.
        class_weight: As in `TuneOptions`.
    """
    targets, split = targets_of(images, model), images.split
    rows = split.trained_on
    return Examples(
        inputs=inputs,
        targets=targets[rows],
        weights=weights_of(targets, split.train, class_weight)[rows],
        train=np.searchsorted(rows, split.train),
        validation=np.searchsorted(rows, split.validation),
        are_pixels=are_pixels,
        is_multilabel=model.is_multilabel,
    )


def decode_pixels(
    paths: list[bytes], images: TrainingSet, recipe: Recipe, file: Path
) -> NDArray[np.uint8]:
    """Decode the images to learn from and to stop by into a file that is mapped.

    Args:
        paths: Of all labelled images.
        images: Which.
        recipe: Of the pixels.
        file: To write.

    Returns:
        uint8 (n, 1, height, width, 3), in the order of `Split.trained_on`.

    Raises:
        Unfinished: An image cannot be read, or is not the one that the model was trained on.
    """
    rows = images.split.trained_on
    unaugmented = recipe.model_copy(update={"views": 1})
    shape = (len(rows), 1, *recipe.image_size, 3)
    pixels: NDArray[np.uint8] = mapped(file, np.uint8, shape)
    with ThreadPoolExecutor(num_cores()) as decoders:
        for start in range(0, len(rows), _AHEAD):
            part = rows[start : start + _AHEAD]
            decoded = decoders.map(lambda row: load_image(paths[row], unaugmented), part)
            for i, (row, image) in enumerate(zip(part, decoded, strict=True), start=start):
                if not isinstance(image.outcome, DecodedImage):
                    raise Unfinished(
                        f"{images.ids[row]} could be embedded before, and now cannot: "
                        f"{image.outcome.error}"
                    )
                if image.sha256 != images.sha256[row]:
                    raise Unfinished(
                        f"{images.ids[row]} must be the image that the model was trained on, with "
                        f"sha256 {images.sha256[row]}. Received: {image.sha256}. Extract the "
                        f"images again, and train the head again"
                    )
                pixels[i, 0] = image.outcome.pixels
    return pixels


def mapped(file: Path, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """An array in a file, which has its place on the disk before anything is written to it.

    A disk that was full only then would end the process, with SIGBUS and without a word.

    Args:
        file: What to write.
        dtype: Of the array.
        shape: Of the array.

    Raises:
        Unfinished: There is no place for it.
    """
    with os_errors_as(Unfinished, f"{file} cannot be written"):
        array: NDArray[Any] = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with file.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    return array


def read_activations(store: Store, images: TrainingSet, file: Path) -> NDArray[np.float32]:
    """Copy activations of the images to learn from and to stop by into a file that is mapped.

    Args:
        store: Of the activations, with any number of views.
        images: Which.
        file: To write.

    Returns:
        float32 (n, n_views, ...), in the order of `Split.trained_on`.

    Raises:
        Unfinished: As in `labelled_images.rows_in`.
    """
    rows = rows_in(images, store)[images.split.trained_on]
    order, start = np.argsort(rows), 0
    activations: NDArray[np.float32] = np.zeros(0, np.float32)
    (column,) = store.recipe.columns
    for table in scan(store, [column], view=None, images=rows[order]):
        vectors = vectors_of(table[column])
        vectors = vectors.reshape(-1, store.recipe.views, *vectors.shape[1:])
        if start == 0:
            activations = mapped(file, np.float32, (len(rows), *vectors.shape[1:]))
        activations[order[start : start + len(vectors)]] = vectors
        start += len(vectors)
    return activations
