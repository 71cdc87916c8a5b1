"""Run a recipe's model fast on this device.

Every engine runs the same Keras model, from uint8 pixels to float32 vectors, at a fixed batch
size: a new shape would cost a compilation, so a smaller last batch is padded by the caller.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from embedder import backbones
from embedder.errors import EngineError, OutOfMemory
from embedder.libraries import import_keras, import_openvino, installed
from embedder.machine import cache_folder, gpus
from embedder.recipe import Recipe

ENGINES = ("openvino", "tensorflow")
# On a CPU, a larger batch no longer fits the caches, which decoding uses too.
_DEFAULT_BATCH_SIZE = {"openvino": 4, "tensorflow": 32}
_BATCH_SIZES = {"openvino": (2, 4, 8, 16, 32), "tensorflow": (16, 32, 64, 128, 256, 512)}
_KNEE = 1.03  # a larger batch must be faster by so much: it costs memory and idle time at the end
_KNEE_SECONDS = 0.5  # of measuring, at each batch size

Features = dict[str, NDArray[np.float32]]  # by column of the recipe


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

    def embed(self, pixels: NDArray[np.uint8]) -> Features:
        """Embed one batch, (batch_size, height, width, 3).

        Returns:
            By column, float32 (batch_size, dim), or (batch_size, height, width, channels) where
            the recipe does not pool.

        Raises:
            OutOfMemory: The batch is too large for the device.
        """
        ...

    def resized(self, batch_size: int) -> Self:
        """The same model at another batch size."""
        ...


def choose(name: str) -> str:
    """Resolve `auto`: TensorFlow where there is a GPU, OpenVINO elsewhere.

    Raises:
        EngineError: The name is not `auto` and not one of `ENGINES`.
    """
    if name == "auto":
        return "tensorflow" if gpus() else "openvino"
    if name not in ENGINES:
        raise EngineError(f"`engine` must be auto or one of {', '.join(ENGINES)}. Received: {name}")
    return name


def check_precision(precision: str, name: str) -> None:
    """Check that an engine computes in a precision on this machine, in hardware.

    Args:
        precision: As in `Recipe`.
        name: One of `ENGINES`, or `auto`.

    Raises:
        EngineError: It does not.
    """
    if precision == "float32" or gpus_of(name):
        return
    if precision == "float16":
        raise EngineError(
            "`precision` float16 needs a GPU. Received: precision=float16 on CPU; "
            "use float32, or bfloat16 where the CPU has it"
        )
    if "BF16" not in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise EngineError(
            "`precision` bfloat16 needs a GPU, or a CPU with AVX-512 BF16 or AMX. "
            "Received: precision=bfloat16 on a CPU with neither; use float32"
        )


def best_training_precision() -> str:
    """What networks are trained in on this device: bfloat16 on a GPU that computes in it.

    On a CPU TensorFlow trains in bfloat16 at half the speed of float32.
    """
    import_keras()
    import tensorflow as tf

    details = [
        tf.config.experimental.get_device_details(gpu)
        for gpu in tf.config.list_physical_devices("GPU")
    ]
    # NVIDIA's of compute capability 8.0 and above have it.
    has_it = [found.get("compute_capability", (0, 0)) >= (8, 0) for found in details]
    return "bfloat16" if has_it and all(has_it) else "float32"


def load(recipe: Recipe, name: str, batch_size: int | None, num_threads: int) -> Engine:
    """Compile a recipe's model.

    Args:
        recipe: What to compute.
        name: One of `ENGINES`, or `auto`.
        batch_size: Images in a batch, fewer if they do not fit into memory; None for what
            `find_batch_size` found on this machine, or else the engine's own default.
        num_threads: CPU threads to use.

    Raises:
        EngineError: The engine is unknown or cannot run here, not even with a batch of one.
        WeightsError: The weights are missing or are not those of the recipe.
    """
    name = choose(name)
    check_precision(recipe.precision, name)
    engine = OpenVinoEngine if name == "openvino" else TensorFlowEngine
    size = batch_size or _remembered_batch_size(recipe, name, num_threads)
    size = size or _DEFAULT_BATCH_SIZE[name]
    while True:
        try:
            return engine(recipe, size, num_threads)
        except OutOfMemory:
            if size == 1:
                raise
            size //= 2


def prepare(recipe: Recipe, name: str) -> None:
    """Build the model once before a run, so that what cannot be built is refused before it.

    On OpenVINO the model is exported to the cache, where the run then finds it.

    Raises:
        RecipeError: The network has no such layer, or does not take such pictures.
        WeightsError: The weights are missing, or do not fit the network.
    """
    if choose(name) == "openvino":
        exported_model(recipe)
        return
    import_keras()
    import tensorflow as tf

    _let_gpu_memory_grow()
    with tf.device("/CPU:0"):  # the GPUs are the workers'
        backbones.build(recipe)


def _let_gpu_memory_grow() -> None:
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # already set, by an earlier engine
        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)


class OpenVinoEngine:
    """OpenVINO on CPU: as many streams as threads, each embedding a batch of its own."""

    name = "openvino"
    device = "CPU"

    def __init__(self, recipe: Recipe, batch_size: int, num_threads: int) -> None:
        """Compile for CPU, from the cached export where there is one."""
        self.batch_size = batch_size
        self.num_parallel = num_threads
        self._recipe = recipe
        core = import_openvino().Core()
        model = core.read_model(exported_model(recipe))
        model.reshape([batch_size, *recipe.image_size, 3])
        with _out_of_memory(RuntimeError, MemoryError):
            settings = openvino_settings(recipe.precision, num_threads)
            compiled = core.compile_model(model, self.device, settings)
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(num_threads):
            self._requests.put(compiled.create_infer_request())
        # The binding's first call sets up static data while it may lose the GIL: two threads that
        # make it together wait for each other for ever. So the first call is made here, alone.
        self.embed(np.zeros((batch_size, *recipe.image_size, 3), np.uint8))

    def embed(self, pixels: NDArray[np.uint8]) -> Features:
        """Embed one batch, (batch_size, height, width, 3)."""
        request = self._requests.get()
        try:
            with _out_of_memory(RuntimeError, MemoryError):
                request.infer({"pixels": pixels}, share_inputs=True)
            return {name: request.get_tensor(name).data.copy() for name in self._recipe.columns}
        finally:
            self._requests.put(request)

    def resized(self, batch_size: int) -> "OpenVinoEngine":
        """Compile again, for another batch size."""
        return OpenVinoEngine(self._recipe, batch_size, self.num_parallel)


def openvino_settings(precision: str, num_threads: int) -> dict[str, Any]:
    """What OpenVINO compiles a model with: a stream for each thread, in a precision of `Recipe`."""
    return {
        "NUM_STREAMS": num_threads,
        "INFERENCE_NUM_THREADS": num_threads,
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
        # Decode threads share the cores: a pinned thread would wait for its own.
        "ENABLE_CPU_PINNING": False,
    }


class TensorFlowEngine:
    """TensorFlow: on the first GPU that the process may see, or else on CPU."""

    name = "tensorflow"

    def __init__(self, recipe: Recipe, batch_size: int, num_threads: int) -> None:
        """Build the model and trace it for one batch size."""
        import_keras()
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # already set, by an earlier engine
            tf.config.threading.set_intra_op_parallelism_threads(num_threads)
        _let_gpu_memory_grow()
        self._compile(backbones.build(recipe), recipe.image_size, batch_size)

    def _compile(self, model: Any, image_size: tuple[int, int], batch_size: int) -> None:
        import tensorflow as tf

        self._model, self._image_size, self.batch_size = model, image_size, batch_size
        self.device = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
        # On a GPU, one batch travels to the device while another is computed; on a CPU,
        # TensorFlow spreads one batch over the cores by itself.
        self.num_parallel = 2 if self.device == "GPU" else 1
        self._run = tf.function(
            lambda pixels: model(pixels, training=False),
            input_signature=[tf.TensorSpec((batch_size, *image_size, 3), tf.uint8)],
            # XLA is ten times slower on CPU for depthwise convolutions, so never there.
            jit_compile=self.device == "GPU",
        )
        # The first call compiles: better here than while others wait.
        self.embed(np.zeros((batch_size, *image_size, 3), np.uint8))

    def embed(self, pixels: NDArray[np.uint8]) -> Features:
        """Embed one batch, (batch_size, height, width, 3)."""
        import tensorflow as tf

        with _out_of_memory(tf.errors.ResourceExhaustedError), tf.device(f"/{self.device}:0"):
            features = self._run(tf.constant(pixels))
            return {name: array.numpy() for name, array in features.items()}

    def resized(self, batch_size: int) -> "TensorFlowEngine":
        """Trace the same model again, for another batch size."""
        engine = TensorFlowEngine.__new__(TensorFlowEngine)
        engine._compile(self._model, self._image_size, batch_size)
        return engine


@contextlib.contextmanager
def _out_of_memory(*kinds: type[Exception]) -> Iterator[None]:
    """Tell a batch that does not fit into memory from other errors of these kinds."""
    try:
        yield
    except kinds as error:
        text = str(error).lower()
        is_memory = isinstance(error, MemoryError) or any(
            words in text for words in ("memory", "bad_alloc", "oom when allocating")
        )
        if not is_memory:
            raise
        raise OutOfMemory(f"The batch does not fit into memory: {error}") from error


# The batch size at the knee ------------------------------------------------------------------


def find_batch_size(engine: Engine, recipe: Recipe, num_threads: int) -> Engine:
    """Find the smallest batch size at which the engine is as fast as it gets, and remember it.

    Batch sizes are tried in ascending order on black pictures, each for half a second, until a
    larger one is no faster by 3 %, twice in a row, or does not fit into memory. What was found
    is kept in the cache folder, for this recipe, engine, device and number of threads; it is
    what `load` uses from then on.

    Args:
        engine: Compiled, at any batch size.
        recipe: What it computes.
        num_threads: CPU threads that it uses.

    Returns:
        The engine at that batch size.
    """
    best, best_speed, num_worse = engine, 0.0, 0
    speeds = {}
    for batch_size in _BATCH_SIZES[engine.name]:
        try:
            candidate = engine.resized(batch_size)
            speed = speeds[batch_size] = images_per_second(candidate, recipe)
        except OutOfMemory:
            break
        if speed > best_speed * _KNEE:
            best, best_speed, num_worse = candidate, speed, 0
        elif (num_worse := num_worse + 1) == 2:
            break
    file = _batch_size_file(recipe, engine.name, num_threads)
    content = {"batch_size": best.batch_size, "images_per_second": speeds}
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, no more
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
        temporary.write_text(json.dumps(content))
        temporary.replace(file)
    return best


def images_per_second(engine: Engine, recipe: Recipe) -> float:
    """Speed of the network alone, on black pictures, for half a second or a call in each thread."""
    pixels = np.zeros((engine.batch_size, *recipe.image_size, 3), np.uint8)
    begin = time.perf_counter()

    def embed_for_a_while(_: int) -> int:
        num_images = 0
        while time.perf_counter() - begin < _KNEE_SECONDS:
            engine.embed(pixels)
            num_images += len(pixels)
        return num_images

    with ThreadPoolExecutor(engine.num_parallel) as threads:
        num_images = sum(threads.map(embed_for_a_while, range(engine.num_parallel)))
    return num_images / (time.perf_counter() - begin)


def is_batch_size_known(recipe: Recipe, name: str, num_threads: int) -> bool:
    """Whether `find_batch_size` has been here before."""
    return _remembered_batch_size(recipe, choose(name), num_threads) is not None


def _remembered_batch_size(recipe: Recipe, name: str, num_threads: int) -> int | None:
    try:
        content = json.loads(_batch_size_file(recipe, name, num_threads).read_bytes())
        batch_size = int(content["batch_size"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return batch_size if batch_size >= 1 else None


def _batch_size_file(recipe: Recipe, name: str, num_threads: int) -> Path:
    device = "GPU" if gpus_of(name) else platform.processor() or "CPU"
    version = installed([name]).items()
    parts = [recipe.fingerprint, name, *version, device, platform.node(), num_threads]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return cache_folder() / "batch-sizes" / f"{recipe.label}-{key}.json"


# The model's form for OpenVINO ---------------------------------------------------------------


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


def gpus_of(name: str) -> list[str]:
    """GPUs that an engine, one of `ENGINES` or `auto`, computes on; empty where it uses the CPU."""
    return gpus() if choose(name) == "tensorflow" else []
