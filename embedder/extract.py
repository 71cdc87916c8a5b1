"""The job: plan, run, summarise."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from embedder import cluster, engines
from embedder.backbones import DEFAULT_BACKBONE, make_recipe
from embedder.cluster import Pool, Task
from embedder.errors import RecipeError, StoreError, Unfinished
from embedder.pipeline import Job, Receipt, extract_shard, toolbox_of
from embedder.plan import Plan, drop_repeated, make_plan
from embedder.recipe import Recipe
from embedder.refresh import refresh_shard
from embedder.sources import list_images
from embedder.store import FAILURES, Store, remove_abandoned
from embedder.summary import Summary

# At 1,280 float32 a row this is 5 MB a shard: some seconds of work to lose in a crash, and few
# enough files for a million images.
DEFAULT_SHARD_SIZE = 1024


@dataclass(frozen=True)
class RunOptions:
    """How a run is done; nothing here changes a vector.

    Attributes:
        engine: `auto`, `openvino` or `tensorflow`.
        batch_size: Images in a batch; None for the smallest at which the engine is as fast as it
            gets: measured by the first run that is long enough to gain by it, and remembered.
        shard_size: Images in a shard: the unit of work, of output and of what a crash can lose.
        workers: Local worker processes, where 1 works within this process; None for one per GPU,
            or 1 where there is none.
        scheduler: Address of a running Dask scheduler, in place of local workers.
        limit: Only the first so many images of the source.
        max_failures: Share of the source's images, 0 to 1, that may fail.
        retry_failed: Whether images that failed before are tried again though unchanged.
        prune: Whether rows of images that the source no longer has are dropped.
    """

    engine: str = "auto"
    batch_size: int | None = None
    shard_size: int = DEFAULT_SHARD_SIZE
    workers: int | None = None
    scheduler: str | None = None
    limit: int | None = None
    max_failures: float = 0.1
    retry_failed: bool = False
    prune: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            RecipeError: A value makes no sense.
            EngineError: The engine is unknown.
        """
        for name in ("batch_size", "shard_size", "workers", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"`{name}` must be at least 1. Received: {name}={value}")
        if not 0.0 <= self.max_failures <= 1.0:
            raise RecipeError(
                f"`max_failures` must be a share between 0 and 1. "
                f"Received: max_failures={self.max_failures}"
            )
        engines.choose(self.engine)

    @property
    def num_workers(self) -> int:
        """Local worker processes."""
        return self.workers or len(engines.gpus_of(self.engine)) or 1


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


def extract(source: str | os.PathLike[str], store: str | os.PathLike[str], **options: Any) -> Store:
    """Embed the images of a source into a store; what the store has already is not done again.

    Args:
        source: A folder, a glob, a manifest or a URL; see `sources.list_images`.
        store: Folder of the store; made if it does not exist.
        **options: Attributes of `Recipe` (first of all `backbone`) and of `RunOptions`.

    Returns:
        The store, of which every image of the source is now a row or a failure.

    Raises:
        RecipeError: The request makes no sense.
        SourceError: The source is missing, empty or unreadable.
        StoreError: The store cannot be written, or was made with another recipe.
        Unfinished: Too many images failed, or the disk is full; what is done is kept.
    """
    run_names = {field.name for field in fields(RunOptions)}
    run_options = {name: options.pop(name) for name in run_names & options.keys()}
    if unknown := options.keys() - Recipe.model_fields.keys():
        known = ", ".join(sorted({*run_names, *Recipe.model_fields}))
        raise RecipeError(f"Unknown option: {', '.join(sorted(unknown))}. There are: {known}")
    recipe = make_recipe(options.pop("backbone", DEFAULT_BACKBONE), **options)
    run_extraction(source, store, recipe, RunOptions(**run_options))
    return Store(store)


