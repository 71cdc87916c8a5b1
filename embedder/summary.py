"""What became of a run: its counts, its speed, and what held it back."""

import os
import socket
import time
import uuid
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from embedder import engines
from embedder.pipeline import STAGES, Receipt
from embedder.sources import Listing
from embedder.store import FAILURES, Store


@dataclass
class Summary:
    """What became of a run.

    Attributes:
        source: As it was given.
        store: Folder of the store.
        options: Of the run.
        started: When the command began, in seconds since the epoch.
        num_inputs: Images that the run was asked for.
        num_done: Of these, rows that were there already.
        num_embedded: Rows that this run made.
        num_failures: Images that failed in this run.
        num_changed: Rows dropped and embedded anew, since their file's content changed.
        num_updated: Rows whose file has a new time or manifest columns, but the same content.
        num_deleted: Images in the store that the source no longer has.
        num_dropped: Rows and failures dropped.
        num_repeated: Lines of a manifest that name a path again.
        skipped: Files that do not have the extension of an image format, by extension.
        failures: Of this run, by (stage, error).
        seconds: Busy time by stage, summed over threads and workers.
        waits: Seconds that shards waited for decode and for the network.
        first_started: When the first byte was read.
        last_ended: When the last shard was written.
        num_shards: Shards written.
        num_bytes: Bytes written.
        engine: Name and device.
        status: `done`, or why not.
        total_rows: Rows in the store after the run.
        total_failures: Failures in the store after the run.
        seconds_total: The whole command, in seconds.
    """

    source: str
    store: str
    options: dict[str, Any]
    started: float
    num_inputs: int
    num_repeated: int
    skipped: Counter[str]
    num_done: int = 0
    num_embedded: int = 0
    num_failures: int = 0
    num_changed: int = 0
    num_updated: int = 0
    num_deleted: int = 0
    num_dropped: int = 0
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    waits: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    first_started: float = float("inf")
    last_ended: float = 0.0
    num_shards: int = 0
    num_bytes: int = 0
    engine: str = ""
    status: str = "started"
    total_rows: int = 0
    total_failures: int = 0
    seconds_total: float = 0.0

    @classmethod
    def begin(
        cls,
        source: str | os.PathLike[str],
        store: Store,
        options: Any,
        listing: Listing,
        started: float,
    ) -> "Summary":
        """Start the record of a run with `extract.RunOptions`."""
        num_listed: int = listing.refs.num_rows
        return cls(
            source=os.fspath(source),
            store=str(store.path),
            options=asdict(options),
            started=started,
            num_inputs=min(num_listed, options.limit or num_listed),
            num_repeated=listing.num_repeated,
            skipped=listing.skipped,
        )

    def add(self, receipt: Receipt) -> None:
        """Count one shard."""
        self.num_shards += 1
        self.num_embedded += receipt.num_rows
        self.num_failures += receipt.failures.total()
        self.failures += receipt.failures
        for stage, seconds in receipt.seconds.items():
            self.seconds[stage] += seconds
        for stage, seconds in receipt.waits.items():
            self.waits[stage] += seconds
        self.num_bytes += receipt.num_bytes
        self.first_started = min(self.first_started, receipt.started)
        self.last_ended = max(self.last_ended, receipt.ended)
        self.engine = receipt.engine

    @property
    def images_per_second(self) -> float:
        """From the first byte read to the last shard written; 0 where nothing was embedded."""
        if not self.num_embedded:
            return 0.0
        return self.num_embedded / max(self.last_ended - self.first_started, 1e-9)

    @property
    def bottleneck(self) -> str:
        """The stage that held the run back, in words."""
        total = sum(self.seconds.values())
        if not total:
            return "nothing to embed"
        share = {stage: f"{self.seconds[stage] / total:.0%}" for stage in STAGES}
        if self.waits["embed"] >= self.waits["decode"]:
            return f"embed: the network ({self.engine}) takes {share['embed']} of the working time"
        slower = "read" if self.seconds["read"] > self.seconds["decode"] else "decode"
        advice = "a faster disk or network" if slower == "read" else "more cores or workers"
        return (
            f"{slower}: it takes {share[slower]} of the working time, and the network waits; "
            f"{advice} would help"
        )

    def finish(self, store: Store) -> None:
        """Count what the store holds now, and keep the record there."""
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
            "versions": engines.versions(),
            "engine": self.engine,
            "options": self.options,
            "counts": {
                "inputs": self.num_inputs,
                "done_before": self.num_done,
                "embedded": self.num_embedded,
                "failed": self.num_failures,
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
            "seconds": {stage: round(self.seconds[stage], 3) for stage in STAGES},
            "waits": {stage: round(seconds, 3) for stage, seconds in self.waits.items()},
            "images_per_second": round(self.images_per_second, 1),
            "seconds_total": round(self.seconds_total, 3),
            "bottleneck": self.bottleneck,
        }
