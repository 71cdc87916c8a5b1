"""The command line: parse, call, exit code."""

import logging
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from embedder import backbones as backbone_table
from embedder import demo as demo_job
from embedder import doctor as doctor_job
from embedder import verify as verify_job
from embedder.errors import EmbedderError
from embedder.extract import DEFAULT_SHARD_SIZE, Progress, RunOptions, run_extraction
from embedder.networks import BACKBONES, Backbone
from embedder.recipe import Recipe
from embedder.store import Store
from embedder.summary import Summary

_PLAIN_LINE_SECONDS = 5.0

app = typer.Typer(
    help="Images in, a feature store out: embed large image archives with frozen backbones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_PLAIN_WIDTH = 160  # characters, where the output is not a terminal
# File names hold anything: they must never be read as markup.
_out = Console(
    markup=False,
    highlight=False,
    soft_wrap=True,
    width=None if sys.stdout.isatty() else _PLAIN_WIDTH,
)
_err = Console(markup=False, highlight=False, soft_wrap=True, stderr=True)

_Source = Annotated[str, typer.Argument(help="Folder, glob, manifest (.txt .csv .parquet) or URL.")]
_StorePath = Annotated[str, typer.Argument(help="Folder of the feature store.")]


@contextmanager
def _exit_status(quiet: bool = False) -> Iterator[None]:
    """Turn a user's mistake into a message and an exit status; show what the package tells."""
    logger = logging.getLogger("embedder")
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.addHandler(handler := _Messages())
    try:
        yield
    except EmbedderError as error:
        _err.print(f"Error: {error}")
        raise typer.Exit(error.exit_status) from None
    except KeyboardInterrupt:
        _err.print("\nInterrupted. Finished shards are kept: the same command continues from here.")
        raise typer.Exit(1) from None
    finally:
        logger.removeHandler(handler)


class _Messages(logging.Handler):
    """Shows what the package logs, such as which weights were loaded, once, on standard error."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = ("Warning: " if record.levelno >= logging.WARNING else "") + record.getMessage()
        if message not in self._shown:
            self._shown.add(message)
            _err.print(message)


@app.command()
def extract(
    source: _Source,
    store: _StorePath,
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            help=f"See `embedder backbones`; {backbone_table.DEFAULT_BACKBONE} if absent. "
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
    engine: Annotated[str, typer.Option(help="auto, openvino or tensorflow.")] = "auto",
    batch_size: Annotated[str, typer.Option(help="auto, or images in a batch.")] = "auto",
    shard_size: Annotated[int, typer.Option(help="Images in a shard.")] = DEFAULT_SHARD_SIZE,
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
        bool, typer.Option("--retry-failed", help="Try images again that failed before.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Drop rows of images that the source no longer has.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Embed the images of SOURCE into STORE; what is there already is not done again."""
    with _exit_status(quiet):
        recipes = _make_recipes(
            store,
            backbone or [backbone_table.DEFAULT_BACKBONE],
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
        )
        options = RunOptions(
            engine=engine,
            batch_size=_parse_batch_size(batch_size),
            shard_size=shard_size,
            workers=workers,
            scheduler=scheduler,
            limit=limit,
            max_failures=max_failures,
            retry_failed=retry_failed,
            prune=prune,
        )
        with _progress(quiet) as on_progress:
            summaries = run_extraction(source, recipes, options, on_progress, _started())
        if not quiet:
            _print_summaries(summaries)


@app.command()
def inspect(store: _StorePath) -> None:
    """Show what is in STORE: recipe, rows, failures by reason, size, runs."""
    with _exit_status():
        opened = Store(store)
        failures = opened.failures()
        reasons = Counter(
            zip(failures["stage"].to_pylist(), failures["error"].to_pylist(), strict=True)
        )
        files = [path for kind in ("embeddings", "failures") for path in opened.shards(kind)]
        num_bytes = sum(path.stat().st_size for path in files)
        facts = {
            "rows": f"{len(opened):,}",
            "failures": f"{failures.num_rows:,}",
            "size": f"{_size(num_bytes)} in {len(files):,} files",
            "fingerprint": opened.recipe.fingerprint,
            "weights source": opened.recipe.weights_source,
        }
        _print_facts(facts | {name: str(v) for name, v in opened.recipe.model_dump().items()})
        if reasons:
            _print_reasons(reasons)
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
        _out.print()
        _out.print(table)
        if last := next((run for run in reversed(opened.runs()) if run["images_per_second"]), None):
            _out.print()
            _print_facts({"bottleneck": last["bottleneck"]})


@app.command()
def verify(
    store: _StorePath,
    source: Annotated[str | None, typer.Option(help="Compare with what SOURCE holds.")] = None,
    audit: Annotated[int, typer.Option(help="Embed so many random images again.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the random choice.")] = 0,
) -> None:
    """Check that every row of STORE is whole and unique, and that vectors are their images'."""
    with _exit_status():
        _print_checks(verify_job.verify(Store(store), source, audit, seed))


@app.command()
def backbones(
    name: Annotated[str | None, typer.Argument(help="Show this network alone.")] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="List what --layer can name, with shapes.")
    ] = False,
) -> None:
    """List the networks: name, dim, input size, parameters, licence, weights at hand or not."""
    with _exit_status():
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
            _out.print(table)
            return
        _print_facts(
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
    _out.print(table)


@app.command()
def doctor(
    backbone: Annotated[
        str, typer.Argument(help="The network to test.")
    ] = backbone_table.DEFAULT_BACKBONE,
    weights: Annotated[
        str | None, typer.Option(help="As in extract; random where none are at hand.")
    ] = None,
) -> None:
    """Show this machine and its engines, and test BACKBONE's pixels and vectors."""
    with _exit_status():
        _print_facts(doctor_job.machine())
        _out.print()
        _print_checks(doctor_job.self_test(backbone, weights))


@app.command()
def demo(
    store: Annotated[str, typer.Argument(help="Folder of the feature store.")] = "demo-features",
) -> None:
    """Run the main job on 2,000 real images, offline, and show what the features are good for."""
    with _exit_status():
        source = demo_job.images_folder()
        _out.print(f"$ embedder extract {shlex.quote(str(source))} {shlex.quote(store)}\n")
        recipe = backbone_table.make_recipe()
        with _progress(quiet=False) as on_progress:
            summaries = run_extraction(
                source, {store: recipe}, RunOptions(), on_progress, _started()
            )
        _print_summaries(summaries)
        _out.print("\nA linear probe on these features (5-fold cross-validation):\n")
        metrics = demo_job.linear_probe(Store(store))
        _print_facts({name: _interval(metric) for name, metric in metrics.items()})


def main() -> None:
    """Entry point of the `embedder` command."""
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


def _started() -> float:
    """When this process began, so that a run's total holds the imports too."""
    import psutil

    return float(psutil.Process().create_time())


# Showing ------------------------------------------------------------------------------------


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """What to call with a run's `Progress`: a bar on a terminal, plain lines elsewhere."""
    if quiet:
        yield lambda _: None
    elif _err.is_terminal:
        bar = ProgressBar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failures]}"),
            console=_err,
            transient=True,
        )
        with bar:
            yield _BarPainter(bar)
    else:
        yield _LinePrinter()


