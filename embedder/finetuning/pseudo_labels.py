"""Images without labels for fine-tuning: pseudo-labels of the head, as far as its guard allows."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from embedder.datasets import TrainingSet
from embedder.extraction import RunOptions, run_extraction
from embedder.finetuning.initial_head import head_spec
from embedder.heads import Model
from embedder.sources import list_images
from embedder.training import (
    Fitted,
    PseudoLabels,
    SemiSupervisedFit,
    Unlabelled,
    check_head,
    fit_semi_supervised,
    read_unlabelled,
)


@dataclass(frozen=True)
class PseudoLabelledImages:
    """Images with pseudo-labels.

    Attributes:
        labelled: The labelled images, and these after them, to learn from.
        paths: Where each of these is.
        head: What the head and its guard made of the unlabelled images.
    """

    labelled: TrainingSet
    paths: list[bytes]
    head: SemiSupervisedFit


def add_pseudo_labels(
    model: Model,
    labelled: TrainingSet,
    with_features: TrainingSet,
    unlabelled: str,
    work: Path,
    run_options: RunOptions,
) -> PseudoLabelledImages:
    """Let the head label images, and take those labels that its guard finds to help.

    As `train --unlabelled`: labelled images that the judged heads have not seen decide, and where
    pseudo-labels would hurt the head none are taken.

    Args:
        model: The head, without the images that training is stopped by.
        labelled: What it learned from.
        with_features: The same images with their features, in any order.
        unlabelled: The images without labels.
        work: Folder for their features.
        run_options: Workers, engine and shard size of the extraction.

    Raises:
        RequestError: The head cannot learn from pseudo-labels, or no image is new.
        SourceError: The source cannot be listed.
    """
    check_head(model.head, model.is_multilabel)
    listing, others = list_images(unlabelled), str(work / "unlabelled")
    recipe = model.recipe.model_copy(update={"views": 1})
    run_extraction(listing, {others: recipe}, run_options)
    known = np.searchsorted(labelled.classes, model.classes)
    fitted = Fitted(model.estimator, model.settings, known, model.temperature, None, [])
    images = read_unlabelled(others, model, set(labelled.sha256))
    train = with_features.split.train
    head = fit_semi_supervised(
        head_spec(model), with_features, train, fitted, images, "self-training"
    )
    pseudo, path_of = head.training.pseudo_labels, listing.paths()
    paths = [path_of[image] for image in images.ids[pseudo.rows]]
    return PseudoLabelledImages(extended(labelled, images, pseudo), paths, head)


def extended(labelled: TrainingSet, images: Unlabelled, pseudo: PseudoLabels) -> TrainingSet:
    """Labelled images, and those with pseudo-labels after them, to learn from.

    Args:
        labelled: With their split, whose test images stay as they are.
        images: Without labels.
        pseudo: Labels of some of these.
    """
    ids, count = images.ids[pseudo.rows], len(labelled.ids)
    codes = np.searchsorted(labelled.classes, pseudo.labels).astype(np.int64)
    groups = labelled.groups.max() + 1 + np.arange(len(ids))  # each for itself
    trained_on = np.concatenate([labelled.split.trained_on, count + np.arange(len(ids))])
    return replace(
        labelled,
        ids=np.concatenate([labelled.ids, ids]),
        sha256=np.concatenate([labelled.sha256, images.sha256[pseudo.rows]]),
        codes=np.concatenate([labelled.codes, codes]),
        groups=np.concatenate([labelled.groups, groups]),
        split=replace(labelled.split, folds=[(trained_on, labelled.split.tested_on)]),
    )
