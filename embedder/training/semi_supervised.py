"""Unlabelled images for a head: which rows they are, and what they add to it."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sklearn.utils.validation import has_fit_parameter

from embedder.datasets import Indices, TrainingSet, grouped_folds
from embedder.errors import RequestError
from embedder.evaluation import expand_logits
from embedder.heads import HEADS, Model, fit_temperature, logits_of, probabilities_of
from embedder.store import Store
from embedder.training.fitting import Fitted, HeadSpec
from embedder.training.options import SelfTrainOptions, UnlabelledMethod
from embedder.training.self_training import SelfTraining, self_train

_NUM_FOLDS = 3  # of the labelled rows, to calibrate the head that pseudo-labels were added to


@dataclass(frozen=True)
class Unlabelled:
    """Images without a label.

    Attributes:
        ids: (n,) str.
        sha256: (n,) str, of their bytes.
        features: float32 (n, dim), of the images as they are.
    """

    ids: NDArray[np.object_]
    sha256: NDArray[np.object_]
    features: NDArray[np.float32]


@dataclass(frozen=True)
class SemiSupervisedFit:
    """A head that learned from unlabelled images too, or did not, if that would have hurt.

    Attributes:
        fitted: The head.
        training: What happened.
        images: Those it had to learn from.
    """

    fitted: Fitted
    training: SelfTraining
    images: Unlabelled

    def facts(self) -> dict[str, Any]:
        """What `metrics.json` says of it, for a frozen backbone and for a tuned one."""
        return {
            "num_images": len(self.images.ids),
            "num_pseudo_labels": len(self.training.pseudo_labels.rows),
            "threshold": min(self.training.threshold, 1.0),
            "verdict": str(self.training),
        }

    def pseudo_labels(self) -> pa.Table:
        """Each pseudo-label: `image_id`, `sha256`, `label`, `confidence` and `round`."""
        pseudo = self.training.pseudo_labels
        return pa.table(
            {
                "image_id": pa.array(self.images.ids[pseudo.rows], pa.string()),
                "sha256": pa.array(self.images.sha256[pseudo.rows], pa.string()),
                "label": pa.array(pseudo.labels.tolist(), pa.string()),
                "confidence": pa.array(pseudo.confidence, pa.float64()),
                "round": pa.array(pseudo.rounds, pa.int64()),
            }
        )


def check_head(head: str, is_multilabel: bool) -> None:
    """Refuse a head that cannot learn from pseudo-labels.

    Raises:
        RequestError: It knows no weights, or labels are multi-label.
    """
    able = [
        name for name, row in HEADS.items() if has_fit_parameter(row.classifier, "sample_weight")
    ]
    if head not in able or is_multilabel:
        raise RequestError(
            f"Unlabelled images need one of the heads {', '.join(able)}, and labelled images of "
            f"one label each. Received: head={head!r}"
        )


def read_unlabelled(path: str, model: Model, labelled: set[str]) -> Unlabelled:
    """The images of a store, but for those whose bytes are of a labelled image.

    Args:
        path: Folder of the store, which may be the one with the labelled images.
        model: Whose features they are to be.
        labelled: Checksums of all labelled images, tested on or not.

    Raises:
        RecipeMismatch: The store's features are of another recipe than the model's.
        RequestError: No image is left.
    """
    store = Store(path)
    model.check_recipe(store.recipe, f"the store {path}")
    ids, sha256 = store.texts("image_id", "sha256")
    is_new = np.array([checksum not in labelled for checksum in sha256], dtype=bool)
    if not is_new.any():
        raise RequestError(
            f"A store of unlabelled images must hold some that are not among the labelled ones. "
            f"Received: {path}, of {len(sha256):,} images"
        )
    features = store.vectors(model.column)[is_new].astype(np.float32)
    return Unlabelled(ids[is_new], sha256[is_new], features)


def fit_semi_supervised(
    spec: HeadSpec,
    images: TrainingSet,
    indices: Indices,
    fitted: Fitted,
    unlabelled: Unlabelled,
    method: UnlabelledMethod,
) -> SemiSupervisedFit:
    """Add pseudo-labels of unlabelled images to a head, as far as they help.

    Whether they help is judged by labelled images that the judged heads have not seen, each fifth
    in turn; see `self_training.self_train`.

    Args:
        spec: What kind of head.
        images: With labels, their features in memory.
        indices: Of those to train on.
        fitted: The head on these alone.
        unlabelled: Without labels.
        method: `self-training` or `label-spreading`.

    Raises:
        RequestError: No class has two labels.
    """
    features, labels = images.unaugmented[indices], images.classes[images.codes[indices]]
    options = SelfTrainOptions(method=method, seed=spec.seed)
    fit = partial(_fit, spec, fitted)
    training = self_train(fit, features, labels, unlabelled.features, options=options)
    if training.kept_round > 0:
        classifier = cast(_Calibrated, training.classifier)
        pseudo = training.pseudo_labels
        extra = unlabelled.features[pseudo.rows]
        fitted = replace(
            fitted,
            estimator=classifier.estimator,
            temperature=_temperature(spec, images, indices, fitted, extra, pseudo.labels),
        )
    return SemiSupervisedFit(fitted, training, unlabelled)


@dataclass(frozen=True)
class _Calibrated:
    """What `self_train` wants of a classifier."""

    estimator: Any
    temperature: float

    @property
    def classes_(self) -> NDArray[np.str_]:
        return np.asarray(self.estimator.classes_)

    def probabilities(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        return probabilities_of(logits_of(self.estimator, features), self.temperature, False)


def _fit(spec: HeadSpec, fitted: Fitted, features: Any, names: Any, weights: Any) -> _Calibrated:
    pipeline = spec.estimator(fitted.settings)
    last, _ = pipeline.steps[-1]
    pipeline.fit(features, names, **{f"{last}__sample_weight": weights})
    return _Calibrated(pipeline, fitted.temperature)


def _temperature(
    spec: HeadSpec,
    images: TrainingSet,
    indices: Indices,
    fitted: Fitted,
    extra: NDArray[np.float32],
    pseudo_labels: NDArray[np.str_],
) -> float:
    """The temperature of a head with the pseudo-labels, from labelled images it has not seen."""
    logits, codes, groups = [], images.codes[indices], images.groups[indices]
    folds = grouped_folds(codes, groups, _NUM_FOLDS, spec.seed)
    for train, test in folds:
        features = np.concatenate([images.unaugmented[indices[train]], extra])
        names = np.concatenate([images.classes[codes[train]], pseudo_labels])
        classifier = _fit(spec, fitted, features, names, None)
        known = np.searchsorted(images.classes, classifier.classes_)
        held = logits_of(classifier.estimator, images.unaugmented[indices[test]])
        logits.append(expand_logits(held, known, len(images.classes)))
    held_codes = codes[np.concatenate([test for _, test in folds])]
    return fit_temperature(np.concatenate(logits), held_codes)
