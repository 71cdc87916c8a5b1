"""The command line: parse, call, exit code."""

import io
import os
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from embedder import backbones as backbone_table, checks
from embedder.backbones import BACKBONES, Backbone
from embedder.cli import console, finetuning as cli_tuning, heads as cli_heads, interrupts
from embedder.cli.job_file import read_job
from embedder.errors import JobError
from embedder.extraction import RunOptions, run_extraction
from embedder.recipe import DEFAULT_BACKBONE, Recipe
from embedder.sources import images_folder
from embedder.store import Store, num_bytes_of

app = typer.Typer(
    help="Images in, a feature store out: embed large image archives with frozen backbones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_UsageError: Any = typer.BadParameter.__base__  # Typer gives it no name of its own
_Source = Annotated[str, typer.Argument(help="Folder, glob, manifest (.txt .csv .parquet) or URL.")]
_StorePath = Annotated[str, typer.Argument(help="Folder of the feature store.")]


@app.command()
def extract(
    source: _Source,
    store: _StorePath,
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            help=f"See `embedder backbones`; {DEFAULT_BACKBONE} if absent. "
            f"Several make a store each, STORE/BACKBONE, and read every image once."
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="imagenet, a .weights.h5, .h5 or .keras file, or random[:SEED]; "
            "one for each --backbone, in their order."
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Take this layer's output; repeat for several, a column each."),
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="avg, max, gem, flatten or none.")] = None,
    image_size: Annotated[
        str | None,
        typer.Option(help="SIDE or HEIGHTxWIDTH, in pixels; the backbone's own if absent."),
    ] = None,
    crop: Annotated[str | None, typer.Option(help="center, squash or pad.")] = None,
    interpolation: Annotated[
        str | None, typer.Option(help="nearest, bilinear, bicubic or lanczos.")
    ] = None,
    decode: Annotated[
        str | None, typer.Option(help="scaled (default), or exact: every pixel, and slower.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32, bfloat16 (GPU, recent CPU) or float16 (GPU).")
    ] = None,
    store_dtype: Annotated[str | None, typer.Option(help="float32 or float16.")] = None,
    l2_normalise: Annotated[
        bool, typer.Option("--l2-normalise", help="Store vectors of length 1.")
    ] = False,
    views: Annotated[
        int | None,
        typer.Option(help="Vectors of each image: the plain one (default), and augmented ones."),
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, openvino or tensorflow.")] = "auto",
    batch_size: Annotated[str, typer.Option(help="auto, or images in a batch.")] = "auto",
    shard_size: Annotated[int, typer.Option(help="Images in a shard.")] = RunOptions.shard_size,
    workers: Annotated[
        int | None, typer.Option(help="Local worker processes; one per GPU if absent, else 1.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler, in place of local workers.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many images.")] = None,
    max_failures: Annotated[
        float, typer.Option(help="Share of the images, 0 to 1, that may fail.")
    ] = 0.1,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed", help="Try all failed images again, not only those that may do now."
        ),
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Drop rows of images that the source no longer has.")
    ] = False,
    prune_share: Annotated[
        float, typer.Option(help="Share of STORE, 0 to 1, that --prune may drop.")
    ] = 0.1,
    repair: Annotated[
        bool, typer.Option("--repair", help="Put damaged shards aside and make them again.")
    ] = False,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="Wait until another run that writes STORE ends; else 10 s."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Embed the images of SOURCE into STORE; what is there already is not done again."""
    with console.exit_status(quiet):
        recipes = _make_recipes(
            store,
            backbone or [DEFAULT_BACKBONE],
            weights,
            layers=tuple(layer) if layer else None,
            pooling=pooling,
            image_size=_parse_size(image_size),
            crop=crop,
            interpolation=interpolation,
            decode=decode,
            precision=precision,
            store_dtype=store_dtype,
            l2_normalise=l2_normalise or None,
            views=views,
        )
        options = RunOptions(
            **dict[str, Any](
                engine=engine,
                batch_size=_parse_batch_size(batch_size),
                shard_size=shard_size,
                workers=workers,
                scheduler=scheduler,
                limit=limit,
                max_failures=max_failures,
                retry_failed=retry_failed,
                prune=prune,
                prune_share=prune_share,
                repair=repair,
                wait=wait,
            )
        )
        with console.progress(quiet) as on_progress:
            summaries = run_extraction(source, recipes, options, on_progress, console.started())
        if not quiet:
            console.print_summaries(summaries)


@app.command()
def inspect(store: _StorePath) -> None:
    """Show what is in STORE: recipe, rows, failures by reason, size, runs."""
    with console.exit_status():
        opened = Store(store)
        failures = opened.failures()
        reasons = Counter(
            zip(failures["stage"].to_pylist(), failures["error"].to_pylist(), strict=True)
        )
        files = [path for kind in ("embeddings", "failures") for path in opened.shards(kind)]
        num_bytes = sum(map(num_bytes_of, files))
        facts = {
            "rows": f"{len(opened):,}",
            "failures": f"{failures.num_rows:,}",
            "size": f"{console.size(num_bytes)} in {len(files):,} files",
            "fingerprint": opened.recipe.fingerprint,
            "weights source": opened.recipe.weights_source,
        }
        console.print_facts(
            facts | {name: str(v) for name, v in opened.recipe.model_dump().items()}
        )
        if reasons:
            console.print_reasons(reasons)
        table = Table(
            "run", "status", "embedded", "failed", "images/s", "seconds", "bottleneck", box=None
        )
        for run in opened.runs():
            counts = run["counts"]
            table.add_row(
                run["when"],
                run["status"][:40],
                f"{counts['embedded']:,}",
                f"{counts['failed']:,}",
                f"{run['images_per_second']:,.1f}",
                f"{run['seconds_total']:,.1f}",
                run["bottleneck"].split(":")[0],
            )
        console.out.print()
        console.out.print(table)
        if unreadable := opened.unreadable_runs():
            console.out.print(f"no records of runs, in runs/: {', '.join(unreadable)}")
        if last := next((run for run in reversed(opened.runs()) if run["images_per_second"]), None):
            console.out.print()
            console.print_facts({"bottleneck": last["bottleneck"]})


@app.command()
def verify(
    store: _StorePath,
    source: Annotated[str | None, typer.Option(help="Compare with what SOURCE holds.")] = None,
    audit: Annotated[int, typer.Option(help="Embed so many random images again.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the random choice.")] = 0,
) -> None:
    """Check that every row of STORE is whole and unique, and that vectors are their images'."""
    with console.exit_status():
        console.print_checks(checks.verify(Store(store), source, audit, seed))


