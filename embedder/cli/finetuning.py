"""The commands of the second pass: finetune, compare. Each imports what it needs to run."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from embedder.cli import console
from embedder.cli.options import JsonFile, ModelPath, Quiet, command
from embedder.errors import EmbedderError
from embedder.extraction import RunOptions
from embedder.files import local_path, os_errors_as
from embedder.finetuning import TuneOptions
from embedder.progress import ignore


@command
def finetune(
    model: ModelPath,
    source: Annotated[str, typer.Argument(help="The images that MODEL was trained on.")],
    out: Annotated[str, typer.Argument(help="Folder to write the tuned model to.")],
    *,
    options: TuneOptions,
    run: Annotated[RunOptions, {"engine", "workers"}],
    activations: Annotated[
        str | None, typer.Option(help="Of head and cut: store to keep activations in, or to take.")
    ] = None,
    report: Annotated[bool, typer.Option(help="Write report.html.")] = True,
    quiet: Quiet = False,
) -> None:
    """Train MODEL's backbone and head further, and say whether it paid."""
    from embedder.finetuning import Watcher, finetune as tune
    from embedder.report import write_head_report

    def write_report(head: Any, metrics: dict[str, Any], folder: Path, listing: Any) -> None:
        if report:
            write_head_report(head, metrics, folder, listing)

    with console.progress(quiet) as on_progress:
        watch = Watcher(on_progress, ignore if quiet else _print_epoch, write_report)
        tuned = tune(model, source, out, options, run, activations, watch)
    if not quiet:
        _print_tuned(tuned.metrics, tuned.path, tuned.head is not None)


def _print_epoch(epoch: Any) -> None:
    console.err.print(str(epoch))  # else as a dataclass, over several lines


def _print_tuned(metrics: dict[str, Any], path: Path, is_new: bool) -> None:
    tuning, test = metrics["tuning"], metrics["test"]
    against, bounds = tuning["against_before"], metrics["intervals"]["test"]["accuracy"]
    facts = {
        "strategy": tuning["strategy"] + ("" if is_new else " (done before)"),
        "tested on": f"{test['num_images']:,} images",
        "accuracy": console.interval(test["accuracy"], *bounds),
        "before": f"{tuning['accuracy_before']:.3f}",
        "McNemar": f"{against['num_better']:,} images better, {against['num_worse']:,} worse, "
        f"p = {against['p_value']:.2g}",
        "weights": f"{tuning['num_tuned']:,} tuned; the backbone has {tuning['num_weights']:,}",
        "seconds": ", ".join(f"{name} {s:,.1f}" for name, s in metrics["seconds"].items()),
        "verdict": tuning["verdict"],
        "model": str(path),
        "next": f"embedder export {console.shell_word(str(path))} OUT --format onnx",
    }
    console.print_facts(facts)


@command
def compare(
    models: Annotated[list[str], typer.Argument(help="Models; the first is what it is against.")],
    report: Annotated[
        str | None, typer.Option(help="Write a page that shows it, such as comparison.html.")
    ] = None,
    json_out: JsonFile = None,
) -> None:
    """Put MODELS side by side, on the images that all of them were tested on."""
    from embedder.analysis import compare as compare_models, row_of
    from embedder.report import write_comparison

    rows = compare_models(models)
    table = [row_of(tested, against) for tested, against in rows]
    if json_out:
        console.write_text(json_out, json.dumps(table, indent=2))
    if report:
        with os_errors_as(EmbedderError, f"{report} cannot be written"):
            write_comparison(local_path(report), table)
    console.print_table(
        ("model", "kind", "accuracy", "95 % interval", "p", "seconds", "tuned", "verdict"),
        [_comparison_cells(row) for row in table],
    )


def _comparison_cells(row: dict[str, Any]) -> list[str]:
    accuracy, found = row["accuracy"], row["against_first"]
    return [
        row["model"],
        row["kind"],
        f"{accuracy['value']:.3f}",
        f"{accuracy['low']:.3f} to {accuracy['high']:.3f}",
        "" if found is None else f"{found['p_value']:.2g}",
        f"{row['seconds']:,.0f}",
        "" if row["num_tuned"] is None else f"{row['num_tuned']:,}",
        row["verdict"],
    ]
