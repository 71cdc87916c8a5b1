"""What this machine lets the process use: cores, memory, GPUs, and a folder for what is kept.

Asked when it is needed, never at import. In a container, its limits count and not the machine's.
"""

import contextlib
import functools
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_logger = logging.getLogger("embedder")  # that of `libraries`, which is not below
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
    """A GPU, or an instance that NVIDIA's MIG makes of a part of one, and what is known of it.

    Attributes:
        id: What names it in `CUDA_VISIBLE_DEVICES`: a UUID or an index.
        name: Such as `NVIDIA H100 80GB HBM3`; "" if not known.
        compute_capability: Such as (9, 0); None if not known.
        memory_bytes: All of its memory; 0 if not known.
        driver: Version of its driver, such as `580.159.04`; "" if not known.
        pci: Its address on the PCI bus, such as `0000:3b:00.0`; "" if not known.
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
    """GPUs that this process may use, in the order of `CUDA_VISIBLE_DEVICES` where that is set.

    Ids are what the variable says. Without it they are UUIDs, since CUDA may count the cards in
    another order than the driver does. NVIDIA's driver is asked by NVML: to ask a framework would
    take seconds, and memory of every card. Where NVML fails, that is told, and if the driver for
    Linux lists cards these are found with nothing known of them.
    """
    entries = _visible_entries()
    if entries == []:
        return []
    import pynvml

    try:
        return _gpus_of_nvml(entries, pynvml)
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        pass  # there is no driver
    except pynvml.NVMLError as error:  # such as a driver of another version than its library
        _warn(f"NVIDIA's driver tells nothing of its GPUs: {error}")
    return _gpus_of_list(entries, root / "proc/driver/nvidia/gpus")


@functools.cache
def _warn(text: str) -> None:
    """Warn, but not again: GPUs are asked for at many places."""
    _logger.warning(text)


def cores_near(gpu: Gpu, root: Path = _ROOT) -> set[int]:
    """CPU cores of a GPU's NUMA node that this process may use; empty if that is not known."""
    if not gpu.pci or not hasattr(os, "sched_getaffinity"):
        return set()
    cores: set[int] = set()
    with contextlib.suppress(OSError, ValueError):
        text = (root / "sys/bus/pci/devices" / gpu.pci / "local_cpulist").read_text()
        for span in text.split(","):  # such as `0-15,32-47`
            first, _, last = span.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
    return cores & os.sched_getaffinity(0)


