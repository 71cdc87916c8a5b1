"""One shard: read, decode, embed, write, with the stages overlapped and each timed.

Reading and decoding run in processes, ahead of the network; batches are embedded in the engine's
own threads; the shard's thread only notes which image is in which slot of which batch. Pixels are
in a fixed number of batches, which go round: where none is free, the network has all it can take,
and decoding waits. A worker process keeps two shards in hand: the second begins when the first has
handed its last image to the decoders, so nothing runs dry between shards.
"""

import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedder.errors import Unfinished
from embedder.extraction.decoders import DecoderPool, Outcome
from embedder.extraction.record import Receipt, Work
from embedder.extraction.worker import Batch, Job, WorkerState, finished_vectors
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
    builders = [
        ShardBuilder(job.recipe, state, refs, of_job)
        for job, state, of_job in zip(jobs, states, earlier or [{}] * len(jobs), strict=True)
    ]
    began, loading = time.time(), Work()
    reporter = _Reporter(report)
    batches = _Batches(builders, states[0], refs["path"].to_pylist(), loading)
    with closing(batches):
        num_done = 0
        for outcomes in batches.feed.outcomes():
            if is_stopped():
                raise Stopped(f"stopped while shard {builders[0].receipt.shard} was in work")
            for outcome in outcomes:
                batches.add(outcome)
            num_done += len(outcomes)
            reporter.tell(num_done, len(builders[0].failures))
        batches.finish()
    receipts = [
        builder.write(store, loading) for builder, store in zip(builders, stores, strict=True)
    ]
    engines_seconds = sum(receipt.seconds["embed"] for receipt in receipts)
    for receipt in receipts:
        receipt.engines_seconds = engines_seconds
        receipt.reads = sorted(loading.reads)[len(loading.reads) // 100 :][:1]
        receipt.spans.append((f"{socket.gethostname()}:{os.getpid()}", began, time.time()))
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


class _Batches:
    """The batches that a shard's images are decoded into, until they are embedded."""

    def __init__(
        self,
        builders: "Sequence[ShardBuilder]",
        state: WorkerState,
        paths: Sequence[bytes],
        loading: Work,
    ) -> None:
        self._builders, self._state = builders, state
        self._pool = state.decoders
        self.feed = self._pool.feed(paths, loading)
        self._rows: dict[int, dict[int, Row]] = {}  # by batch, then by place in it
        self._in_flight: deque[Future[list[_EmbeddedBatch]]] = deque()

    def add(self, outcome: Outcome) -> None:
        """Note an image, whose pixels are in their slots, or its failure."""
        row = Row(outcome.position, 0, outcome.num_bytes, outcome.sha256, 0, 0, "")
        if isinstance(outcome.found, Failure):
            self.feed.reuse(outcome.slots)
            for builder in self._builders:
                builder.failures.append((row, outcome.found))
            return
        row = Row(*row[:4], *outcome.found)
        for view, slot in enumerate(outcome.slots):
            batch, place = divmod(slot, self._pool.batch_size)
            rows = self._rows.setdefault(batch, {})
            rows[place] = row._replace(view=view) if view else row
            if len(rows) == self._pool.batch_size:
                self._submit(batch)

    def _submit(self, batch: int) -> None:
        """Have a batch embedded, and take in those that are done."""
        self.feed.hand_over(batch)
        rows = self._rows.pop(batch)
        self._in_flight.append(
            self._state.embedders.submit(_embed, self._builders, self._pool, batch, rows)
        )
        while self._in_flight and self._in_flight[0].done():
            self._collect()

    def _collect(self) -> None:
        for builder, embedded in zip(
            self._builders, self._in_flight.popleft().result(), strict=True
        ):
            builder.collect(embedded)

    def finish(self) -> None:
        """Embed the batches that are not full, and wait for all."""
        for batch in sorted(self._rows):
            self._submit(batch)
        while self._in_flight:
            self._collect()

    def close(self) -> None:
        """Return what a shard that was given up still holds."""
        self.feed.close()
        for future in self._in_flight:
            future.exception()  # its batch is back


class ShardBuilder:
    """Collects a shard's vectors, and makes rows of them.

    A vector finds its row by the position of its ref and its view, which are noted with the slot
    of its pixels: nothing depends on the order in which images or batches come back.
    """

    def __init__(
        self, recipe: Recipe, state: WorkerState, refs: pa.Table, earlier: Earlier
    ) -> None:
        """Begin with no image.

        Args:
            recipe: What is stored.
            state: The worker's engine.
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

    def collect(self, embedded: "_EmbeddedBatch") -> None:
        """Take in the vectors of a batch."""
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

    def write(self, store: Store, loading: Work) -> Receipt:
        """Write the shard, and tell what became of it."""
        receipt, engine = self.receipt, self.state.engine
        receipt.add(loading)
        receipt.engine, receipt.batch_size = f"{engine.name} on {engine.device}", engine.batch_size
        receipt.num_decoders = self.state.decoders.num_decoders
        receipt.num_parallel = engine.num_parallel
        self.failures.sort(key=lambda failure: failure[0].position)
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
    builders: Sequence[ShardBuilder], pool: DecoderPool, number: int, rows: dict[int, Row]
) -> list[_EmbeddedBatch]:
    """Embed a batch for each builder, and release it.

    Args:
        builders: With the engine of each.
        pool: Of the batch.
        number: Of the batch.
        rows: By place in the batch; other places hold nothing of use.
    """
    found = []
    places, batch = list(rows), Batch(pool.shared.batches[number])
    try:
        for builder in builders:
            begin = time.perf_counter()
            features = builder.state.embed(batch)
            mine = {name: f[places] for name, f in features.items()}
            vectors = finished_vectors(mine, builder.recipe, builder.state.head)
            seconds = time.perf_counter() - begin
            found.append(_EmbeddedBatch(list(rows.values()), vectors, seconds))
    finally:
        pool.release(number)
    return found
