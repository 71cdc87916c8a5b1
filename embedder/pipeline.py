"""One shard: read, decode, embed, write, with the stages overlapped and each timed.

Reading and decoding run in threads, ahead of the network; batches are embedded in the engine's
own threads; the shard's thread only carries images from one to the other, in the refs' order.
A worker process keeps two shards in hand, so that one fills while the other drains.
"""

import contextlib
import ctypes
import hashlib
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embedder import engines
from embedder.decode import DecodedImage, decode_rgb, silence_decoders
from embedder.engines import Engine
from embedder.errors import DecodeError, ReadError, Unfinished
from embedder.recipe import Recipe
from embedder.sources import read_bytes
from embedder.store import (
    FAILURE_SCHEMA,
    Store,
    extra_columns,
    row_schema,
    shard_name,
    vector_array,
)

STAGES = ("read", "decode", "embed", "write")
_MIN_LOOKAHEAD = 64  # images read and decoded ahead of the network, per shard
_REPORT_SECONDS = 0.5
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


@dataclass(frozen=True)
class Job:
    """What every shard of a run has in common; small enough to send with each of them."""

    recipe: Recipe
    store: str
    engine: str
    batch_size: int | None


@dataclass
class Receipt:
    """What became of one shard; all that travels back from a worker.

    Attributes:
        shard: File name of the shard.
        num_rows: Images embedded.
        failures: Number of failures by (stage, error).
        seconds: Busy time of each stage, summed over threads.
        waits: Seconds that the shard's thread waited for `decode` (the network had no work) and
            for `embed` (the network had all it could take).
        started: Time of the first byte read, in seconds since the epoch.
        ended: Time when the shard was written.
        num_bytes: Written to the store.
        engine: Name and device of the engine.
    """

    shard: str
    num_rows: int = 0
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    waits: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    started: float = 0.0
    ended: float = 0.0
    num_bytes: int = 0
    engine: str = ""


class Stopped(Unfinished):
    """The run was stopped while this shard was in work; nothing of it was written."""


class Toolbox:
    """What a worker process keeps between shards: the engine and the threads."""

    def __init__(self, engine: Engine, num_threads: int) -> None:
        """Start the threads.

        Args:
            engine: Compiled model.
            num_threads: Threads that read and decode.
        """
        silence_decoders()
        _give_back_large_blocks()
        self.engine = engine
        self.decoders = ThreadPoolExecutor(num_threads, "decode")
        self.embedders = ThreadPoolExecutor(engine.num_parallel, "embed")


def _give_back_large_blocks() -> None:
    """Have glibc return a shard's vectors to the system as soon as they are freed.

    It would otherwise raise its threshold as it goes and keep a heap for each thread: by
    `benchmarks/memory.py`, 5,000 images then peak at 1.17 times the memory of 1,000. Pixels stay
    below the threshold: at 128 KiB their page faults cost a tenth of the speed.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2 * 2**20)


_toolboxes: dict[Any, Toolbox] = {}
_toolboxes_lock = threading.Lock()


def toolbox_of(job: Job, num_threads: int) -> Toolbox:
    """This process's toolbox for a job: made by its first shard, shared by all others."""
    key = (job.recipe, job.engine, job.batch_size, num_threads)
    with _toolboxes_lock:
        if key not in _toolboxes:
            engine = engines.load(job.recipe, job.engine, job.batch_size, num_threads)
            _toolboxes[key] = Toolbox(engine, num_threads)
        return _toolboxes[key]


class _Failure(NamedTuple):
    stage: str
    error: str


class _Image(NamedTuple):
    """An image after reading and decoding, or the failure that came instead."""

    num_bytes: int | None
    sha256: str | None
    outcome: DecodedImage | _Failure
    read_seconds: float
    decode_seconds: float


def _load_image(path: bytes, recipe: Recipe) -> _Image:
    begin = time.perf_counter()
    try:
        encoded = read_bytes(path)
    except ReadError as error:
        return _Image(None, None, _Failure("read", str(error)), time.perf_counter() - begin, 0.0)
    sha256 = hashlib.sha256(encoded).hexdigest()
    read = time.perf_counter()
    outcome: DecodedImage | _Failure
    try:
        outcome = decode_rgb(encoded, recipe)
    except DecodeError as error:
        outcome = _Failure("decode", str(error))
    end = time.perf_counter()
    return _Image(len(encoded), sha256, outcome, read - begin, end - read)


