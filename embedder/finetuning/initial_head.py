"""The head that fine-tuning starts from: the model's, but for the images that stop the training."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedder.datasets import Targets
from embedder.errors import Unfinished
from embedder.extraction import RunOptions, run_extraction
from embedder.finetuning.labelled_images import Labelled, targets_of
from embedder.finetuning.network import FEATURES, TrainableNetwork
from embedder.finetuning.tuned_model import labelled_targets
from embedder.heads import Model, probabilities_of, recorded
from embedder.libraries import logger
from embedder.store import RECIPE_FILE, Store
from embedder.training import Task, features_of, refit

_TOLERANCE = 1e-3  # of a probability: float32 sums in another order


@dataclass(frozen=True)
class HeadTask:
    """What a model's head was trained on.

    Attributes:
        task: Features and labels of its images.
        targets: Their labels.
        place_of: Place in `task` of each labelled image.
    """

    task: Task
    targets: Targets
    place_of: NDArray[np.int64]


def head_task(
    model: Model,
    labelled: Labelled,
    source: str | os.PathLike[str],
    work: Path,
    run_options: RunOptions,
) -> HeadTask:
    """Read the features that a head was trained on, or make them again.

    Args:
        model: The head.
        labelled: Its images.
        source: Where they are.
        work: Folder for their features, where the model's own store is no longer what it was.
        run_options: How they are extracted.

    Raises:
        Unfinished: The features are of other bytes.
    """
    own = Path(recorded(model.record, "provenance", "store"))
    if (own / RECIPE_FILE).is_file() and Store(own).recipe.fingerprint == model.recipe.fingerprint:
        try:
            return _task_of(model, labelled, Store(own))
        except Unfinished as error:
            logger.info("extracting features again: %s", error)
    made = work / "features"
    recipe = model.recipe.model_copy(update={"views": 1})
    run_extraction(source, {str(made): recipe}, run_options)
    return _task_of(model, labelled, Store(made))


def _task_of(model: Model, labelled: Labelled, store: Store) -> HeadTask:
    targets, place_of = labelled_targets(labelled, store)
    task = Task(
        head=model.head,
        features=features_of(store, targets, model.column),
        codes=targets.codes,
        groups=labelled.groups[np.argsort(place_of)],
        classes=targets.classes,
        class_weight=recorded(model.record, "options", "class_weight"),
    )
    return HeadTask(task, targets, place_of)


def starting_model(model: Model, labelled: Labelled, found: HeadTask) -> Model:
    """The model with its settings, without the images that training is to be stopped by.

    `train` fits its heads on validation images too, at last: of these the model knows the answers,
    and no epoch of the training would seem better than its start. Of classes that have no others
    it sees them all the same: it has to know every class.
    """
    has = targets_of(labelled, model) > 0
    lacking = has[labelled.train].sum(axis=0) == 0
    rows = np.concatenate(
        [labelled.train, labelled.validation[has[labelled.validation][:, lacking].any(axis=1)]]
    )
    return refit(found.task, model, found.targets, np.sort(found.place_of[rows]))


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
