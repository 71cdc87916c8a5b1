"""Dask: the same code path in this process, in local processes and on a scheduler elsewhere."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from embedder.errors import ClusterError, Unfinished
from embedder.extraction import cluster
from embedder.extraction.cluster import Pool, WorkerContext, connect
from embedder.machine import num_cores
from tests.support import ROOT


def double(task: WorkerContext, number: int) -> int:
    task.report(1, 0)
    return 2 * number


def process_id(task: WorkerContext, number: int) -> int:
    time.sleep(0.05)
    return os.getpid()


def gpu(task: WorkerContext, number: int) -> str | None:
    time.sleep(0.05)
    return os.environ.get("CUDA_VISIBLE_DEVICES")


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


def results(pool: Pool, function: object, items: list[object]) -> list[object]:
    with closing(pool.run(function, ((i,) for i in items), lambda *_: None)) as found:  # type: ignore[arg-type]
        return list(found)


@contextmanager
def scheduler_with_workers(*worker_options: str, path: Path = ROOT) -> Iterator[str]:
    """A real Dask scheduler, and a real worker for each string of options.

    Args:
        *worker_options: Of each worker, separated by spaces.
        path: Where both find the functions of this module.
    """
    log = Path(tempfile.mkdtemp()) / "scheduler.log"
    environment = os.environ | {"PYTHONPATH": str(path)}
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1"]
    with log.open("wb") as log_file:
        scheduler = subprocess.Popen(
            [*command, "--port", "0", "--no-dashboard"], stderr=log_file, cwd=path, env=environment
        )
    processes = [scheduler]
    try:
        while not (lines := [x for x in log.read_text().splitlines() if "Scheduler at:" in x]):
            time.sleep(0.05)
        address = lines[0].split()[-1]
        for options in worker_options:
            command = [sys.executable, "-m", "distributed.cli.dask_worker", address]
            command += ["--no-dashboard", *options.split()]
            processes.append(
                subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=path, env=environment)
            )
        yield address
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait()


def test_results_and_reports_arrive_from_this_process() -> None:
    told: list[int] = []
    with connect(None, 1) as pool:
        with closing(
            pool.run(double, ((n,) for n in range(10)), lambda *c: told.append(c[0]))
        ) as r:
            assert sorted(r) == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
        deadline = time.monotonic() + 10
        while len(told) < 10 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert results(pool, num_threads, [0]) == [num_cores()]
    assert sum(told) == 10


def test_local_workers_are_processes_that_share_the_cores_and_the_gpus() -> None:
    with connect(None, 2, ["2", "GPU-abc"]) as pool:
        ids = set(results(pool, process_id, list(range(20))))
        assert len(ids) == 2
        assert set(results(pool, gpu, list(range(20)))) == {"2", "GPU-abc"}
        assert os.getpid() not in ids
        assert results(pool, num_threads, [0]) == [max(1, num_cores() // 2)]


def test_work_goes_to_a_scheduler_by_its_address() -> None:
    with (
        scheduler_with_workers("--nthreads 1", "--nthreads 3") as address,
        connect(address, 1) as pool,
    ):
        while pool.num_workers < 2:  # the second may come later than the first
            pool.num_workers = len(pool._client.scheduler_info(n_workers=-1)["workers"])
        ids = set(results(pool, process_id, list(range(20))))
        assert len(ids) == 2
        assert set(results(pool, num_threads, list(range(20)))) == {1, 3}


def test_a_scheduler_that_does_not_answer_is_told() -> None:
    begin = time.monotonic()
    with pytest.raises(ClusterError, match=r"tcp://127\.0\.0\.1:9 does not answer"):
        with connect("tcp://127.0.0.1:9", 1):
            pass
    assert time.monotonic() - begin < 60


def test_an_address_that_is_none_is_told() -> None:
    with pytest.raises(ClusterError, match="does not answer"), connect("nonsense://x", 1):
        pass


def test_a_scheduler_without_workers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedder.extraction.cluster._WORKERS_SECONDS", 1)
    with scheduler_with_workers() as address:
        with pytest.raises(ClusterError, match="has no workers. Start some with: dask worker tcp"):
            with connect(address, 1):
                pass


def test_workers_with_another_version_are_told(tmp_path: Path) -> None:
    # Python imports it when it starts.
    (tmp_path / "sitecustomize.py").write_text('import embedder; embedder.__version__ = "99"')
    with scheduler_with_workers("--nthreads 1", path=tmp_path) as address:
        with pytest.raises(ClusterError, match="must have embedder .* installed.*: 99"):
            with connect(address, 1):
                pass


def test_only_as_much_is_handed_out_as_workers_can_take() -> None:
    taken: list[int] = []

    def numbers() -> Iterator[tuple[int]]:
        for number in range(100):
            taken.append(number)
            yield (number,)

    with connect(None, 1) as pool:
        with closing(pool.run(double, numbers(), lambda *_: None)) as found:
            next(found)
            assert len(taken) <= 3


def test_a_failed_task_stops_the_others(tmp_path: Path) -> None:
    def tasks() -> Iterator[tuple[str]]:
        yield (str(tmp_path),)
        while not list(tmp_path.glob("started-*")):
            time.sleep(0.01)
        yield (str(tmp_path / "no-such-folder"),)

    with connect(None, 1) as pool:
        with pytest.raises(FileNotFoundError):
            with closing(pool.run(wait_for_stop, tasks(), lambda *_: None)) as found:
                list(found)
        assert len(list(tmp_path.glob("stopped-*"))) == 1


def test_a_tasks_error_reaches_the_caller() -> None:
    with connect(None, 1) as pool, pytest.raises(ValueError, match="number 7 is no good"):
        results(pool, fail, [7])


def test_work_of_a_killed_worker_is_done_by_another(tmp_path: Path) -> None:
    with connect(None, 2) as pool:
        assert results(pool, die_once, [str(tmp_path)]) == ["done"]


def test_a_task_that_kills_every_worker_ends_the_run() -> None:
    with connect(None, 2) as pool, pytest.raises(Unfinished, match="A worker died 4 times"):
        results(pool, die, [0])


def test_it_is_told_that_all_workers_are_gone_and_the_run_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cluster, "_GONE_SECONDS", 1)
    with scheduler_with_workers("--nthreads 1 --no-nanny") as address:
        with connect(address, 1) as pool, pytest.raises(Unfinished, match="none came back within"):
            results(pool, die, [0])
    (told,) = caplog.messages
    assert f"All workers of the scheduler {address} are gone" in told
    assert "waiting up to 1 s for one to come back" in told


def test_a_run_goes_on_once_a_worker_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "embedder")
    monkeypatch.setattr(cluster, "_LOOK_SECONDS", 0.05)
    with scheduler_with_workers("--nthreads 1") as address, connect(address, 1) as pool:
        assert results(pool, die_once, [str(tmp_path)]) == ["done"]
    gone, back = caplog.messages
    assert "are gone" in gone
    assert "Work goes on" in back


def test_a_lost_scheduler_ends_the_run_without_a_traceback(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with scheduler_with_workers("--nthreads 1 --no-nanny") as address:
        with connect(address, 1) as pool:
            process = pool._client.run_on_scheduler(os.getpid)
            with pytest.raises(Unfinished, match=f"The connection to .* {address} was lost"):
                results(pool, kill, [process])
    assert capfd.readouterr().err == ""