def extract_shard(
    job: Job,
    toolbox: Toolbox,
    refs: pa.Table,
    report: Callable[[int, int], None],
    is_stopped: Callable[[], bool],
) -> Receipt:
    """Embed the images of one shard and write it.

    Args:
        job: What the shards of this run have in common.
        toolbox: This process's engine and threads.
        refs: Refs of the shard's images.
        report: Called now and then with the number of images done and of failures among them,
            since the last call.
        is_stopped: Asked before each image; once true, the shard is given up.

    Raises:
        Stopped: `is_stopped` said so.
        StoreError: The shard could not be written.
    """
    store = Store(job.store)
    receipt = Receipt(shard_name(job.recipe, refs["image_id"].to_pylist()), started=time.time())
    receipt.engine = f"{toolbox.engine.name} on {toolbox.engine.device}"
    shard = _ShardInWork(job.recipe, toolbox, receipt, refs.num_rows)
    reporter = _Reporter(report)
    for position, image in enumerate(_load_images(refs, job.recipe, toolbox, receipt)):
        if is_stopped():
            raise Stopped(f"stopped while shard {receipt.shard} was in work")
        shard.add(position, image)
        reporter.tell(position + 1, len(shard.failures))
    shard.finish()
    begin = time.perf_counter()
    rows, failures = shard.rows_table(refs), shard.failures_table(refs)
    receipt.num_bytes = store.write_shard(rows, failures, receipt.shard)
    receipt.seconds["write"] += time.perf_counter() - begin
    receipt.num_rows, receipt.ended = rows.num_rows, time.time()
    receipt.failures = Counter((failure.stage, failure.error) for *_, failure in shard.failures)
    reporter.tell(refs.num_rows, failures.num_rows, at_once=True)
    return receipt


