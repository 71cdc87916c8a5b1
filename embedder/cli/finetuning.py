"""The commands of the second pass: finetune, compare. They import what they need when they run."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from embedder.cli import console
from embedder.cli.heads import ModelPath
from embedder.extraction import RunOptions
from embedder.files import local_path


def finetune(
    model: ModelPath,
    source: Annotated[str, typer.Argument(help="The images that MODEL was trained on.")],
    out: Annotated[str, typer.Argument(help="Folder to write the tuned model to.")],
    strategy: Annotated[
        str,
        typer.Option(help="head, gradual, full, partial, norm, bias, cut or scratch."),
    ] = "gradual",
    epochs: Annotated[int | None, typer.Option(help="The most there can be.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images of a step.")] = 32,
    learning_rate: Annotated[float | None, typer.Option(help="Of the head, at most.")] = None,
    rate_decay: Annotated[
        float | None, typer.Option(help="Factor of the rate from a group of blocks to the next.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="Of Keras, such as adamw or sgd.")] = None,
    weight_decay: Annotated[float, typer.Option(help="Of kernels.")] = 1e-4,
    label_smoothing: Annotated[float, typer.Option(help="Share of a target, 0 to below 1.")] = 0.1,
    class_weight: Annotated[
        str | None, typer.Option(help="balanced: rare classes count as much as frequent ones.")
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(
            help="Of flip, vertical-flip, crop, rotation, colour, mixup, cutmix, with commas; "
            "none; flip if not given."
        ),
    ] = None,
    views: Annotated[
        int | None, typer.Option(help="Of head and cut: views an image, 4 if not given.")
    ] = None,
    cut: Annotated[
        str | None, typer.Option(help="Of cut: the lowest block that is trained, such as conv5.")
    ] = None,
    from_pixels: Annotated[
        bool, typer.Option("--from-pixels", help="Of head and cut: keep no activations.")
    ] = False,
    activations: Annotated[
        str | None, typer.Option(help="Of head and cut: store to keep activations in, or to take.")
    ] = None,
    unlabelled: Annotated[
        str | None, typer.Option(help="Images that help without labels: folder, manifest, ...")
    ] = None,
    block: Annotated[
        list[str] | None, typer.Option(help="Of partial: a block to choose channels in.")
    ] = None,
    fraction: Annotated[float, typer.Option(help="Of partial: share of the channels.")] = 0.05,
    importance: Annotated[str, typer.Option(help="Of partial: taylor or fisher.")] = "taylor",
    auxiliary: Annotated[
        str | None, typer.Option(help="Layer with a classifier of its own, in training.")
    ] = None,
    loss_weights: Annotated[
        tuple[float, float], typer.Option(help="Of the auxiliary and the main classifier.")
    ] = (1.0, 10.0),
    pooling: Annotated[
        str | None, typer.Option(help="Of a new head: avg, max, gem or flatten.")
    ] = None,
    hidden: Annotated[int | None, typer.Option(help="Of a new head: units, 0 for none.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Of a new head.")] = None,
    train_norm: Annotated[
        bool, typer.Option("--train-norm", help="Also BatchNormalization's statistics.")
    ] = False,
    ema: Annotated[
        float | None, typer.Option(help="Momentum of the average of the weights to keep.")
    ] = None,
    patience: Annotated[int, typer.Option(help="Epochs without gain before the end.")] = 5,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    engine: Annotated[str, typer.Option(help="For features: as in extract.")] = "auto",
    workers: Annotated[int | None, typer.Option(help="For features: as in extract.")] = None,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    report: Annotated[bool, typer.Option(help="Write report.html.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only errors.")] = False,
) -> None:
    """Train MODEL's backbone and head further, and say whether it paid."""
    with console.exit_status(quiet):
        from embedder.finetuning import TuneOptions, Watcher, finetune as tune
        from embedder.report import write_head_report

        options = TuneOptions(
            **dict[str, Any](
                strategy=strategy,
                epochs=epochs,
                batch_size=batch_size,
                learning_rate=learning_rate,
                rate_decay=rate_decay,
                optimizer=optimizer,
                weight_decay=weight_decay,
                label_smoothing=label_smoothing,
                class_weight=class_weight,
                unlabelled=unlabelled,
                augment=_parse_augment(augment),
                views=views,
                cut=cut,
                from_pixels=from_pixels,
                blocks=tuple(block or ()),
                fraction=fraction,
                importance=importance,
                auxiliary=auxiliary,
                loss_weights=loss_weights,
                pooling=pooling,
                hidden=hidden,
                dropout=dropout,
                train_norm=train_norm,
                ema=ema,
                patience=patience,
                precision=precision,
                seed=seed,
            )
        )

        def write_report(head: Any, metrics: dict[str, Any], folder: Path, listing: Any) -> None:
            if report:
                write_head_report(head, metrics, folder, listing)

        with console.progress(quiet) as on_progress:
            on_epoch = _ignore if quiet else _print_epoch
            watch = Watcher(on_progress, on_epoch, write_report)
            tuned = tune(
                model,
                source,
                out,
                options,
                RunOptions(**dict[str, Any](engine=engine, workers=workers)),
                activations,
                watch,
            )
        if not quiet:
            _print_tuned(tuned.metrics, tuned.path, tuned.head is not None)