def cache_folder() -> Path:
    """Where exported models are kept: `EMBEDDER_CACHE`, or the user's cache folder."""
    if chosen := os.environ.get("EMBEDDER_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "embedder"


def _visible_entries() -> list[str] | None:
    """Entries of `CUDA_VISIBLE_DEVICES` that CUDA would look at; None for all GPUs.

    CUDA takes entries up to the first that is negative or empty, or not of the kind of the first
    one (an index, a card's UUID or a MIG instance's); and none at all where one is repeated.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    entries: list[str] = []
    for entry in map(str.strip, visible.split(",")):
        kind = _kind(entry)
        if kind is None or (entries and kind != _kind(entries[0])):
            break
        entries.append(entry)
    return entries if len(set(entries)) == len(entries) else []


def _kind(entry: str) -> str | None:
    if entry.isdecimal():
        return "index"
    return next((kind for kind in ("GPU-", "MIG-") if entry.startswith(kind)), None)


def _gpus_of_nvml(entries: list[str] | None, nvml: Any) -> list[Gpu]:
    """GPUs that NVML tells of.

    Raises:
        nvml.NVMLError: It tells of none.
    """
    nvml.nvmlInit()
    try:
        cards = _cards(nvml)
        if entries is None:
            return list(itertools.chain(*cards.values()))
        found = []
        for entry in entries:
            gpu = _gpu_of(entry, cards, nvml)
            if gpu is None:  # which hides the later ones from CUDA too
                break
            found.append(gpu)
        cards_named = [gpu.pci for gpu in found if gpu.id.startswith("GPU-") and gpu.pci]
        # One card by two abbreviations is one that is repeated.
        return found if len(set(cards_named)) == len(cards_named) else []
    finally:
        nvml.nvmlShutdown()


def _gpus_of_list(entries: list[str] | None, folder: Path) -> list[Gpu]:
    """GPUs of a driver that tells no more of them than how many there are."""
    indices = [str(index) for index, _ in enumerate(folder.glob("*"))]
    if entries is None or not indices:
        return [Gpu(index) for index in indices]
    known = itertools.takewhile(lambda entry: entry in indices or "-" in entry, entries)
    return [Gpu(entry) for entry in known]


def _gpu_of(entry: str, cards: dict[Gpu, list[Gpu]], nvml: Any) -> Gpu | None:
    """What an entry of `CUDA_VISIBLE_DEVICES` names; None for nothing. The entry is its id."""
    if entry.startswith("MIG-"):
        # CUDA shows one instance to a process. That is all that a worker process is given.
        try:
            return _described(entry, nvml.nvmlDeviceGetHandleByUUID(entry.encode()), nvml)
        except nvml.NVMLError:
            return Gpu(entry)
    if entry.startswith("GPU-"):
        matches = [card for card in cards if card.id.startswith(entry)]
        usable = cards[matches[0]] if len(matches) == 1 else []
        return replace(usable[0], id=entry) if usable else None
    index = int(entry)
    if index >= len(cards):
        return None
    # CUDA puts the fastest card first, unless it is told to go by the bus as NVML does. With cards
    # of one kind that is the same but for the address; with several, the index tells no card.
    by_bus = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    card = list(cards)[index]
    if by_bus or len({card.name for card in cards}) == 1:
        return replace(cards[card][0], id=entry) if cards[card] else None
    return Gpu(entry, driver=card.driver)


def _cards(nvml: Any) -> dict[Gpu, list[Gpu]]:
    """All cards that this process may open, in the order of the PCI bus, and what each gives.

    That is the card itself, or its instances where MIG is on. Of these CUDA shows one to a process:
    the first, unless `CUDA_VISIBLE_DEVICES` names another.
    """
    cards: dict[Gpu, list[Gpu]] = {}
    num_hidden = 0
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            card = _described(nvml.nvmlDeviceGetUUID(handle), handle, nvml)
            cards[card] = _instances(card, handle, nvml) if _has_mig(handle, nvml) else [card]
        except nvml.NVMLError_NoPermission:  # a container or a batch system keeps it for others
            num_hidden += 1
        except nvml.NVMLError as error:
            _warn(f"NVIDIA's driver does not open its GPU {index}, which is not used: {error}")
    if num_hidden and not cards:
        _warn(f"This process may not open the GPUs that NVIDIA's driver has: {num_hidden}")
    return dict(sorted(cards.items(), key=lambda item: item[0].pci))


def _has_mig(handle: Any, nvml: Any) -> bool:
    with contextlib.suppress(nvml.NVMLError):  # most cards cannot have it
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE)
    return False


def _instances(card: Gpu, handle: Any, nvml: Any) -> list[Gpu]:
    """Instances of a card with MIG on."""
    found = []
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with contextlib.suppress(nvml.NVMLError):  # there are fewer than there may be
            instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
            found.append(_described(nvml.nvmlDeviceGetUUID(instance), instance, nvml))
    if not found:
        _warn(f"MIG is on for {card}, {card.id}, and it has no instance that could be used")
    return found


def _described(name: str, handle: Any, nvml: Any) -> Gpu:
    """What NVML tells of a card or a MIG instance, which may be less than all."""

    def ask(function: Callable[[Any], Any]) -> Any:
        """An answer for the handle; for a MIG instance also that of its card, if it has none."""
        with contextlib.suppress(nvml.NVMLError):
            return function(handle)
        with contextlib.suppress(nvml.NVMLError):
            return function(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle))
        return None

    capability = ask(nvml.nvmlDeviceGetCudaComputeCapability)
    memory = ask(nvml.nvmlDeviceGetMemoryInfo)
    pci = ask(nvml.nvmlDeviceGetPciInfo)
    return Gpu(
        name,
        ask(nvml.nvmlDeviceGetName) or "",
        None if capability is None else tuple(capability),
        0 if memory is None else memory.total,
        ask(lambda _: nvml.nvmlSystemGetDriverVersion()) or "",
        "" if pci is None else f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0",
    )


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
