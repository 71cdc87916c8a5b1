"""Heavy libraries, imported where they are first needed, and the package's logger."""

import importlib.metadata
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from embedder import __version__
from embedder.errors import EngineError

logger = logging.getLogger("embedder")
# What `pip install` knows this package by; PyPI has an unrelated project `embedder`.
DISTRIBUTION = "image-embedder"


def import_keras() -> Any:
    """Import Keras on its backend in this process, without chatter on standard error.

    Where nothing has been chosen that is TensorFlow, or JAX where there is no TensorFlow.
    """
    with _keras_lock:
        if "keras" not in sys.modules and keras_backend() is None:
            has_tensorflow = importlib.util.find_spec("tensorflow") is not None
            claim_keras_backend("tensorflow" if has_tensorflow else "jax")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        runs_on_tensorflow = os.environ.get("KERAS_BACKEND") == "tensorflow"
        with silent_standard_error() if runs_on_tensorflow else nullcontext():
            import keras
        if _claimed:  # this process's own affair: its children may need another
            os.environ.pop("KERAS_BACKEND", None)
            _claimed.clear()

    return keras


@contextmanager
def silent_standard_error() -> Iterator[None]:
    """Discard what is written there as TensorFlow is imported, whatever the level of its log."""
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


def keras_backend() -> str | None:
    """What Keras runs on in this process, for good; None as long as nothing has been chosen."""
    with _keras_lock:
        config = getattr(sys.modules.get("keras"), "config", None)
        return config.backend() if config else os.environ.get("KERAS_BACKEND")


def claim_keras_backend(name: str) -> bool:
    """Have Keras run on `tensorflow` or `jax` in this process, unless it runs on another."""
    with _keras_lock:
        now = keras_backend()
        if now is None:
            os.environ["KERAS_BACKEND"] = name
            _claimed.append(name)
        return now in (None, name)


def choose_keras_backend(name: str) -> None:
    """Have Keras run on a backend in this process: `tensorflow` or `jax`.

    Raises:
        EngineError: It runs on another, or the backend is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise EngineError(f"This needs {name}, which is not installed: pip install {name}")
    if not claim_keras_backend(name):
        raise EngineError(
            f"Keras has one backend in a process, for good, and here it must be {name}. Received: "
            f"a process in which it runs on {keras_backend()}. Start another one; a worker of a "
            f"scheduler that has served another engine must be started again"
        )


@contextmanager
def children_with(variables: Mapping[str, str]) -> Iterator[None]:
    """Have processes that are started within begin with these environment variables.

    In the process itself it would be too late: it first imports what the user's script imports,
    which may be Keras.
    """
    with _keras_lock:  # nobody chooses a backend meanwhile
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


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
        "jax",
        "jaxlib",
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


_keras_lock = threading.RLock()
_claimed: list[str] = []  # what KERAS_BACKEND was set to, until Keras is imported
