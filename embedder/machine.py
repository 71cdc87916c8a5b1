"""What this machine lets the process use: cores, memory, GPUs, and a folder for what is kept.

Asked when it is needed, never at import. In a container, its limits count and not the machine's.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")  # where the system's files are; another folder in tests


def num_cores(root: Path = _ROOT) -> int:
    """CPU cores that this process may use, at least 1: affinity and cgroups are respected."""
    on_linux = hasattr(os, "sched_getaffinity")
    limits = [len(os.sched_getaffinity(0)) if on_linux else os.cpu_count() or 1]
    for group in _cgroups(root):
        for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            match [number for file in files for number in _numbers(group / file)]:
                case [quota, period] if quota > 0:
                    limits.append(math.ceil(quota / period))
    return min(limits)


def memory_bytes(root: Path = _ROOT) -> int:
    """Memory that this process may use, in bytes: the machine's, or less where a cgroup says so."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for group in _cgroups(root):
        limits += _numbers(group / "memory.max") + _numbers(group / "memory.limit_in_bytes")
    return min(limits)


@dataclass(frozen=True)
class Gpu:
    """A card that this process may use, and what is known of it.

    Attributes:
        id: As `CUDA_VISIBLE_DEVICES` names it.
        name: Such as `NVIDIA H100 80GB HBM3`; empty if not known.
        compute_capability: What NVIDIA counts generations by, such as (9, 0); None if not known.
        memory_bytes: All of its memory; 0 if not known.
        driver: Version of NVIDIA's driver, such as `580.159.04`; empty if not known.
        pci: Address, such as `0000:3b:00.0`; empty if not known.
    """

    id: str
    name: str = ""
    compute_capability: tuple[int, int] | None = None
    memory_bytes: int = 0
    driver: str = ""
    pci: str = ""

    def __str__(self) -> str:
        """What it is called."""
        return self.name or f"GPU {self.id}"


def gpus(root: Path = _ROOT) -> list[Gpu]:
    """GPUs that this process may use.

    Asked of NVIDIA's driver for Linux: asking TensorFlow would take seconds, and fix the
    process's choice.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = sorted((root / "proc/driver/nvidia/gpus").glob("*"))
    if not found or visible is None:
        return [Gpu(str(number)) for number in range(len(found))]
    return [Gpu(name) for name in visible.split(",") if name not in ("", "-1")]


def cache_folder() -> Path:
    """Where exported models are kept: `EMBEDDER_CACHE`, or the user's cache folder."""
    if chosen := os.environ.get("EMBEDDER_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "embedder"


def _cgroups(root: Path) -> Iterator[Path]:
    """Folders of this process's cgroups, and of those around them, of versions 1 and 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:  # such as `4:cpu,cpuacct:/docker/1a2b`, or `0::/` in version 2
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
            group = top / path.lstrip("/")
            # In a container the path may be the machine's, of which only the top is to be seen.
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _numbers(file: Path) -> list[int]:
    """Numbers of a cgroup's file; none where there is no such file, or no limit but `max`."""
    with contextlib.suppress(OSError, ValueError):
        return [int(word) for word in file.read_text().split()]
    return []
