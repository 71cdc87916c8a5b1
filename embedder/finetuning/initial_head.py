"""The head that fine-tuning starts from: the model's, but for the images that stop the training."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedder.datasets import TrainingSet
from embedder.errors import Unfinished
from embedder.extraction import RunOptions, run_extraction
from embedder.finetuning.labelled_images import in_store, targets_of
from embedder.finetuning.network import FEATURES, TrainableNetwork
from embedder.heads import Model, probabilities_of
from embedder.libraries import logger
from embedder.sources import Listing
from embedder.store import Store
from embedder.training import HeadSpec, refit

_TOLERANCE = 1e-3  # of a probability: float32 sums in another order


def head_spec(model: Model) -> HeadSpec:
    """What kind of head a model's is."""
    return HeadSpec(model.head, model.recorded().options.class_weight)


def with_head_features(
    model: Model, images: TrainingSet, listing: Listing, work: Path, run_options: RunOptions
) -> TrainingSet:
    """The images with the features that their head was trained on, read or made again.

    Args:
        model: The head.
        images: Its images.
        listing: Where they are.
        work: Folder for their features, where the model's own store is no longer what it was.
        run_options: Workers, engine and shard size of the extraction.

    Returns:
        The images in the order of the store.

    Raises:
        Unfinished: The features are of other bytes.
    """
    own = model.recorded().provenance.store
    if Store.exists(own) and Store(own).recipe.fingerprint == model.recipe.fingerprint:
        try:
            return in_store(images, Store(own)).with_features(Store(own), model.column)
        except Unfinished as error:
            logger.info("extracting features again: %s", error)
    made = work / "features"
    recipe = model.recipe.model_copy(update={"views": 1})
    run_extraction(listing, {str(made): recipe}, run_options)
    return in_store(images, Store(made)).with_features(Store(made), model.column)


def starting_model(model: Model, images: TrainingSet) -> Model:
    """The model with its settings, without the images that training is to be stopped by.

    `train` fits its heads on validation images too, at last: of these the model knows the answers,
    and no epoch of the training would seem better than its start. Of classes that have no others
    it sees them all the same: it has to know every class.

    Args:
        model: The head.
        images: With the features that it was trained on.
    """
    has = targets_of(images, model) > 0
    train, validation = images.split.train, images.split.validation
    lacking = has[train].sum(axis=0) == 0
    needed = validation[has[validation][:, lacking].any(axis=1)]
    return refit(head_spec(model), images, model, np.union1d(train, needed))


def check_start(tunable: TrainableNetwork, pixels: NDArray[np.uint8], start: Model) -> None:
    """Check that a network with its head predicts, before the first step, what the head predicts.

    Args:
        tunable: Network and head.
        pixels: uint8 (n, height, width, 3) RGB.
        start: The model whose head it has.

    Raises:
        Unfinished: It does not.
    """
    features = tunable.upper(tunable.below_the_cut(pixels), training=False)[FEATURES]
    logits = np.asarray(tunable.head(features, training=False))
    ours = probabilities_of(logits, 1.0, start.is_multilabel)
    theirs = start.probabilities(np.asarray(features, np.float32))
    difference = float(np.abs(ours - theirs).max())
    if difference > _TOLERANCE:
        raise Unfinished(
            f"Before the first step the network must predict what the model predicts, to within "
            f"{_TOLERANCE}. Received: probabilities that differ by {difference:.2g}"
        )
