"""A model's predictions on the images that it was tested on, read from its folder."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from embedder.columns import TEST
from embedder.errors import ModelError, RequestError
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

    @property
    def tuning(self) -> dict[str, Any]:
        """What `metrics.json` says of the fine-tuning; empty for a head on frozen features."""
        return dict(self.metrics.get("tuning") or {})

    @property
    def seconds(self) -> float:
        """Of training: of all steps but the features of a frozen backbone."""
        return float(sum(self.metrics["seconds"].values()))


def read_tested(path: str | os.PathLike[str]) -> TestedModel:
    """Read what a model predicted for the images that it was tested on.

    Raises:
        ModelError: The folder holds no model, or one that was not tested on images of its own.
    """
    folder = ModelFolder(path)
    table = folder.read_predictions("sha256", "label", "part", "predicted")
    metrics, (said, _) = folder.read_metrics(), folder.read_description()
    table = table.filter(pc.equal(table["part"], TEST))
    if not table.num_rows:
        raise ModelError(
            f"A model must have been tested on images that it was not trained on. Received: "
            f"{folder.path}, trained with cross-validation; train it with --split 0.2 or official "
            f"lists"
        )
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    tuning = metrics.get("tuning")
    return TestedModel(
        path=folder.path,
        kind=tuning["strategy"] if tuning else f"frozen + {said.head.kind}",
        ids=columns["image_id"],
        sha256=columns["sha256"],
        is_right=columns["label"] == columns["predicted"],
        metrics=metrics,
    )


def check_same_images(ours: TestedModel, theirs: TestedModel) -> None:
    """Refuse models that were not tested on the same bytes.

    Raises:
        RequestError: They were not.
    """
    if ours.ids.tolist() != theirs.ids.tolist() or ours.sha256.tolist() != theirs.sha256.tolist():
        common = len(set(ours.ids) & set(theirs.ids))
        raise RequestError(
            f"Models must be tested on the same images to be compared. Received: {ours.path} on "
            f"{len(ours.ids):,} and {theirs.path} on {len(theirs.ids):,} images, of which "
            f"{common:,} have the same id"
        )
