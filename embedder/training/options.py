"""How a head is trained."""

from typing import Annotated, Literal

from pydantic import Field

from embedder.neighbours import DEFAULT_THRESHOLD
from embedder.options import Name, checked

# Rows of `heads.HEADS`, which takes scikit-learn's import to look at.
HeadName = Literal["logistic", "svm", "ridge", "lda", "knn", "centroid", "linear", "mlp"]
UnlabelledMethod = Literal["self-training", "label-spreading"]
ClassWeight = Annotated[
    Literal["balanced"] | None,
    Field(description="balanced: rare classes count as much as frequent ones."),
]
Seed = Annotated[int, Field(ge=0, description="Of all that is random.")]


@checked
class TrainOptions:
    """How a head is trained and judged."""

    split: Annotated[
        Name,
        Field(
            description="Share to test on, kfold:K, a folder with train.txt, test.txt (and "
            "val.txt), FILE.csv:COLUMN or column:NAME."
        ),
    ] = "0.2"
    duplicates: Annotated[
        float | None,
        Field(
            gt=0.0,
            le=1.0,
            description="Cosine from which two images count as near-duplicates, which never stand "
            "on both sides of a split; none takes every image for itself.",
        ),
    ] = DEFAULT_THRESHOLD
    class_weight: ClassWeight = None
    separator: Annotated[
        str | None, Field(description="What separates several labels of one image, such as ;")
    ] = None
    column: Annotated[str | None, Field(description="Which feature, of several.")] = None
    coarse: Annotated[
        Name | None,
        Field(description="Labels of a coarser level, spelled as labels, to score on both levels."),
    ] = None
    unlabelled: Annotated[
        Name | None, Field(description="A store whose images help without labels.")
    ] = None
    unlabelled_method: Annotated[UnlabelledMethod, Field(description="How they help.")] = (
        "self-training"
    )
    seed: Seed = 0


@checked
class SelfTrainOptions:
    """How pseudo-labels are chosen."""

    method: Annotated[
        UnlabelledMethod,
        Field(
            description="self-training in rounds, or label-spreading over a graph of nearest "
            "neighbours (Zhou et al., NIPS 2003), which gives pseudo-labels for one refit."
        ),
    ] = "self-training"
    num_rounds: Annotated[int, Field(ge=1, description="Of self-training.")] = 5
    growth: Annotated[
        float,
        Field(
            gt=0.0,
            description="In round r a class gets at most growth**r pseudo-labels for each of its "
            "labels.",
        ),
    ] = 2.0
    precision: Annotated[
        float,
        Field(
            gt=0.0,
            le=1.0,
            description="Share of right labels that the threshold aims at: the lowest confidence "
            "above which held-out labelled rows are predicted so well in round 0. Classes of one "
            "label cannot be held out; where all are such, the threshold is 0.",
        ),
    ] = 0.95
    threshold: Annotated[
        float | None, Field(ge=0.0, le=1.0, description="Confidence, instead of a calibrated one.")
    ] = None
    seed: Seed = 0
