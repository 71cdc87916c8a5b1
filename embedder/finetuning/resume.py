"""A fine-tuning's folder of work: begun, gone on with after a kill, and put away."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from embedder.datasets import TrainingSet
from embedder.errors import EmbedderError, RequestError
from embedder.files import remove_abandoned, remove_folder
from embedder.finetuning.options import TuneOptions
from embedder.heads import Model, ModelFolder
from embedder.libraries import logger, versions
from embedder.store import Store

TUNED_FEATURES = "tuned-features"  # of the tuned backbone, until they take their place beside OUT
_REQUEST_FILE = "request.json"


def request_of(model: Model, labelled: TrainingSet, options: TuneOptions) -> dict[str, Any]:
    """What decides the result: another one begins anew.

    Args:
        model: What is tuned.
        labelled: What it learns from.
        options: Of the strategy and its training.
    """
    images = [labelled.sha256.tolist(), labelled.codes.tolist(), labelled.split.train.tolist()]
    schedule = asdict(options.schedule())  # what is usual can change from version to version
    schedule["loss_weights"] = schedule["loss_weights"][::-1]  # as it has always been written
    return {
        "model": model.head_sha256,
        "recipe": model.recipe.fingerprint,
        "images": hashlib.sha256(json.dumps(images).encode()).hexdigest(),
        "options": asdict(options),
        "schedule": schedule,
    }


def done_before(folder: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """Metrics of a model that the same request made."""
    try:
        metrics = ModelFolder(folder).read_metrics(is_tuned=True)
        tuning = Model.load(folder).recorded().tuning
    except EmbedderError:
        return None
    is_same = tuning is not None and tuning.request == json.loads(json.dumps(request))
    return metrics if is_same else None


def open_work(work: Path, request: dict[str, Any]) -> None:
    """Make the folder of a training, or leave the one that the same request began.

    Raises:
        RequestError: It holds something else.
    """
    if _is_of(work, request):
        logger.info("continuing what is in %s", work)
        return
    file = work / _REQUEST_FILE
    if work.is_dir() and not file.is_file() and any(work.iterdir()):
        raise RequestError(
            f"{work} is where a training is kept until it is done, and must be of embedder. "
            f"Received: a folder that holds something else"
        )
    if work.exists():
        remove_folder(work)
    work.mkdir(parents=True)
    file.write_text(json.dumps(request))


def finish(work: Path, request: dict[str, Any], folder: Path, features: Path) -> None:
    """Put the features beside the model, and delete the folder of a training that is done.

    After a kill the same request comes here again: the model is in its place.

    Args:
        work: The training's folder.
        request: What it was of; another's folder is left alone.
        folder: Of the model.
        features: Where they go.
    """
    remove_abandoned(work.parent)
    if not _is_of(work, request):
        return
    if (work / TUNED_FEATURES).exists():
        store, (said, _) = Store(work / TUNED_FEATURES), ModelFolder(folder).read_description()
        if store.recipe.fingerprint == said.fingerprint:  # else the older ones, swapped
            place = {"weights_source": str(folder.absolute() / said.weights_source)}
            recipe = store.recipe.model_copy(update=place)
            store = Store.open_or_create(work / TUNED_FEATURES, recipe, versions())
            store.move(features)
    remove_folder(work)


def _is_of(work: Path, request: dict[str, Any]) -> bool:
    file = work / _REQUEST_FILE
    return file.is_file() and file.read_bytes() == json.dumps(request).encode()
