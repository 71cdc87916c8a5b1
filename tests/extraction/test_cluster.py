"""Dask: the same code path in this process, in local processes and on a scheduler elsewhere."""

import itertools
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import distributed
import pynvml
import pytest

from embedder.errors import ClusterError, Unfinished
from embedder.extraction import cluster, crew
from embedder.extraction.cluster import Pool, connect
from embedder.machine import num_cores
from tests.extraction import cluster_tasks
from tests.fake_nvml import Card, functions, install_in
from tests.support import ROOT


def results(pool: Pool, function: object, items: list[object]) -> list[object]:
    with closing(pool.run(function, ((i,) for i in items), lambda *_: None)) as found:  # type: ignore[arg-type]
        return list(found)


@contextmanager
def scheduler_with_workers(*worker_options: str, path: Path = ROOT) -> Iterator[str]:
    """A real Dask scheduler, and workers as `dask_workers` starts them."""
    log = Path(tempfile.mkdtemp()) / "scheduler.log"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1"]
    with log.open("wb") as log_file:
        scheduler = subprocess.Popen(
            [*command, "--port", "0", "--no-dashboard"],
            stderr=log_file,
            cwd=path,
            env=environment_of(path),
        )
    with ended([scheduler]):
        while not (lines := [x for x in log.read_text().splitlines() if "Scheduler at:" in x]):
            time.sleep(0.05)
        address = lines[0].split()[-1]
        # A worker that ends tells its scheduler so, and may wait long for one that is gone.
        with dask_workers(address, *worker_options, path=path):
            yield address


@contextmanager
def dask_workers(address: str, *worker_options: str, path: Path = ROOT) -> Iterator[None]:
    """A real worker for each string of options.

    Args:
        address: Of their scheduler.
        *worker_options: Of each worker, separated by spaces, after variables of its environment
            such as `NAME=VALUE`.
        path: Where they start, and where Python looks first for modules.
    """
    processes: list[subprocess.Popen[bytes]] = []
    with ended(processes):
        for options in worker_options:
            command = [sys.executable, "-m", "distributed.cli.dask_worker", address]
            words = options.split()
            variables = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
            command += ["--no-dashboard", *words[len(variables) :]]
            own = environment_of(path) | dict(variable.split("=", 1) for variable in variables)
            processes.append(
                subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=path, env=own)
            )
        yield


def environment_of(path: Path) -> dict[str, str]:
    """Of processes that look for modules in a folder first."""
    return os.environ | {
        "PYTHONPATH": f"{path}:{ROOT}",
        "DASK_DISTRIBUTED__DIAGNOSTICS__NVML": "False",  # which would ask cards that are not there
    }


@contextmanager
def ended(processes: list[subprocess.Popen[bytes]], seconds: float = 30) -> Iterator[None]:
    """End processes after use, by force if they take longer than that."""
    try:
        yield
    finally:
        try:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(seconds)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def wait_for_workers(address: str, num_workers: int) -> None:
    with distributed.Client(address) as client:
        client.wait_for_workers(num_workers, timeout=60)


@pytest.fixture
def two_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that gives a Python process that looks there two cards, as this process has."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cards = (Card("GPU-aaaa", bus=0x3B), Card("GPU-bbbb", bus=0xD8))
    for name, function in functions(cards).items():
        monkeypatch.setattr(pynvml, name, function)
    install_in(tmp_path, *cards)
    return tmp_path


