"""The job: plan, run, summarise."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedder import engines
from embedder.columns import VIEW
from embedder.engines import Runtime
from embedder.errors import RecipeError, StoreError, Unfinished
from embedder.extraction import cluster
from embedder.extraction.changed_files import Refreshed, refresh_shard
from embedder.extraction.cluster import Pool, WorkerContext
from embedder.extraction.options import RunOptions
from embedder.extraction.plan import Plan, drop_repeated, make_plan
from embedder.extraction.record import Receipt, Summary, grouped_reasons
from embedder.extraction.shard import Earlier, extract_shard
from embedder.extraction.worker import Job, worker_state_of
from embedder.libraries import logger, versions
from embedder.machine import gpus
from embedder.recipe import Recipe
from embedder.sources import Listing, list_images
from embedder.store import EMBEDDINGS, FAILURES, Store, check_place, lease


@dataclass
class Progress:
    """How far a run is, for whoever watches it.

    Attributes:
        phase: What is being done, in words.
        num_images: Images to embed in this run.
        num_done: Of these, embedded or failed.
        num_failures: Of these, failed.
    """

    phase: str = "listing"
    num_images: int = 0
    num_done: int = 0
    num_failures: int = 0


OnProgress = Callable[[Progress], None]  # called often, from several threads, with the same object


def run_extraction(
    source: str | os.PathLike[str] | Listing,
    recipes: dict[str, Recipe],
    options: RunOptions,
    on_progress: OnProgress | None = None,
    started: float | None = None,
) -> list[Summary]:
    """Do one run of the job, keep its record in the store, and tell what became of it.

    Args:
        source: A folder, a glob, a manifest or a URL, as `sources.list_images` takes it; or what it
            holds, where that is listed already.
        recipes: What to compute, by folder of the store. With several, an image that more than
            one of them lacks is read and decoded once for all those that want the same pixels.
        options: How.
        on_progress: Called often, from several threads, with the same object.
        started: When the command began, in seconds since the epoch; now, if None.

    Returns:
        A summary for each store.

    Raises:
        SourceError: The source is missing, empty or unreadable.
        RecipeError: The request makes no sense.
        StoreError: A store cannot be written, was made with another recipe, or is being written
            by another run.
        Unfinished: Too many images failed, or the disk is full; what is done is kept, and so is
            the record of a run that was not finished.
    """
    watch = _Watch(on_progress or (lambda _: None))
    runtime = engines.choose(options.engine, gpus())
    if options.scheduler is None:  # workers elsewhere have other devices, and check them there
        for recipe in recipes.values():
            engines.check_precision(recipe.precision, runtime)
    watch.enter("listing images")
    with ExitStack() as stack:
        # Before a store is made: a scheduler that does not answer must leave nothing behind.
        pool = (
            stack.enter_context(cluster.connect(options.scheduler, 0))
            if options.scheduler
            else None
        )
        listing = source if isinstance(source, Listing) else list_images(source)
        watch.enter("preparing the network")
        for recipe in recipes.values():
            _check_columns(listing.refs, recipe)
            engines.prepare(recipe.of_features, runtime)
        began = started or time.time()
        targets = []
        for path in sorted(recipes):  # in one order, so that two runs cannot wait for each other
            check_place(path)
            stack.enter_context(lease(path, wait=options.wait))
        for path, recipe in recipes.items():
            store = Store.open_or_create(path, recipe, versions())
            summary = Summary.begin(listing.source, store, options, listing, began)
            targets.append(_Target(store, summary, listing.refs))
        with _recorded(targets):
            watch.enter("comparing with the store")
            for target in targets:
                target.compare(options, runtime)
            if any(target.has_work for target in targets):
                if pool is None:
                    num_workers = options.workers or len(runtime.gpus) or 1
                    pool = stack.enter_context(cluster.connect(None, num_workers, runtime.gpus))
                with _settled(targets):
                    for target in targets:
                        target.refresh(pool, watch, options)
                    _embed(pool, targets, options, watch)
    return [target.summary for target in targets]


@contextmanager
def _recorded(targets: "list[_Target]") -> Iterator[None]:
    """Keep the record of a run in its stores, whatever becomes of it."""
    status = "done"
    try:
        yield
    except KeyboardInterrupt as interrupt:
        status = str(interrupt) or "interrupted"
        raise
    except Exception as error:
        status = str(error)
        raise
    finally:
        errors = []
        for target in targets:
            target.summary.status = status
            try:
                target.summary.finish(target.store)
            except StoreError as error:
                errors.append(error)
        if errors and status != "done":  # it must not hide what ended the run
            logger.warning("the run is not recorded: %s", errors[0])
        elif errors:
            raise Unfinished(f"All is done, but not recorded: {errors[0]}") from errors[0]


@contextmanager
def _settled(targets: "list[_Target]") -> Iterator[None]:
    """Leave each image one row or one failure, also where a run ends early."""
    try:
        yield
        for target in targets:
            target.tidy()
    except StoreError as error:
        raise Unfinished(f"{error}. What is written is kept; run the same command again") from error
    except BaseException:
        for target in targets:
            with suppress(StoreError):  # the next run sees to it
                target.tidy()
        raise


def _check_columns(refs: pa.Table, recipe: Recipe) -> None:
    if taken := set(refs.column_names).intersection(recipe.columns):
        raise RecipeError(
            f"A manifest's columns must have other names than the layers. "
            f"Received: {', '.join(sorted(taken))} in both"
        )
    if recipe.views > 1 and VIEW in refs.column_names:
        raise RecipeError(
            f"With several views, `{VIEW}` is the column of their numbers, and a manifest cannot "
            f"have one of that name. Received: {', '.join(refs.column_names)}"
        )


class _Watch:
    """Passes on how far the run is."""

    def __init__(self, on_progress: OnProgress) -> None:
        self.progress = Progress()
        self._on_progress = on_progress

    def enter(self, phase: str, num_images: int = 0) -> None:
        self.progress.phase, self.progress.num_images = phase, num_images
        self.progress.num_done = self.progress.num_failures = 0
        self._on_progress(self.progress)

    def add(self, num_done: int, num_failures: int = 0) -> None:
        self.progress.num_done += num_done
        self.progress.num_failures += num_failures
        self._on_progress(self.progress)


class _Target:
    """One store of a run: what it lacks, and what becomes of it."""

    def __init__(self, store: Store, summary: Summary, refs: pa.Table) -> None:
        self.store, self.summary = store, summary
        self._refs = refs
        self._plan: Plan
        self._replaced: dict[str, str] = {}  # sha256 of the rows that are to be replaced
        self._shard_of: dict[str, str] = {}  # where they are
        self.job: Job
        self.todo: pa.Table

    def compare(self, options: RunOptions, runtime: Runtime) -> None:
        """Plan what to do, and drop what the plan and the options say is to go.

        Raises:
            RecipeError: More would be pruned than is allowed.
            StoreError: The store has damaged shards, or shards of another recipe.
        """
        if options.repair:
            self.summary.repaired = self.store.put_damaged_aside()
            for name, reason in self.summary.repaired.items():
                logger.warning("%s is put aside, in damaged/, and made again: %s", name, reason)
        self.summary.num_dropped += drop_repeated(self.store, self._refs)
        plan = self._plan = make_plan(
            self._refs, self.store, limit=options.limit, retry_failed=options.retry_failed
        )
        self.summary.num_done, self.summary.num_deleted = plan.num_done, plan.num_deleted
        self.summary.num_retried = len(plan.stale_failures)
        if options.prune:
            _check_prune(plan, options.prune_share)
            self.store.drop(plan.deleted)
            self.store.drop(plan.deleted_failures, FAILURES)
            self.summary.num_dropped += plan.num_deleted
        num_images = plan.missing.num_rows + plan.stale.num_rows
        self.job = Job(
            self.store.recipe,
            self.store.address,
            options.engine,
            options.batch_size,
            num_images,
            None if options.scheduler else runtime.gpus,
        )

    @property
    def has_work(self) -> bool:
        return self.job.num_images > 0

    def refresh(self, pool: Pool, watch: _Watch, options: RunOptions) -> None:
        """Find out which of the files that look changed are to be embedded again.

        Raises:
            Unfinished: Too many files cannot be read.
        """
        stale, summary = self._plan.stale, self.summary
        self.todo = self._plan.missing
        if stale.num_rows == 0:
            return
        watch.enter("comparing changed files", stale.num_rows)
        by_shard = (
            (self.job, name, stale.filter(pc.equal(stale["shard"], name)))
            for name in pc.unique(stale["shard"]).to_pylist()
        )
        with closing(pool.run(_refresh_shard, by_shard, watch.add)) as results:
            for found in results:
                self._replaced |= found.replaced
                summary.num_updated += found.num_same
                summary.unreadable += found.unreadable
        summary.num_changed = len(self._replaced)
        is_replaced = pc.is_in(stale["image_id"], pa.array([*self._replaced], pa.string()))
        replaced = stale.filter(is_replaced)
        self._shard_of = dict(
            zip(replaced["image_id"].to_pylist(), replaced["shard"].to_pylist(), strict=True)
        )
        changed = replaced.drop_columns(["shard", "same_file"])
        self.todo = pa.concat_tables([self.todo, changed]).sort_by("image_id")
        self._check_failures(options.max_failures)

    def earlier(self, refs: pa.Table) -> Earlier:
        """What the store has of images that are to be embedded."""
        known = self._plan.stale_failures.keys() | self._replaced.keys()
        if not known:
            return {}
        ids = refs["image_id"].to_pylist()
        return {image_id: self._replaced.get(image_id) for image_id in ids if image_id in known}

    def add(self, receipt: Receipt, max_failures: float) -> None:
        """Count one shard, and drop what its rows and failures take the place of.

        Raises:
            Unfinished: Too many images failed.
            StoreError: A shard cannot be read or written.
        """
        self.summary.add(receipt)
        for kind, shard_of in (
            (EMBEDDINGS, self._shard_of),
            (FAILURES, self._plan.stale_failures),
        ):
            superseded: dict[str, list[str]] = {}
            for image_id in receipt.settled:
                # A shard's new failures have been written over its old ones.
                is_gone = (
                    kind == FAILURES
                    and receipt.failures
                    and (shard_of.get(image_id) == receipt.shard)
                )
                if image_id in shard_of and not is_gone:
                    superseded.setdefault(shard_of[image_id], []).append(image_id)
            self.store.drop(superseded, kind)
        self._check_failures(max_failures)

    def _check_failures(self, max_failures: float) -> None:
        summary = self.summary
        num_unreadable = summary.unreadable.total()
        num_failed = self._plan.num_failed + summary.num_failures + num_unreadable
        if num_failed > max_failures * summary.num_inputs:
            raise Unfinished(_too_many_failures(num_failed, max_failures, summary))

    def tidy(self) -> None:
        """Leave the store as if one run had made it."""
        self.summary.num_dropped += drop_repeated(self.store, self._refs)
        self.store.remove_abandoned()  # of an earlier run, whose workers died meanwhile


def _check_prune(plan: Plan, prune_share: float) -> None:
    """Refuse to drop more than is likely to have been deleted.

    Raises:
        RecipeError: It is more.
    """
    if plan.num_deleted > math.ceil(prune_share * plan.num_stored):
        raise RecipeError(
            f"`--prune` drops a share of {prune_share} of a store at most, in case a disk is "
            f"missing or the source is another. Received: a source that no longer has "
            f"{plan.num_deleted:,} of {plan.num_stored:,} images. If they are to go, say so with "
            f"a larger --prune-share. Nothing was changed"
        )


def _embed(pool: Pool, targets: list[_Target], options: RunOptions, watch: _Watch) -> None:
    by_store = {target.job.store: target for target in targets}
    work = list(_shared_work(targets))
    watch.enter("embedding", sum(refs.num_rows for _, refs in work))
    for target in targets:
        target.summary.num_workers = pool.num_workers
    shards = (
        (jobs, refs, [by_store[job.store].earlier(refs) for job in jobs])
        for jobs, todo in work
        for refs in _shards(todo, options.shard_size)
    )
    with closing(pool.run(_extract_shard, shards, watch.add)) as results:
        for receipts in results:
            for store, receipt in receipts.items():
                by_store[store].add(receipt, options.max_failures)


def _shared_work(targets: list[_Target]) -> Iterator[tuple[list[Job], pa.Table]]:
    """What is to be embedded: refs, and the jobs of all stores that lack them."""
    same_pixels: dict[Any, list[_Target]] = {}
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


def _shards(todo: pa.Table, shard_size: int) -> Iterator[pa.Table]:
    for start in range(0, todo.num_rows, shard_size):
        yield todo.slice(start, shard_size).combine_chunks()


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


# What runs on the workers. -----------------------------------------------------------------


def _extract_shard(
    task: WorkerContext, jobs: list[Job], refs: pa.Table, earlier: list[Earlier]
) -> dict[str, Receipt]:
    states = [worker_state_of(job, task.num_threads()) for job in jobs]
    receipts = extract_shard(jobs, states, refs, task.report, task.is_stopped, earlier)
    return dict(zip((job.store for job in jobs), receipts, strict=True))


def _refresh_shard(task: WorkerContext, job: Job, name: str, refs: pa.Table) -> Refreshed:
    found = refresh_shard(Store(job.store), name, refs, task.is_stopped)
    task.report(refs.num_rows)
    return found
