"""A tuned backbone and head as a model: saved, calibrated, tested, and compared with the head."""

from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embedder.backbones import digest_of, load_network, save_network
from embedder.columns import EMBEDDING
from embedder.datasets import TrainingSet
from embedder.errors import Unfinished
from embedder.evaluation import Evaluation, PairedTest, TestedModel
from embedder.finetuning import scratch_network as scratch
from embedder.finetuning.labelled_images import in_store, targets_of
from embedder.finetuning.network import FEATURES
from embedder.finetuning.options import SCRATCH, TuneOptions
from embedder.finetuning.trainer import Epoch
from embedder.heads import (
    BACKBONE_FILES,
    KerasHead,
    Model,
    Record,
    RecordedTuning,
    calibrate,
    read_logits,
)
from embedder.recipe import Recipe
from embedder.store import Store
from embedder.training import Fitted, TrainedHead, TrainOptions

if TYPE_CHECKING:
    import keras

_ARRAYS_FILE, _NETWORK_FILE = BACKBONE_FILES


@dataclass(frozen=True)
class Tuning:
    """How a model was fine-tuned.

    Attributes:
        model: Folder of the model it started from.
        weights: File of the tuned backbone's weights, once the model is in its place.
        features: Store of its features, once they are in theirs.
        options: The strategy and its training, as asked for.
        request: What decides the result.
        epochs: What they came to.
        num_tuned: Weights that could change, the heads' too.
        num_weights: Of the backbone.
        seconds: What took how long.
        pseudo_labels: What unlabelled images came to; None where there were none.
    """

    model: Path
    weights: Path
    features: Path
    options: TuneOptions
    request: dict[str, Any]
    epochs: list[Epoch]
    num_tuned: int
    num_weights: int
    seconds: dict[str, float]
    pseudo_labels: dict[str, Any] | None = None


def tuned_recipe(model: Model, options: TuneOptions) -> Recipe:
    """The recipe of the features that are tuned, with the weights that tuning starts from."""
    recipe = model.recipe
    changes: dict[str, Any] = {"views": 1}
    if len(recipe.layers) > 1:
        changes["layers"] = (model.column,)
    if not options.kind.keeps_head:
        changes["pooling"] = options.pooling or recipe.pooling
    if options.strategy == SCRATCH:
        changes |= {"layers": (), "l2_normalise": False}
    return recipe.model_copy(update=changes)


def activations_recipe(recipe: Recipe, cut: str | None, num_views: int) -> Recipe:
    """The recipe of the activations at a cut, in full precision, as the layer gives them.

    Args:
        recipe: Of the features that are tuned.
        cut: Layer after which the network is cut, or `FEATURES` for the features themselves.
        num_views: Of each image.
    """
    changes: dict[str, Any] = {"views": num_views, "precision": "float32"}
    if cut != FEATURES:
        changes |= {"layers": (cut,), "pooling": "none", "l2_normalise": False}
    return recipe.model_copy(update=changes)


def save_backbone(
    network: "keras.Model", recipe: Recipe, options: TuneOptions, folder: Path
) -> Recipe:
    """Write a tuned backbone into a folder, unless it is there.

    Args:
        network: The tuned one.
        recipe: Of the features that were tuned.
        options: Of the strategy: `scratch` made the network itself.
        folder: Of the model.

    Returns:
        The recipe of its features.

    Raises:
        Unfinished: It cannot be written.
    """
    is_scratch = options.strategy == SCRATCH
    is_whole_network = is_scratch or recipe.weights_source.endswith(".keras")
    file = folder / (_NETWORK_FILE if is_whole_network else _ARRAYS_FILE)
    if not file.exists():
        if is_whole_network:
            # A new one: that which was trained may compute in another precision.
            trained = network
            network = (
                scratch.make_network(recipe.image_size, 0) if is_scratch else load_network(recipe)
            )
            network.set_weights(trained.get_weights())
        half = folder / f"half-{file.name}"
        try:
            save_network(network, half)
            half.replace(file)
        except (OSError, RuntimeError) as error:  # the latter of HDF5
            reason = getattr(error, "strerror", None) or error
            raise Unfinished(f"{file} cannot be written: {reason}") from error
    source = {"weights": digest_of(file), "weights_source": str(file.absolute())}
    return recipe.model_copy(update=source)


