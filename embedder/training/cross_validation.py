"""Judging: heads on images they were not trained on."""

from dataclasses import replace

from embedder.datasets import Indices, Split, TrainingSet
from embedder.errors import ModelError
from embedder.evaluation import Evaluation
from embedder.heads import Model
from embedder.training.fitting import HeadSpec, fit, fit_head


def judge(
    spec: HeadSpec, images: TrainingSet, model: Model, is_refitted: bool = False
) -> Evaluation:
    """Predictions of the images that are tested on, as `Split.tested_on` has them.

    With one round, by the model itself. With several, a head is fitted for each round, with its
    own choice of settings.

    Args:
        spec: What kind of head the model's is.
        images: With a split, and their features in memory.
        model: Trained.
        is_refitted: Whether a head with the model's settings is fitted for each round, as of
            another split than the model's.
    """
    evaluations = []
    for train, test in images.split.folds:
        if is_refitted:
            judged = refit(spec, images, model, train)
        elif len(images.split.folds) == 1:
            judged = model
        else:
            own = fit_head(spec, replace(images, split=Split(folds=[(train, test)])))
            judged = own.in_model(model, images)
        evaluations.append(Evaluation.of(judged, images, test))
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
