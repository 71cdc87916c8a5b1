"""OpenVINO's form of a recipe's model, exported once and kept in the cache folder."""

import hashlib
import importlib.metadata
import importlib.util
import json
import threading
from pathlib import Path

from embedder import backbones
from embedder.engines.own_process import call_apart, claim_process
from embedder.errors import EngineError
from embedder.files import whole_folder
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
    # Keras exports for OpenVINO by way of TensorFlow's graphs.
    if importlib.util.find_spec("tensorflow") is None:
        raise EngineError(
            f"`engine` openvino needs TensorFlow to export {recipe.backbone}, and it is not "
            f"installed. Install it, or take `--engine jax`"
        )
    if claim_process("tensorflow"):
        _export_here(recipe, folder)
    else:
        call_apart("tensorflow", _export_here, recipe, folder)


def _export_here(recipe: Recipe, folder: Path) -> None:
    import_openvino()
    # OpenVINO chooses the precision when it compiles: one export serves all.
    model = backbones.build(recipe.model_copy(update={"precision": "float32"}))
    try:
        with whole_folder(folder) as new:
            model.export(str(new / "model.xml"), format="openvino", verbose=False)
            (new / _CHECKSUM_FILE).write_text(_checksum(new))
    except OSError as error:
        if not _is_intact(folder):  # another process may have been faster
            raise EngineError(
                f"The cache folder {folder.parent} cannot be written: {error}. "
                f"Set EMBEDDER_CACHE to a folder that can"
            ) from error