def test_no_process_of_a_test_outlives_it() -> None:
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); "
    command = [sys.executable, "-c", f"{deaf} signal.pause()"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    with pytest.raises(subprocess.TimeoutExpired), ended(processes, seconds=0.1):
        for process in processes:
            assert process.stdout is not None
            with process.stdout:
                process.stdout.readline()
    assert [process.returncode for process in processes] == [-9, -9]


def test_results_and_reports_arrive_from_this_process() -> None:
    told: list[int] = []
    with connect(None, 1) as pool:
        with closing(
            pool.run(cluster_tasks.double, ((n,) for n in range(10)), lambda *c: told.append(c[0]))
        ) as r:
            assert sorted(r) == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
        deadline = time.monotonic() + 10
        while len(told) < 10 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert results(pool, cluster_tasks.num_threads, [0]) == [num_cores()]
    assert sum(told) == 10


def test_local_workers_are_processes_that_share_the_cores_and_the_gpus(
    two_cards: Path,
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    near = {"0000:3b:00.0": cores[: len(cores) // 2], "0000:d8:00.0": cores[len(cores) // 2 :]}
    for pci, of_node in near.items():
        folder = two_cards / "sys/bus/pci/devices" / pci
        folder.mkdir(parents=True)
        (folder / "local_cpulist").write_text(",".join(map(str, of_node)))
    with connect(None, 2, ["GPU-aaaa", "GPU-bbbb"], root=two_cards) as pool:
        ids = set(results(pool, cluster_tasks.process_id, list(range(20))))
        assert len(ids) == 2
        assert os.getpid() not in ids
        found = {gpu: rest for gpu, *rest in results(pool, cluster_tasks.place, list(range(20)))}
        threads = max(1, num_cores() // 2)
        assert found == {
            "GPU-aaaa": [set(near["0000:3b:00.0"]), threads],
            "GPU-bbbb": [set(near["0000:d8:00.0"]), threads],
        }
        assert os.sched_getaffinity(0) == set(cores)
        assert results(pool, cluster_tasks.state_of_nvml, [0]) == ["DISABLED_CONFIG"]


def test_a_single_worker_may_have_a_process_of_its_own() -> None:
    with connect(None, 1, ["2"], in_process=False) as pool:
        assert results(pool, cluster_tasks.process_id, [0]) != [os.getpid()]
        assert results(pool, cluster_tasks.place, [0]) == [
            ("2", os.sched_getaffinity(0), num_cores())
        ]


def test_work_goes_to_a_scheduler_by_its_address() -> None:
    with (
        scheduler_with_workers("--nthreads 1 --no-nanny", "--nthreads 3 --no-nanny") as address,
        connect(address, 1) as pool,
    ):
        wait_for_workers(address, 2)  # the second may come later than the first
        ids = set(results(pool, cluster_tasks.process_id, list(range(20))))
        assert len(ids) == 2
        assert set(results(pool, cluster_tasks.num_threads, list(range(20)))) == {1, 3}


def test_workers_that_come_later_get_work_and_once_one_declares_a_gpu_only_such_do(
    two_cards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "embedder")
    monkeypatch.setattr(crew, "_GONE_SECONDS", 0.2)
    monkeypatch.setattr(crew, "LOOK_SECONDS", 0.05)
    options = "--nthreads 4 --no-nanny"
    later = [
        f"CUDA_VISIBLE_DEVICES=0,1 {options} --resources GPU=1",
        f"CUDA_VISIBLE_DEVICES=1,0 {options} --resources GPU=1",
    ]
    with (
        scheduler_with_workers(f"CUDA_VISIBLE_DEVICES= {options}", path=two_cards) as address,
        connect(address, 1) as pool,
        ExitStack() as stack,
    ):
        numbers = ((number,) for number in range(1000))
        with closing(pool.run(cluster_tasks.gpu, numbers, lambda *_: None)) as found:
            assert next(found) == ""
            assert (pool.num_workers, pool.mean_workers) == (1, 1)
            stack.enter_context(dask_workers(address, *later, path=two_cards))
            seen = set()
            while seen != {"", "0", "1"}:
                seen.add(next(found))
            after = list(itertools.islice(found, 60))  # some of the first were handed out before
            assert set(after[-20:]) == {"0", "1"}, after
        assert set(results(pool, cluster_tasks.gpu, list(range(20)))) == {"0", "1"}
        assert (pool.num_workers, pool.mean_workers) == (2, 2)
        monkeypatch.setattr(cluster, "LOOK_SECONDS", 0.05)
        with pytest.raises(Unfinished, match="All workers with a GPU of .* none came back"):
            results(pool, cluster_tasks.die, [0])
    assert re.fullmatch(
        "[12] of [23] workers declare the resource GPU; from now on only such get work",
        caplog.messages[0],
    )
    assert "All workers with a GPU of" in caplog.messages[1]


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [x.getMessage() for x in caplog.records if x.levelno >= logging.WARNING]


def test_workers_that_share_a_gpu_or_have_none_are_told(
    two_cards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = "--nthreads 1 --no-nanny --resources GPU=1"
    workers = [
        f"CUDA_VISIBLE_DEVICES=0 {options} --name index",
        f"CUDA_VISIBLE_DEVICES=GPU-aa {options} --name uuid",
        f"CUDA_VISIBLE_DEVICES=1,0 {options} --name other",
        f"CUDA_VISIBLE_DEVICES=-1 {options} --name none",
    ]
    with scheduler_with_workers(*workers, path=two_cards) as address:
        wait_for_workers(address, 4)
        with connect(address, 1, with_gpus=False) as pool:
            assert pool.num_workers == 4
            given = results(pool, cluster_tasks.gpu, list(range(20)))
            assert set(given) == {"0", "GPU-aa", "1,0", "-1"}  # as they were started
        assert warnings_in(caplog) == []
        with connect(address, 1) as pool:
            identity = pool._client.scheduler_info(n_workers=-1)
    name_of = {at: worker["name"] for at, worker in identity["workers"].items()}
    told = {}
    for message in warnings_in(caplog):
        what, _, which = message.partition(": ")
        told[what] = {name for at, name in name_of.items() if at in which}
    assert told == {
        f"Several workers of host {socket.gethostname()} take the same GPU, 0000:3b:00.0": {
            "index",
            "uuid",
        },
        "No GPU is found by workers that declare the resource GPU": {"none"},
    }
    assert f"CUDA_VISIBLE_DEVICES=0 dask worker {address} --nworkers 1" in caplog.text


def test_a_scheduler_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.5)
    with pytest.raises(ClusterError, match=r"tcp://127\.0\.0\.1:9 does not answer"):
        with connect("tcp://127.0.0.1:9", 1):
            pass


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
        with closing(pool.run(cluster_tasks.double, numbers(), lambda *_: None)) as found:
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
            with closing(pool.run(cluster_tasks.wait_for_stop, tasks(), lambda *_: None)) as found:
                list(found)
        assert len(list(tmp_path.glob("stopped-*"))) == 1


def test_a_tasks_error_reaches_the_caller() -> None:
    with connect(None, 1) as pool, pytest.raises(ValueError, match="number 7 is no good"):
        results(pool, cluster_tasks.fail, [7])


def test_work_of_a_killed_worker_is_done_by_another(tmp_path: Path) -> None:
    with connect(None, 2) as pool:
        assert results(pool, cluster_tasks.die_once, [str(tmp_path)]) == ["done"]


def test_a_task_that_kills_every_worker_ends_the_run() -> None:
    with connect(None, 2) as pool, pytest.raises(Unfinished, match="A worker died 4 times"):
        results(pool, cluster_tasks.die, [0])


def test_it_is_told_that_all_workers_are_gone_and_the_run_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(crew, "_GONE_SECONDS", 1)
    with scheduler_with_workers("--nthreads 1 --no-nanny") as address:
        with connect(address, 1) as pool, pytest.raises(Unfinished, match="none came back within"):
            results(pool, cluster_tasks.die, [0])
    (told,) = caplog.messages
    assert f"All workers of the scheduler {address} are gone" in told
    assert "waiting up to 1 s for one to come back" in told


def test_a_run_goes_on_once_a_worker_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "embedder")
    for module in (crew, cluster):
        monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    with scheduler_with_workers("--nthreads 1") as address, connect(address, 1) as pool:
        assert results(pool, cluster_tasks.die_once, [str(tmp_path)]) == ["done"]
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
                results(pool, cluster_tasks.kill, [process])
    assert capfd.readouterr().err == ""
