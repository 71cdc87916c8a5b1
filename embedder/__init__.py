"""Feature-embedding batch extraction: images in, a feature store out."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from embedder.errors import EmbedderError, RecipeError
from embedder.extraction import extract
from embedder.store import Store

if TYPE_CHECKING:
    from embedder.training import TrainedHead

__all__ = ["EmbedderError", "Store", "extract", "train"]


def train(
    store: Store, labels: str = "folder", head: str = "logistic", **options: Any
) -> "TrainedHead":
    """Train a head on a store's features, and test it on images it has not seen.

    Args:
        store: Features.
        labels: `folder`, `parent`, `FILE.csv:COLUMN`, `LIST.txt:NUMBER` or `column:NAME`; see
            `datasets.read_training_set`.
        head: `logistic`, `svm`, `ridge`, `lda`, `knn`, `centroid`, `linear` or `mlp`.
        **options: Attributes of `training.TrainOptions`, first of all `split`.

    Raises:
        EmbedderError: As in `heads.train`; also where an option is unknown.
    """
    # Extraction needs no scikit-learn, whose import takes half a second on every worker.
    from embedder.training import TrainOptions, train as train_head

    known = [field.name for field in fields(TrainOptions)]
    if unknown := options.keys() - set(known):
        raise RecipeError(
            f"Unknown option: {', '.join(sorted(unknown))}. There are: {', '.join(known)}"
        )
    return train_head(store, labels, head, TrainOptions(**options))
