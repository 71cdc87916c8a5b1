"""The package's functions: each does what the command of its name does."""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

from embedder import analysis, checks, engines, finetuning, heads, inference, training
from embedder.backbones import BACKBONES, RecipeOptions, make_recipe
from embedder.errors import RequestError
from embedder.extraction import OnProgress, Progress, RunOptions, run_extraction
from embedder.finetuning import TuneOptions
from embedder.inference import ExportFormat
from embedder.machine import gpus
from embedder.options import described, options_of
from embedder.store import Store
from embedder.training import HeadName, TrainOptions

if TYPE_CHECKING:  # scikit-learn, which they import, takes as long as a small extraction
    from embedder.checks import Check
    from embedder.finetuning import Tuned
    from embedder.heads import Model
    from embedder.inference import EvaluationResult, Exported, Predictions
    from embedder.training import TrainedHead

Result = TypeVar("Result")


def _with_options(function: Callable[..., Result]) -> Callable[..., Result]:
    """Let a function be called with the attributes of its option classes, as keywords of its own.

    Its signature and its docstring tell of them; the classes check what is given.
    """
    signature, doc = inspect.signature(function), function.__doc__ or ""
    classes = options_of(function)
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in signature.parameters.items():
        if name not in classes:
            parameters[name] = parameter
            continue
        cls, chosen = classes[name]
        types = get_type_hints(cls)
        own = next(line for line in doc.splitlines() if line.startswith(f"        {name}: "))
        lines = [described(field.name, field.type, indent=8) for field in chosen]
        doc = doc.replace(own, "\n".join(lines))
        parameters |= {
            field.name: parameter.replace(
                name=field.name, default=field.default, annotation=types[field.name]
            )
            for field in chosen
        }

    @wraps(function)
    def call(*args: Any, **given: Any) -> Result:
        if unknown := given.keys() - parameters.keys():
            raise RequestError(
                f"Unknown option: {', '.join(sorted(unknown))}. There are: {', '.join(parameters)}"
            )
        made = {
            name: cls(
                **{field.name: given.pop(field.name) for field in chosen if field.name in given}
            )
            for name, (cls, chosen) in classes.items()
        }
        return function(*args, **given, **made)

    call.__doc__ = doc
    call.__signature__ = signature.replace(parameters=[*parameters.values()])  # type: ignore[attr-defined]
    return call


@_with_options
def extract(
    source: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    recipe: RecipeOptions,
    run: RunOptions,
    quiet: bool = False,
    on_progress: OnProgress | None = None,
) -> Store:
    """Embed the images of a source into a store; what the store has already is not done again.

    Args:
        source: A folder, a glob, a manifest or a URL; see `sources.list_images`.
        store: Folder of the store; made if it does not exist.
        recipe: What decides the vectors.
        run: How it is done.
        quiet: Whether nothing is shown of how far it is, on a terminal or in a notebook.
        on_progress: Called with how far it is, in place of showing it: often, from several
            threads, with the same object.

    Returns:
        The store, of which every image of the source is now a row or a failure.

    Raises:
        RequestError: The request makes no sense.
        SourceError: The source is missing, empty or unreadable.
        StoreError: The store cannot be written, was made with another recipe, or is being written
            by another run.
        Unfinished: Too many images failed, or the disk is full; what is done is kept.
    """
    with _watching(quiet, on_progress) as watch:
        engines.ready_keras(run.engine, recipe.backbone, gpus)
        run_extraction(source, {os.fspath(store): make_recipe(**asdict(recipe))}, run, watch)
    return Store(store)


@_with_options
def train(
    store: Store | str | os.PathLike[str],
    labels: str = "folder",
    head: HeadName = "logistic",
    *,
    options: TrainOptions,
) -> "TrainedHead":
    """Train a head on a store's features, and test it on images it has not seen.

    Args:
        store: Features.
        labels: `folder`, `parent`, `FILE.csv:COLUMN`, `LIST.txt:NUMBER` or `column:NAME`; see
            `datasets.read_training_set`.
        head: The kind of classifier.
        options: How it is trained and judged.

    Returns:
        The trained head; its `save` writes the model's folder, that the other functions take.

    Raises:
        RequestError: The request makes no sense, or the labels name fewer than two classes.
        SourceError: A label file or a list cannot be read.
        StoreError: The store has no rows.
    """
    return training.train(_opened(store), labels, head, options)


def evaluate(
    model: str | os.PathLike[str],
    store: Store | str | os.PathLike[str],
    labels: str = "folder",
    coarse: str | None = None,
    include_trained: bool = False,
) -> "EvaluationResult":
    """Test a model on the labelled images of a store that it was not trained on.

    Args:
        model: Its folder.
        store: Features of the model's recipe.
        labels: As in `train`.
        coarse: Labels of a coarser level, spelled alike, for a score on both.
        include_trained: Whether images it was trained on count too.

    Returns:
        Its metrics, and which rows were left out.

    Raises:
        ModelError: There is no such model.
        RecipeMismatch: The features are of another recipe.
        RequestError: The request makes no sense, or nothing is left to test on.
    """
    return inference.evaluate_model(model, _opened(store), labels, coarse, include_trained)


