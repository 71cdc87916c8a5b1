"""Many tasks on Dask: a local cluster by default, any scheduler by address, one code path."""

import importlib.metadata
import logging
import os
import signal
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dask
import distributed
from dask.system import CPU_COUNT

from embedder import engines
from embedder.errors import ClusterError, Unfinished

_CONNECT_SECONDS = 10
_WORKERS_SECONDS = 30  # for the first worker of a scheduler that has none yet
_TASKS_PER_WORKER = 2  # one task's start and end overlap with the other's middle
_STOP_SECONDS = 30
NUM_CORES: int = CPU_COUNT  # those this process may use: affinity and cgroups are respected


@dataclass(frozen=True)
class Task:
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
    """Give a local worker process its GPU, and let it outlive Ctrl-C.

    Dask calls this by name in each such process before its first task, and thus before
    TensorFlow is imported, which takes all GPUs that it sees. Ctrl-C reaches the workers from
    the terminal too; the run itself tells them to stop.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if gpus := engines.gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(worker.name) % len(gpus)]


class Pool:
    """Workers that run functions.

    Attributes:
        num_workers: Worker processes when the pool was opened.
    """

    def __init__(self, client: distributed.Client, threads_per_worker: int | None) -> None:
        """Use the workers of a client.

        Args:
            client: Connected.
            threads_per_worker: CPU threads that the tasks of a worker may use; None for as many
                as each worker was started with.
        """
        self._client = client
        self.num_workers = max(1, len(client.scheduler_info(n_workers=-1)["workers"]))
        self._threads_per_worker = threads_per_worker

    def run(
        self,
        function: Callable[..., Any],
        arguments: Iterable[tuple[Any, ...]],
        on_report: Callable[..., None],
    ) -> Generator[Any]:
        """Run `function(task, *arguments)` for each of the arguments, on whichever worker is free.

        Only as many are handed out as the workers can soon take, so the arguments may be many.
        When the caller stops iterating, or a task fails, those in work are told to stop.

        Args:
            function: Importable on the workers; its first argument is a `Task`.
            arguments: The other arguments of each call.
            on_report: Called with what tasks `report`, in a thread of its own.

        Yields:
            Results, in the order in which they come.

        Raises:
            Unfinished: A worker died again and again on the same task.
        """
        topic = f"embedder-{uuid.uuid4().hex}"
        self._client.subscribe_topic(topic, lambda event: on_report(*event[1]))
        waiting = iter(arguments)
        futures = distributed.as_completed()
        num_out = 0
        try:
            while True:
                while num_out < self.num_workers * _TASKS_PER_WORKER:
                    item = next(waiting, None)
                    if item is None:
                        break
                    future = self._client.submit(
                        function, Task(topic, self._threads_per_worker), *item, pure=False
                    )
                    futures.add(future)
                    num_out += 1
                if num_out == 0:
                    return
                future = next(futures)
                num_out -= 1
                yield future.result()
                future.release()
        except distributed.KilledWorker as error:
            raise Unfinished(
                f"A worker died {error.allowed_failures + 1} times on the same shard "
                f"(out of memory, or a file that crashes its decoder): {error.task}"
            ) from error
        finally:
            if num_out:
                self._stop_tasks(topic, futures)
            self._client.unsubscribe_topic(topic)

    def _stop_tasks(self, topic: str, futures: distributed.as_completed) -> None:
        try:
            self._client.run(_stop, topic)
            outstanding = [future for future in futures.futures if not future.done()]
            distributed.wait(outstanding, timeout=_STOP_SECONDS)
        except (OSError, TimeoutError, distributed.comm.CommClosedError):
            pass  # the cluster is gone, and its tasks with it


@contextmanager
def connect(scheduler: str | None, num_workers: int) -> Iterator[Pool]:
    """Open a pool of workers.

    Args:
        scheduler: Address of a running Dask scheduler, such as `tcp://host:8786`; None for a
            cluster of this process's own.
        num_workers: Local worker processes, which share the cores; 1 works within this process.
            Not used with a scheduler, which has its own.

    Raises:
        ClusterError: The scheduler does not answer, or has no workers.
    """
    # Dask tells of every lost connection; what matters of that reaches the user as an error.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    config = {
        "distributed.comm.timeouts.connect": f"{_CONNECT_SECONDS}s",
        # By default Dask looks 100 times a second what a task does, and 50 times whether its event
        # loop is late: that takes the interpreter's lock from decoding.
        "distributed.worker.profile.enabled": False,
        "distributed.admin.tick.interval": "1s",
    }
    with dask.config.set(config):
        if scheduler is not None:
            with _client_of(scheduler) as client:
                yield Pool(client, None)
            return
        threads = max(1, NUM_CORES // num_workers)
        cluster = distributed.LocalCluster(
            n_workers=num_workers,
            threads_per_worker=_TASKS_PER_WORKER,
            processes=num_workers > 1,
            memory_limit=0,  # shards bound the memory; Dask would kill workers on a guess
            # No dashboard; a fixed port would collide with a second run.
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            silence_logs=logging.CRITICAL,
            **({"preload": [__name__]} if num_workers > 1 else {}),
        )
        with cluster, distributed.Client(cluster) as client:
            yield Pool(client, threads)


@contextmanager
def _client_of(scheduler: str) -> Iterator[distributed.Client]:
    try:
        client = distributed.Client(scheduler, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"The scheduler {scheduler} does not answer within {_CONNECT_SECONDS} seconds. "
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
    return importlib.metadata.version("embedder")


def _check_versions(client: distributed.Client, scheduler: str) -> None:
    """The scheduler reads tasks too: it and its workers need this package, in this version."""
    try:
        client.submit(_version, pure=False).result()
        found = client.run(_version, on_error="return")
    except (ImportError, RuntimeError, distributed.FutureCancelledError) as error:
        raise ClusterError(
            f"The scheduler {scheduler} must have embedder {_version()} installed, and so must its "
            f"workers. Received: {error}"
        ) from error
    if wrong := [f"{at}: {version}" for at, version in found.items() if version != _version()]:
        raise ClusterError(
            f"Every worker of {scheduler} must have embedder {_version()} installed. "
            f"Received: {'; '.join(wrong)}"
        )
