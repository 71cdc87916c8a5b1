"""Many tasks on Dask: a local cluster by default, any scheduler by address, one code path."""

import asyncio
import functools
import logging
import queue
import signal
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import distributed
from distributed.client import ClosedClientError, FutureCancelledError

from embedder import __version__
from embedder.errors import ClusterError, Unfinished
from embedder.extraction.crew import (
    ANSWER_SECONDS,
    LOOK_SECONDS,
    TASKS_PER_WORKER,
    Crew,
    NobodyLeft,
)
from embedder.extraction.worker_gpus import (
    Place,
    local_places,
    run_on_first_gpu,
    share_of_cores,
    take_place,
)
from embedder.libraries import children_with

_ROOT = Path("/")
_WORKERS_SECONDS = 30  # for the first worker of a scheduler that has none yet
_STOP_SECONDS = 3  # for tasks in work to be given up; one may be in a decoder that never ends
_CLOSE_SECONDS = 5  # for local workers to end, before they are killed
_PLACES = "embedder.places"  # in Dask's configuration, which local workers are given


@dataclass(frozen=True)
class WorkerContext:
    """What a function that runs on a worker is given to talk to the run that started it."""

    topic: str
    threads_per_worker: int | None

    def report(self, *counts: int) -> None:
        """Send counts to the run's `on_report`."""
        distributed.get_worker().log_event(self.topic, list(counts))

    def is_stopped(self) -> bool:
        """Whether the run has been stopped, and the task may be given up."""
        return self.topic in _stopped_topics

    def num_threads(self) -> int:
        """CPU threads to use: this worker's share of the cores, or what it was started with."""
        return self.threads_per_worker or int(distributed.get_worker().state.nthreads)


_stopped_topics: set[str] = set()


def _stop(topic: str) -> None:
    _stopped_topics.add(topic)


