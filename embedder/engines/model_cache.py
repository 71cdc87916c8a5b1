"""OpenVINO's form of a recipe's model, exported once and kept in the cache folder."""

import contextlib
import hashlib
import importlib.metadata
import json
import shutil
import tempfile
import threading
from pathlib import Path

from embedder import backbones
from embedder.errors import EngineError
from embedder.libraries import import_openvino
from embedder.machine import cache_folder
from embedder.recipe import Recipe


def exported_model(recipe: Recipe) -> Path:
    """OpenVINO's form of a recipe's model, made once and kept in the cache.

    Returns:
        Path of the `.xml` file, with its `.bin` beside it. Reading it needs no TensorFlow.
    """
    keras_version = importlib.metadata.version("keras")
    parts = [recipe.backbone, recipe.weights, recipe.layers, recipe.pooling, recipe.image_size]
    key = hashlib.sha256(json.dumps([recipe.version, *parts, keras_version]).encode())
    folder = cache_folder() / f"{recipe.label}-{key.hexdigest()[:16]}"
    if not _is_intact(folder):
        with _lock:
            if not _is_intact(folder):
                _export(recipe, folder)
    return folder / "model.xml"


_lock = threading.Lock()
_CHECKSUM_FILE = "model.sha256"


def _is_intact(folder: Path) -> bool:
    try:
        return (folder / _CHECKSUM_FILE).read_bytes() == _checksum(folder).encode()
    except OSError:
        return False


def _checksum(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("model.xml", "model.bin"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _export(recipe: Recipe, folder: Path) -> None:
    """Export into a temporary folder and rename it, so that a cached model is always whole."""
    import_openvino()
    # OpenVINO chooses the precision when it compiles: one export serves all.
    model = backbones.build(recipe.model_copy(update={"precision": "float32"}))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise EngineError(
            f"The cache folder {folder.parent} cannot be written: {error}. "
            f"Set EMBEDDER_CACHE to a folder that can"
        ) from error
    try:
        model.export(str(temporary / "model.xml"), format="openvino", verbose=False)
        (temporary / _CHECKSUM_FILE).write_text(_checksum(temporary))
        if folder.exists():  # a damaged one; another process may have mended it meanwhile
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if not _is_intact(folder):
        raise EngineError(f"The model could not be exported to {folder}")
