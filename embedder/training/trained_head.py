"""A trained head: what it was trained and tested on, what that says of it, and its files."""

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embedder.datasets import (
    CROSS_VALIDATED,
    TEST,
    TRAIN,
    UNUSED,
    VALIDATION,
    Split,
    Targets,
    make_split,
)
from embedder.errors import ModelError, RecipeError
from embedder.evaluation import Evaluation, Scores, paired_difference
from embedder.files import is_temporary, local_path, whole_folder
from embedder.heads import (
    BACKBONE_FILES,
    METRICS_FILE,
    MODEL_FILE,
    PREDICTIONS_FILE,
    PSEUDO_LABELS_FILE,
    REPORT_FILE,
    Model,
)
from embedder.neighbours import DEFAULT_THRESHOLD
from embedder.store import Store
from embedder.training.cross_validation import judge, metrics_of, refit
from embedder.training.fitting import Fitted, Task, explain_fit_errors
from embedder.training.out_of_core import read_features
from embedder.training.semi_supervised import SemiSupervisedFit

_FILES = {MODEL_FILE, METRICS_FILE, REPORT_FILE, PREDICTIONS_FILE, PSEUDO_LABELS_FILE}
_FILES |= {"head.skops", "head.keras", *BACKBONE_FILES}
_CURVE = (1, 2, 5, 10, 20, 50, 100)  # labels per class of the learning curve


@dataclass(frozen=True)
class TrainOptions:
    """How a head is trained and judged.

    Attributes:
        split: As in `datasets.make_split`.
        duplicates: Cosine from which two images count as near-duplicates, which never stand on
            both sides of a split; None to take every image for itself.
        class_weight: None, or `balanced`: rare classes count as much as frequent ones.
        separator: What separates several labels of one image; None where each has one.
        column: Which feature, where the store has several.
        coarse: Labels of a coarser level, spelled as labels, for a score on both levels.
        unlabelled: Store whose images help without labels; None for none.
        unlabelled_method: `self-training` or `label-spreading`; see `self_training`.
        seed: Of all that is random.
    """

    split: str = "0.2"
    duplicates: float | None = DEFAULT_THRESHOLD
    class_weight: str | None = None
    separator: str | None = None
    column: str | None = None
    coarse: str | None = None
    unlabelled: str | None = None
    unlabelled_method: str = "self-training"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            RecipeError: A value makes no sense.
        """
        if self.duplicates is not None and not 0.0 < self.duplicates <= 1.0:
            raise RecipeError(
                f"`duplicates` must be a cosine above 0 and at most 1. "
                f"Received: duplicates={self.duplicates}"
            )
        if self.seed < 0:
            raise RecipeError(f"`seed` must be at least 0. Received: seed={self.seed}")
        if self.class_weight not in (None, "balanced"):
            raise RecipeError(
                f"`class_weight` must be balanced. Received: class_weight={self.class_weight!r}"
            )


class Stopwatch:
    """Times the steps of a training.

    Attributes:
        seconds: Of each step, by its name.
    """

    def __init__(self) -> None:
        """Start."""
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a step, and begin the next."""
        now = time.perf_counter()
        self.seconds[name], self._last = round(now - self._last, 3), now