@_with_options
def predict(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    top_k: int = 5,
    store: str | None = None,
    *,
    run: RunOptions,
    quiet: bool = False,
    on_progress: OnProgress | None = None,
) -> "Predictions":
    """Predict the classes of images, or of a store's rows, and write them to one Parquet file.

    Args:
        model: Its folder.
        source: A store, or images as `extract` takes them.
        out: The file, a row for each image; its columns are described in `inference.predict`.
        top_k: How many of the most probable classes to write.
        store: Store to keep the features of the images in; None to keep their logits alone, hidden
            beside `out`.
        run: How images are run.
        quiet: As in `extract`.
        on_progress: As in `extract`.

    Returns:
        The file, and how many images it has.

    Raises:
        ModelError: There is no such model.
        RecipeMismatch: The store's features are of another recipe than the model's.
        EmbedderError: As in `extract`.
    """
    with _watching(quiet, on_progress) as watch:
        return inference.predict(model, source, out, top_k, run, store, watch)


@_with_options
def finetune(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    activations: str | os.PathLike[str] | None = None,
    options: TuneOptions,
    run: Annotated[RunOptions, {"engine", "workers"}],
    quiet: bool = False,
    on_progress: OnProgress | None = None,
) -> "Tuned":
    """Train a model's backbone and head further, and test it on the images the model was tested on.

    Args:
        model: Its folder: a head on frozen features, or a tuned model.
        source: The images it was trained on, as `extract` takes them.
        out: Folder to write the tuned model to; its features go beside it, to `out`.features.
        activations: Of head and cut: store of the activations, to make or to take.
        options: How it is tuned.
        run: How features are made.
        quiet: As in `extract`.
        on_progress: As in `extract`; after an epoch, with what it came to as the `phase`.

    Returns:
        The tuned model, and whether it paid.

    Raises:
        RequestError: The request makes no sense.
        ModelError: The model cannot be read, or `out` holds something else.
        SourceError: The source cannot be listed.
        EngineError: Neither TensorFlow nor JAX can train here.
        Unfinished: Training diverged, or images are no longer what they were.
    """
    with _watching(quiet, on_progress) as watch:
        watcher = finetuning.Watcher(watch, lambda epoch: watch(Progress(phase=str(epoch))))
        return finetuning.finetune(model, source, out, options, run, activations, watcher)


def compare(models: Sequence[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """Put models side by side, on the images that all of them were tested on.

    Args:
        models: Their folders; the first is what the others are compared with.

    Returns:
        For each: `model`, `accuracy` with its interval, `against_first` (gain, McNemar's test),
        `verdict` in words and more, as `embedder compare --json` writes it.

    Raises:
        ModelError: One of them is no model, or was not tested on images of its own.
        RequestError: They were not tested on the same images.
    """
    return [analysis.row_of(tested, against) for tested, against in analysis.compare(models)]


def export(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    file_format: ExportFormat,
    source: str | os.PathLike[str] | None = None,
    num_images: int = 16,
    *,
    quiet: bool = False,
    on_progress: OnProgress | None = None,
) -> "Exported":
    """Write a model as one network from pixels to probabilities, which runs without this package.

    Args:
        model: Its folder.
        out: Folder to write; what is in it is described in `inference.export`.
        file_format: Whose runtime is to run it.
        source: Images to compare on, as `extract` takes them; None for those of the training.
        num_images: How many of them.
        quiet: As in `extract`.
        on_progress: As in `extract`.

    Returns:
        Where it is, and how far it is from what `predict` gives.

    Raises:
        ModelError: There is no such model, or `out` holds something else or cannot be written.
        RequestError: The request makes no sense.
        Unfinished: The format cannot hold the network, or computes something else.
    """
    with _watching(quiet, on_progress) as watch:
        return inference.export(model, out, file_format, source, num_images, watch=watch)


def verify(
    store: Store | str | os.PathLike[str],
    source: str | None = None,
    audit: int = 0,
    seed: int = 0,
    *,
    allow_private: bool = False,
) -> "list[Check]":
    """Check that every row of a store is whole and unique, and that vectors are their images'.

    Args:
        store: The store.
        source: Where its images are, to compare with.
        audit: Number of random images that are embedded again, one by one.
        seed: Of the choice.
        allow_private: Whether servers may redirect to private addresses, such as those of a local
            network.

    Returns:
        All checks, passed or not.

    Raises:
        SourceError: The source is missing or empty, or none is known for an audit.
        RequestError: `audit` is negative.
    """
    return checks.verify(_opened(store), source, audit, seed, allow_private=allow_private)


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open a store that is there.

    Raises:
        StoreError: There is none.
    """
    return Store(path)


def load_model(path: str | os.PathLike[str]) -> "Model":
    """Load a model from its folder.

    Raises:
        ModelError: There is none, or it cannot be read safely.
    """
    return heads.Model.load(path)


def list_backbones() -> list[str]:
    """Names of the networks, as `backbone` takes them; `backbones.BACKBONES` has their facts."""
    return [*BACKBONES]


def _opened(store: Store | str | os.PathLike[str]) -> Store:
    return store if isinstance(store, Store) else Store(store)


@contextmanager
def _watching(quiet: bool, on_progress: OnProgress | None) -> Iterator[OnProgress]:
    """What a run is to call with its progress."""
    from embedder.progress import ignore, show_progress  # rich is for those who look

    if quiet or on_progress is not None:
        yield on_progress or ignore
    else:
        with show_progress() as watch:
            yield watch