class _Reporter:
    """Passes on how far a shard is, but not more often than anyone would look."""

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self._report = report
        self._told = (0, 0)
        self._time = time.monotonic()

    def tell(self, num_done: int, num_failures: int, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self._time > _REPORT_SECONDS:
            self._report(num_done - self._told[0], num_failures - self._told[1])
            self._told, self._time = (num_done, num_failures), now


def _load_images(
    refs: pa.Table, recipe: Recipe, toolbox: Toolbox, receipt: Receipt
) -> Iterator[_Image]:
    """Images in the refs' order, read and decoded by the toolbox's threads ahead of need."""
    lookahead = max(_MIN_LOOKAHEAD, 4 * toolbox.engine.batch_size)
    ahead: deque[Future[_Image]] = deque()
    try:
        for path in refs["path"]:
            ahead.append(toolbox.decoders.submit(_load_image, path.as_py(), recipe))
            if len(ahead) == lookahead:
                yield _take(ahead.popleft(), receipt)
        while ahead:
            yield _take(ahead.popleft(), receipt)
    finally:
        for future in ahead:
            future.cancel()


def _take(future: Future[_Image], receipt: Receipt) -> _Image:
    begin = time.perf_counter()
    image = future.result()
    receipt.waits["decode"] += time.perf_counter() - begin
    receipt.seconds["read"] += image.read_seconds
    receipt.seconds["decode"] += image.decode_seconds
    return image


class _Row(NamedTuple):
    """A row of the store, but for its vector; `position` is that of its ref."""

    position: int
    num_bytes: int | None
    sha256: str | None
    width: int
    height: int
    format: str


class _ShardInWork:
    """Collects a shard's images into batches, and their vectors into rows.

    A vector finds its row by the position of its ref, which travels with the pixels: nothing
    depends on the order in which batches come back.
    """

    def __init__(self, recipe: Recipe, toolbox: Toolbox, receipt: Receipt, num_refs: int) -> None:
        self.num_refs = num_refs
        self.recipe = recipe
        self.toolbox = toolbox
        self.receipt = receipt
        self.failures: list[tuple[_Row, _Failure]] = []
        self._rows: list[_Row] = []
        # One array for the shard, made when the first batch tells `dim`: a list of batches, and
        # its concatenation, would be three times the memory.
        self._vectors: NDArray[Any] = np.empty((0, 0))
        self._batch: list[_Row] = []
        self._pixels = self._new_pixels()
        self._in_flight: set[Future[_EmbeddedBatch]] = set()

    def _new_pixels(self) -> NDArray[np.uint8]:
        return np.zeros((self.toolbox.engine.batch_size, *self.recipe.image_size, 3), np.uint8)

    def add(self, position: int, image: _Image) -> None:
        """Add an image to the batch, or its failure to the failures."""
        outcome = image.outcome
        if isinstance(outcome, _Failure):
            row = _Row(position, image.num_bytes, image.sha256, 0, 0, "")
            self.failures.append((row, outcome))
            return
        self._pixels[len(self._batch)] = outcome.pixels
        size_and_format = outcome.width, outcome.height, outcome.format
        self._batch.append(_Row(position, image.num_bytes, image.sha256, *size_and_format))
        if len(self._batch) == len(self._pixels):
            self._submit()

    def _submit(self) -> None:
        """Hand the batch over; wait while the engine has as much as it can take, and one more."""
        begin = time.perf_counter()
        while len(self._in_flight) > self.toolbox.engine.num_parallel:
            done, self._in_flight = wait(self._in_flight, return_when=FIRST_COMPLETED)
            for future in done:
                self._collect(future.result())
        self.receipt.waits["embed"] += time.perf_counter() - begin
        engine, embedders = self.toolbox.engine, self.toolbox.embedders
        self._in_flight.add(
            embedders.submit(_embed, engine, self.recipe, self._batch, self._pixels)
        )
        self._batch, self._pixels = [], self._new_pixels()

    def _collect(self, embedded: "_EmbeddedBatch") -> None:
        self.receipt.seconds["embed"] += embedded.seconds
        is_finite = np.isfinite(embedded.vectors).all(axis=1)
        if not self._vectors.size:
            shape = (self.num_refs, embedded.vectors.shape[1])
            self._vectors = np.empty(shape, embedded.vectors.dtype)
        self._vectors[[row.position for row in embedded.rows]] = embedded.vectors
        for row, good in zip(embedded.rows, is_finite, strict=True):
            if good:
                self._rows.append(row)
            else:
                error = f"the vector is not finite in {self.recipe.store_dtype}"
                self.failures.append((row, _Failure("embed", error)))

    def finish(self) -> None:
        """Embed the last, partial batch and wait for all."""
        if self._batch:
            self._submit()
        begin = time.perf_counter()
        for future in self._in_flight:
            self._collect(future.result())
        self.receipt.waits["embed"] += time.perf_counter() - begin
        self.failures.sort(key=lambda failure: failure[0].position)

    def rows_table(self, refs: pa.Table) -> pa.Table:
        """The shard's rows, in the refs' order."""
        if not self._rows:
            return pa.table({})
        rows = sorted(self._rows)  # by position
        positions = [row.position for row in rows]
        is_whole = len(positions) == self.num_refs
        vectors = vector_array(self._vectors if is_whole else self._vectors[positions])
        mine = refs.take(pa.array(positions))
        extras = extra_columns(refs.column_names)
        columns = [
            mine["image_id"],
            [row.sha256 for row in rows],
            [row.num_bytes for row in rows],
            [row.width for row in rows],
            [row.height for row in rows],
            [row.format for row in rows],
            mine["modified"],
            *(mine[name] for name in extras),
            vectors,
        ]
        fields = [refs.schema.field(name) for name in extras]
        return pa.table(columns, schema=row_schema(self.recipe, vectors.type.list_size, fields))

    def failures_table(self, refs: pa.Table) -> pa.Table:
        """The shard's failures, in the refs' order."""
        rows = [row for row, _ in self.failures]
        mine = refs.take(pa.array([row.position for row in rows], pa.int64()))
        sizes = pc.coalesce(pa.array([row.num_bytes for row in rows], pa.int64()), mine["bytes"])
        columns = [
            mine["image_id"],
            sizes,
            [row.sha256 for row in rows],
            mine["modified"],
            [failure.stage for _, failure in self.failures],
            [failure.error for _, failure in self.failures],
        ]
        return pa.table(columns, schema=FAILURE_SCHEMA)


class _EmbeddedBatch(NamedTuple):
    rows: list[_Row]
    vectors: NDArray[Any]
    seconds: float


def _embed(
    engine: Engine, recipe: Recipe, rows: list[_Row], pixels: NDArray[np.uint8]
) -> _EmbeddedBatch:
    """Embed a batch, of which the first `len(rows)` images are real."""
    begin = time.perf_counter()
    vectors = finished_vectors(engine.embed(pixels)[: len(rows)], recipe)
    return _EmbeddedBatch(rows, vectors, time.perf_counter() - begin)


def finished_vectors(vectors: NDArray[np.float32], recipe: Recipe) -> NDArray[Any]:
    """Bring the network's output (batch, dim) to what the recipe stores.

    Returns:
        Array of the same shape, divided by its Euclidean length if `l2_normalise`, in
        `store_dtype`. Values too large for float16 become infinite.
    """
    if recipe.l2_normalise:
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.maximum(norms, np.finfo(np.float32).tiny)
    with np.errstate(over="ignore"):
        return vectors.astype(recipe.store_dtype)
