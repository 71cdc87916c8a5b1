"""Feature-embedding batch extraction: images in, a feature store out."""

from embedder.errors import EmbedderError
from embedder.extract import extract
from embedder.store import Store

__all__ = ["EmbedderError", "Store", "extract"]
