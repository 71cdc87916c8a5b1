"""The package's functions: each does what the command of its name does."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any

from embedder import training
from embedder.backbones import make_recipe
from embedder.errors import RecipeError
from embedder.extraction import Progress, RunOptions, run_extraction
from embedder.recipe import DEFAULT_BACKBONE, Recipe
from embedder.store import Store


def extract(
    source: str | os.PathLike[str],
    store: str | os.PathLike[str],
    quiet: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> Store:
    """Embed the images of a source into a store; what the store has already is not done again.

    Args:
        source: A folder, a glob, a manifest or a URL; see `sources.list_images`.
        store: Folder of the store; made if it does not exist.
        quiet: Whether nothing is shown of how far it is, on a terminal and in a notebook too.
        on_progress: Called with how far it is, instead of that being shown: often, from several
            threads, with the same object.
        **options: Attributes of `Recipe` (first of all `backbone`) and of `RunOptions`.

    Returns:
        The store, of which every image of the source is now a row or a failure.

    Raises:
        RecipeError: The request makes no sense.
        SourceError: The source is missing, empty or unreadable.
        StoreError: The store cannot be written, was made with another recipe, or is being written
            by another run.
        Unfinished: Too many images failed, or the disk is full; what is done is kept.
    """
    run_names = {field.name for field in fields(RunOptions)}
    run_options = {name: options.pop(name) for name in run_names & options.keys()}
    if unknown := options.keys() - Recipe.model_fields.keys():
        known = ", ".join(sorted({*run_names, *Recipe.model_fields}))
        raise RecipeError(f"Unknown option: {', '.join(sorted(unknown))}. There are: {known}")
    recipe = make_recipe(options.pop("backbone", DEFAULT_BACKBONE), **options)
    with _watching(quiet, on_progress) as watch:
        run_extraction(source, {os.fspath(store): recipe}, RunOptions(**run_options), watch)
    return Store(store)


def train(
    store: Store, labels: str = "folder", head: str = "logistic", **options: Any
) -> "training.TrainedHead":
    """Train a head on a store's features, and test it on images it has not seen.

    Args:
        store: Features.
        labels: `folder`, `parent`, `FILE.csv:COLUMN`, `LIST.txt:NUMBER` or `column:NAME`; see
            `datasets.read_training_set`.
        head: `logistic`, `svm`, `ridge`, `lda`, `knn`, `centroid`, `linear` or `mlp`.
        **options: Attributes of `training.TrainOptions`, first of all `split`.

    Raises:
        EmbedderError: As in `heads.train`; also where an option is unknown.
    """
    known = [field.name for field in fields(training.TrainOptions)]
    if unknown := options.keys() - set(known):
        raise RecipeError(
            f"Unknown option: {', '.join(sorted(unknown))}. There are: {', '.join(known)}"
        )
    return training.train(store, labels, head, training.TrainOptions(**options))


def _watching(
    quiet: bool, on_progress: Callable[[Progress], None] | None
) -> AbstractContextManager[Callable[[Progress], None]]:
    """What a run is to call with its progress."""
    from embedder.progress import ignore, show_progress  # rich is for those who look

    if on_progress is not None:
        return nullcontext(on_progress)
    return nullcontext(ignore) if quiet else show_progress()
