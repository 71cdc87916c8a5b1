"""Models side by side, on the images that all of them were tested on."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.stats import binomtest

from embedder.datasets.splits import TEST
from embedder.errors import ModelError, RecipeError
from embedder.evaluation.metrics import paired_difference
from embedder.files import local_path
from embedder.heads.model_folder import read_kind, read_metrics, read_table
from embedder.training.cross_validation import PREDICTIONS_FILE, columns_of

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Tested:
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
        return dict(self.metrics.get("tuning", {}))

    @property
    def seconds(self) -> float:
        """Of training: of all steps but the features of a frozen backbone."""
        return float(sum(self.metrics["seconds"].values()))


@dataclass(frozen=True)
class Against:
    """A model against another, on the same images.

    Attributes:
        gain: Difference in accuracy, `value`, `low` and `high` of the 95 % interval.
        num_better: Images that only the first has right.
        num_worse: Images that only the other has right.
        p_value: Of McNemar's exact test (McNemar 1947): how often two models that are equally good
            would differ so much.
        seconds: That the first took to train.
        is_tuned: Whether the first is the other, fine-tuned; else it is another model.
    """

    gain: dict[str, float]
    num_better: int
    num_worse: int
    p_value: float
    seconds: float
    is_tuned: bool

    @property
    def verdict(self) -> str:
        """Whether it paid, in words."""
        gain, low, high = (100 * self.gain[name] for name in ("value", "low", "high"))
        figures = f"{abs(gain):.1f} points [{low:.1f}, {high:.1f}] for {self.seconds:,.0f} s"
        what, other = ("fine-tuning", "the head") if self.is_tuned else ("it", "the first")
        if self.p_value >= SIGNIFICANT or low <= 0 <= high:
            change = f"{gain:+.1f} points [{low:.1f}, {high:.1f}]"
            return f"no gain beyond the interval, {change}: keep {other}"
        if gain > 0:
            return f"{what} gains {figures}: take it"
        return f"{what} loses {figures}: keep {other}"


def read_tested(path: str | os.PathLike[str]) -> Tested:
    """Read what a model predicted for the images that it was tested on.

    Raises:
        ModelError: The folder holds no model, or one that was not tested on images of its own.
    """
    folder = local_path(path)
    columns = columns_of("image_id", "sha256", "label", "part", "predicted")
    table = read_table(folder / PREDICTIONS_FILE, columns)
    metrics, head = read_metrics(folder), read_kind(folder)
    table = table.filter(pc.equal(table["part"], TEST)).sort_by("image_id")
    if not table.num_rows:
        raise ModelError(
            f"A model must have been tested on images that it was not trained on. Received: "
            f"{folder}, trained with cross-validation; train it with --split 0.2 or official lists"
        )
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    tuning = metrics.get("tuning")
    return Tested(
        path=folder,
        kind=tuning["strategy"] if tuning else f"frozen + {head}",
        ids=columns["image_id"],
        sha256=columns["sha256"],
        is_right=columns["label"] == columns["predicted"],
        metrics=metrics,
    )


def against(ours: Tested, theirs: Tested) -> Against:
    """Compare two models.

    Raises:
        RecipeError: They were not tested on the same images.
    """
    check_same_images(ours, theirs)
    return judge(ours.is_right, theirs.is_right, ours.seconds, bool(ours.tuning))


def check_same_images(ours: Tested, theirs: Tested) -> None:
    """Refuse models that were not tested on the same bytes.

    Raises:
        RecipeError: They were not.
    """
    if ours.ids.tolist() != theirs.ids.tolist() or ours.sha256.tolist() != theirs.sha256.tolist():
        common = len(set(ours.ids) & set(theirs.ids))
        raise RecipeError(
            f"Models must be tested on the same images to be compared. Received: {ours.path} on "
            f"{len(ours.ids):,} and {theirs.path} on {len(theirs.ids):,} images, of which "
            f"{common:,} have the same id"
        )


def judge(
    ours: NDArray[np.bool_], theirs: NDArray[np.bool_], seconds: float, is_tuned: bool = True
) -> Against:
    """Compare which of the same images, (n,), are right."""
    better, worse = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    p_value = binomtest(better, better + worse).pvalue if better + worse else 1.0
    gain = paired_difference(ours, theirs)
    return Against(gain, better, worse, float(p_value), seconds, is_tuned)


def compare(paths: Sequence[str | os.PathLike[str]]) -> list[tuple[Tested, Against | None]]:
    """Models side by side, each against the first.

    Raises:
        ModelError: One of them is no model, or was not tested on images of its own.
        RecipeError: They were not tested on the same images.
    """
    first, *others = (read_tested(path) for path in paths)
    return [(first, None), *((other, against(other, first)) for other in others)]


def row_of(tested: Tested, found: Against | None) -> dict[str, Any]:
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
