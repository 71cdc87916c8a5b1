"""Models side by side, on the images that all of them were tested on."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from embedder.evaluation import PairedTest, TestedModel


def compare(paths: Sequence[str | os.PathLike[str]]) -> list[tuple[TestedModel, PairedTest | None]]:
    """Models side by side, each against the first.

    Raises:
        ModelError: One of them is no model, or was not tested on images of its own.
        RequestError: They were not tested on the same images.
    """
    first, *others = (TestedModel.read(path) for path in paths)
    return [(first, None), *((other, other.against(first)) for other in others)]


def row_of(tested: TestedModel, found: PairedTest | None) -> dict[str, Any]:
    """A model of a comparison, in values of JSON."""
    metrics, tuning = tested.metrics, tested.tuning
    low, high = metrics["intervals"]["test"]["accuracy"]
    return {
        "model": str(tested.path),
        "kind": tested.kind,
        "num_images": len(tested.ids),
        "accuracy": {"value": metrics["test"]["accuracy"], "low": low, "high": high},
        "balanced_accuracy": metrics["test"].get("balanced_accuracy"),
        "coarse_accuracy": metrics["test"].get("coarse_accuracy"),
        "log_loss": metrics["test"]["log_loss"],
        "seconds": round(tested.seconds, 1),
        "num_tuned": tuning.get("num_tuned"),
        "num_weights": tuning.get("num_weights"),
        "against_first": None if found is None else asdict(found),
        "verdict": "" if found is None else found.verdict,
    }
