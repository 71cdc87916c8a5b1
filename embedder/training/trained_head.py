"""A trained head: what it was trained and tested on, what that says of it, and its files."""

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedder.datasets import TrainingSet, make_split
from embedder.errors import ModelError, RequestError
from embedder.evaluation import Evaluation, Scores, paired_difference
from embedder.files import os_errors_as, whole_folder
from embedder.heads import BACKBONE_FILES, Model, ModelFolder
from embedder.store import Store
from embedder.training.cross_validation import judge, refit
from embedder.training.fitting import Fitted, HeadSpec, explain_fit_errors
from embedder.training.options import TrainOptions
from embedder.training.out_of_core import read_features
from embedder.training.semi_supervised import SemiSupervisedFit

_CURVE = (1, 2, 5, 10, 20, 50, 100)  # labels per class of the learning curve


@dataclass(frozen=True)
class TrainedHead:
    """A trained model, with what it was trained and tested on.

    Attributes:
        model: Trained on all images that were not tested on; with `kfold:K`, on all.
        store: The features.
        options: As it was asked for.
        images: What it was trained and tested on.
        fitted: The model's estimator, and how its settings were chosen.
        test: What was predicted for the images tested on.
        is_out_of_core: Whether it was trained a few shards at a time, its features never all in
            memory.
        coarse_of: (n_classes,) the coarse class of each class, as a number, if `coarse` is given.
        seconds: What took how long.
        semi_supervised: What unlabelled images did, if there were any.
        supervised_test: What the head without them predicts for the images tested on.
        pseudo_labels: Of images without labels that it learned from, as in `SemiSupervisedFit`.
        tuning: How its backbone was fine-tuned, as in `metrics.json`; None of a frozen one.
    """

    model: Model
    store: Store
    options: TrainOptions
    images: TrainingSet
    fitted: Fitted
    test: Evaluation
    is_out_of_core: bool = False
    coarse_of: NDArray[np.int64] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    semi_supervised: SemiSupervisedFit | None = None
    supervised_test: Evaluation | None = None
    pseudo_labels: pa.Table | None = None
    tuning: dict[str, Any] | None = None

    def __repr__(self) -> str:
        """Head, classes, and how good it is."""
        found = self.test.scores["accuracy"]
        return (
            f"<TrainedHead {self.model.head}: {len(self.model.classes):,} classes, "
            f"accuracy {found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})>"
        )

    @property
    def estimator(self) -> Any:
        """The fitted scikit-learn estimator."""
        return self.model.estimator

    @property
    def spec(self) -> HeadSpec:
        """What kind of head it is."""
        return HeadSpec(self.model.head, self.options.class_weight, self.options.seed)

    @property
    def can_refit(self) -> bool:
        """Whether heads of its kind can be trained on other images: their features are at hand."""
        return self.images.features is not None

    def evaluate(self) -> Scores:
        """Metrics on the images that were not trained on, with 95 % intervals.

        Returns:
            As `evaluation.metrics.scores`, or if multi-label, `multilabel_scores` there.
        """
        return self.test.scores

    def features_of(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Features (m, dim) of a few images, their indices rising, as they are."""
        if self.images.features is None:
            return read_features(self.store, self.model.column, self.images.rows[indices])
        return self.images.unaugmented[indices]

    def leak(self) -> dict[str, Any]:
        """Find out what near-duplicates across the split would do, or do, to the accuracy.

        Heads are trained for it, where the features are in memory.

        Returns:
            `num_groups` of two or more near-duplicates, the `num_images` in them, and the size of
            the `largest`. With a split of our own: `naive`, the accuracy of the same head on a
            split that takes no care. With an official split, which is left as it is:
            `num_straddling`, test images with a near-duplicate among the training images, and
            `without_them`, the accuracy on the others. Accuracies are as in `evaluate`.
        """
        images, split = self.images, self.images.split
        _, group, counts = np.unique(images.groups, return_inverse=True, return_counts=True)
        is_grouped = counts[group] > 1
        found: dict[str, Any] = {
            "num_groups": int((counts > 1).sum()),
            "num_images": int(is_grouped.sum()),
            "largest": int(counts.max()),
        }
        if not is_grouped.any():
            return found
        if split.is_official:
            trained = np.unique(group[split.folds[0][0]])
            straddles = np.isin(group[split.tested_on], trained)
            found["num_straddling"] = int(straddles.sum())
            if 0 < straddles.sum() < len(straddles):
                found["without_them"] = self.test.rows(~straddles).scores["accuracy"]
        elif self.can_refit:
            alone = replace(images, groups=np.arange(len(group)))
            naive = make_split(self.options.split, self.store, alone, self.options.seed)
            test = judge(self.spec, replace(images, split=naive), self.model, is_refitted=True)
            found["naive"] = test.scores["accuracy"]
        return found

    def learning_curve(self) -> list[dict[str, float]]:
        """Train heads for the accuracy against the number of training images of each class.

        Returns:
            `labels_per_class`, `accuracy`, `low`, `high` of heads with the settings chosen, each
            trained on so many images of each class, or on all that the class has. A head that
            cannot be trained on so few has no such point. Empty if multi-label, of
            `kfold:K`, and where features are not in memory.
        """
        images = self.images
        if images.is_multilabel or len(images.split.folds) > 1 or not self.can_refit:
            return []
        order = np.random.default_rng(self.options.seed).permutation(images.split.trained_on)
        codes = images.codes[order]
        rank = np.zeros(len(order), np.int64)
        for code in np.unique(codes):
            rank[codes == code] = np.arange((codes == code).sum())
        largest = int(rank.max()) + 1
        curve = []
        for size in [*(size for size in _CURVE if size < largest), largest]:
            indices = np.sort(order[rank < size])
            try:
                evaluation = self._refitted(indices) if size < largest else self.test
            except RequestError:  # so few images are not enough for this head
                continue
            found = evaluation.scores["accuracy"]
            point = {"labels_per_class": size, "accuracy": found["value"]}
            curve.append(point | {"low": found["low"], "high": found["high"]})
        return curve

    def _refitted(self, indices: NDArray[np.int64]) -> Evaluation:
        with warnings.catch_warnings():
            # scikit-learn takes one image a class for a regression.
            warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
            model = refit(self.spec, self.images, self.model, indices)
        with explain_fit_errors(self.spec.kind, len(indices)):  # more neighbours than images
            return Evaluation.of(model, self.images, self.images.split.tested_on)

    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` holds; heads are trained for some of it."""
        found = self.test.metrics(self.coarse_of)
        found |= {"near_duplicates": self.leak(), "selection": self.fitted.trials}
        if self.semi_supervised is not None:
            found["unlabelled"] = self.semi_supervised_metrics()
        if self.tuning is not None:
            found["tuning"] = self.tuning
        return found | {"learning_curve": self.learning_curve(), "seconds": self.seconds}

    def semi_supervised_metrics(self) -> dict[str, Any]:
        """What unlabelled images did: rounds, the guard's verdict, and accuracy with and without.

        Raises:
            RequestError: The head was trained without any.
        """
        if self.semi_supervised is None or self.supervised_test is None:
            raise RequestError("The head was trained without unlabelled images")
        training = self.semi_supervised.training
        return {
            "method": self.options.unlabelled_method,
            **self.semi_supervised.facts(),
            "rounds": [asdict(judged) for judged in training.rounds],
            "kept_round": training.kept_round,
            "is_rolled_back": training.is_rolled_back,
            "accuracy_without": self.supervised_test.scores["accuracy"],
            "accuracy_with": self.test.scores["accuracy"],
            "gain": paired_difference(self.test.is_right, self.supervised_test.is_right),
        }

    def save(
        self,
        folder: str | os.PathLike[str],
        write_more: Callable[[Path, dict[str, Any]], None] = lambda *_: None,
        backbone: Path | None = None,
    ) -> dict[str, Any]:
        """Write the model, its metrics, and what it predicted for each image it was tested on.

        All of it is in a folder of its own before that takes the place of an older model, which is
        whole until then.

        Args:
            folder: Where the model will be.
            write_more: Called with the folder that is yet to take its place, and the metrics, such
                as for a report.
            backbone: Weights that the model is to hold, as its recipe says; where they are in the
                folder already, they stay.

        Returns:
            The metrics, which take a while to compute.

        Raises:
            ModelError: The folder holds something else, or cannot be written.
        """
        path = ModelFolder(folder).path
        ModelFolder(folder).check_free()
        metrics = self.metrics()
        source = Path(self.model.recipe.weights_source)
        if source.name in BACKBONE_FILES and source.parent == path.absolute():
            backbone = backbone or source
        unwritable = os_errors_as(ModelError, f"The model {path} cannot be written")
        with unwritable, whole_folder(path) as new:
            if backbone is not None:
                _link(backbone, new / backbone.name)
            files = ModelFolder(new)
            files.write_tables(self.predictions(), self.pseudo_labels)
            files.write_metrics(metrics)
            self.model.save(new, path)
            write_more(new, metrics)
        return metrics

    def predictions(self) -> pa.Table:
        """One row for each labelled image: what it was for, and what was predicted for it.

        Returns:
            Table of `image_id`, `sha256`, `label`, `part` (train, validation, test,
            cross-validated, or nothing), `group` of near-duplicates, and, of those tested on,
            `predicted` and its `probability`.
        """
        images, num_images = self.images, len(self.images.ids)
        predicted, probability = np.full(num_images, None), np.full(num_images, None)
        predicted[images.split.tested_on] = self.test.predicted_texts
        probability[images.split.tested_on] = self.test.calibrated.max(axis=1)
        return pa.table(
            {
                "image_id": pa.array(images.ids, pa.string()),
                "sha256": pa.array(images.sha256, pa.string()),
                "label": pa.array(images.texts().tolist(), pa.string()),
                "part": pa.array(images.parts.tolist(), pa.string()),
                "group": pa.array(images.groups, pa.int64()),
                "predicted": pa.array(predicted, pa.string()),
                "probability": pa.array(probability, pa.float64()),
            }
        )


def _link(file: Path, place: Path) -> None:
    """Have a file at a second place, without its bytes where the file system can."""
    try:
        place.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, place)
