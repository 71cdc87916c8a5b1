"""Launch recipes, run as a user runs them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import distributed
import pytest

from embedder.machine import num_cores
from tests.extraction.test_cluster import scheduler_with_workers
from tests.fake_nvml import Card, install_in
from tests.support import ROOT


@contextmanager
def gpu_workers(address: str, folder: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start workers on a machine with two cards."""
    install_in(folder, Card("GPU-aaaa", bus=0x3B), Card("GPU-bbbb", bus=0xD8))
    environment = {name: v for name, v in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment["PATH"] = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment["PYTHONPATH"] = f"{folder}:{ROOT}"
    with subprocess.Popen(
        ["/bin/sh", ROOT / "jobs/gpu_workers.sh", address],
        stderr=subprocess.PIPE,
        env=environment | variables,
        start_new_session=True,
    ) as command:
        try:
            yield command
        finally:
            with suppress(ProcessLookupError):
                os.killpg(command.pid, signal.SIGKILL)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_each_gpu_has_a_worker_that_ends_with_the_command(tmp_path: Path) -> None:
    with scheduler_with_workers() as address, gpu_workers(address, tmp_path) as command:
        with distributed.Client(address) as client:
            client.wait_for_workers(2, timeout=60)
            gpu_of = client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
            workers = client.scheduler_info(n_workers=-1)["workers"]
            processes = client.run(os.getpid).values()
        assert sorted(gpu_of.values()) == ["GPU-aaaa", "GPU-bbbb"]
        assert [worker["resources"] for worker in workers.values()] == [{"GPU": 1}] * 2
        share = max(1, num_cores() // 2)
        assert [worker["nthreads"] for worker in workers.values()] == [share] * 2
        command.send_signal(signal.SIGTERM)
        _, errors = command.communicate(timeout=30)
        assert command.returncode == 143, errors
        assert not any(map(is_running, processes))


@pytest.mark.parametrize("statuses", [(0, 0), (3, 0), (0, 3)])
def test_the_command_fails_if_a_worker_does(tmp_path: Path, statuses: tuple[int, int]) -> None:
    dask = tmp_path / "dask"  # one that ends at once
    exits = "exit {}; exit {}".format(*statuses)
    dask.write_text(f"#!/bin/sh\n[ $CUDA_VISIBLE_DEVICES = GPU-aaaa ] && {exits}")
    dask.chmod(0o755)
    with gpu_workers("tcp://127.0.0.1:9", tmp_path) as command:
        _, errors = command.communicate(timeout=30)
        assert (command.returncode, errors) == (max(statuses), b"")


def test_without_a_gpu_no_worker_is_started(tmp_path: Path) -> None:
    with gpu_workers("tcp://127.0.0.1:9", tmp_path, CUDA_VISIBLE_DEVICES="") as command:
        _, errors = command.communicate(timeout=30)
        assert (command.returncode, errors) == (1, b"No GPU is found\n")
