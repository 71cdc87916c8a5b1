"""The job: plan, run, summarise."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace

import pyarrow as pa

from embedder import engines
from embedder.columns import VIEW
from embedder.engines import Runtime
from embedder.errors import RequestError, StoreError, Unfinished
from embedder.extraction import cluster
from embedder.extraction.cluster import Pool, WorkerContext
from embedder.extraction.decoder_link import start_ahead
from embedder.extraction.options import RunOptions
from embedder.extraction.record import Receipt, Summary
from embedder.extraction.shard import Earlier, extract_shard
from embedder.extraction.targets import Target, compare, shared_work
from embedder.extraction.worker import MIN_IMAGES_TO_MEASURE, Job, worker_state_of
from embedder.extraction.worker_gpus import share_of_cores
from embedder.libraries import keras_backend, logger, versions
from embedder.machine import gpus, num_cores
from embedder.recipe import Recipe
from embedder.sources import Listing, list_images
from embedder.store import Part, Store, check_place, lease, share_of

_SHARDS_PER_WORKER = 2  # which overlaps one's start and end with the other's middle
# Two batches of the largest that a CPU's engine takes: with one, nothing would be decoded while it
# is embedded, and much smaller files are many to open for whoever reads the store.
_MIN_SHARD_IMAGES = 64


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
        options: Workers, engine, shard size and the like.
        on_progress: Called often, from several threads, with the same object.
        started: When the command began, in seconds since the epoch; now, if None.

    Returns:
        A summary for each store.

    Raises:
        SourceError: The source is missing, empty or unreadable.
        RequestError: The request makes no sense.
        StoreError: A store cannot be written, was made with another recipe, or is being written
            by another run.
        Unfinished: Too many images failed, or the disk is full; what is done is kept, and so is
            the record of a run that was not finished.
    """
    part, began = _part_of(options), started or time.time()
    watch = _Watch(on_progress or (lambda _: None))
    runtime = _runtime_of(recipes, options)
    watch.enter("listing images")
    with ExitStack() as stack:
        # Before a store is made: a scheduler that does not answer must leave nothing behind.
        pool = None
        if options.scheduler:
            with_gpus = options.engine != "openvino"
            pool = stack.enter_context(cluster.connect(options.scheduler, 0, with_gpus=with_gpus))
        listing = _listing_of(source, part)
        watch.enter("preparing the network")
        runtime = _fastest(runtime, recipes, options, listing)
        is_here = _is_here(options, runtime)
        if is_here and not all(map(os.path.exists, recipes)):  # a new store, so there is work
            _start_decoders(options)
        for path, recipe in recipes.items():
            _check_columns(listing.refs, recipe)
            if is_here or not os.path.exists(path):  # a process apart takes seconds to start
                stack.callback(engines.forget_prepared, recipe.of_features)
                engines.prepare(recipe.of_features, runtime, is_here)
        for path in sorted(recipes):  # in one order, so that two runs cannot wait for each other
            check_place(path)
            stack.enter_context(lease(path, part=part, wait=options.wait))
        begun = _begin(recipes, options, listing, began)
        with _recorded(begun):
            watch.enter("comparing with the store")
            targets = [compare(*both, listing.refs, options, runtime) for both in begun]
            if any(target.has_work for target in targets):
                if is_here:
                    _start_decoders(options)
                if pool is None:
                    pool = stack.enter_context(_local_pool(options, runtime, is_here))
                with _settled(targets):
                    _refresh(pool, targets, watch)
                    _embed(pool, targets, options.shard_size, watch)
    return [summary for _, summary in begun]


def _listing_of(source: str | os.PathLike[str] | Listing, part: Part | None) -> Listing:
    listing = source if isinstance(source, Listing) else list_images(source)
    return replace(listing, refs=share_of(listing.refs, part))


def _part_of(options: RunOptions) -> Part | None:
    """The part of the images that a run touches; None for all.

    Raises:
        RequestError: Something else is asked for that touches others.
    """
    if options.part is None:
        return None
    if options.repair:
        raise RequestError(
            f"`repair` must be done by a run of the whole source, since damaged shards can hold "
            f"images of other parts. Received: part={options.part}"
        )
    return Part.parse(options.part)


def _runtime_of(recipes: dict[str, Recipe], options: RunOptions) -> Runtime:
    """What computes, on this machine, which must have the precision that is asked for.

    Raises:
        EngineError: It does not.
    """
    if options.scheduler is not None:  # workers elsewhere have other devices, and choose there
        return engines.choose(options.engine, [])
    runtime = engines.choose(options.engine, gpus())
    for recipe in recipes.values():
        engines.check_precision(recipe.precision, runtime)
    return runtime


def _fastest(
    runtime: Runtime, recipes: dict[str, Recipe], options: RunOptions, listing: Listing
) -> Runtime:
    """Of several engines that can use the GPUs the fastest, unless one is asked for."""
    if options.engine != "auto" or not runtime.gpus:
        return runtime
    recipe = next(iter(recipes.values()))
    num_threads = share_of_cores(_num_local_workers(options, runtime))
    is_long = listing.refs.num_rows * recipe.views >= MIN_IMAGES_TO_MEASURE
    return engines.fastest(recipe.of_features, gpus(), runtime, num_threads, is_worth_it=is_long)


