"""What is above a cut, trained from cached activations and from pixels: seconds, and weights.

Both see the same images in the same order, without augmentation, at the same rates.

    python benchmarks/cut.py MODEL SOURCE --cuts stage6 stage7
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from embedder.backbones import load_network
from embedder.finetuning import Tuned, finetune
from embedder.model import Model
from embedder.strategies import TuneOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("source")
    parser.add_argument("--cuts", nargs="+", default=["stage6", "stage7"])
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    print(
        "| cut below | seconds an epoch, cached | from pixels | ratio | extraction, once |", end=""
    )
    print(" largest difference of a weight after one epoch |\n|---|---:|---:|---:|---:|---:|")
    for cut in options.cuts:
        with tempfile.TemporaryDirectory() as folder:
            times, weights, extraction = [], [], 0.0
            for name, how in {
                "cached": {"views": 1},
                "pixels": {"from_pixels": True, "augment": ()},
            }.items():
                once, several = (
                    tune(options, Path(folder) / f"{name}{epochs}", cut, epochs, how)
                    for epochs in (1, options.epochs)
                )
                extraction = once.metrics["seconds"].get("activations", extraction)
                epochs = several.metrics["tuning"]["epochs"][2:]  # the first is traced too
                times.append(float(np.median([epoch["seconds"] for epoch in epochs])))
                weights.append(load_network(Model.load(once.path).recipe).get_weights())
            difference = max(np.abs(a - b).max() for a, b in zip(*weights, strict=True))
            cached, pixels = times
            print(
                f"| {cut} | {cached:.2f} | {pixels:.2f} | {pixels / cached:.1f} "
                f"| {extraction:.1f} | {difference:.1g} |",
                flush=True,
            )


def tune(options: argparse.Namespace, out: Path, cut: str, epochs: int, how: dict) -> Tuned:  # type: ignore[type-arg]
    tuning = TuneOptions(
        strategy="cut", cut=cut, epochs=epochs, optimizer="sgd", learning_rate=0.01, **how
    )
    return finetune(options.model, options.source, out, tuning)


if __name__ == "__main__":
    main()
