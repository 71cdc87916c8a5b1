"""What tests run on workers, apart from them: a worker process imports this in no time."""

import os
import signal
import time
from pathlib import Path

from distributed.diagnostics import nvml

from embedder.extraction.cluster import WorkerContext


def double(task: WorkerContext, number: int) -> int:
    task.report(1, 0)
    return 2 * number


def process_id(task: WorkerContext, number: int) -> int:
    time.sleep(0.05)
    return os.getpid()


def gpu(task: WorkerContext, number: int) -> str | None:
    time.sleep(0.05)
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def place(task: WorkerContext, number: int) -> tuple[str | None, set[int], int]:
    """This process's GPUs, its cores, and the threads that it may use."""
    time.sleep(0.05)
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.sched_getaffinity(0), task.num_threads()


def state_of_nvml(task: WorkerContext, number: int) -> str:
    return nvml.NVML_STATE.name


def num_threads(task: WorkerContext, number: int) -> int:
    return task.num_threads()


def wait_for_stop(task: WorkerContext, folder: str) -> None:
    (Path(folder) / f"started-{time.monotonic_ns()}").touch()
    while not task.is_stopped():
        time.sleep(0.01)
    (Path(folder) / f"stopped-{time.monotonic_ns()}").touch()


def fail(task: WorkerContext, number: int) -> None:
    raise ValueError(f"number {number} is no good")


def die(task: WorkerContext, number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(task: WorkerContext, folder: str) -> str:
    marker = Path(folder) / "died"
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def kill(task: WorkerContext, process: int) -> None:
    os.kill(process, signal.SIGKILL)