def dask_setup(worker: distributed.Worker) -> None:
    """Give a local worker process its GPU and its cores, and let it outlive Ctrl-C.

    Dask calls this by name in each such process before its first task. Ctrl-C reaches the workers
    from the terminal too; the run itself tells them to stop.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    take_place(Place(*dask.config.get(_PLACES)[int(worker.name)]))


class Pool:
    """Workers that run functions."""

    def __init__(
        self,
        client: distributed.Client,
        crew: Crew,
        threads_per_worker: int | None,
        with_gpus: bool = False,
    ) -> None:
        """Use the workers of a client.

        Args:
            client: Connected.
            crew: Its workers.
            threads_per_worker: CPU threads that the tasks of a worker may use; None for as many
                as each worker was started with.
            with_gpus: Whether workers may have been given several GPUs, of which a task uses one.
        """
        self._client, self._crew = client, crew
        self._threads_per_worker, self._with_gpus = threads_per_worker, with_gpus

    @property
    def num_workers(self) -> int:
        """Worker processes that get work; a scheduler's may be asked for, at most once a second."""
        self._crew.look_again()
        return self._crew.num_workers

    @property
    def mean_workers(self) -> int:
        """Worker processes that get work, on average since the last `run` began; rounded."""
        return self._crew.mean_workers

    def run(
        self,
        function: Callable[..., Any],
        arguments: Iterable[tuple[Any, ...]],
        on_report: Callable[..., None],
    ) -> Generator[Any]:
        """Run `function(task, *arguments)` for each of the arguments, on whichever worker is free.

        Only as many are handed out as the workers can soon take, so the arguments may be many.
        Workers that come while it runs get work too.
        When the caller stops iterating, or a task fails, those in work are told to stop.

        Args:
            function: Importable on the workers; its first argument is a `WorkerContext`.
            arguments: The other arguments of each call.
            on_report: Called with what tasks `report`, in a thread of its own.

        Yields:
            Results, in the order in which they come.

        Raises:
            Unfinished: A worker died again and again on the same task, all workers are gone, or
                the scheduler is.
        """
        topic = f"embedder-{uuid.uuid4().hex}"
        waiting = iter(arguments)
        results = distributed.as_completed(loop=self._client.loop, with_results=True)
        out: dict[str, bool] = {}  # tasks in work, and whether each takes a share of a GPU
        self._crew.begin()
        try:
            self._client.subscribe_topic(topic, lambda event: on_report(*event[1]))
            while True:
                while self._num_wanted(out) > 0 and (item := next(waiting, None)) is not None:
                    future = self._submit(function, topic, item)
                    out[future.key] = bool(self._crew.share)
                    results.add(future)
                if not out:
                    return
                try:
                    # Results come here by themselves; to wait for one in `Future.result` would be
                    # to wait for a worker that may never come back.
                    future, result = results.queue.get(timeout=LOOK_SECONDS)
                except queue.Empty:
                    self._crew.look()
                    continue
                result = self._checked(future, result)
                del out[future.key]
                yield result
        except distributed.KilledWorker as error:
            raise Unfinished(
                f"A worker died {error.allowed_failures + 1} times on the same shard "
                f"(out of memory, or a file that crashes its decoder): {error.task}"
            ) from error
        except (NobodyLeft, ClosedClientError) as error:
            out.clear()  # nor is there anyone to tell it
            raise (error if isinstance(error, NobodyLeft) else self._crew.lost()) from None
        finally:
            if out:
                self._stop_tasks(topic, results)
            with suppress(ClosedClientError):
                self._client.unsubscribe_topic(topic)

    def _num_wanted(self, out: dict[str, bool]) -> int:
        """Tasks to hand out now, as there are workers; none, if 0 or less.

        Args:
            out: Tasks in work, and whether each takes a share of a GPU. Only those count that take
                what the next one would.
        """
        num_workers, with_gpu = self.num_workers, bool(self._crew.share)
        num_out = sum(takes_gpu == with_gpu for takes_gpu in out.values())
        return num_workers * TASKS_PER_WORKER - num_out

    def _submit(
        self, function: Callable[..., Any], topic: str, item: tuple[Any, ...]
    ) -> distributed.Future:
        task = WorkerContext(topic, self._threads_per_worker)
        call = functools.partial(run_on_first_gpu, function) if self._with_gpus else function
        return self._client.submit(call, task, *item, pure=False, resources=self._crew.share)

    def _checked(self, future: distributed.Future, result: Any) -> Any:
        """The result of a task that has ended.

        Raises:
            Exception: The task's own.
            NobodyLeft: There is nobody to do the work.
        """
        self._crew.has_workers()
        if future.cancelled():
            raise self._crew.lost()
        if future.status == "error":
            _, error, traceback = result
            raise error.with_traceback(traceback)
        future.release()
        return result

    def _stop_tasks(self, topic: str, results: distributed.as_completed) -> None:
        deadline = time.monotonic() + _STOP_SECONDS
        with suppress(OSError, ClosedClientError, queue.Empty):  # a time-out is an OSError
            self._client.run(_stop, topic, on_error="ignore", callback_timeout=_STOP_SECONDS)
            while results.count():
                results.queue.get(timeout=max(0.0, deadline - time.monotonic()))


@contextmanager
def connect(
    scheduler: str | None,
    num_workers: int,
    gpus: Sequence[str] = (),
    *,
    in_process: bool | None = None,
    with_gpus: bool = True,
    environment: Mapping[str, str] | None = None,
    root: Path = _ROOT,
) -> Iterator[Pool]:
    """Open a pool of workers.

    Args:
        scheduler: Address of a running Dask scheduler, such as `tcp://host:8786`; None for a
            cluster of this process's own.
        num_workers: Local workers, which share the cores. Not used with a scheduler, which has
            its own.
        gpus: What local worker processes take in turns, by their ids.
        in_process: Whether the one local worker is this process; None for: if there is one.
        with_gpus: Whether GPUs of a scheduler's workers may be used. Once a worker declares to
            have one, only such workers get work, which use one each.
        environment: Variables of local worker processes, from their start on.
        root: Where the system's files are; another folder in tests.

    Raises:
        ClusterError: The scheduler does not answer, or has no workers.
    """
    # Dask tells of every lost connection; what matters of that reaches the user as an error.
    for name in ("distributed", "distributed.client"):  # Dask gives the latter a level of its own
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = {
        "distributed.comm.timeouts.connect": f"{ANSWER_SECONDS}s",
        # By default Dask looks 100 times a second what a task does, and 50 times whether its event
        # loop is late: that takes the interpreter's lock from decoding.
        "distributed.worker.profile.enabled": False,
        "distributed.admin.tick.interval": "1s",
        # Nor is it to ask the driver what the GPU does: twice a second, and an error where
        # `CUDA_VISIBLE_DEVICES` has only the beginning of a UUID.
        "distributed.diagnostics.nvml": False,
    }
    if in_process is None:
        in_process = num_workers == 1
    if scheduler is None and not in_process:
        config[_PLACES] = local_places(gpus, num_workers, root)
    with dask.config.set(config):
        if scheduler is not None:
            with _client_of(scheduler) as client:
                crew = Crew(client, f"the scheduler {scheduler}", with_gpus=with_gpus)
                crew.look()
                yield Pool(client, crew, None, with_gpus)
        else:
            with _local_client(num_workers, in_process, environment or {}) as client:
                crew = Crew(client, "the local scheduler", num_workers, in_process=in_process)
                yield Pool(client, crew, share_of_cores(num_workers))


