"""A model's predictions on the images that it was tested on, read from its folder."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from embedder.columns import TEST
from embedder.errors import ModelError, RequestError
from embedder.evaluation.paired_test import PairedTest
from embedder.heads import ModelFolder


@dataclass(frozen=True)
class TestedModel:
    """A model's predictions on the images that it was tested on.

    Attributes:
        path: Folder of the model.
        kind: Its head, or how it was fine-tuned.
        ids: (n,) str, sorted.
        sha256: (n,) str, of their bytes.
        is_right: bool (n,).
        metrics: As in `metrics.json`.
    """

    path: Path
    kind: str
    ids: NDArray[np.object_]
    sha256: NDArray[np.object_]
    is_right: NDArray[np.bool_]
    metrics: dict[str, Any]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read what a model predicted for the images that it was tested on.

        Raises:
            ModelError: The folder holds no model, or one that was not tested on images of its own.
        """
        folder = ModelFolder(path)
        columns = folder.read_predictions("sha256", "label", "part", "predicted")
        metrics, (said, _) = folder.read_metrics(), folder.read_description()
        is_tested = columns["part"] == TEST
        if not is_tested.any():
            raise ModelError(
                f"A model must have been tested on images that it was not trained on. Received: "
                f"{folder.path}, trained with cross-validation; train it with --split 0.2 or "
                f"official lists"
            )
        tuning = metrics.get("tuning")
        return cls(
            path=folder.path,
            kind=tuning["strategy"] if tuning else f"frozen + {said.head.kind}",
            ids=columns["image_id"][is_tested],
            sha256=columns["sha256"][is_tested],
            is_right=(columns["label"] == columns["predicted"])[is_tested],
            metrics=metrics,
        )

    @property
    def tuning(self) -> dict[str, Any]:
        """What `metrics.json` says of the fine-tuning; empty for a head on frozen features."""
        return dict(self.metrics.get("tuning") or {})

    @property
    def seconds(self) -> float:
        """Of training: of all steps but the features of a frozen backbone."""
        return float(sum(self.metrics["seconds"].values()))

    def against(self, other: "TestedModel") -> PairedTest:
        """Compare with another model.

        Raises:
            RequestError: They were not tested on the same bytes.
        """
        ours, theirs = (model.ids.tolist() for model in (self, other))
        if ours != theirs or self.sha256.tolist() != other.sha256.tolist():
            raise RequestError(
                f"Models must be tested on the same images to be compared. Received: {self.path} "
                f"on {len(ours):,} and {other.path} on {len(theirs):,} images, of which "
                f"{len(set(ours) & set(theirs)):,} have the same id"
            )
        return PairedTest.of(self.is_right, other.is_right, self.seconds, bool(self.tuning))
