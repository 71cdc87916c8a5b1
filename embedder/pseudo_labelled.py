"""Images without labels for fine-tuning: pseudo-labels of the head, as far as its guard allows."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from embedder.extract import RunOptions, run_extraction
from embedder.fitting import Fitted, Task
from embedder.model import Model
from embedder.self_training import PseudoLabels
from embedder.sources import list_images
from embedder.store import RECIPE_FILE, Store
from embedder.tuned import labelled_targets
from embedder.tuning_data import Labelled
from embedder.unlabelled import Helped, Unlabelled, check_head, learn, read_unlabelled


@dataclass(frozen=True)
class More:
    """Images with pseudo-labels.

    Attributes:
        labelled: The labelled images, and these after them, to learn from.
        paths: Where each of them is.
        helped: What the head and its guard made of the unlabelled images.
    """

    labelled: Labelled
    paths: list[bytes]
    helped: Helped

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
    sources: tuple[tuple[str | os.PathLike[str], list[bytes]], str],
    work: Path,
    run_options: RunOptions,
) -> More:
    """Let the head label images, and take those labels that its guard finds to help.

    As `train --unlabelled`: labelled images that the judged heads have not seen decide, and where
    pseudo-labels would hurt the head none are taken.

    Args:
        model: The head, on features of its own recipe.
        labelled: What it learned from, and where that is.
        sources: The labelled images' source and paths; and the source of the unlabelled ones.
        work: Folder for the features of both, where the model's own store is no longer there.
        run_options: How they are extracted.

    Raises:
        RecipeError: The head cannot learn from pseudo-labels, or no image is new.
        SourceError: A source cannot be listed.
    """
    (source, paths), unlabelled = sources
    check_head(model.head, model.is_multilabel)
    recipe = model.recipe.model_copy(update={"views": 1})
    own = Path(model.record["provenance"]["store"])
    if not (own / RECIPE_FILE).is_file() or Store(own).recipe.fingerprint != recipe.fingerprint:
        own = work / "features"
        run_extraction(source, {str(own): recipe}, run_options)
    others = str(work / "unlabelled")
    run_extraction(unlabelled, {others: recipe}, run_options)
    store = Store(own)
    targets, place_of = labelled_targets(labelled, store)
    vectors = store.vectors(model.column)[targets.rows].astype(np.float32)
    task = Task(
        head=model.head,
        features=vectors,
        codes=targets.codes,
        groups=labelled.groups[np.argsort(place_of)],
        classes=targets.classes,
        class_weight=model.record["options"]["class_weight"],
    )
    known = np.searchsorted(targets.classes, model.classes)
    fitted = Fitted(model.estimator, model.settings, known, model.temperature, None, [])
    images = read_unlabelled(others, model, set(labelled.sha256))
    helped = learn(task, np.sort(place_of[labelled.train]), fitted, images, "self-training")
    pseudo = helped.training.pseudo_labels
    refs = list_images(unlabelled).refs
    path_of = dict(zip(refs["image_id"].to_pylist(), refs["path"].to_pylist(), strict=True))
    more_paths = [path_of[image] for image in images.ids[pseudo.rows]]
    return More(extended(labelled, images, pseudo), [*paths, *more_paths], helped)


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
