"""What became of a run: its counts, its speed, and what held it back."""

import re
import socket
import time
import uuid
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from embedder.errors import StoreError
from embedder.extraction.bottleneck import bottleneck_of
from embedder.extraction.options import RunOptions
from embedder.libraries import versions
from embedder.recipe import Recipe
from embedder.sources import Listing
from embedder.store import FAILURES, Store

STAGES = ("read", "decode", "embed", "write")
# What differs between failures of one kind: quoted bytes, checksums and addresses, numbers.
_PARTICULARS = re.compile(
    r"""(b'(?:[^'\\]|\\.)*'|b"(?:[^"\\]|\\.)*"|0x[0-9a-f]+|\b(?=[a-f]*\d)[0-9a-f]{6,}\b|\d[\d,.]*\d|\d)""",
    re.IGNORECASE,
)


def grouped_reasons(reasons: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """Count together the failures whose reasons are the same but for what differs by file.

    Args:
        reasons: Number of failures by (stage, error).

    Returns:
        The same by kind of error: what is not the same in all of a kind, numbers and checksums,
        is `N` in its text, and quoted bytes are `b'...'`.
    """
    kinds: dict[tuple[str, ...], list[tuple[list[str], int]]] = defaultdict(list)
    for (stage, error), count in reasons.items():
        parts = _PARTICULARS.split(error)  # at odd places what may differ
        kind = (_placeholder(part) if i % 2 else part for i, part in enumerate(parts))
        kinds[stage, *kind].append((parts, count))
    grouped: Counter[tuple[str, str]] = Counter()
    for (stage, *_), members in kinds.items():
        common = [
            found[0] if len(set(found)) == 1 else _placeholder(found[0])
            for found in zip(*(parts for parts, _ in members), strict=True)
        ]
        grouped[stage, "".join(common)] += sum(count for _, count in members)
    return grouped


def _placeholder(part: str) -> str:
    return "b'...'" if part[:2] in ("b'", 'b"') else "N"


@dataclass(kw_only=True)
class Work:
    """What was done, how long it took and what it took: for one shard, or added up for many.

    Attributes:
        num_embedded: Images embedded.
        failures: Number of failures by (stage, error).
        unreadable: Number of images that keep the row they had, since nothing could be made of
            what they are now, by (stage, error).
        engines_seconds: Of all networks that embed the same images, `embed` of the seconds below.
        seconds: Busy time by stage, summed over decoders, threads and workers. What shares a core
            is all busy, and so are reads that wait for their answers.
        decode_cpu_seconds: Of these, what decoding took of the cores.
        waits: Seconds that decoders waited for what they `read`, and for `room` to put pixels
            (the network had all it could take).
        python_seconds: In which images waited for Python, in the engine's process, to hand them
            on.
        reads: Seconds that reading took, of each image that was read beside many others; in a
            receipt, the hundredth part of a shard's that was quickest.
        spans: When workers had a shard in hand: worker, begin and end in seconds since the epoch.
        first_read: When the first byte was read, in seconds since the epoch.
        last_written: When the last shard was written, in seconds since the epoch.
        num_bytes: Written to the store.
        num_bytes_read: Of image files.
        engine: Name and device.
        batch_size: Images in a batch.
        num_decoders: Processes of a worker that read and decode.
        num_parallel: Batches that a worker's engine takes at the same time.
    """

    num_embedded: int = 0
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    unreadable: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    decode_cpu_seconds: float = 0.0
    waits: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    engines_seconds: float = 0.0
    python_seconds: float = 0.0
    reads: list[float] = field(default_factory=list)
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    first_read: float = float("inf")
    last_written: float = 0.0
    num_bytes: int = 0
    num_bytes_read: int = 0
    engine: str = ""
    batch_size: int = 0
    num_decoders: int = 1
    num_parallel: int = 1

    def add(self, other: "Work") -> None:
        """Count other work too; its engine is the last."""
        self.num_embedded += other.num_embedded
        self.failures += other.failures
        self.unreadable += other.unreadable
        for mine, theirs in (self.seconds, other.seconds), (self.waits, other.waits):
            for stage, seconds in theirs.items():
                mine[stage] += seconds
        self.decode_cpu_seconds += other.decode_cpu_seconds
        self.engines_seconds += other.engines_seconds
        self.python_seconds += other.python_seconds
        self.reads += other.reads
        self.spans += other.spans
        self.first_read = min(self.first_read, other.first_read)
        self.last_written = max(self.last_written, other.last_written)
        self.num_bytes += other.num_bytes
        self.num_bytes_read += other.num_bytes_read
        self.engine, self.batch_size = other.engine, other.batch_size
        self.num_decoders, self.num_parallel = other.num_decoders, other.num_parallel

    @property
    def num_failures(self) -> int:
        """Images that failed."""
        return self.failures.total()


@dataclass
class Receipt(Work):
    """What became of one shard; all that travels back from a worker.

    Attributes:
        shard: File name of the shard.
        settled: Ids of images that had a row or a failure, and have another one now.
    """

    shard: str
    settled: list[str] = field(default_factory=list)


@dataclass
class Summary(Work):
    """What became of a run: the work of its shards, and what there was to do.

    Attributes:
        source: As it was given.
        store: Folder of the store.
        options: Of the run.
        recipe: What was computed.
        started: When the command began, in seconds since the epoch.
        num_inputs: Images that the run was asked for.
        num_repeated: Lines of a manifest that name a path again.
        skipped: Files that do not have the extension of an image format, by extension.
        num_done: Rows that were there already.
        num_retried: Images that had failed before and were tried again.
        num_changed: Rows whose file's content changed, to be replaced.
        num_updated: Rows whose file has a new time or manifest columns, but the same content.
        num_deleted: Images in the store that the source no longer has.
        num_dropped: Rows and failures dropped.
        repaired: Why shards were put aside as damaged, by name.
        num_workers: Worker processes; those of a scheduler on average, as they may come and go.
        status: `done`, or why not.
        total_rows: Rows in the store after the run; None where they cannot be counted.
        total_failures: Failures in the store after the run; None where they cannot be counted.
        seconds_total: The whole command, in seconds.
    """

    source: str
    store: str
    options: dict[str, Any]
    recipe: Recipe
    started: float
    num_inputs: int
    num_repeated: int
    skipped: Counter[str]
    num_done: int = 0
    num_retried: int = 0
    num_changed: int = 0
    num_updated: int = 0
    num_deleted: int = 0
    num_dropped: int = 0
    repaired: dict[str, str] = field(default_factory=dict)
    num_workers: int = 1
    status: str = "started"
    total_rows: int | None = None
    total_failures: int | None = None
    seconds_total: float = 0.0

    def __repr__(self) -> str:
        """Where, how many, and how it ended."""
        return (
            f"<Summary of a run into {self.store}: {self.num_embedded:,} new, "
            f"{self.num_failures:,} failed, {self.status}>"
        )

    @classmethod
    def begin(
        cls, store: Store, options: RunOptions, listing: Listing, started: float
    ) -> "Summary":
        """Start the record of a run.

        Args:
            store: Where the features go.
            options: Of the run.
            listing: What the source holds.
            started: When, in seconds since 1970.
        """
        num_listed: int = listing.refs.num_rows
        return cls(
            source=listing.source,
            store=str(store),
            options=asdict(options),
            recipe=store.recipe,
            started=started,
            num_inputs=min(num_listed, options.limit or num_listed),
            num_repeated=listing.num_repeated,
            skipped=listing.skipped,
        )

    @property
    def images_per_second(self) -> float:
        """From the first byte read to the last shard written; 0 where nothing was embedded."""
        if not self.num_embedded:
            return 0.0
        return self.num_embedded / self.elapsed

    @property
    def elapsed(self) -> float:
        """Seconds from the first byte read to the last shard written."""
        return max(self.last_written - self.first_read, 1e-9)

    @property
    def engine_idle(self) -> float:
        """Share of the run, 0 to 1, in which the engine could have taken a batch and had none."""
        capacity = self.num_workers * self.num_parallel * self.elapsed
        return max(0.0, 1.0 - self.engines_seconds / capacity)

    @property
    def num_images(self) -> int:
        """Images embedded or failed."""
        return self.num_embedded + self.num_failures

    @property
    def fastest_read(self) -> float:
        """Seconds that quick reads took, where many were in work at once; else 0."""
        return min(self.reads, default=0.0)

    @property
    def seconds_without_shard(self) -> float:
        """Seconds that workers had no shard in hand, between their first and their last."""
        idle = 0.0
        until: dict[str, float] = {}
        for worker, begin, end in sorted(self.spans):
            idle += max(0.0, begin - until.get(worker, begin))
            until[worker] = max(end, until.get(worker, end))
        return idle

    @property
    def bottleneck(self) -> str:
        """The stage that held the run back, the figures that say so, and what would help."""
        return bottleneck_of(self) if self.num_embedded else "nothing to embed"

    def finish(self, store: Store) -> None:
        """Count what the store holds now, and keep the record there.

        Raises:
            StoreError: The record cannot be written.
        """
        with suppress(StoreError):  # which has ended the run, and is told
            self.total_rows = len(store)
            self.total_failures = store.index(FAILURES).num_rows
        self.seconds_total = time.time() - self.started
        store.write_run(self.record(), uuid.uuid4().hex[:8])

    def record(self) -> dict[str, Any]:
        """The run as kept in `runs/`."""
        by_stage: Counter[str] = Counter()
        for (stage, _), count in self.failures.items():
            by_stage[stage] += count
        return {
            "when": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
            "status": self.status,
            "source": self.source,
            "host": socket.gethostname(),
            "versions": versions(),
            "engine": self.engine,
            "options": self.options,
            "counts": {
                "inputs": self.num_inputs,
                "done_before": self.num_done,
                "embedded": self.num_embedded,
                "failed": self.num_failures,
                "unreadable": self.unreadable.total(),
                "retried": self.num_retried,
                "changed": self.num_changed,
                "updated": self.num_updated,
                "deleted": self.num_deleted,
                "dropped": self.num_dropped,
                "repeated": self.num_repeated,
                "rows": self.total_rows,
                "failures": self.total_failures,
            },
            "failures": dict(by_stage),
            "skipped_files": dict(self.skipped),
            "repaired": self.repaired,
            "seconds": {stage: round(self.seconds[stage], 3) for stage in STAGES},
            "decode_cpu_seconds": round(self.decode_cpu_seconds, 3),
            "waits": {stage: round(seconds, 3) for stage, seconds in self.waits.items()},
            "python_seconds": round(self.python_seconds, 3),
            "engine_idle": round(self.engine_idle, 3) if self.num_embedded else None,
            "batch_size": self.batch_size,
            "workers": self.num_workers,
            "decoders": self.num_decoders,
            "images_per_second": round(self.images_per_second, 1),
            "seconds_total": round(self.seconds_total, 3),
            "bottleneck": self.bottleneck,
        }