class _Speed:
    """Images per second since a phase began."""

    def __init__(self) -> None:
        self.phase, self.began = "", time.monotonic()

    def entered(self, progress: Progress) -> bool:
        is_new = progress.phase != self.phase
        if is_new:
            self.phase, self.began = progress.phase, time.monotonic()
        return is_new

    def of(self, progress: Progress) -> float:
        return progress.num_done / max(time.monotonic() - self.began, 1e-9)


class _BarPainter:
    def __init__(self, bar: ProgressBar) -> None:
        self._bar, self._speed = bar, _Speed()
        self._task = bar.add_task("starting", total=None, speed="", failures="")

    def __call__(self, progress: Progress) -> None:
        if self._speed.entered(progress):
            self._bar.reset(self._task, total=progress.num_images or None)
        failures = f"{progress.num_failures:,} failed" if progress.num_failures else ""
        self._bar.update(
            self._task,
            description=progress.phase,
            completed=progress.num_done,
            speed=f"{self._speed.of(progress):,.0f} images/s" if progress.num_done else "",
            failures=failures,
        )


class _LinePrinter:
    def __init__(self) -> None:
        self._speed, self._last = _Speed(), 0.0

    def __call__(self, progress: Progress) -> None:
        if self._speed.entered(progress):
            self._last = time.monotonic()
            count = f" {progress.num_images:,} images" if progress.num_images else ""
            _err.print(f"{progress.phase}{count}")
        elif time.monotonic() - self._last > _PLAIN_LINE_SECONDS:
            self._last = time.monotonic()
            speed = self._speed.of(progress)
            left = (progress.num_images - progress.num_done) / max(speed, 1e-9)
            _err.print(
                f"{progress.num_done:,} of {progress.num_images:,}, {speed:,.0f} images/s, "
                f"{left:,.0f} s left, {progress.num_failures:,} failed"
            )


