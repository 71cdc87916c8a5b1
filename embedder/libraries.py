"""Heavy libraries, imported where they are first needed, and the package's logger."""

import importlib.metadata
import logging
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from embedder import __version__

logger = logging.getLogger("embedder")
# What `pip install` knows this package by; PyPI has an unrelated project `embedder`.
DISTRIBUTION = "image-embedder"


def import_keras() -> Any:
    """Import Keras on TensorFlow, without TensorFlow's chatter on standard error."""
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _import_lock, _silent_standard_error():
        import keras

    return keras


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which would report every import over the network."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that decide a vector's last digits."""
    libraries = (
        "keras",
        "tensorflow",
        "tensorflow-cpu",
        "openvino",
        "pillow",
        "cykooz-resizer",
        "numpy",
        "pyarrow",
    )
    return {"embedder": __version__, **installed(libraries)}


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of packages, by name, without those that are not installed."""
    found = {}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


_import_lock = threading.Lock()


@contextmanager
def _silent_standard_error() -> Iterator[None]:
    """Discard what native code writes to standard error: the log level does not stop all of it."""
    if "tensorflow" in sys.modules:
        yield
        return
    kept = os.dup(2)
    discard = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(discard, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(discard)
