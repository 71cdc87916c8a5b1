"""The commands on heads: train, evaluate, predict, export. Each imports what it needs to run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from embedder.cli import console
from embedder.extraction import RunOptions
from embedder.store import Store

StorePath = Annotated[str, typer.Argument(help="Folder of the feature store.")]
ModelPath = Annotated[str, typer.Argument(help="Folder of the model.")]
Labels = Annotated[
    str,
    typer.Option(
        help="folder (first folder), parent (containing folder), FILE.csv:COLUMN, "
        "LIST.txt:NUMBER or column:NAME."
    ),
]
Coarse = Annotated[
    str | None, typer.Option(help="Labels of a coarser level, for a score on both levels.")
]
Separator = Annotated[
    str | None, typer.Option(help="What separates several labels of one image, such as ;")
]


def train(
    store: StorePath,
    model: ModelPath,
    labels: Labels = "folder",
    head: Annotated[
        str,
        typer.Option(help="logistic, svm, ridge, lda, knn, centroid, linear or mlp."),
    ] = "logistic",
    split: Annotated[
        str,
        typer.Option(
            help="Share to test on, kfold:K, a folder with train.txt, test.txt (and val.txt), "
            "FILE.csv:COLUMN or column:NAME."
        ),
    ] = "0.2",
    duplicates: Annotated[
        str,
        typer.Option(help="Cosine from which images never stand on both sides, or none."),
    ] = "auto",
    class_weight: Annotated[
        str | None, typer.Option(help="balanced: rare classes count as much as frequent ones.")
    ] = None,
    separator: Separator = None,
    layer: Annotated[str | None, typer.Option(help="Which feature, of several.")] = None,
    coarse: Coarse = None,
    unlabelled: Annotated[
        str | None, typer.Option(help="A store whose images help without labels.")
    ] = None,
    unlabelled_method: Annotated[
        str, typer.Option(help="self-training or label-spreading.")
    ] = "self-training",
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    source: Annotated[
        str | None, typer.Option(help="Where the images are, for the report's pictures.")
    ] = None,
    report: Annotated[bool, typer.Option(help="Write report.html.")] = True,
) -> None:
    """Train a head on STORE, test it on images it has not seen, and write it to MODEL."""
    with console.exit_status():
        from embedder.heads import REPORT_FILE, ModelFolder
        from embedder.neighbours import DEFAULT_THRESHOLD
        from embedder.report import notes_of, write_head_report
        from embedder.training import TrainOptions, train as train_head

        options = TrainOptions(
            **dict[str, Any](
                split=split,
                duplicates=_parse_duplicates(duplicates, DEFAULT_THRESHOLD),
                class_weight=class_weight,
                separator=separator,
                column=layer,
                coarse=coarse,
                unlabelled=unlabelled,
                unlabelled_method=unlabelled_method,
                seed=seed,
            )
        )
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


def evaluate(
    model: ModelPath,
    store: StorePath,
    labels: Labels = "folder",
    coarse: Coarse = None,
    include_trained: Annotated[
        bool, typer.Option("--include-trained", help="Also images it was trained on.")
    ] = False,
    json_out: Annotated[
        str | None, typer.Option("--json", help="Write all metrics to this file.")
    ] = None,
) -> None:
    """Test MODEL on the labelled images of STORE that it was not trained on."""
    with console.exit_status():
        import json

        from embedder.training import evaluate_model

        result = evaluate_model(model, Store(store), labels, coarse, include_trained)
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


def predict(
    model: ModelPath,
    source: Annotated[str, typer.Argument(help="A store, or images: folder, glob, manifest, URL.")],
    out: Annotated[str, typer.Argument(help="Parquet file to write, a row for each image.")],
    top_k: Annotated[int, typer.Option(help="How many of the most probable classes.")] = 5,
    store: Annotated[
        str | None, typer.Option(help="Keep the features of the images in this store.")
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, openvino or tensorflow.")] = "auto",
    shard_size: Annotated[int, typer.Option(help="Images in a shard.")] = RunOptions.shard_size,
    workers: Annotated[int | None, typer.Option(help="Local worker processes.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many images.")] = None,
    max_failures: Annotated[float, typer.Option(help="Share, 0 to 1, that may fail.")] = 0.1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try them again.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Drop images that the source no longer has.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Predict the classes of the images of SOURCE, or of a store's rows, with MODEL."""
    with console.exit_status(quiet):
        from embedder.inference import predict as predict_images

        options = RunOptions(
            **dict[str, Any](
                engine=engine,
                shard_size=shard_size,
                workers=workers,
                scheduler=scheduler,
                limit=limit,
                max_failures=max_failures,
                retry_failed=retry_failed,
                prune=prune,
            )
        )
        with console.progress(quiet) as on_progress:
            result = predict_images(
                model, source, out, top_k=top_k, options=options, keep=store, watch=on_progress
            )
        if quiet:
            return
        facts = {
            "predicted": f"{result.num_predicted:,} images",
            "failed": f"{result.num_failed:,} images",
            "predictions": str(result.path),
        }
        if store and result.summary is not None:
            console.print_summary(result.summary)
        elif result.summary is not None:
            facts |= _run_facts(result.summary)
        console.print_facts(facts)
        summary = None if store else result.summary
        if summary is not None and (reasons := summary.failures + summary.unreadable):
            console.print_reasons(reasons)


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


def export(
    model: ModelPath,
    out: Annotated[str, typer.Argument(help="Folder to write.")],
    file_format: Annotated[
        str, typer.Option("--format", help="keras, saved-model, onnx, openvino or litert.")
    ],
    source: Annotated[
        str | None, typer.Option(help="Images to compare on; those of the training, if not given.")
    ] = None,
    images: Annotated[int, typer.Option(help="How many of them to compare on.")] = 16,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Write MODEL as one network from pixels to probabilities, which runs without this package."""
    with console.exit_status(quiet):
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
    intervals = metrics["intervals"]["test"]
    facts = {"tested on": f"{metrics['test']['num_images']:,} images"}
    for name, (low, high) in intervals.items():
        facts[name] = console.interval({"value": metrics["test"][name], "low": low, "high": high})
    return facts


def _parse_duplicates(text: str, default: float) -> float | None:
    if text == "auto":
        return default
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(
            f"must be a cosine, such as {default}, auto or none. Received: {text}",
            param_hint="--duplicates",
        ) from None
