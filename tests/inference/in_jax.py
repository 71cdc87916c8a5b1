"""What the tests ask of export in a process in which Keras runs on JAX."""

import sys
from pathlib import Path

from embedder.errors import EngineError
from embedder.inference.export import export
from embedder.inference.formats import FORMATS


def export_all(model: Path, folder: Path) -> dict[str, str | dict[str, float]]:
    """Export to each format: by its name, the differences from `predict`, or the error."""
    found: dict[str, str | dict[str, float]] = {}
    for name in FORMATS:
        try:
            found[name] = export(model, folder / name, name, num_images=2).differences
        except EngineError as error:
            found[name] = str(error)
    assert sys.modules["keras"].config.backend() == "jax"
    return found
