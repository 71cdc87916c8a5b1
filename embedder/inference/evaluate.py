"""Evaluation of a saved model: on the labelled images of a store that it was not trained on."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedder.columns import CROSS_VALIDATED, TRAIN, VALIDATION
from embedder.datasets import coarse_classes, read_training_set
from embedder.errors import ModelError, RequestError
from embedder.evaluation import Evaluation, accuracy_in_words
from embedder.heads import PREDICTIONS_FILE, Model, ModelFolder, read_logits
from embedder.store import Store


@dataclass(frozen=True)
class EvaluationResult:
    """A model on the labelled rows of a store.

    Attributes:
        metrics: As in `metrics.json`.
        notes: Which rows were left out, and why, a sentence each.
    """

    metrics: dict[str, Any]
    notes: list[str]

    def __repr__(self) -> str:
        """How many images, and how good it is on them."""
        num_images = self.metrics["test"]["num_images"]
        return f"<EvaluationResult {num_images:,} images: {accuracy_in_words(self.metrics)}>"


def evaluate_model(
    model_path: str | os.PathLike[str],
    store: Store,
    labels: str,
    coarse: str | None = None,
    include_trained: bool = False,
) -> EvaluationResult:
    """Test a model on the labelled images of a store.

    Images whose bytes it was trained on are left out, unless they are asked for. Labels that the
    model does not know count as errors.

    Args:
        model_path: Folder of the model.
        store: Features of the model's recipe.
        labels: As in `datasets.read_training_set`.
        coarse: Labels of a coarser level, spelled alike.
        include_trained: Whether images it was trained on count too.

    Raises:
        ModelError: There is no such model.
        RecipeMismatch: The features are of another recipe.
        RequestError: The request makes no sense, or nothing is left to test on.
    """
    model = Model.load(model_path)
    model.check_recipe(store.recipe, f"the store {store}")
    record = model.recorded()
    images = read_training_set(store, labels, record.options.separator, model.classes)
    indices, notes = np.arange(len(images.ids)), []
    if images.num_unlabelled:
        notes.append(f"{images.num_unlabelled:,} rows have no label.")
    if not include_trained:
        trained = _trained_on(ModelFolder(model_path), record.provenance.num_trained_on)
        indices = np.array([i for i in indices if images.sha256[i] not in trained], np.int64)
        if left_out := len(images.ids) - len(indices):
            notes.append(f"{left_out:,} images were trained on, and are left out.")
    if not len(indices):
        raise RequestError(
            f"There must be labelled images that the model was not trained on. Received: "
            f"{store}, of which all {len(images.ids):,} labelled images were; "
            f"--include-trained tests on them all the same"
        )
    if unknown := sorted(set(images.classes) - set(model.classes)):
        names = ", ".join(unknown[:5])
        notes.append(f"The model does not know {len(unknown)} of the classes, such as {names}.")
    coarse_of = None if coarse is None else coarse_classes(store, coarse, images)
    logits = read_logits(model.estimator, store, model.column, images.rows[indices])
    test = Evaluation.of_logits(model, logits, images, indices)
    return EvaluationResult(test.metrics(coarse_of), notes)


def _trained_on(folder: ModelFolder, num_trained_on: int) -> set[str]:
    """Checksums of the images that a model has learned from, with a label or a pseudo-label.

    Args:
        folder: Of the model.
        num_trained_on: Images with a label that its record says it has learned from.

    Raises:
        ModelError: The model does not tell.
    """
    try:
        columns, pseudo = folder.read_predictions("sha256", "part"), folder.read_pseudo_labels()
    except ModelError as error:
        raise ModelError(
            f"A model must tell what it was trained on. {error}. --include-trained tests on all "
            f"images"
        ) from error
    is_trained_on = np.isin(columns["part"], [TRAIN, VALIDATION, CROSS_VALIDATED])
    trained = columns["sha256"][is_trained_on]
    if len(trained) < num_trained_on:
        raise ModelError(
            f"A model must tell what it was trained on. Received: "
            f"{folder.path / PREDICTIONS_FILE} with {len(trained):,} of the {num_trained_on:,} "
            f"images. --include-trained tests on all images"
        )
    return set(trained) | set([] if pseudo is None else pseudo["sha256"].to_pylist())