def _ignore(_: Any) -> None:
    pass


def _print_epoch(epoch: Any) -> None:
    loss = "" if epoch.loss is None else f"loss {epoch.loss:.3f}, "
    validation = (
        ""
        if epoch.validation_loss is None
        else f"validation log-loss {epoch.validation_loss:.3f}, "
        f"accuracy {epoch.validation_accuracy:.3f}, "
    )
    console.err.print(f"epoch {epoch.number}: {loss}{validation}{epoch.seconds:.1f} s")


def _print_tuned(metrics: dict[str, Any], path: Path, is_new: bool) -> None:
    tuning, intervals = metrics["tuning"], metrics["intervals"]["test"]
    low, high = intervals["accuracy"]
    value = metrics["test"]["accuracy"]
    tuned, total = tuning["num_tuned"], tuning["num_weights"]
    against = tuning["against_before"]
    seconds = metrics["seconds"]
    facts = {
        "strategy": tuning["strategy"] + ("" if is_new else " (done before)"),
        "tested on": f"{metrics['test']['num_images']:,} images",
        "accuracy": console.interval({"value": value, "low": low, "high": high}),
        "before": f"{tuning['accuracy_before']:.3f}",
        "McNemar": f"{against['num_better']:,} images better, {against['num_worse']:,} worse, "
        f"p = {against['p_value']:.2g}",
        "weights": f"{tuned:,} tuned; the backbone has {total:,}",
        "seconds": ", ".join(f"{name} {value:,.1f}" for name, value in seconds.items()),
        "verdict": tuning["verdict"],
        "model": str(path),
        "next": f"embedder export {console.shell_word(str(path))} OUT --format onnx",
    }
    console.print_facts(facts)


def compare(
    models: Annotated[list[str], typer.Argument(help="Models; the first is what it is against.")],
    report: Annotated[
        str | None, typer.Option(help="Write a page that shows it, such as comparison.html.")
    ] = None,
    json_out: Annotated[
        str | None, typer.Option("--json", help="Write the comparison to this file.")
    ] = None,
) -> None:
    """Put MODELS side by side, on the images that all of them were tested on."""
    with console.exit_status():
        from embedder.analysis import compare as compare_models, row_of
        from embedder.report import write_comparison

        rows = compare_models(models)
        table = [row_of(tested, against) for tested, against in rows]
        if json_out:
            console.write_text(json_out, json.dumps(table, indent=2))
        if report:
            with console.writing(report):
                write_comparison(local_path(report), table)
        console.print_table(
            ("model", "kind", "accuracy", "95 % interval", "p", "seconds", "tuned", "verdict"),
            [_comparison_cells(row) for row in table],
        )


def _parse_augment(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return () if text == "none" else tuple(name.strip() for name in text.split(","))


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