def _print_summaries(summaries: list[Summary]) -> None:
    for number, summary in enumerate(summaries):
        if number:
            _out.print()
        _print_summary(summary)


def _print_summary(summary: Summary) -> None:
    new = f"{summary.num_embedded:,} new" if summary.num_embedded else "nothing new"
    facts = {"rows": f"{summary.total_rows:,} in the store, {new}"}
    for name, count in {
        "changed": summary.num_changed,
        "same content": summary.num_updated,
        "dropped": summary.num_dropped,
        "repeated lines": summary.num_repeated,
    }.items():
        if count:
            facts[name] = f"{count:,}"
    facts["failures"] = f"{summary.total_failures:,} in the store, {summary.num_failures:,} new"
    if summary.skipped:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in summary.skipped.most_common(5))
        facts["other files"] = f"{summary.skipped.total():,} left out: {kinds}"
    if summary.num_deleted and not summary.options["prune"]:
        facts["deleted"] = (
            f"{summary.num_deleted:,} that the source no longer has; `--prune` drops them"
        )
    if summary.num_embedded:
        stages = ", ".join(
            f"{stage} {s:,.1f} s" for stage, s in summary.record()["seconds"].items()
        )
        facts["speed"] = (
            f"{summary.images_per_second:,.1f} images/s, {summary.seconds_total:,.1f} s in all"
        )
        facts["stages"] = f"{stages} (summed over threads)"
        facts["bottleneck"] = summary.bottleneck
    facts["store"] = summary.store
    facts["next"] = f"embedder inspect {shlex.quote(summary.store)}"
    _print_facts(facts)
    if summary.failures:
        _print_reasons(summary.failures)


def _print_facts(facts: dict[str, str]) -> None:
    # Not a table: it would break paths and commands over lines, and they are to be copied.
    width = max(map(len, facts))
    for name, value in facts.items():
        _out.print(Text(f"{name:<{width}}", style="bold"), value, sep="  ")


def _print_reasons(reasons: Counter[tuple[str, str]]) -> None:
    table = Table("failures", "stage", "reason", box=None, pad_edge=False)
    for (stage, error), count in reasons.most_common(10):
        table.add_row(f"{count:,}", stage, error)
    _out.print()
    _out.print(table)
    if len(reasons) > 10:
        _out.print(f"and {len(reasons) - 10:,} more reasons, in failures/*.parquet")


def _print_checks(checks: list[verify_job.Check]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in checks:
        table.add_row("pass" if check.passed else "FAIL", check.name, check.detail)
    _out.print(table)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


def _interval(metric: dict[str, float]) -> str:
    return f"{metric['value']:.3f}  (95 % interval {metric['low']:.3f} to {metric['high']:.3f})"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


if __name__ == "__main__":
    main()
