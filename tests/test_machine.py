"""Cores, memory and GPUs: a container's limits count, whichever version of cgroups it has."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pynvml
import pytest

from embedder.machine import (
    Gpu,
    _warn,
    cache_folder,
    cores_near,
    gpus,
    memory_bytes,
    num_cores,
)
from tests.fake_nvml import Card, functions

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


@pytest.fixture
def set_cards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    _warn.cache_clear()  # each test is told anew

    def set_(*cards: Card, instances: tuple[Card, ...] = ()) -> None:
        for name, function in functions(cards, instances).items():
            monkeypatch.setattr(pynvml, name, function)

    return set_


THREE = (Card("GPU-cccc", bus=0xD8), Card("GPU-aaaa", bus=0x3B), Card("GPU-aabb", bus=0x86))


def test_a_gpu_is_what_the_driver_tells_of_it(set_cards: Callable[..., None]) -> None:
    set_cards(Card("GPU-aaaa"), Card("GPU-bbbb", "NVIDIA GB10", 0x01, None, None))
    assert gpus() == [
        Gpu("GPU-bbbb", "NVIDIA GB10", None, 0, "580.159.04", "0000:01:00.0"),
        Gpu("GPU-aaaa", "NVIDIA H100 80GB HBM3", (9, 0), 80 * 2**30, "580.159.04", "0000:3b:00.0"),
    ]


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, ["GPU-aaaa at 3b", "GPU-aabb at 86", "GPU-cccc at d8"]),
        ("", []),
        ("-1", []),
        ("2,0", ["2 at d8", "0 at 3b"]),
        ("2, 0", ["2 at d8", "0 at 3b"]),
        ("1,-1,0", ["1 at 86"]),
        ("1,3,0", ["1 at 86"]),
        ("1,,0", ["1 at 86"]),
        ("GPU-cccc,GPU-aaa", ["GPU-cccc at d8", "GPU-aaa at 3b"]),
        ("GPU-c,GPU-aa,GPU-aaaa", ["GPU-c at d8"]),  # two begin with the second
        ("GPU-dddd,GPU-cccc", []),
        ("GPU-cccc,0", ["GPU-cccc at d8"]),  # CUDA takes entries of one kind
        ("0,1,0", []),  # and none where one is repeated
        ("GPU-aab,GPU-aabb", []),
        ("all", []),
    ],
)
def test_visible_gpus_are_those_that_cuda_shows(
    set_cards: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    found: list[str],
) -> None:
    set_cards(*THREE)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [f"{gpu.id} at {gpu.pci[5:7]}" for gpu in gpus()] == found


def test_a_card_that_the_process_may_not_open_does_not_count(
    set_cards: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hidden = Card("GPU-aaaa", refusal="NVMLError_NoPermission")
    set_cards(hidden, Card("GPU-bbbb", bus=0x86))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert [gpu.pci for gpu in gpus()] == ["0000:86:00.0"]
    assert caplog.messages == []
    set_cards(hidden, hidden)
    assert gpus() == gpus() == []
    assert caplog.messages == ["This process may not open the GPUs that NVIDIA's driver has: 2"]


def test_a_card_that_fails_is_told_once(
    set_cards: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    set_cards(THREE[0], Card("GPU-dddd", refusal="NVMLError_GpuIsLost"), THREE[1])
    assert [gpu.id for gpu in gpus()] == [gpu.id for gpu in gpus()] == ["GPU-aaaa", "GPU-cccc"]
    (told,) = caplog.messages
    assert "does not open its GPU 1, which is not used: " in told


def test_an_index_tells_no_card_where_cuda_has_an_order_of_its_own(
    set_cards: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_cards(Card("GPU-aaaa", "Tesla T4", bus=0x01), Card("GPU-bbbb", bus=0x86))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert gpus() == [Gpu("0", driver="580.159.04")]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert [gpu.name for gpu in gpus()] == ["Tesla T4"]


def test_an_instance_of_mig_is_known_as_far_as_the_driver_tells(
    set_cards: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Card("GPU-aaaa", "NVIDIA A100", 0x86, (8, 0))
    part = Card("MIG-1234", "NVIDIA A100 MIG 1g.5gb", 0, None, 5 * 2**30, whole=whole)
    set_cards(whole, instances=(part,))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234,MIG-GPU-aaaa/1/0")
    assert gpus() == [
        Gpu("MIG-1234", part.name, (8, 0), 5 * 2**30, "580.159.04", "0000:86:00.0"),
        Gpu("MIG-GPU-aaaa/1/0"),
    ]


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, ["MIG-1", "MIG-2", "GPU-bbbb"]),
        ("MIG-2", ["MIG-2"]),
        ("0", ["0"]),
        ("GPU-a", ["GPU-a"]),
        ("1,2", ["1"]),  # there is nothing to use of the last
    ],
)
def test_a_card_with_mig_is_its_instances(
    set_cards: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    visible: str | None,
    found: list[str],
) -> None:
    whole = Card("GPU-aaaa", bus=0x01, has_mig=True)
    parts = [Card(f"MIG-{n}", "a part", 0, None, 5 * 2**30, whole=whole) for n in (1, 2)]
    empty = Card("GPU-cccc", bus=0xD8, has_mig=True)
    set_cards(whole, Card("GPU-bbbb", bus=0x86), empty, instances=tuple(parts))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.id for gpu in gpus()] == found
    for gpu in gpus():
        is_part = gpu.pci == "0000:01:00.0"
        assert (gpu.name, gpu.memory_bytes == 5 * 2**30) == (
            "a part" if is_part else whole.name,
            is_part,
        )
    assert caplog.messages == [
        "MIG is on for NVIDIA H100 80GB HBM3, GPU-cccc, and it has no instance that could be used"
    ]


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, ["0", "1", "2"]),
        ("-1", []),
        ("2,3,0", ["2"]),
        ("GPU-cccc,GPU-d", ["GPU-cccc", "GPU-d"]),
        ("MIG-1234", ["MIG-1234"]),
    ],
)
def test_of_a_driver_that_fails_the_cards_are_only_counted(
    set_cards: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    visible: str | None,
    found: list[str],
) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)

    set_cards(*THREE)
    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus(tmp_path) == []
    names = ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0")
    write(tmp_path, {f"proc/driver/nvidia/gpus/{name}": "" for name in names})
    assert gpus(tmp_path) == [Gpu(name) for name in found]
    told = [
        "NVIDIA's driver tells nothing of its GPUs: RM has detected an NVML/RM version mismatch."
    ]
    assert caplog.messages == ([] if visible == "-1" else told)


@pytest.mark.parametrize("error", ["LibraryNotFound", "DriverNotLoaded"])
def test_a_machine_without_a_driver_is_not_told(
    set_cards: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: str,
) -> None:
    def fail() -> None:
        raise getattr(pynvml, f"NVMLError_{error}")

    set_cards()
    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert gpus(tmp_path) == []
    assert caplog.messages == []


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(
    ("listed", "near"),
    [("1-3,5", {1, 2, 5}), ("2", {2}), ("8-15", set()), ("", set()), (None, set())],
)
def test_cores_near_a_gpu_are_those_of_its_node_that_the_process_may_use(
    tmp_path: Path, listed: str | None, near: set[int]
) -> None:
    if listed is not None:
        write(tmp_path, {"sys/bus/pci/devices/0000:3b:00.0/local_cpulist": listed})
    assert cores_near(Gpu("0", pci="0000:3b:00.0"), tmp_path) == near
    assert cores_near(Gpu("0"), tmp_path) == set()


def test_gpus_cost_no_framework() -> None:
    code = "import sys; from embedder.machine import gpus; gpus(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"tensorflow", "jax", "keras", "numpy"}.isdisjoint(done.stdout.split())


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDER_CACHE", "/fast/models")
    assert cache_folder() == Path("/fast/models")
    monkeypatch.delenv("EMBEDDER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/ann/.cache")
    assert cache_folder() == Path("/home/ann/.cache/embedder")
