"""The demo: 2,000 real photographs of woven textile, in three classes, from a package."""

import importlib.util
from pathlib import Path

from embedder.errors import SourceError
from embedder.store.store import Store

_PACKAGE = "conformal_clip_data"
_FOLDER = "data/textile_images/simulated"


def images_folder() -> Path:
    """Where the demo images are.

    Raises:
        SourceError: Their package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(
            "The demo images are not installed. Install them with: pip install 'embedder[demo]'"
        )
    return Path(spec.submodule_search_locations[0]) / _FOLDER


def linear_probe(store: Store) -> dict[str, dict[str, float]]:
    """How well a logistic regression tells the demo's classes apart; see `Head.evaluate`."""
    # scikit-learn takes half a second to import, which no other command is to pay.
    from embedder.training.train import train

    return train(store).evaluate()
