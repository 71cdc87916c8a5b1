"""The stores of a run, each compared with the listing, and what they lack together."""

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedder.engines import Runtime
from embedder.errors import RequestError, Unfinished
from embedder.extraction.changed_files import Refreshed, refresh_shard
from embedder.extraction.cluster import Pool, WorkerContext
from embedder.extraction.decoders import Feeding
from embedder.extraction.options import RunOptions
from embedder.extraction.plan import Plan, drop_repeated, make_plan, shards_by_id
from embedder.extraction.record import Receipt, Summary, grouped_reasons
from embedder.extraction.shard import Earlier
from embedder.extraction.worker import Job
from embedder.libraries import logger
from embedder.store import FAILURES, Part, Store


@dataclass
class Target:
    """One store of a run: what it lacks, and what becomes of it.

    Attributes:
        store: The store.
        summary: The record of the run.
        refs: Of the source, or of the part.
        part: Of all images, which is all that the run touches; None for all.
        options: Of the run.
        plan: What there is to do.
        job: What the shards have in common.
        todo: Refs of the images to be embedded.
        replaced: sha256 of the rows that are to be replaced, by id.
        shard_of: Where these rows are, by id.
    """

    store: Store
    summary: Summary
    refs: pa.Table
    part: Part | None
    options: RunOptions
    plan: Plan
    job: Job
    todo: pa.Table
    replaced: dict[str, str] = field(default_factory=dict)
    shard_of: dict[str, str] = field(default_factory=dict)

    @property
    def has_work(self) -> bool:
        """Whether any image is to be embedded, or any file to be compared."""
        return self.job.num_images > 0

    def refresh(self, pool: Pool, on_report: Callable[..., None]) -> None:
        """Find out which of the files that look changed are to be embedded again.

        Raises:
            Unfinished: Too many files cannot be read.
        """
        stale, summary = self.plan.stale, self.summary
        by_shard = (
            (self.job, name, stale.filter(pc.equal(stale["shard"], name)))
            for name in pc.unique(stale["shard"]).to_pylist()
        )
        with closing(pool.run(_refresh_shard, by_shard, on_report)) as results:
            for found in results:
                self.replaced |= found.replaced
                summary.num_updated += found.num_same
                summary.unreadable += found.unreadable
        summary.num_changed = len(self.replaced)
        is_replaced = pc.is_in(stale["image_id"], pa.array([*self.replaced], pa.string()))
        replaced = stale.filter(is_replaced)
        self.shard_of = shards_by_id(replaced)
        changed = replaced.drop_columns(["shard", "same_file"])
        self.todo = pa.concat_tables([self.todo, changed]).sort_by("image_id")
        self._check_failures()

    def earlier(self, refs: pa.Table) -> Earlier:
        """What the store has of images that are to be embedded."""
        known = self.plan.stale_failures.keys() | self.replaced.keys()
        if not known:
            return {}
        ids = refs["image_id"].to_pylist()
        return {image_id: self.replaced.get(image_id) for image_id in ids if image_id in known}

    def add(self, receipt: Receipt) -> None:
        """Count one shard, and drop what its rows and failures take the place of.

        Raises:
            Unfinished: Too many images failed.
            StoreError: A shard cannot be read or written.
        """
        self.summary.add(receipt)
        rows = [(i, self.shard_of[i]) for i in receipt.settled if i in self.shard_of]
        self.store.drop(rows)
        shard_of = self.plan.stale_failures
        failures = [(i, shard_of[i]) for i in receipt.settled if i in shard_of]
        if receipt.failures:  # which have been written over the old ones of this shard
            failures = [(i, shard) for i, shard in failures if shard != receipt.shard]
        self.store.drop(failures, FAILURES)
        self._check_failures()

    def _check_failures(self) -> None:
        summary, max_failures = self.summary, self.options.max_failures
        num_unreadable = summary.unreadable.total()
        num_failed = self.plan.num_failed + summary.num_failures + num_unreadable
        if num_failed > max_failures * summary.num_inputs:
            raise Unfinished(_too_many_failures(num_failed, max_failures, summary))

    def tidy(self) -> None:
        """Leave the store as if one run had made it."""
        self.summary.num_dropped += drop_repeated(self.store, self.refs, self.part)
        if self.part is None:  # else others may be writing them, on machines of the same name
            self.store.remove_abandoned()  # of an earlier run, whose workers died meanwhile