@contextmanager
def _no_hang_up() -> Iterator[None]:
    """Threads and processes started within, and those that they start, outlive their terminal.

    So do the workers and the process in which Python keeps track of what they share, for which
    there is no other way.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _local_client(
    num_workers: int, in_process: bool, environment: Mapping[str, str]
) -> Iterator[distributed.Client]:
    of_processes: dict[str, Any] = {}
    if not in_process:
        of_processes = {"preload": [__name__], "env": dict(environment)}
    with _no_hang_up(), children_with({} if in_process else environment):
        cluster = distributed.LocalCluster(
            n_workers=num_workers,
            threads_per_worker=TASKS_PER_WORKER,
            processes=not in_process,
            memory_limit=0,  # shards bound the memory; Dask would kill workers on a guess
            # No dashboard; a fixed port would collide with a second run.
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            silence_logs=logging.CRITICAL,
            **of_processes,
        )
    seconds = _CLOSE_SECONDS
    try:
        with distributed.Client(cluster) as client:
            yield client
    except BaseException:
        seconds = 1  # they have been given time already
        raise
    finally:
        with suppress(TimeoutError):
            cluster.sync(_close_workers, cluster, seconds, callback_timeout=2 * _CLOSE_SECONDS)
            cluster.close(timeout=_CLOSE_SECONDS)


async def _close_workers(cluster: distributed.LocalCluster, seconds: float) -> None:
    """End local workers, also those with a task that does not end: Dask alone would wait for it.

    Worker processes are killed after about so many seconds; threads are left to themselves.
    """
    await asyncio.gather(
        *(
            worker.close(
                timeout=seconds,
                **({"executor_wait": False} if isinstance(worker, distributed.Worker) else {}),
            )
            for worker in cluster.workers.values()
        )
    )


@contextmanager
def _client_of(scheduler: str) -> Iterator[distributed.Client]:
    try:
        client = distributed.Client(scheduler, timeout=ANSWER_SECONDS)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"The scheduler {scheduler} does not answer within {ANSWER_SECONDS} seconds. "
            f"Expected the address that `dask scheduler` prints, such as tcp://host:8786"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_WORKERS_SECONDS)
        except TimeoutError as error:
            raise ClusterError(
                f"The scheduler {scheduler} has no workers. Start some with: "
                f"dask worker {scheduler}"
            ) from error
        _check_versions(client, scheduler)
        yield client


def _version() -> str:
    return __version__


def _check_versions(client: distributed.Client, scheduler: str) -> None:
    """The scheduler reads tasks too: it and its workers need this package, in this version."""
    try:
        client.submit(_version, pure=False).result()
        found = client.run(_version, on_error="return")
    except (ImportError, RuntimeError, FutureCancelledError) as error:
        raise ClusterError(
            f"The scheduler {scheduler} must have embedder {_version()} installed, and so must its "
            f"workers. Received: {error}"
        ) from error
    if wrong := [f"{at}: {version}" for at, version in found.items() if version != _version()]:
        raise ClusterError(
            f"Every worker of {scheduler} must have embedder {_version()} installed. "
            f"Received: {'; '.join(wrong)}"
        )
