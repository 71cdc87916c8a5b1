"""Which GPU a worker process takes, and which cores: of workers on this machine, and elsewhere."""

import functools
import os
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from embedder.libraries import logger
from embedder.machine import Gpu, cores_near, gpus, num_cores

RESOURCE = "GPU"  # what workers of a scheduler declare to have: `dask worker --resources GPU=1`


class Place(NamedTuple):
    """Where a local worker works: its GPU, None to leave that open, and cores, none for all."""

    gpu: str | None
    cores: list[int]


def local_places(ids: Sequence[str], num_workers: int, root: Path) -> list[Place]:
    """Give GPUs to local workers in turns, and with each the cores near it.

    No worker is bound to cores where that would take some from it: where the cores near a GPU are
    fewer than the shares, of all cores, of the workers that they are for.

    Args:
        ids: As `machine.gpus` names them.
        num_workers: Local worker processes.
        root: Where the system's files are.
    """
    if not ids:
        return [Place(None, [])] * num_workers
    taken = [ids[number % len(ids)] for number in range(num_workers)]
    near = {gpu.id: frozenset(cores_near(gpu, root)) for gpu in gpus(root)}
    near_each = [near.get(gpu, frozenset()) for gpu in taken]
    num_sharers, share = Counter(near_each), share_of_cores(num_workers)
    return [
        Place(gpu, sorted(cores) if len(cores) >= share * num_sharers[cores] else [])
        for gpu, cores in zip(taken, near_each, strict=True)
    ]


def share_of_cores(num_workers: int) -> int:
    """CPU threads for each of several local workers."""
    return max(1, num_cores() // num_workers)


def take_place(place: Place) -> None:
    """Give this process, and those that it starts, a GPU and cores.

    To be called in the main thread, before a framework is imported, and before other threads and
    decoders are started: they get the cores of what starts them.
    """
    if place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu
    if place.cores:
        os.sched_setaffinity(0, place.cores)


def run_on_first_gpu(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a task in a worker process that others started, and may have given several GPUs."""
    _keep_to_first_gpu()
    return function(*arguments)


@functools.cache
def _keep_to_first_gpu() -> Gpu | None:
    """Hide all GPUs but the first from this process: a framework would take memory of each.

    `dask cuda worker` gives every worker all cards, with its own in the first place.
    """
    found = gpus()
    if not found:
        return None
    os.environ["CUDA_VISIBLE_DEVICES"] = found[0].id
    return found[0]


def gpu_of_this_worker() -> tuple[str, str] | None:
    """The host and the GPU of the worker that this runs on, such as `0000:3b:00.0`."""
    gpu = _keep_to_first_gpu()
    if gpu is None:
        return None
    # Instances of one card have the address of the card.
    is_instance = gpu.id.startswith("MIG-")
    return socket.gethostname(), gpu.id if is_instance or not gpu.pci else gpu.pci


def tell_of_gpus(
    found: dict[str, tuple[str, str] | None], new: set[str], scheduler: str, expected: bool
) -> None:
    """Warn of new workers of a scheduler that share a GPU, or lack the one they declare.

    Args:
        found: What `gpu_of_this_worker` tells, by worker.
        new: Workers that nothing was told of before.
        scheduler: Its address.
        expected: Whether each of these workers declares to have one.
    """
    workers = defaultdict(list)
    for worker, gpu in found.items():
        workers[gpu].append(worker)
    for gpu, sharing in workers.items():
        if new.isdisjoint(sharing):
            continue
        if gpu is None:
            if expected:
                logger.warning(
                    "No GPU is found by workers that declare the resource %s: %s",
                    *(RESOURCE, ", ".join(sharing)),
                )
        elif len(sharing) > 1:
            logger.warning(
                "Several workers of host %s take the same GPU, %s: %s. Start one worker for each "
                "GPU, with a CUDA_VISIBLE_DEVICES of its own: CUDA_VISIBLE_DEVICES=0 dask worker "
                "%s --nworkers 1 --resources %s=1",
                *(*gpu, ", ".join(sharing), scheduler, RESOURCE),
            )