@app.command()
def backbones(
    name: Annotated[str | None, typer.Argument(help="Show this network alone.")] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="List what --layer can name, with shapes.")
    ] = False,
) -> None:
    """List the networks: name, dim, input size, parameters, licence, weights at hand or not."""
    with console.exit_status():
        if name is None and layers:
            raise typer.BadParameter("wants the name of a network", param_hint="--layers")
        if name is None:
            _print_backbones()
            return
        name, row = backbone_table.find_backbone(name)
        if layers:
            table = Table("layer", "output", box=None)
            for layer, shape in backbone_table.layer_shapes(name).items():
                table.add_row(layer, "x".join(map(str, shape)))
            console.out.print(table)
            return
        console.print_facts(
            {
                "backbone": name,
                "dim": f"{row.dim:,}",
                "image size": f"{row.image_size[0]}x{row.image_size[1]}, at least {row.min_side}",
                "crop": f"{row.crop_fraction:.3f} of the largest square, {row.interpolation}",
                "parameters": f"{row.num_parameters:,}",
                "licence": row.licence,
                "weights": _where_weights_are(row),
            }
        )


def _weights_at_hand(row: Backbone) -> str:
    if row.weights is None or row.weights.path:
        return "yes"
    return row.weights.how_to_get


def _where_weights_are(row: Backbone) -> str:
    if row.weights is None:
        return "the preset's own"
    return str(row.weights.path or f"not on this machine. {row.weights.advice}")


def _print_backbones() -> None:
    table = Table("backbone", "dim", "size", "parameters", "licence", "weights at hand", box=None)
    for name, row in BACKBONES.items():
        table.add_row(
            name,
            f"{row.dim:,}",
            "x".join(map(str, row.image_size)),
            f"{row.num_parameters / 1e6:.1f} M",
            row.licence,
            _weights_at_hand(row),
        )
    console.out.print(table)


@app.command()
def doctor(
    backbone: Annotated[str, typer.Argument(help="The network to test.")] = DEFAULT_BACKBONE,
    weights: Annotated[
        str | None, typer.Option(help="As in extract; random where none are at hand.")
    ] = None,
) -> None:
    """Show this machine and its engines, and test BACKBONE's pixels and vectors."""
    with console.exit_status():
        console.print_facts(checks.machine())
        console.out.print()
        console.print_checks(checks.self_test(backbone, weights))