def judge_tuned(
    head: "keras.Sequential", model: Model, labelled: TrainingSet, store: Store, tuning: Tuning
) -> TrainedHead:
    """Make a model of a tuned head and the features under it, and test it.

    Args:
        head: From features (n, dim) to logits (n, n_known).
        model: What tuning started from.
        labelled: What it learned from, and what it is tested on.
        store: Features of the tuned backbone, not yet in their place.
        tuning: How it came to be.

    Raises:
        Unfinished: The store lacks an image.
    """
    images = in_store(labelled, store)
    validation, test = images.split.validation, images.split.tested_on
    estimator = _estimator(head, model, tuning.options.seed)
    held = read_logits(estimator, store, EMBEDDING, images.rows[validation])
    truth: NDArray[Any] = targets_of(images, model)[validation]
    truth = truth.astype(np.int64) if model.is_multilabel else truth.argmax(axis=1)
    calibration = calibrate(held, truth)
    known = np.searchsorted(images.classes, model.classes)
    fitted = Fitted(estimator, {}, known, calibration.temperature, calibration.thresholds, [])
    tuned = Model(
        estimator=estimator,
        recipe=store.recipe.model_copy(update={"weights_source": str(tuning.weights)}),
        column=EMBEDDING,
        classes=model.classes,
        temperature=fitted.temperature,
        thresholds=fitted.thresholds,
        head="mlp" if estimator.hidden else "linear",
        settings={},
        record=_record(model, tuning, len(images.split.trained_on)),
    )
    logits = read_logits(estimator, store, EMBEDDING, images.rows[test])
    evaluation = Evaluation.of_logits(tuned, logits, images, test)
    coarse_of = model.recorded().coarse_of
    return TrainedHead(
        model=tuned,
        store=store,
        options=replace(_train_options(model), unlabelled=None),
        images=images,
        fitted=fitted,
        test=evaluation,
        coarse_of=None if coarse_of is None else np.array(coarse_of),
        seconds=tuning.seconds,
        tuning=_facts(evaluation, images.ids[test], tuning),
    )


def _train_options(model: Model) -> TrainOptions:
    known = {field.name for field in fields(TrainOptions)}
    options = model.recorded().options
    return TrainOptions(**options.model_dump(include=known))


def _estimator(head: "keras.Sequential", model: Model, seed: int) -> KerasHead:
    units = [x.units for x in head.layers if type(x).__name__ == "Dense"]
    dropout = [x.rate for x in head.layers if type(x).__name__ == "Dropout"]
    estimator = KerasHead(
        hidden=tuple(units[:-1]), dropout=dropout[-1] if dropout else 0.0, seed=seed
    )
    estimator.network_ = head
    estimator.n_features_in_ = head.input_shape[1]
    estimator.is_multilabel_ = model.is_multilabel
    known = model.classes
    estimator.classes_ = np.arange(len(known)) if model.is_multilabel else known
    return estimator


def _record(model: Model, tuning: Tuning, num_trained_on: int) -> Record:
    record = model.recorded()
    changes = {
        "store": str(tuning.features),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "num_trained_on": num_trained_on,
    }
    return record.model_copy(
        update={
            "provenance": record.provenance.model_copy(update=changes),
            "tuning": RecordedTuning(model=str(tuning.model), request=tuning.request),
        }
    )


def _facts(test: Evaluation, ids: NDArray[np.object_], tuning: Tuning) -> dict[str, Any]:
    """What `metrics.json` says of a fine-tuning."""
    before = TestedModel.read(tuning.model)
    right = dict(zip(ids, test.is_right, strict=True))
    ours = np.array([right[image] for image in before.ids], dtype=bool)
    found = PairedTest.of(ours, before.is_right, sum(tuning.seconds.values()))
    return {
        "strategy": tuning.options.strategy,
        "model": str(tuning.model),
        "options": asdict(tuning.options),
        "epochs": [asdict(epoch) for epoch in tuning.epochs],
        "num_weights": tuning.num_weights,
        "num_tuned": tuning.num_tuned,
        **({} if tuning.pseudo_labels is None else {"pseudo_labels": tuning.pseudo_labels}),
        "accuracy_before": float(before.is_right.mean()),
        "against_before": asdict(found),
        "verdict": found.verdict,
    }
