"""The commands on heads: train, evaluate, predict, export. Each imports what it needs to run."""

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from embedder.cli import console
from embedder.cli.options import JsonFile, ModelPath, Quiet, StorePath, command, option
from embedder.extraction import RunOptions
from embedder.inference import ExportFormat
from embedder.training import HeadName, TrainOptions

Labels = Annotated[
    str,
    typer.Option(
        help="folder (first folder), parent (containing folder), FILE.csv:COLUMN, "
        "LIST.txt:NUMBER or column:NAME."
    ),
]
_HEADS, _FORMATS = get_args(HeadName), get_args(ExportFormat)


@command
def train(
    store: StorePath,
    model: ModelPath,
    *,
    labels: Labels = "folder",
    head: Annotated[str, option("Kind of head.", lambda: _HEADS, *_HEADS)] = "logistic",
    options: TrainOptions,
    source: Annotated[
        str | None, typer.Option(help="Where the images are, for the report's pictures.")
    ] = None,
    report: Annotated[bool, typer.Option(help="Write report.html.")] = True,
) -> None:
    """Train a head on STORE, test it on images it has not seen, and write it to MODEL."""
    from embedder.heads import REPORT_FILE, ModelFolder
    from embedder.report import notes_of, write_head_report
    from embedder.store import Store
    from embedder.training import train as train_head

    ModelFolder(model).check_free()
    trained = train_head(Store(store), labels, head, options)

    def write_report(folder: Path, metrics: dict[str, Any]) -> None:
        if report:
            write_head_report(trained, metrics, folder, source)

    metrics = trained.save(model, write_report)
    facts = {"model": model}
    if report:
        facts["report"] = str(Path(model) / REPORT_FILE)
    facts["next"] = f"embedder predict {console.shell_word(model)} SOURCE predictions.parquet"
    for note in notes_of(trained, metrics):
        console.out.print(note)
    console.out.print()
    console.print_facts(_metric_facts(metrics) | facts)


@command
def evaluate(
    model: ModelPath,
    store: StorePath,
    *,
    labels: Labels = "folder",
    also: Annotated[TrainOptions, {"coarse"}],
    include_trained: Annotated[
        bool, typer.Option("--include-trained", help="Also images it was trained on.")
    ] = False,
    json_out: JsonFile = None,
) -> None:
    """Test MODEL on the labelled images of STORE that it was not trained on."""
    import json

    from embedder.inference import evaluate_model
    from embedder.store import Store

    result = evaluate_model(model, Store(store), labels, also.coarse, include_trained)
    if json_out:
        console.write_text(json_out, json.dumps(result.metrics, indent=2))
    for note in result.notes:
        console.out.print(note)
    console.print_facts(_metric_facts(result.metrics))
    worst = sorted(result.metrics["per_class"], key=lambda row: row["f1"])[:5]
    if worst:
        console.out.print("\nleast F1:")
        console.print_facts(
            {
                row["class"]: f"F1 {row['f1']:.3f}, precision {row['precision']:.3f}, "
                f"recall {row['recall']:.3f}, {row['num_images']:,} images"
                for row in worst
            }
        )


@command
def predict(
    model: ModelPath,
    source: Annotated[str, typer.Argument(help="A store, or images: folder, glob, manifest, URL.")],
    out: Annotated[str, typer.Argument(help="Parquet file to write, a row for each image.")],
    *,
    top_k: Annotated[int, typer.Option(help="How many of the most probable classes.")] = 5,
    store: Annotated[
        str | None, typer.Option(help="Keep the features of the images in this store.")
    ] = None,
    run: RunOptions,
    quiet: Quiet = False,
) -> None:
    """Predict the classes of the images of SOURCE, or of a store's rows, with MODEL."""
    from embedder.inference import predict as predict_images

    with console.progress(quiet) as on_progress:
        result = predict_images(
            model, source, out, top_k=top_k, options=run, keep=store, watch=on_progress
        )
    if quiet:
        return
    facts = {
        "predicted": f"{result.num_predicted:,} images",
        "failed": f"{result.num_failed:,} images",
        "predictions": str(result.path),
    }
    summary = result.summary
    if summary is None:
        console.print_facts(facts)
    elif store:
        console.print_summary(summary)
        console.print_facts(facts)
    else:
        console.print_facts(facts | _run_facts(summary))
        console.print_reasons(summary.failures + summary.unreadable)


def _run_facts(summary: Any) -> dict[str, str]:
    """What a run over images was like, but where its logits are, which nobody need look at."""
    facts = {"of these": f"{summary.num_embedded:,} new"}
    if summary.skipped:
        facts["other files"] = f"{summary.skipped.total():,} left out"
    if summary.num_embedded:
        facts["speed"] = (
            f"{summary.images_per_second:,.1f} images/s, {summary.seconds_total:,.1f} s in all"
        )
        facts["bottleneck"] = summary.bottleneck
    return facts


@command
def export(
    model: ModelPath,
    out: Annotated[str, typer.Argument(help="Folder to write.")],
    file_format: Annotated[
        str, option("What to write it for.", lambda: _FORMATS, *_FORMATS, flag="--format")
    ],
    source: Annotated[
        str | None, typer.Option(help="Images to compare on; those of the training, if not given.")
    ] = None,
    images: Annotated[int, typer.Option(help="How many of them to compare on.")] = 16,
    quiet: Quiet = False,
) -> None:
    """Write MODEL as one network from pixels to probabilities, which runs without this package."""
    from embedder.inference import DESCRIPTION_FILE, export as export_model

    with console.progress(quiet) as on_progress:
        exported = export_model(
            model, out, file_format, source=source, num_images=images, watch=on_progress
        )
    if quiet:
        return
    differences = ", ".join(
        f"{value:.1e} of {name}" for name, value in exported.differences.items()
    )
    console.print_facts(
        {
            "exported": str(exported.path / exported.file),
            "size": console.size(exported.num_bytes),
            "compared on": f"{exported.num_images:,} images, as `predict` has them",
            "differences": f"{differences}, at most",
            "how to use it": str(exported.path / DESCRIPTION_FILE),
        }
    )


def _metric_facts(metrics: dict[str, Any]) -> dict[str, str]:
    facts = {"tested on": f"{metrics['test']['num_images']:,} images"}
    for name, (low, high) in metrics["intervals"]["test"].items():
        facts[name] = console.interval(metrics["test"][name], low, high)
    return facts