def _num_local_workers(options: RunOptions, runtime: Runtime) -> int:
    """Worker processes on this machine; 0 where a scheduler has them."""
    return 0 if options.scheduler else options.workers or len(runtime.gpus) or 1


def _is_here(options: RunOptions, runtime: Runtime) -> bool:
    """Whether this process is the worker.

    It cannot be where Keras runs on another backend; nor is it where there are several GPUs and one
    worker, since a framework would take memory of each.
    """
    is_alone = _num_local_workers(options, runtime) == 1 and len(runtime.gpus) <= 1
    return is_alone and engines.claim_process(runtime.engine)


def _local_pool(
    options: RunOptions, runtime: Runtime, is_here: bool
) -> AbstractContextManager[Pool]:
    num_workers = _num_local_workers(options, runtime)
    if num_workers == 1 and not engines.runs_here(runtime.engine):
        logger.info(
            "Keras runs on %s in this process, so %s runs in a process of its own",
            *(keras_backend(), runtime.engine),
        )
    environment = {} if runtime.engine == "openvino" else {"KERAS_BACKEND": runtime.engine}
    return cluster.connect(
        None, num_workers, runtime.gpus, in_process=is_here, environment=environment
    )


def _start_decoders(options: RunOptions) -> None:
    """Start what is wanted soon, as this process is the worker; a second time does nothing."""
    start_ahead(options.decoders or num_cores())


def _begin(
    recipes: dict[str, Recipe], options: RunOptions, listing: Listing, began: float
) -> list[tuple[Store, Summary]]:
    """The stores of a run, made where there are none, and its record in each."""
    is_shared = options.part is not None
    stores = [
        Store.open_or_create(path, recipe, versions(), is_shared=is_shared)
        for path, recipe in recipes.items()
    ]
    return [(store, Summary.begin(store, options, listing, began)) for store in stores]


@contextmanager
def _recorded(begun: list[tuple[Store, Summary]]) -> Iterator[None]:
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
        for store, summary in begun:
            summary.status = status
            try:
                summary.finish(store)
            except StoreError as error:
                errors.append(error)
        if errors and status != "done":  # it must not hide what ended the run
            logger.warning("the run is not recorded: %s", errors[0])
        elif errors:
            raise Unfinished(f"All is done, but not recorded: {errors[0]}") from errors[0]


@contextmanager
def _settled(targets: list[Target]) -> Iterator[None]:
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
        raise RequestError(
            f"A manifest's columns must have other names than the layers. "
            f"Received: {', '.join(sorted(taken))} in both"
        )
    if recipe.views > 1 and VIEW in refs.column_names:
        raise RequestError(
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


def _refresh(pool: Pool, targets: list[Target], watch: _Watch) -> None:
    for target in targets:
        if num_stale := target.plan.stale.num_rows:
            watch.enter("comparing changed files", num_stale)
            target.refresh(pool, watch.add)


def _embed(pool: Pool, targets: list[Target], shard_size: int, watch: _Watch) -> None:
    by_store = {target.job.store: target for target in targets}
    work = list(shared_work(targets))
    watch.enter("embedding", sum(refs.num_rows for _, refs in work))
    for target in targets:
        target.summary.num_workers = pool.num_workers
    shard_size = _shared_out(watch.progress.num_images, pool.num_workers, shard_size)
    shards = (
        (jobs, refs, [by_store[job.store].earlier(refs) for job in jobs])
        for jobs, todo in work
        for refs in _shards(todo, shard_size)
    )
    with closing(pool.run(_extract_shard, shards, watch.add)) as results:
        for receipts in results:
            for store, receipt in receipts.items():
                by_store[store].add(receipt)
                by_store[store].summary.num_workers = pool.mean_workers


def _shared_out(num_images: int, num_workers: int, shard_size: int) -> int:
    """Images in a shard, so few that every worker of a short run has work.

    Args:
        num_images: To be embedded.
        num_workers: Processes; one alone has nobody to share with.
        shard_size: At most.
    """
    if num_workers == 1 or not num_images:
        return shard_size
    num_shards = min(_SHARDS_PER_WORKER * num_workers, num_images // _MIN_SHARD_IMAGES)
    return min(shard_size, math.ceil(num_images / max(1, num_shards)))


def _shards(todo: pa.Table, shard_size: int) -> Iterator[pa.Table]:
    for start in range(0, todo.num_rows, shard_size):
        yield todo.slice(start, shard_size).combine_chunks()


# What runs on the workers. -----------------------------------------------------------------


def _extract_shard(
    task: WorkerContext, jobs: list[Job], refs: pa.Table, earlier: list[Earlier]
) -> dict[str, Receipt]:
    states = [worker_state_of(job, task.num_threads()) for job in jobs]
    receipts = extract_shard(jobs, states, refs, task.report, task.is_stopped, earlier)
    return dict(zip((job.store for job in jobs), receipts, strict=True))
