"""Images without labels for fine-tuning: pseudo-labels of the head, as far as its guard allows."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from embedder.extraction import RunOptions, run_extraction
from embedder.finetuning.initial_head import HeadTask
from embedder.finetuning.labelled_images import Labelled
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
        helped: What the head and its guard made of the unlabelled images.
    """

    labelled: Labelled
    paths: list[bytes]
    helped: SemiSupervisedFit

    def facts(self) -> dict[str, Any]:
        """What `metrics.json` says of them."""
        training = self.helped.training
        return {
            "num_images": len(self.helped.images.ids),
            "num_pseudo_labels": len(training.pseudo_labels.rows),
            "threshold": min(training.threshold, 1.0),
            "verdict": str(training),
        }


def add_pseudo_labels(
    model: Model,
    labelled: Labelled,
    found: HeadTask,
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
        found: The features of that.
        unlabelled: The images without labels.
        work: Folder for their features.
        run_options: How they are extracted.

    Raises:
        RecipeError: The head cannot learn from pseudo-labels, or no image is new.
        SourceError: The source cannot be listed.
    """
    check_head(model.head, model.is_multilabel)
    others = str(work / "unlabelled")
    recipe = model.recipe.model_copy(update={"views": 1})
    run_extraction(unlabelled, {others: recipe}, run_options)
    task, targets, place_of = found.task, found.targets, found.place_of
    known = np.searchsorted(targets.classes, model.classes)
    fitted = Fitted(model.estimator, model.settings, known, model.temperature, None, [])
    images = read_unlabelled(others, model, set(labelled.sha256))
    helped = fit_semi_supervised(
        task, np.sort(place_of[labelled.train]), fitted, images, "self-training"
    )
    pseudo = helped.training.pseudo_labels
    path_of = list_images(unlabelled).paths()
    paths = [path_of[image] for image in images.ids[pseudo.rows]]
    return PseudoLabelledImages(extended(labelled, images, pseudo), paths, helped)


def extended(labelled: Labelled, images: Unlabelled, pseudo: PseudoLabels) -> Labelled:
    """Labelled images, and those with pseudo-labels after them, to learn from."""
    ids, count = images.ids[pseudo.rows], len(labelled.ids)
    codes = np.searchsorted(labelled.classes, pseudo.labels).astype(np.int64)
    groups = labelled.groups.max() + 1 + np.arange(len(ids))  # each for itself
    return replace(
        labelled,
        ids=np.concatenate([labelled.ids, ids]),
        sha256=np.concatenate([labelled.sha256, images.sha256[pseudo.rows]]),
        codes=np.concatenate([labelled.codes, codes]),
        groups=np.concatenate([labelled.groups, groups]),
        train=np.concatenate([labelled.train, count + np.arange(len(ids))]),
    )
