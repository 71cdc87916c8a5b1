"""The table of heads: for each kind, the estimator and the settings to choose from."""

from dataclasses import dataclass
from typing import Any

from sklearn.base import BaseEstimator, clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.svm import LinearSVC

from embedder.errors import RequestError
from embedder.heads.centroid_head import CentroidHead
from embedder.heads.keras_head import KerasHead
from embedder.heads.ridge_head import RidgeHead

_MIN_STEPS = 600  # of a Keras head: forty images are one batch, and thirty epochs too few
Settings = dict[str, Any]
_SCALINGS = {"standard": StandardScaler(), "l2": Normalizer()}


@dataclass(frozen=True)
class HeadKind:
    """One kind of head.

    Attributes:
        classifier: Unfitted, to be cloned.
        grid: Settings to choose from, parameters of the classifier; with one, there is nothing to
            choose. `scaling` says what is done to features before: `l2`, each divided by its
            Euclidean length, as if absent; or `standard`, each dimension brought to mean 0 and
            variance 1.
        can_multilabel: Whether it takes multi-label targets.
        is_one_vs_rest: Whether it does so by a classifier for each label.
    """

    classifier: BaseEstimator
    grid: tuple[Settings, ...] = ({},)
    can_multilabel: bool = False
    is_one_vs_rest: bool = False

    @property
    def can_balance(self) -> bool:
        """Whether it knows class weights."""
        return "class_weight" in self.classifier.get_params()


HEADS = {
    "logistic": HeadKind(
        LogisticRegression(max_iter=300, tol=1e-3),
        grid=(
            *({"scaling": "l2", "C": C} for C in (10.0, 30.0, 100.0)),
            *({"scaling": "standard", "C": C} for C in (0.01, 0.1)),
        ),
        can_multilabel=True,
        is_one_vs_rest=True,
    ),
    "svm": HeadKind(
        LinearSVC(),
        grid=tuple({"C": C} for C in (0.3, 1.0, 3.0)),
        can_multilabel=True,
        is_one_vs_rest=True,
    ),
    "ridge": HeadKind(
        RidgeHead(), grid=({"scaling": "l2"}, {"scaling": "standard"}), can_multilabel=True
    ),
    "lda": HeadKind(
        LinearDiscriminantAnalysis(solver="lsqr"),
        grid=tuple({"shrinkage": share} for share in (0.1, 0.2, 0.4, 0.6)),
    ),
    "knn": HeadKind(
        KNeighborsClassifier(weights="distance"),
        grid=tuple({"n_neighbors": k} for k in (1, 3, 5, 10, 20)),
    ),
    "centroid": HeadKind(CentroidHead()),
    "linear": HeadKind(KerasHead(hidden=(), min_steps=_MIN_STEPS), can_multilabel=True),
    "mlp": HeadKind(KerasHead(hidden=(256,), min_steps=_MIN_STEPS), can_multilabel=True),
}


def find_head(name: str, class_weight: str | None, is_multilabel: bool) -> HeadKind:
    """The row of `HEADS` by its name.

    Args:
        name: Of the row.
        class_weight: None, or `balanced`, which not every head can.
        is_multilabel: Whether an image can have several labels, which not every head can.

    Raises:
        RequestError: There is no such head, or it cannot do what is asked.
    """
    if name not in HEADS:
        raise RequestError(f"`head` must be one of {', '.join(HEADS)}. Received: head={name!r}")
    kind = HEADS[name]
    if class_weight is not None and not kind.can_balance:
        able = ", ".join(other for other, row in HEADS.items() if row.can_balance)
        raise RequestError(f"Class weights need one of the heads {able}. Received: head={name!r}")
    if is_multilabel and not kind.can_multilabel:
        able = ", ".join(other for other, row in HEADS.items() if row.can_multilabel)
        raise RequestError(
            f"Multi-label targets need one of the heads {able}. Received: head={name!r}"
        )
    return kind


def make_estimator(
    head: str, settings: Settings, class_weight: str | None, seed: int, is_multilabel: bool
) -> Any:
    """An unfitted estimator of features.

    Args:
        head: Its kind, a name of `HEADS`.
        settings: As in `HeadKind.grid`.
        class_weight: None or `balanced`.
        seed: Of what it draws.
        is_multilabel: Whether an image can have several labels (multi-label).
    """
    kind = HEADS[head]
    classifier = clone(kind.classifier)
    parameters = {name: value for name, value in settings.items() if name != "scaling"}
    own = {"class_weight": class_weight, "random_state": seed, "seed": seed}
    own = {name: value for name, value in own.items() if name in classifier.get_params()}
    classifier.set_params(**own, **parameters)
    if isinstance(classifier, KerasHead):
        return classifier  # scales features itself, within its network
    if is_multilabel and kind.is_one_vs_rest:
        classifier = OneVsRestClassifier(classifier)
    return make_pipeline(clone(_SCALINGS[settings.get("scaling", "l2")]), classifier)