def run_extraction(
    source: str | os.PathLike[str],
    store_path: str | os.PathLike[str],
    recipe: Recipe,
    options: RunOptions,
    on_progress: Callable[[Progress], None] | None = None,
    started: float | None = None,
) -> Summary:
    """Do one run of the job, keep its record in the store, and tell what became of it.

    Args:
        source: As in `extract`.
        store_path: Folder of the store.
        recipe: What to compute.
        options: How.
        on_progress: Called often, from several threads, with the same object.
        started: When the command began, in seconds since the epoch; now, if None.

    Raises:
        EmbedderError: As in `extract`. A run that was not finished leaves its record too.
    """
    watch = _Watch(on_progress or (lambda _: None))
    if options.scheduler is None:  # workers elsewhere have other devices, and check them there
        engines.check_precision(recipe.precision, options.engine)
    watch.enter("listing images")
    with ExitStack() as stack:
        # Before the store is made: a scheduler that does not answer must leave nothing behind.
        pool = (
            stack.enter_context(cluster.connect(options.scheduler, 0))
            if options.scheduler
            else None
        )
        listing = list_images(source)
        _check_columns(listing.refs, recipe)
        watch.enter("preparing the network")
        engines.prepare(recipe, options.engine)
        store = Store.open_or_create(store_path, recipe, engines.versions())
        summary = Summary.begin(source, store, options, listing, started or time.time())
        try:
            watch.enter("comparing with the store")
            summary.num_dropped += drop_repeated(store)
            plan = make_plan(
                listing.refs, store, limit=options.limit, retry_failed=options.retry_failed
            )
            summary.num_done, summary.num_deleted = plan.num_done, plan.num_deleted
            if options.prune:
                summary.num_dropped += _prune(store, plan)
            if plan.missing.num_rows or plan.stale.num_rows:
                if pool is None:
                    pool = stack.enter_context(cluster.connect(None, options.num_workers))
                num_images = plan.missing.num_rows + plan.stale.num_rows
                path = str(store.path.absolute())
                job = Job(recipe, path, options.engine, options.batch_size, num_images)
                changed = _refresh(pool, job, plan, summary, watch)
                store.drop(plan.stale_failures, FAILURES)
                todo = pa.concat_tables([plan.missing, changed]).sort_by("image_id")
                _embed(pool, job, todo, options, plan.num_failed, summary, watch)
            summary.num_dropped += drop_repeated(store)
            remove_abandoned(store.path)  # of an earlier run, whose workers died meanwhile
            summary.status = "done"
        except StoreError as error:
            summary.status = str(error)
            raise Unfinished(
                f"{error}. What is written is kept; run the same command again"
            ) from error
        except KeyboardInterrupt:
            summary.status = "interrupted"
            raise
        except Exception as error:
            summary.status = str(error)
            raise
        finally:
            summary.finish(store)
    return summary


def _check_columns(refs: pa.Table, recipe: Recipe) -> None:
    if taken := set(refs.column_names).intersection(recipe.columns):
        raise RecipeError(
            f"A manifest's columns must have other names than the layers. "
            f"Received: {', '.join(sorted(taken))} in both"
        )


class _Watch:
    """Passes on how far the run is."""

    def __init__(self, on_progress: Callable[[Progress], None]) -> None:
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


def _prune(store: Store, plan: Plan) -> int:
    store.drop(plan.deleted)
    store.drop(plan.deleted_failures, FAILURES)
    return plan.num_deleted


def _refresh(pool: Pool, job: Job, plan: Plan, summary: Summary, watch: _Watch) -> pa.Table:
    """Update rows whose content is the same; drop the others, and return their refs."""
    stale = plan.stale
    if stale.num_rows == 0:
        return plan.missing.slice(0, 0)
    watch.enter("comparing changed files", stale.num_rows)
    by_shard = (
        (job, name, stale.filter(pc.equal(stale["shard"], name)))
        for name in pc.unique(stale["shard"]).to_pylist()
    )
    changed_ids: list[str] = []
    with closing(pool.run(_refresh_shard, by_shard, watch.add)) as results:
        for ids in results:
            changed_ids.extend(ids)
    summary.num_changed = len(changed_ids)
    summary.num_updated = stale.num_rows - len(changed_ids)
    changed = stale.filter(pc.is_in(stale["image_id"], pa.array(changed_ids, pa.string())))
    return changed.drop_columns(["shard", "same_file"])


def _embed(
    pool: Pool,
    job: Job,
    todo: pa.Table,
    options: RunOptions,
    num_failed_before: int,
    summary: Summary,
    watch: _Watch,
) -> None:
    watch.enter("embedding", todo.num_rows)
    summary.num_workers = pool.num_workers
    shards = ((job, refs) for refs in _shards(todo, options.shard_size))
    with closing(pool.run(_extract_shard, shards, watch.add)) as receipts:
        for receipt in receipts:
            summary.add(receipt)
            num_failed = num_failed_before + summary.num_failures
            if num_failed > options.max_failures * summary.num_inputs:
                raise Unfinished(_too_many_failures(num_failed, options, summary))


def _shards(todo: pa.Table, shard_size: int) -> Iterator[pa.Table]:
    for start in range(0, todo.num_rows, shard_size):
        yield todo.slice(start, shard_size).combine_chunks()


def _too_many_failures(num_failed: int, options: RunOptions, summary: Summary) -> str:
    reasons: Counter[str] = Counter()
    for (stage, error), count in summary.failures.items():
        reasons[f"{stage}: {error}"] += count
    most = "; ".join(f"{count:,} x {reason}" for reason, count in reasons.most_common(3))
    return (
        f"{num_failed:,} of {summary.num_inputs:,} images failed; `--max-failures` allows a share "
        f"of {options.max_failures}. Most often: {most}. What is done is kept: see "
        f"`embedder inspect {summary.store}`, and run again with a larger share to go on"
    )


# What runs on the workers. -----------------------------------------------------------------


def _extract_shard(task: Task, job: Job, refs: pa.Table) -> Receipt:
    toolbox = toolbox_of(job, task.num_threads())
    return extract_shard(job, toolbox, refs, task.report, task.is_stopped)


def _refresh_shard(task: Task, job: Job, name: str, refs: pa.Table) -> list[str]:
    changed_ids = refresh_shard(Store(job.store), name, refs, task.is_stopped)
    task.report(refs.num_rows)
    return changed_ids
