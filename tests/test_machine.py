"""Cores, memory and GPUs: a container's limits count, whichever version of cgroups it has."""

import os
from pathlib import Path

import pytest

from embedder.machine import cache_folder, gpus, memory_bytes, num_cores

MIB = 2**20


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5})


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, 4),
        ({"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/cpu.max": "250000 100000"}, 3),
        ({"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/cpu.max": "max 100000"}, 4),
        ({"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/cpu.max": "900000 100000"}, 4),
        ({"proc/self/cgroup": "0::/job/step", "sys/fs/cgroup/job/cpu.max": "100000 100000"}, 1),
        ({"proc/self/cgroup": "0::/other", "sys/fs/cgroup/job/cpu.max": "100000 100000"}, 4),
        # In a container that is not told where it is on the machine.
        ({"proc/self/cgroup": "0::/docker/1a2b", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        (
            {
                "proc/self/cgroup": "5:memory:/\n4:cpu,cpuacct:/docker/1a2b",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4,
        ),
    ],
)
def test_cores_are_those_of_the_affinity_or_fewer(
    tmp_path: Path, files: dict[str, str], found: int
) -> None:
    assert num_cores(write(tmp_path, files)) == found


def test_memory_is_the_machines_or_less(tmp_path: Path) -> None:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_bytes(tmp_path) == machine
    write(tmp_path, {"proc/self/cgroup": "4:memory:/a/b\n0::/c/d"})
    write(tmp_path, {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)})
    assert memory_bytes(tmp_path) == machine
    write(tmp_path, {"sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": str(300 * MIB)})
    assert memory_bytes(tmp_path) == 300 * MIB
    write(tmp_path, {"sys/fs/cgroup/c/memory.max": str(200 * MIB)})
    assert memory_bytes(tmp_path) == 200 * MIB
    write(tmp_path, {"sys/fs/cgroup/c/d/memory.max": "max"})
    assert memory_bytes(tmp_path) == 200 * MIB


def test_gpus_are_the_drivers_that_the_process_may_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0")
    three = write(tmp_path / "three", {f"proc/driver/nvidia/gpus/{name}": "" for name in names})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus(three) == ["0", "1", "2"]
    assert gpus(tmp_path) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-abc,2")
    assert gpus(three) == ["GPU-abc", "2"]
    assert gpus(tmp_path) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert gpus(three) == []


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDER_CACHE", "/fast/models")
    assert cache_folder() == Path("/fast/models")
    monkeypatch.delenv("EMBEDDER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/ann/.cache")
    assert cache_folder() == Path("/home/ann/.cache/embedder")