@dataclass(frozen=True)
class TrainedHead:
    """A trained model, with what it was trained and tested on.

    Attributes:
        model: Trained on all rows that were not tested on; with `kfold:K`, on all rows.
        store: The features.
        options: How.
        targets: Labels of the labelled rows, of which there are n.
        ids: (n,) str, their images.
        task: What was learned: their features, codes and groups; of a store that was streamed,
            features (0, dim), as they were never all in memory.
        split: Which were trained on.
        fitted: The model's estimator, and how its settings were chosen.
        test_rows: Places of those tested on.
        test: What was predicted for them.
        coarse_of: (n_classes,) the coarse class of each class, as a number, if `coarse` is given.
        seconds: What took how long.
        helped: What unlabelled images did, if there were any.
        unhelped: What the head without them predicts for the test rows.
        pseudo_labels: Of images without labels that it learned from, as in `SemiSupervisedFit`.
        tuning: How its backbone was fine-tuned, as in `metrics.json`; None of a frozen one.
    """

    model: Model
    store: Store
    options: TrainOptions
    targets: Targets
    ids: NDArray[np.object_]
    task: Task
    split: Split
    fitted: Fitted
    test_rows: NDArray[np.int64]
    test: Evaluation
    coarse_of: NDArray[np.int64] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    helped: SemiSupervisedFit | None = None
    unhelped: Evaluation | None = None
    pseudo_labels: pa.Table | None = None
    tuning: dict[str, Any] | None = None

    @property
    def estimator(self) -> Any:
        """The fitted scikit-learn estimator."""
        return self.model.estimator

    def evaluate(self) -> Scores:
        """Metrics on the images that were not trained on, with 95 % intervals.

        Returns:
            As `evaluation.scores`, or with several labels an image, `evaluation.multilabel_scores`.
        """
        return self.test.scores

    @property
    def is_streamed(self) -> bool:
        """Whether features were read in parts, and `task` has none."""
        return len(self.task.features) == 0

    def features_of(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Features (m, dim) of a few labelled rows, rising, of the pictures as they are."""
        if self.is_streamed:
            return read_features(self.store, self.model.column, self.targets.rows[rows])
        return self.task.plain[rows]

    @property
    def parts(self) -> NDArray[np.str_]:
        """(n,) what each labelled row was for; see `splits`."""
        parts = np.full(len(self.ids), UNUSED, dtype="<U15")
        if len(self.split.folds) > 1:
            parts[:] = CROSS_VALIDATED
            return parts
        train, test = self.split.folds[0]
        parts[train], parts[self.split.validation], parts[test] = TRAIN, VALIDATION, TEST
        return parts

    @cached_property
    def leak(self) -> dict[str, Any]:
        """What near-duplicates across the split would do, or do, to the accuracy.

        Returns:
            `num_groups` of two or more near-duplicates, the `num_images` in them, and the size of
            the `largest`. With a split of our own: `naive`, the accuracy of the same head on a
            split that takes no care. With an official split, which is left as it is:
            `num_straddling`, test images with a near-duplicate among the training images, and
            `without_them`, the accuracy on the others. Accuracies are as in `evaluation.scores`.
        """
        _, group, counts = np.unique(self.task.groups, return_inverse=True, return_counts=True)
        is_grouped = counts[group] > 1
        found: dict[str, Any] = {
            "num_groups": int((counts > 1).sum()),
            "num_images": int(is_grouped.sum()),
            "largest": int(counts.max()),
        }
        if not is_grouped.any():
            return found
        if self.split.is_official:
            trained = np.unique(group[self.split.folds[0][0]])
            straddles = np.isin(group[self.test_rows], trained)
            found["num_straddling"] = int(straddles.sum())
            if 0 < straddles.sum() < len(straddles):
                found["without_them"] = self.test.rows(~straddles).scores["accuracy"]
            return found
        if self.is_streamed:  # no head can be fitted on another split
            return found
        everyone = np.arange(len(group))
        naive = make_split(
            self.options.split, self.store, self.ids, self.task.codes, everyone, self.task.seed
        )
        _, evaluation = judge(self.task, self.targets, naive, self.model, self.fitted)
        found["naive"] = evaluation.scores["accuracy"]
        return found

    @cached_property
    def learning_curve(self) -> list[dict[str, float]]:
        """Accuracy on the test rows against the number of training images of each class.

        Returns:
            `labels_per_class`, `accuracy`, `low`, `high` of heads with the settings chosen, each
            trained on so many images of each class, or on all that the class has. A head that
            cannot be trained on so few has no such point. None of several labels an image, of
            `kfold:K`, and of a store that was streamed.
        """
        if self.targets.is_multilabel or len(self.split.folds) > 1 or self.is_streamed:
            return []
        train = self.split.folds[0][0]
        order = np.random.default_rng(self.task.seed).permutation(train)
        codes = self.task.codes[order]
        rank = np.zeros(len(order), np.int64)
        for code in np.unique(codes):
            rank[codes == code] = np.arange((codes == code).sum())
        largest = int(rank.max()) + 1
        curve = []
        for size in [*(size for size in _CURVE if size < largest), largest]:
            rows = np.sort(order[rank < size])
            try:
                evaluation = self._refitted(rows) if size < largest else self.test
            except RecipeError:  # so few images are not enough for this head
                continue
            accuracy = evaluation.scores["accuracy"]
            curve.append(
                {
                    "labels_per_class": size,
                    "accuracy": accuracy["value"],
                    "low": accuracy["low"],
                    "high": accuracy["high"],
                }
            )
        return curve

    def _refitted(self, rows: NDArray[np.int64]) -> Evaluation:
        with warnings.catch_warnings():
            # scikit-learn takes one image a class for a regression.
            warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
            model = refit(self.task, self.model, self.targets, rows)
        features = self.task.plain[self.test_rows]
        with explain_fit_errors(self.task, len(rows)):  # such as more neighbours than images
            return Evaluation.of(model, features, self.targets, self.test_rows)

    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        return {
            **metrics_of(self.test, self.coarse_of),
            "near_duplicates": self.leak,
            "selection": self.fitted.trials,
            **({} if self.helped is None else {"unlabelled": self.help()}),
            **({} if self.tuning is None else {"tuning": self.tuning}),
            "learning_curve": self.learning_curve,
            "seconds": self.seconds,
        }

    def help(self) -> dict[str, Any]:
        """What unlabelled images did: rounds, the guard's verdict, and accuracy with and without.

        Raises:
            RecipeError: The head was trained without any.
        """
        if self.helped is None or self.unhelped is None:
            raise RecipeError("The head was trained without unlabelled images")
        training = self.helped.training
        return {
            "method": self.options.unlabelled_method,
            "num_images": len(self.helped.images.ids),
            "threshold": min(training.threshold, 1.0),
            "num_pseudo_labels": len(training.pseudo_labels.rows),
            "rounds": [asdict(judged) for judged in training.rounds],
            "kept_round": training.kept_round,
            "is_rolled_back": training.is_rolled_back,
            "verdict": str(training),
            "accuracy_without": self.unhelped.scores["accuracy"],
            "accuracy_with": self.test.scores["accuracy"],
            "gain": paired_difference(self.test.is_right, self.unhelped.is_right),
        }

    def save(
        self,
        folder: str | os.PathLike[str],
        write_more: Callable[[Path], None] = lambda _: None,
        backbone: Path | None = None,
    ) -> dict[str, Any]:
        """Write the model, its metrics, and what it predicted for each image it was tested on.

        All of it is in a folder of its own before that takes the place of an older model, which is
        whole until then.

        Args:
            folder: Where the model will be.
            write_more: Called with the folder that is yet to take its place, such as for a report.
            backbone: Weights that the model is to hold, as its recipe says; where they are in the
                folder already, they stay.

        Returns:
            The metrics, which take a while to compute.

        Raises:
            ModelError: The folder holds something else, or cannot be written.
        """
        path = local_path(folder)
        check_model_folder(path)
        metrics = self.metrics()
        source = Path(self.model.recipe.weights_source)
        if source.name in BACKBONE_FILES and source.parent == path.absolute():
            backbone = backbone or source
        try:
            with whole_folder(path) as new:
                if backbone is not None:
                    _link(backbone, new / backbone.name)
                self.model.save(new, path)
                pq.write_table(self.predictions(), new / PREDICTIONS_FILE)
                if self.pseudo_labels is not None:
                    pq.write_table(self.pseudo_labels, new / PSEUDO_LABELS_FILE)
                (new / METRICS_FILE).write_text(json.dumps(metrics, indent=2))
                write_more(new)
        except OSError as error:
            raise ModelError(
                f"The model {path} cannot be written: {error.strerror or error}"
            ) from error
        return metrics

    def predictions(self) -> pa.Table:
        """One row for each labelled image: what it was for, and what was predicted for it.

        Returns:
            Table of `image_id`, `sha256`, `label`, `part` (train, validation, test,
            cross-validated, or nothing), `group` of near-duplicates, and, of those tested on,
            `predicted` and its `probability`.
        """
        predicted: list[str | None] = [None] * len(self.ids)
        probability: list[float | None] = [None] * len(self.ids)
        names, probabilities = self.test.predicted_texts, self.test.calibrated.max(axis=1)
        for row, name, p in zip(self.test_rows, names, probabilities, strict=True):
            predicted[row], probability[row] = str(name), float(p)
        return pa.table(
            {
                "image_id": pa.array(self.ids, pa.string()),
                "sha256": self.store.sha256()[self.targets.rows],
                "label": pa.array(self.targets.texts().tolist(), pa.string()),
                "part": pa.array(self.parts.tolist(), pa.string()),
                "group": pa.array(self.task.groups, pa.int64()),
                "predicted": pa.array(predicted, pa.string()),
                "probability": pa.array(probability, pa.float64()),
            }
        )


def compare(ours: TrainedHead, theirs: TrainedHead) -> dict[str, float]:
    """Difference in accuracy on the same test images, with its 95 % interval.

    Raises:
        RecipeError: They were tested on other images.
    """
    if ours.ids[ours.test_rows].tolist() != theirs.ids[theirs.test_rows].tolist():
        raise RecipeError("Heads must be tested on the same images to be compared")
    return paired_difference(ours.test.is_right, theirs.test.is_right)


def check_model_folder(path: Path) -> None:
    """Refuse a folder that holds anything but a model, or what is left of one.

    Raises:
        ModelError: It does.
    """
    held = [entry for entry in path.iterdir() if not is_temporary(entry)] if path.is_dir() else []
    if (path.exists() and not path.is_dir()) or not {entry.name for entry in held} <= _FILES:
        raise ModelError(
            f"A model must be written to an empty folder, over an older model, or to one that "
            f"does not exist. Received: {path}, which holds something else"
        )


def _link(file: Path, place: Path) -> None:
    """Have a file at a second place, without its bytes where the file system can."""
    try:
        place.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, place)
