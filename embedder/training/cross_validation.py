"""Judging: heads on rows they were not trained on, and what `metrics.json` says of them."""

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.columns import CROSS_VALIDATED, TRAIN, VALIDATION
from embedder.datasets import Indices, Split, TrainingSet, read_labels, read_training_set
from embedder.errors import ModelError, RequestError
from embedder.evaluation import Evaluation, accuracy_in_words
from embedder.heads import PREDICTIONS_FILE, Model, ModelFolder
from embedder.store import Store
from embedder.training.fitting import Fitted, HeadSpec, fit, fit_head
from embedder.training.out_of_core import read_logits


def judge(
    spec: HeadSpec, images: TrainingSet, model: Model, fitted: Fitted | None = None
) -> Evaluation:
    """Predictions of the images that are tested on, as `Split.tested_on` has them.

    With one round and no `fitted`, by the model itself. With several, or on another split than
    the model's, a head is fitted for each round: with its own choice of settings, or with those
    of `fitted`.

    Args:
        spec: What kind of head the model's is.
        images: With a split, and their features in memory.
        model: Trained.
        fitted: Its head, where settings are not to be chosen anew.
    """
    evaluations = []
    for train, test in images.split.folds:
        if fitted is not None:
            judged = refit(spec, images, model, train)
        elif len(images.split.folds) == 1:
            judged = model
        else:
            own = fit_head(spec, replace(images, split=Split(folds=[(train, test)])))
            judged = own.in_model(model, images)
        evaluations.append(Evaluation.of(judged, images.unaugmented[test], images, test))
    return Evaluation.pooled(evaluations)


def refit(spec: HeadSpec, images: TrainingSet, model: Model, indices: Indices) -> Model:
    """The model with its settings, trained on other images.

    Args:
        spec: What kind of head it has.
        images: With their labels, their features in memory.
        model: Whose settings are taken.
        indices: (m,), of the images to train on.

    Raises:
        ModelError: It has settings that its kind of head does not know.
    """
    try:
        estimator = spec.estimator(model.settings, images.is_multilabel)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"A model must have a kind of head and settings that there are. Received: {spec.kind} "
            f"with {model.settings}: {error}"
        ) from error
    estimator = fit(spec, estimator, images, indices)
    return replace(
        model, estimator=estimator, classes=images.classes[images.known_classes(indices)]
    )


def metrics_of(test: Evaluation, coarse_of: NDArray[np.int64] | None) -> dict[str, Any]:
    """The part of `metrics.json` that says how good predictions are: `test`, and its intervals.

    Args:
        test: The predictions.
        coarse_of: (n_classes,), the coarse class of each class; None where there are none.
    """
    found = dict(test.scores)
    if coarse_of is not None:
        found |= test.hierarchical(coarse_of)
    before = test.scores_before_calibration
    return {
        "test": {"num_images": len(test), **{n: score["value"] for n, score in found.items()}},
        "intervals": {
            "test": {name: [score["low"], score["high"]] for name, score in found.items()}
        },
        "before_calibration": {name: score["value"] for name, score in before.items()},
        "per_class": test.per_class(),
    }


def coarse_classes(store: Store, coarse: str, images: TrainingSet) -> NDArray[np.int64]:
    """The coarse class of each class, as a number.

    Args:
        store: Where the images are of.
        coarse: Labels of the coarser level, as in `datasets.read_training_set`.
        images: Their classes.

    Returns:
        (n_classes,).

    Raises:
        RequestError: Images of one class are of several coarse classes, or of none.
    """
    if images.is_multilabel:
        raise RequestError("Coarse labels need images of one label each")
    by_id = read_labels(store, coarse, images.ids, images.rows)
    names: dict[int, str] = {}
    for image_id, code in zip(images.ids, images.codes, strict=True):
        name = by_id.get(image_id)
        if name is None or names.setdefault(int(code), name) != name:
            raise RequestError(
                f"Every image of a class must be of the same coarse class. Received: {image_id} of "
                f"the class {images.classes[code]}, which is of {name}"
                + (f", others of {names[int(code)]}" if name is not None else "")
            )
    # A class that no image has is of a coarse class of its own: nothing tells of another.
    own = [names.get(c, f"\0{c}") for c in range(len(images.classes))]
    return np.unique(own, return_inverse=True)[1]


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
    return EvaluationResult(metrics_of(test, coarse_of), notes)


def _trained_on(folder: ModelFolder, num_trained_on: int) -> set[str]:
    """Checksums of the images that a model has learned from, with a label or a pseudo-label.

    Args:
        folder: Of the model.
        num_trained_on: Images with a label that its record says it has learned from.

    Raises:
        ModelError: The model does not tell.
    """
    try:
        table, pseudo = folder.read_predictions("sha256", "part"), folder.read_pseudo_labels()
    except ModelError as error:
        raise ModelError(
            f"A model must tell what it was trained on. {error}. --include-trained tests on all "
            f"images"
        ) from error
    rows = zip(table["sha256"].to_pylist(), table["part"].to_pylist(), strict=True)
    trained = [sha256 for sha256, part in rows if part in (TRAIN, VALIDATION, CROSS_VALIDATED)]
    if len(trained) < num_trained_on:
        raise ModelError(
            f"A model must tell what it was trained on. Received: "
            f"{folder.path / PREDICTIONS_FILE} with {len(trained):,} of the {num_trained_on:,} "
            f"images. --include-trained tests on all images"
        )
    return set(trained) | set([] if pseudo is None else pseudo["sha256"].to_pylist())