def compare(
    store: Store, summary: Summary, refs: pa.Table, options: RunOptions, runtime: Runtime
) -> Target:
    """Plan what a run does to a store, and drop what the plan and the options say is to go.

    Args:
        store: The store.
        summary: The record of the run, begun.
        refs: Of the source.
        options: Of the run.
        runtime: What computes, unless workers elsewhere do.

    Raises:
        RequestError: More would be pruned than is allowed.
        StoreError: The store has damaged shards, or shards of another recipe.
    """
    if options.repair:
        summary.repaired = store.put_damaged_aside()
        for name, reason in summary.repaired.items():
            logger.warning("%s is put aside, in damaged/, and made again: %s", name, reason)
    part = Part.parse(options.part) if options.part else None
    summary.num_dropped += drop_repeated(store, refs, part)
    plan = make_plan(refs, store, part=part, limit=options.limit, retry_failed=options.retry_failed)
    summary.num_done, summary.num_deleted = plan.num_done, plan.num_deleted
    summary.num_retried = len(plan.stale_failures)
    if options.prune:
        _check_prune(plan, options.prune_share)
        store.drop(plan.deleted.items())
        store.drop(plan.deleted_failures.items(), FAILURES)
        summary.num_dropped += plan.num_deleted
    job = Job(
        store.recipe,
        store.address,
        options.engine,
        options.batch_size,
        num_images=plan.missing.num_rows + plan.stale.num_rows,
        runtime=None if options.scheduler else runtime,
        feeding=Feeding(
            options.decoders, options.decode_timeout, options.read_ahead, options.allow_private
        ),
    )
    return Target(store, summary, refs, part, options, plan, job, plan.missing)


def _check_prune(plan: Plan, prune_share: float) -> None:
    """Refuse to drop more than is likely to have been deleted.

    Raises:
        RequestError: It is more.
    """
    if plan.num_deleted > math.ceil(prune_share * plan.num_stored):
        raise RequestError(
            f"`--prune` drops a share of {prune_share} of a store at most, in case a disk is "
            f"missing or the source is another. Received: a source that no longer has "
            f"{plan.num_deleted:,} of {plan.num_stored:,} images. If they are to go, say so with "
            f"a larger --prune-share. Nothing was changed"
        )


def shared_work(targets: list[Target]) -> Iterator[tuple[list[Job], pa.Table]]:
    """What is to be embedded: refs, and the jobs of all stores that lack them."""
    same_pixels: dict[Any, list[Target]] = {}
    for target in targets:
        same_pixels.setdefault(target.job.recipe.pixels, []).append(target)
    if len(same_pixels) > 1:
        first, other = (group[0].store.recipe for group in list(same_pixels.values())[:2])
        logger.info(
            "%s and %s do not see the same pixels, so images are decoded for each: %s",
            *(first.backbone, other.backbone, "; ".join(first.differences_in_pixels(other))),
        )
    for group in same_pixels.values():
        todo = group[0].todo
        for target in group[1:]:
            is_new = pc.invert(pc.is_in(target.todo["image_id"], todo["image_id"]))
            todo = pa.concat_tables([todo, target.todo.filter(is_new)])
        if todo.num_rows == 0:
            continue
        todo = todo.sort_by("image_id")
        lacks = np.array(
            [pc.is_in(todo["image_id"], target.todo["image_id"]).to_numpy() for target in group]
        )
        for which in np.unique(lacks, axis=1).T:
            jobs = [target.job for target, wanted in zip(group, which, strict=True) if wanted]
            yield jobs, todo.filter(pa.array((lacks == which[:, None]).all(axis=0)))


def _too_many_failures(num_failed: int, max_failures: float, summary: Summary) -> str:
    reasons = grouped_reasons(summary.failures + summary.unreadable).most_common(3)
    most = "; ".join(f"{count:,} x {stage}: {error}" for (stage, error), count in reasons)
    most = f"Most often: {most}" if most else "All of them in earlier runs"
    return (
        f"{num_failed:,} of {summary.num_inputs:,} images failed; `--max-failures` allows a share "
        f"of {max_failures}. {most}. What is done is kept, and so are rows of images "
        f"that cannot be read now: see "
        f"`embedder inspect {summary.store}`, and run again with a larger share to go on"
    )


def _refresh_shard(task: WorkerContext, job: Job, name: str, refs: pa.Table) -> Refreshed:
    num_threads = task.num_threads()
    found = refresh_shard(Store(job.store), name, refs, task.is_stopped, num_threads, job.feeding)
    task.report(refs.num_rows)
    return found
