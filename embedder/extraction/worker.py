"""What a worker process keeps between shards: the engine, the decoders and their batches."""

import contextlib
import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embedder import engines
from embedder.columns import LOGITS
from embedder.engines import Engine, Features, Runtime
from embedder.errors import EngineError, ModelError, OutOfMemory
from embedder.extraction.decoder_link import start_ahead
from embedder.extraction.decoders import DEFAULT_FEEDING, DecoderPool, Feeding
from embedder.machine import gpus
from embedder.recipe import Recipe

if TYPE_CHECKING:
    from embedder.heads import Model

# A shorter run would be over before measuring batch sizes, and engines, has paid for itself.
MIN_IMAGES_TO_MEASURE = 2000
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


@dataclass(frozen=True)
class Job:
    """What every shard of a run has in common; small enough to send with each of them."""

    recipe: Recipe
    store: str
    engine: str
    batch_size: int | None  # None: found by measuring, where the run is long enough to gain by it
    num_images: int = 0
    runtime: Runtime | None = None  # None: what the worker chooses, wherever it is
    feeding: Feeding = DEFAULT_FEEDING


class WorkerState:
    """What a worker process keeps between shards: the engine, the decoders and their batches."""

    def __init__(
        self, recipe: Recipe, engine: Engine, num_threads: int, feeding: Feeding = DEFAULT_FEEDING
    ) -> None:
        """Make the batches that decoders fill.

        Args:
            recipe: What is computed.
            engine: Compiled model.
            num_threads: Cores for this worker, of which each has a decoder by default.
            feeding: How images are read and decoded.
        """
        _give_back_large_blocks()
        self.engine = engine
        self.head = load_head(recipe)
        self.embedders = ThreadPoolExecutor(engine.num_parallel, "embed")
        # For each call of the engine one batch that is in work and one that waits.
        self.decoders = DecoderPool(
            *(recipe.pixels, engine.batch_size, 2 * engine.num_parallel),
            *(feeding.decoders or num_threads, feeding),
        )
        self._resizing = threading.Lock()

    def embed(self, batch: "Batch") -> Features:
        """Embed a batch: in one call, or in several once the engine has run out of memory.

        Returns:
            By column, float32 (batch size, dim).

        Raises:
            EngineError: Not even one image fits into memory.
        """
        size, height, width, _ = batch.pixels.shape
        wanted = self.engine.batch_size
        while True:
            engine = self.engine
            try:
                # An engine for larger batches than decoders fill would compute padding.
                wanted = min(wanted, engine.batch_size, size)
                if wanted == engine.batch_size:
                    return _embed_in_parts(engine, batch)
                with self._resizing:
                    if self.engine is engine:  # no other thread has made it smaller meanwhile
                        self.engine = engine.resized(wanted)
            except OutOfMemory as error:
                if wanted == 1:
                    raise EngineError(
                        f"Not even one image of {height}x{width} pixels fits into the memory of "
                        f"{engine.device}: {error}"
                    ) from error
                wanted //= 2


class Batch:
    """A batch of pixels, brought to a device once for all engines that are there.

    Attributes:
        pixels: uint8 (batch size, height, width, 3).
    """

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        """Begin with a batch that is on no device.

        Args:
            pixels: uint8 (batch size, height, width, 3).
        """
        self.pixels = pixels
        self._uploaded: dict[str, Any] = {}

    def on_device_of(self, engine: Engine) -> Any:
        """What `engine.embed` takes.

        Raises:
            OutOfMemory: It is too large for the device.
        """
        if engine.name not in self._uploaded:
            self._uploaded[engine.name] = engine.upload(self.pixels)
        return self._uploaded[engine.name]


def _embed_in_parts(engine: Engine, batch: Batch) -> Features:
    size, pixels = engine.batch_size, batch.pixels
    if size == len(pixels):
        return engine.embed(batch.on_device_of(engine))
    padding = np.zeros((-len(pixels) % size, *pixels.shape[1:]), np.uint8)
    padded = np.concatenate([pixels, padding])
    parts = [engine.embed(padded[start : start + size]) for start in range(0, len(pixels), size)]
    return {name: np.concatenate([p[name] for p in parts])[: len(pixels)] for name in parts[0]}


def _give_back_large_blocks() -> None:
    """Have glibc return a shard's vectors to the system as soon as they are freed.

    It would otherwise raise its threshold as it goes and keep a heap for each thread: by
    `benchmarks/memory.py`, 5,000 images then peak at 1.17 times the memory of 1,000. Pixels stay
    below the threshold: at 128 KiB their page faults cost a tenth of the speed.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2 * 2**20)


_states: dict[Any, WorkerState] = {}
_states_lock = threading.Lock()


def worker_state_of(job: Job, num_threads: int) -> WorkerState:
    """This process's state for a job: made by its first shard, shared by all others."""
    runtime = job.runtime or engines.choose(job.engine, gpus(), is_here=True)
    key = (job.recipe, runtime, job.batch_size, num_threads, job.feeding)
    with _states_lock:
        if key not in _states:
            recipe = job.recipe.of_features
            start_ahead(job.feeding.decoders or num_threads)  # while the network is loaded
            engine = engines.load(recipe, runtime, job.batch_size, num_threads)
            if (
                job.batch_size is None
                and job.num_images * job.recipe.views >= MIN_IMAGES_TO_MEASURE
                and engines.remembered_batch_size(recipe, runtime, num_threads) is None
            ):
                engine = engines.find_batch_size(engine, recipe, runtime, num_threads)
            _states[key] = WorkerState(job.recipe, engine, num_threads, job.feeding)
        return _states[key]


def load_head(recipe: Recipe) -> "Model | None":
    """The head whose logits the recipe stores; None where it stores features.

    Raises:
        ModelError: It is not there any more, or is another.
    """
    if recipe.head is None:
        return None
    # scikit-learn takes half a second to import, which extraction is not to pay.
    from embedder.heads import Model

    model = Model.load(recipe.head_source)
    if model.head_sha256 != recipe.head:
        raise ModelError(f"The model {recipe.head_source} has changed since the run began")
    return model


def finished_vectors(
    features: Features, recipe: Recipe, head: "Model | None" = None
) -> dict[str, NDArray[Any]]:
    """Bring the network's outputs to what the recipe stores.

    Args:
        features: Of the network, (batch, dim) each, by column.
        recipe: Gives `l2_normalise` and `store_dtype`.
        head: That of the recipe; None where it has none.

    Returns:
        Arrays of the same shapes, each vector divided by its Euclidean length if `l2_normalise`,
        in `store_dtype`. Values too large for float16 become infinite. A feature map that is not
        pooled, (batch, height, width, channels), counts as one vector. With a head, the logits
        that it makes of them, (batch, n_classes).
    """
    vectors = {name: _finished(vectors, recipe) for name, vectors in features.items()}
    return vectors if head is None else {LOGITS: head.logits_of_columns(vectors)}


def _finished(vectors: NDArray[np.float32], recipe: Recipe) -> NDArray[Any]:
    if recipe.l2_normalise:
        axes = tuple(range(1, vectors.ndim))
        norms = np.sqrt((vectors**2).sum(axis=axes, keepdims=True))
        vectors = vectors / np.maximum(norms, np.finfo(np.float32).tiny)
    with np.errstate(over="ignore"):
        return vectors.astype(recipe.store_dtype)
