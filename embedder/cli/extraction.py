"""The commands on stores: extract, inspect, verify, demo. Each imports what it needs to run."""

import os
import shlex
from collections import Counter
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedder.backbones import RecipeOptions
from embedder.cli import console
from embedder.cli.options import Quiet, Source, StorePath, backbone_names, command, option, parts_of
from embedder.errors import RequestError
from embedder.extraction import RunOptions
from embedder.options import description_of

if TYPE_CHECKING:
    from embedder.recipe import Recipe

_RUN = {field.name: field for field in fields(RunOptions)}
_HELP = {field.name: description_of(field.type) for field in fields(RecipeOptions)}


@command
def extract(
    source: Source,
    store: StorePath,
    *,
    backbone: Annotated[
        list[str],
        option(
            f"{_HELP['backbone']} Several make a store each, STORE/BACKBONE, and read every image "
            f"once.",
            backbone_names,
        ),
    ] = [RecipeOptions.backbone],  # noqa: B006 - it is not changed
    weights: Annotated[
        list[str] | None, option(f"{_HELP['weights']} One for each backbone, in their order.")
    ] = None,
    recipe: Annotated[RecipeOptions, _HELP.keys() - {"backbone", "weights"}],
    run: RunOptions,
    quiet: Quiet = False,
) -> None:
    """Embed the images of SOURCE into STORE; what is there already is not done again."""
    from embedder import engines
    from embedder.extraction import run_extraction
    from embedder.machine import gpus

    for name in parts_of(backbone):
        engines.ready_keras(run.engine, name, gpus)
    recipes = make_recipes(store, parts_of(backbone), parts_of(weights), recipe)
    with console.progress(quiet) as on_progress:
        summaries = run_extraction(source, recipes, run, on_progress, console.started())
    if not quiet:
        console.print_summaries(summaries)


@command
def inspect(store: StorePath) -> None:
    """Show what is in STORE: recipe, rows, failures by reason, size, runs."""
    from embedder.store import Store, last_division

    opened = Store(store)
    failures = opened.failures()
    reasons = Counter(
        zip(failures["stage"].to_pylist(), failures["error"].to_pylist(), strict=True)
    )
    sizes = opened.file_sizes()
    facts = {
        "rows": f"{len(opened):,}",
        "failures": f"{failures.num_rows:,}",
        "size": f"{console.size(sum(sizes.values()))} in {len(sizes):,} files",
        "fingerprint": opened.recipe.fingerprint,
        "weights source": opened.recipe.weights_source,
    }
    console.print_facts(facts | {name: str(v) for name, v in opened.recipe.model_dump().items()})
    console.print_reasons(reasons)
    runs = opened.runs()
    console.out.print()
    console.print_table(
        ("run", "status", "embedded", "failed", "images/s", "seconds", "bottleneck"),
        [_run_cells(run) for run in runs],
    )
    if division := last_division(runs):
        console.print_parts(division)
    if unreadable := opened.unreadable_runs():
        console.out.print(f"no records of runs, in runs/: {', '.join(unreadable)}")
    if last := next((run for run in reversed(runs) if run["images_per_second"]), None):
        console.out.print()
        console.print_facts({"bottleneck": last["bottleneck"]})


def _run_cells(run: dict[str, Any]) -> list[str]:
    return [
        run["when"],
        run["status"][:40],
        f"{run['counts']['embedded']:,}",
        f"{run['counts']['failed']:,}",
        f"{run['images_per_second']:,.1f}",
        f"{run['seconds_total']:,.1f}",
        run["bottleneck"].split(":")[0],
    ]


@command
def verify(
    store: StorePath,
    source: Annotated[str | None, typer.Option(help="Compare with what SOURCE holds.")] = None,
    audit: Annotated[int, typer.Option(help="Embed so many random images again.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the random choice.")] = 0,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help=description_of(_RUN["allow_private"].type))
    ] = False,
) -> None:
    """Check that every row of STORE is whole and unique, and that vectors are their images'."""
    from embedder.checks import verify as verify_store
    from embedder.store import Store

    checks = verify_store(Store(store), source, audit, seed, allow_private=allow_private)
    console.print_checks(checks)


@command
def demo(
    store: Annotated[str, typer.Argument(help="Folder of the feature store.")] = "demo-features",
) -> None:
    """Run the main job on 2,000 real images, offline, and show what the features are good for."""
    from embedder.backbones import make_recipe
    from embedder.extraction import run_extraction
    from embedder.sources import images_folder
    from embedder.store import Store
    from embedder.training import train

    source = images_folder()
    console.out.print(f"$ embedder extract {shlex.quote(str(source))} {shlex.quote(store)}\n")
    recipe = make_recipe()
    with console.progress(quiet=False) as on_progress:
        summaries = run_extraction(
            source, {store: recipe}, RunOptions(), on_progress, console.started()
        )
    console.print_summaries(summaries)
    console.out.print("\nA linear probe on these features, tested on a fifth of the images:\n")
    metrics = train(Store(store)).evaluate()
    console.print_facts({name: console.interval(**metric) for name, metric in metrics.items()})


def make_recipes(
    store: str, backbones: list[str], weights: list[str], options: RecipeOptions
) -> "dict[str, Recipe]":
    """A recipe for each backbone, by the folder of its store.

    Args:
        store: The folder, or with several backbones the one that theirs are in.
        backbones: As in `RecipeOptions`.
        weights: As there: none, one for all or one for each.
        options: All else.

    Raises:
        RequestError: There are too many weights, or a backbone comes twice.
    """
    from embedder.backbones import make_recipe

    if len(weights) not in (0, 1, len(backbones)):
        raise RequestError(
            f"`weights` must be given once, or once for each backbone. Received: {len(weights)} "
            f"for {len(backbones)}"
        )
    sources = weights if len(weights) > 1 else [*weights, None][:1] * len(backbones)
    recipes = [
        make_recipe(**asdict(replace(options, backbone=name, weights=source)))
        for name, source in zip(backbones, sources, strict=True)
    ]
    if len(recipes) == 1:
        return {store: recipes[0]}
    by_store = {os.path.join(store, recipe.label): recipe for recipe in recipes}
    if len(by_store) < len(recipes):
        raise RequestError(
            f"`backbone` must name different networks. Received: {', '.join(backbones)}"
        )
    return by_store
