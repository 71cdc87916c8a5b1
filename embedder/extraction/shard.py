"""One shard: read, decode, embed, write, with the stages overlapped and each timed.

Reading and decoding run in threads, ahead of the network; batches are embedded in the engine's
own threads; the shard's thread only carries images from one to the other, in the refs' order.
Pixels wait in a fixed number of buffers, which go round: where none is free, the network has all
it can take, and decoding waits. A worker process keeps two shards in hand: the second begins when
the first has handed its last image to the decoders, so nothing runs dry between shards.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedder.errors import Unfinished
from embedder.extraction.images import LoadedImage, load_images
from embedder.extraction.record import Receipt, Work
from embedder.extraction.worker import Job, WorkerState, finished_vectors
from embedder.recipe import Recipe
from embedder.store import Failure, Row, Store, failures_table, row_indices, rows_table, shard_name

_REPORT_SECONDS = 0.5

# What a store has of images that are to be embedded, by id: the sha256 of the row, or None of a
# failure. Images that it does not know are not in it.
Earlier = Mapping[str, str | None]


class Stopped(Unfinished):
    """The run was stopped while this shard was in work; nothing of it was written."""


def extract_shard(
    jobs: Sequence[Job],
    states: Sequence[WorkerState],
    refs: pa.Table,
    report: Callable[[int, int], None],
    is_stopped: Callable[[], bool],
    earlier: Sequence[Earlier] | None = None,
) -> list[Receipt]:
    """Embed the images of one shard and write it: to one store, or with each network to its own.

    Args:
        jobs: What the shards of this run have in common, for each store. Their recipes differ in
            the network alone: every image is read and decoded once, for all of them.
        states: This process's engine and threads for each job; the first one's threads decode.
        refs: Refs of the shard's images.
        report: Called now and then with the number of images done and of failures among them,
            since the last call.
        is_stopped: Asked before each image; once true, the shard is given up.
        earlier: What each job's store has of these images.

    Returns:
        A receipt for each job.

    Raises:
        Stopped: `is_stopped` said so.
        StoreError: The shard could not be written.
    """
    stores = [Store(job.store) for job in jobs]
    shards = [
        ShardBuilder(job.recipe, state, refs, of_job)
        for job, state, of_job in zip(jobs, states, earlier or [{}] * len(jobs), strict=True)
    ]
    loading = Work()
    reporter = _Reporter(report)
    try:
        for position, image in enumerate(load_images(refs, jobs[0].recipe, states[0], loading)):
            if is_stopped():
                raise Stopped(f"stopped while shard {shards[0].receipt.shard} was in work")
            for shard in shards:
                shard.add(position, image)
            reporter.tell(position + 1, len(shards[0].failures))
        for shard in shards:
            shard.finish()
    finally:
        for shard in shards:
            shard.give_back()
    receipts = [shard.write(store, loading) for shard, store in zip(shards, stores, strict=True)]
    reporter.tell(refs.num_rows, receipts[0].num_failures, at_once=True)
    return receipts


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


class ShardBuilder:
    """Collects a shard's images into batches, and their vectors into rows.

    A vector finds its row by the position of its ref and its view, which travel with the pixels:
    nothing depends on the order in which batches come back.
    """

    def __init__(
        self, recipe: Recipe, state: WorkerState, refs: pa.Table, earlier: Earlier
    ) -> None:
        """Begin with no image.

        Args:
            recipe: What is stored.
            state: The worker's engine and buffers.
            refs: Rows of the listing.
            earlier: What the store had of these images; see `Earlier`.
        """
        self.refs = refs
        self.recipe = recipe
        self.state = state
        self._ids: list[str] = refs["image_id"].to_pylist()
        self._earlier = earlier
        replaced = {image_id: sha256 for image_id, sha256 in earlier.items() if sha256}
        self.receipt = Receipt(shard_name(recipe, self._ids, replaced))
        self.failures: list[tuple[Row, Failure]] = []
        self._rows: list[Row] = []
        self._not_finite: set[int] = set()  # positions of images that failed by one of their views
        # By column, one array for the shard, made when the first batch tells `dim`: a list of
        # batches, and its concatenation, would be three times the memory.
        self._vectors: dict[str, NDArray[Any]] = {}
        self._batch: list[Row] = []
        self._buffer: NDArray[np.uint8] | None = None  # holds the pixels of the batch
        self._in_flight: deque[Future[_EmbeddedBatch]] = deque()

    def add(self, position: int, image: LoadedImage) -> None:
        """Add an image's views to the batch, or its failure to the failures."""
        outcome = image.outcome
        row = Row(position, 0, image.num_bytes, image.sha256, 0, 0, "")
        if isinstance(outcome, Failure):
            self.failures.append((row, outcome))
            return
        row = row._replace(width=outcome.width, height=outcome.height, format=outcome.format)
        for view, pixels in enumerate((outcome.pixels, *outcome.augmented)):
            if self._buffer is None:
                begin = time.perf_counter()
                self._buffer = self.state.buffers.get()
                self.receipt.waits["embed"] += time.perf_counter() - begin
            self._buffer[len(self._batch)] = pixels
            self._batch.append(row._replace(view=view))
            if len(self._batch) == len(self._buffer):
                self._submit(self._buffer)

    def _submit(self, buffer: NDArray[np.uint8]) -> None:
        """Hand the batch over, with its buffer, and take in those that are done."""
        self._in_flight.append(
            self.state.embedders.submit(_embed, self.state, self.recipe, self._batch, buffer)
        )
        self._batch, self._buffer = [], None
        while self._in_flight and self._in_flight[0].done():
            self._collect(self._in_flight.popleft().result())

    def _collect(self, embedded: "_EmbeddedBatch") -> None:
        self.receipt.seconds["embed"] += embedded.seconds
        indices = row_indices(embedded.rows, self.recipe.views)
        is_finite = np.ones(len(indices), bool)
        for column, vectors in embedded.vectors.items():
            is_finite &= np.isfinite(vectors).all(axis=tuple(range(1, vectors.ndim)))
            if column not in self._vectors:
                shape = self.refs.num_rows * self.recipe.views, *vectors.shape[1:]
                self._vectors[column] = np.empty(shape, vectors.dtype)
            self._vectors[column][indices] = vectors
        for row, good in zip(embedded.rows, is_finite, strict=True):
            if good:
                self._rows.append(row)
            elif row.position not in self._not_finite:
                self._not_finite.add(row.position)
                error = f"the vector is not finite in {self.recipe.store_dtype}"
                self.failures.append((row, Failure("embed", error)))

    def finish(self) -> None:
        """Embed the last, partial batch and wait for all."""
        if self._buffer is not None:
            self._submit(self._buffer)
        begin = time.perf_counter()
        while self._in_flight:
            self._collect(self._in_flight.popleft().result())
        self.receipt.waits["embed"] += time.perf_counter() - begin
        self.failures.sort(key=lambda failure: failure[0].position)

    def give_back(self) -> None:
        """Return what a shard that was given up still holds of the state."""
        if self._buffer is not None:
            self.state.buffers.put(self._buffer)
            self._buffer = None
        for future in self._in_flight:
            future.exception()  # its buffer is back

    def write(self, store: Store, loading: Work) -> Receipt:
        """Write the shard, and tell what became of it."""
        receipt, engine = self.receipt, self.state.engine
        receipt.add(loading)
        receipt.engine, receipt.batch_size = f"{engine.name} on {engine.device}", engine.batch_size
        receipt.num_threads, receipt.num_parallel = self.state.num_threads, engine.num_parallel
        self._set_kept_apart()
        begin = time.perf_counter()
        good = sorted(row for row in self._rows if row.position not in self._not_finite)
        rows = rows_table(self.recipe, self.refs, good, self._vectors)
        failures = failures_table(self.refs, self.failures)
        receipt.num_bytes = store.write_shard(rows, failures, receipt.shard)
        receipt.seconds["write"] = time.perf_counter() - begin
        receipt.num_embedded, receipt.last_written = rows.num_rows // self.recipe.views, time.time()
        receipt.failures = Counter((failure.stage, failure.error) for _, failure in self.failures)
        return receipt

    def _set_kept_apart(self) -> None:
        """Leave the rows of images of which nothing can be said but that something went wrong.

        A failure takes the place of a row only if other bytes were read, and are of no use.
        """
        kept_ids, failures = set(), []
        for row, failure in self.failures:
            stored = self._earlier.get(self._ids[row.position])
            if stored and (failure.is_passing or row.sha256 in (None, stored)):
                kept_ids.add(self._ids[row.position])
                self.receipt.unreadable[failure.stage, failure.error] += 1
            else:
                failures.append((row, failure))
        self.failures = failures
        self.receipt.settled = [i for i in self._ids if i in self._earlier and i not in kept_ids]


class _EmbeddedBatch(NamedTuple):
    rows: list[Row]
    vectors: dict[str, NDArray[Any]]
    seconds: float


def _embed(
    state: WorkerState, recipe: Recipe, rows: list[Row], buffer: NDArray[np.uint8]
) -> _EmbeddedBatch:
    """Embed a batch, of which the first `len(rows)` images are real, and return its buffer."""
    begin = time.perf_counter()
    try:
        features = state.embed(buffer)
    finally:
        state.buffers.put(buffer)
    mine = {name: f[: len(rows)] for name, f in features.items()}
    vectors = finished_vectors(mine, recipe, state.head)
    return _EmbeddedBatch(rows, vectors, time.perf_counter() - begin)
