"""Run a recipe's model fast on this device.

Every engine runs the same Keras model, from uint8 pixels to float32 vectors, at a fixed batch
size: a new shape would cost a compilation, so a smaller last batch is padded by the caller.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import queue
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from embedder import backbones
from embedder.errors import EngineError
from embedder.recipe import Recipe

ENGINES = ("openvino", "tensorflow")
# Measured by `benchmarks/engines.py` for EfficientNet-Lite0 on two cores: 8 is the knee on CPU,
# where a larger batch no longer fits the caches.
_DEFAULT_BATCH_SIZE = {"openvino": 8, "tensorflow": 32}


class Engine(Protocol):
    """A compiled model.

    Attributes:
        name: One of `ENGINES`.
        device: Such as `CPU`.
        batch_size: Images in a call of `embed`.
        num_parallel: Calls of `embed` that may run at the same time, each in its own thread.
    """

    name: str
    device: str
    batch_size: int
    num_parallel: int

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed one batch: (batch_size, height, width, 3) to float32 (batch_size, dim)."""
        ...


def choose(name: str) -> str:
    """Resolve `auto`: TensorFlow where there is a GPU, OpenVINO elsewhere.

    Raises:
        EngineError: The name is not `auto` and not one of `ENGINES`.
    """
    if name == "auto":
        return "tensorflow" if _has_gpu() else "openvino"
    if name not in ENGINES:
        raise EngineError(f"`engine` must be auto or one of {', '.join(ENGINES)}. Received: {name}")
    return name


def load(recipe: Recipe, name: str, batch_size: int | None, num_threads: int) -> Engine:
    """Compile a recipe's model.

    Args:
        recipe: What to compute.
        name: One of `ENGINES`, or `auto`.
        batch_size: Images in a batch; None for the engine's own choice.
        num_threads: CPU threads to use.

    Raises:
        EngineError: The engine is unknown or cannot run here.
        WeightsError: The weights are missing or are not those of the recipe.
    """
    name = choose(name)
    engine = OpenVinoEngine if name == "openvino" else TensorFlowEngine
    return engine(recipe, batch_size or _DEFAULT_BATCH_SIZE[name], num_threads)


class OpenVinoEngine:
    """OpenVINO on CPU: as many streams as threads, each embedding a batch of its own."""

    name = "openvino"
    device = "CPU"

    def __init__(self, recipe: Recipe, batch_size: int, num_threads: int) -> None:
        """Compile for CPU, from the cached export where there is one."""
        self.batch_size = batch_size
        self.num_parallel = num_threads
        core = import_openvino().Core()
        model = core.read_model(exported_model(recipe))
        model.reshape([batch_size, *recipe.image_size, 3])
        compiled = core.compile_model(
            model,
            self.device,
            {
                "NUM_STREAMS": num_threads,
                "INFERENCE_NUM_THREADS": num_threads,
                "INFERENCE_PRECISION_HINT": "f32",
                # Decode threads share the cores; a pinned thread would wait for its own core.
                "ENABLE_CPU_PINNING": False,
            },
        )
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(num_threads):
            self._requests.put(compiled.create_infer_request())
        # The binding's first call sets up static data while it may lose the GIL: two threads that
        # make it together wait for each other for ever. So the first call is made here, alone.
        self.embed(np.zeros((batch_size, *recipe.image_size, 3), np.uint8))

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed one batch: (batch_size, height, width, 3) to float32 (batch_size, dim)."""
        request = self._requests.get()
        try:
            request.infer({"pixels": pixels}, share_inputs=True)
            vectors: NDArray[np.float32] = request.get_output_tensor(0).data.copy()
            return vectors
        finally:
            self._requests.put(request)


class TensorFlowEngine:
    """TensorFlow on GPU or CPU."""

    name = "tensorflow"
    num_parallel = 1  # TensorFlow spreads one batch over the device by itself

    def __init__(self, recipe: Recipe, batch_size: int, num_threads: int) -> None:
        """Build the model and trace it for one batch size."""
        backbones.import_keras()
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # already set, by an earlier engine
            tf.config.threading.set_intra_op_parallelism_threads(num_threads)
        self.batch_size = batch_size
        self.device = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
        model = backbones.build(recipe)
        signature = tf.TensorSpec((batch_size, *recipe.image_size, 3), tf.uint8)
        # XLA is ten times slower on CPU for depthwise convolutions, so never there.
        self._run = tf.function(
            lambda pixels: model(pixels, training=False)[backbones.EMBEDDING],
            input_signature=[signature],
            jit_compile=False,
        )

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed one batch: (batch_size, height, width, 3) to float32 (batch_size, dim)."""
        vectors: NDArray[np.float32] = self._run(pixels).numpy()
        return vectors


def exported_model(recipe: Recipe) -> Path:
    """OpenVINO's form of a recipe's model, made once and kept in the cache.

    Returns:
        Path of the `.xml` file, with its `.bin` beside it. Reading it needs no TensorFlow.
    """
    keras_version = importlib.metadata.version("keras")
    parts = [recipe.backbone, recipe.weights, recipe.pooling, recipe.image_size, keras_version]
    key = hashlib.sha256(json.dumps([recipe.version, *parts]).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{recipe.backbone}-{key}"
    if not _is_intact(folder):
        with _lock:
            if not _is_intact(folder):
                _export(recipe, folder)
    return folder / "model.xml"


def cache_folder() -> Path:
    """Where exported models are kept: `EMBEDDER_CACHE`, or the user's cache folder."""
    if chosen := os.environ.get("EMBEDDER_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "embedder"


_lock = threading.Lock()
_CHECKSUM_FILE = "model.sha256"


def _is_intact(folder: Path) -> bool:
    try:
        return (folder / _CHECKSUM_FILE).read_text() == _checksum(folder)
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
    model = backbones.build(recipe)
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


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which would report every import over the network."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _has_gpu() -> bool:
    """Whether an NVIDIA driver shows a device; asking TensorFlow would take seconds."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(Path("/proc/driver/nvidia/gpus").glob("*"))


def versions() -> dict[str, str]:
    """Versions of the libraries that decide a vector's last digits."""
    packages = ("embedder", "keras", "tensorflow", "openvino", "pillow", "numpy", "pyarrow")
    return dict(_installed(packages))


def _installed(packages: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)
