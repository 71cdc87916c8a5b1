"""Feature-embedding batch extraction: images in, a feature store out."""

from typing import TYPE_CHECKING

from embedder.errors import EmbedderError
from embedder.extract import extract
from embedder.store import Store

if TYPE_CHECKING:
    from embedder.heads import Head

__all__ = ["EmbedderError", "Store", "extract", "train"]


def train(store: Store, labels: str = "folder") -> "Head":
    """Train a linear probe on a store's features; see `embedder.heads.train`."""
    # Extraction needs no scikit-learn, whose import takes half a second on every worker.
    from embedder import heads

    return heads.train(store, labels)