@app.command()
def demo(
    store: Annotated[str, typer.Argument(help="Folder of the feature store.")] = "demo-features",
) -> None:
    """Run the main job on 2,000 real images, offline, and show what the features are good for."""
    with console.exit_status():
        source = images_folder()
        console.out.print(f"$ embedder extract {shlex.quote(str(source))} {shlex.quote(store)}\n")
        recipe = backbone_table.make_recipe()
        with console.progress(quiet=False) as on_progress:
            summaries = run_extraction(
                source, {store: recipe}, RunOptions(), on_progress, console.started()
            )
        console.print_summaries(summaries)
        console.out.print("\nA linear probe on these features, tested on a fifth of the images:\n")
        from embedder.training import train as train_head

        metrics = train_head(Store(store)).evaluate()
        console.print_facts({name: console.interval(metric) for name, metric in metrics.items()})


app.command()(cli_heads.train)
app.command()(cli_heads.evaluate)
app.command()(cli_heads.predict)
app.command()(cli_heads.export)
app.command()(cli_tuning.finetune)
app.command()(cli_tuning.compare)


@app.command()
def run(
    job: Annotated[str, typer.Argument(help="Job file, in TOML; see jobs/.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE, in place of the job's own; repeatable."),
    ] = None,
) -> None:
    """Run the commands of a job file, one after the other; what is done is not done again."""
    with console.exit_status():
        overrides = {}
        for text in set_ or []:
            name, equals, value = text.partition("=")
            if not equals:
                raise typer.BadParameter(
                    f"must be NAME=VALUE. Received: {text}", param_hint="--set"
                )
            overrides[name] = value
        steps = read_job(Path(job), overrides)
        _check_steps(steps)
        for words in steps:
            console.out.print(f"$ embedder {shlex.join(words)}\n")
            if status := app(words, standalone_mode=False):
                raise typer.Exit(status)
            console.out.print()


def _check_steps(steps: list[list[str]]) -> None:
    """Refuse a job before anything is started, where a step is no command or has bad options."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words in steps:
        if words[0] not in commands or words[0] == "run":
            raise JobError(
                f"A step's command must be one of embedder's, but run. Received: {words[0]}"
            )
        try:
            commands[words[0]].make_context(words[0], words[1:])
        except (_UsageError, typer.Exit) as error:  # Exit is --help
            reason = error.format_message() if isinstance(error, _UsageError) else "it runs nothing"
            raise JobError(
                f"A step must be what could be typed. Received: {shlex.join(words)}: {reason}"
            ) from error


def main() -> None:
    """Entry point of the `embedder` command."""
    for stream in (sys.stdout, sys.stderr):  # names of files hold anything, in any locale
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with interrupts.ending_the_process():
        app()


# Parsing ------------------------------------------------------------------------------------


def _make_recipes(
    store: str, backbones: list[str], weights: list[str] | None, **options: Any
) -> dict[str, Recipe]:
    """A recipe for each backbone, by the folder of its store."""
    if weights and len(weights) not in (1, len(backbones)):
        raise typer.BadParameter(
            f"must be given once, or once for each --backbone. Received: {len(weights)} for "
            f"{len(backbones)}",
            param_hint="--weights",
        )
    sources: list[str | None] = [*weights] if weights else [None]
    sources = sources * len(backbones) if len(sources) == 1 else sources
    recipes = [
        backbone_table.make_recipe(name, source, **options)
        for name, source in zip(backbones, sources, strict=True)
    ]
    if len(recipes) == 1:
        return {store: recipes[0]}
    by_store = {os.path.join(store, recipe.label): recipe for recipe in recipes}
    if len(by_store) < len(recipes):
        raise typer.BadParameter("must name different networks", param_hint="--backbone")
    return by_store


def _parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(
            f"must be SIDE or HEIGHTxWIDTH in pixels, such as 224 or 192x256. Received: {text}",
            param_hint="--image-size",
        )
    return int(parts[0]), int(parts[-1])


def _parse_batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise typer.BadParameter(
            f"must be auto or a number of images. Received: {text}", param_hint="--batch-size"
        )
    return int(text)


if __name__ == "__main__":
    main()
