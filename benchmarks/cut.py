"""What is above a cut, trained from cached activations and from pixels: seconds, and weights.

All see the same images in the same order, without augmentation, at the same rates.

    python benchmarks/cut.py MODEL SOURCE --cuts stage6 stage7
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.backbones import load_network
from embedder.extraction import RunOptions
from embedder.finetuning import TuneOptions, finetune
from embedder.heads import Model

CACHED: dict[str, Any] = {"views": 1}
PIXELS: dict[str, Any] = {"from_pixels": True, "augment": ()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("source")
    parser.add_argument("--cuts", nargs="+", default=["stage6", "stage7"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=0.002)
    options = parser.parse_args()
    before = weights_of(options.model)
    print(
        "| cut below | seconds an epoch, cached | from pixels | ratio | extraction, once "
        "| largest change of a weight in an epoch "
        "| difference, activations by TensorFlow | by the usual engine |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    for cut in options.cuts:
        pixels, _ = tune(options, cut, 1, PIXELS)
        same, _ = tune(options, cut, 1, CACHED, engine="tensorflow")
        usual, metrics = tune(options, cut, 1, CACHED)
        cached_seconds, pixels_seconds = (
            seconds_an_epoch(tune(options, cut, options.epochs, how)[1]) for how in (CACHED, PIXELS)
        )
        print(
            f"| {cut} | {cached_seconds:.2f} | {pixels_seconds:.2f} "
            f"| {pixels_seconds / cached_seconds:.1f} | {metrics['seconds']['activations']:.1f} "
            f"| {distance(pixels, before):.1g} | {distance(same, pixels):.1g} "
            f"| {distance(usual, pixels):.1g} |",
            flush=True,
        )


def tune(
    options: argparse.Namespace, cut: str, epochs: int, how: dict[str, Any], engine: str = "auto"
) -> tuple[list[NDArray[Any]], dict[str, Any]]:
    """The backbone's weights, and the metrics."""
    tuning = TuneOptions(
        strategy="cut",
        cut=cut,
        epochs=epochs,
        optimizer="sgd",
        learning_rate=options.learning_rate,
        **how,
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        tuned = finetune(options.model, options.source, out, tuning, RunOptions(engine=engine))
        return weights_of(out), tuned.metrics


def weights_of(model: str | Path) -> list[NDArray[Any]]:
    weights: list[NDArray[Any]] = load_network(Model.load(model).recipe).get_weights()
    return weights


def distance(ours: list[NDArray[Any]], theirs: list[NDArray[Any]]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


def seconds_an_epoch(metrics: dict[str, Any]) -> float:
    epochs = metrics["tuning"]["epochs"][2:]  # 0 is the start, and 1 is traced too
    return float(np.median([epoch["seconds"] for epoch in epochs]))


if __name__ == "__main__":
    main()
