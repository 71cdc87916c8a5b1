"""Sections of a benchmark: each a process of its own, with a limit of time, that tells rows.

What a section has told is in a file, so that nothing is lost when it fails, or is ended because its
time is up. Two frameworks that each take the memory of a GPU thus never share a process.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from runs import PR_SET_CHILD_SUBREAPER, descendants, environment_of, pss_bytes

from embedder.machine import Gpu, gpus

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.05
GRACE_SECONDS = 5.0  # for a section that ends itself to do so
ERROR_CHARACTERS = 1500


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@dataclass
class Section:
    """What a section is asked, and where it tells what it found.

    Attributes:
        settings: Of the benchmark.
        file: To which rows are told.
        deadline: On `time.monotonic`'s clock: nothing is begun that is likely to pass it.
    """

    settings: dict[str, Any]
    file: Path
    deadline: float
    _took: list[float] = field(default_factory=list, init=False)

    def tell(self, **row: Any) -> None:
        """Add a row to what was found."""
        with self.file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")

    def measure(self, call: Callable[..., dict[str, Any]], **what: Any) -> None:
        """Tell a row of one measurement: left out where not even the quickest would still fit.

        An error, or that there is no time left, becomes the row's `reason`; others go on.

        Args:
            call: Is given the section and `what`; returns the rest of the row.
            **what: Is measured; the row begins with it.
        """
        row = dict(what)
        begin = time.monotonic()
        try:
            if begin + min(self._took, default=0.0) > self.deadline:
                raise NotMeasuredError("no time was left")
            row |= call(self, **what)
            self._took.append(time.monotonic() - begin)
        except NotMeasuredError as error:
            row["reason"] = str(error)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - does not end the others
            row["reason"] = f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]
            row["traceback"] = end_of(traceback.format_exc())
        row["took"] = round(time.monotonic() - begin, 2)
        self.tell(**row)


class NotMeasuredError(Exception):
    """Why there is no figure."""


def end_of(text: str) -> str:
    return text.strip()[-ERROR_CHARACTERS:]


def serve(functions: Sequence[Callable[[Section], None]]) -> None:
    """Be a section: the process that `run_section` starts."""
    name, settings, file, seconds = sys.argv[1:]
    section = Section(json.loads(settings), Path(file), time.monotonic() + float(seconds))
    {function.__name__: function for function in functions}[name](section)


def run_section(
    script: str,
    function: str,
    settings: dict[str, Any],
    seconds: float,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run a section, for so many seconds at most.

    Args:
        script: Beside this file.
        function: Of the script.
        settings: Of the benchmark.
        seconds: Until it is killed. What it started and left running is killed in any case.
        environment: Beside this process's own.

    Returns:
        `rows` that it told, the `seconds` that it took, and, where it did not come to its end, the
        `reason`.
    """
    file = Path(settings["scratch"]) / f"{function}-{time.monotonic_ns()}.jsonl"
    file.touch()
    own = max(1.0, seconds - GRACE_SECONDS)
    command = [sys.executable, str(ROOT / "benchmarks" / script), function]
    command += [json.dumps(settings), str(file), str(own)]
    # Orphans become children of this process, which thus finds them.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    others = {os.getpid(), *descendants(os.getpid())}
    begin = time.monotonic()
    log = file.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment_of(ROOT, environment),
            cwd=settings["scratch"],
        )
        reason = None
        try:
            if process.wait(seconds):
                ended = f"ended with status {process.returncode}"
                reason = f"{ended}: {end_of(log.read_text(errors='replace'))}"
        except subprocess.TimeoutExpired:
            reason = f"took longer than its {seconds:.0f} s"
        finally:
            end_all_but(others)
            process.wait()
    found: dict[str, Any] = {"seconds": round(time.monotonic() - begin, 1)}
    if reason is not None:
        found["reason"] = reason
    return found | {"rows": [json.loads(line) for line in file.read_text().splitlines()]}


def end_all_but(others: set[int]) -> None:
    """Kill all below this process, other than these, and wait until they are gone."""
    end = time.monotonic() + GRACE_SECONDS
    while (left := set(descendants(os.getpid())) - others) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # the child of one that is killed too
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)


def sweep(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What is measured of networks alone: first what comes first in all of the settings' lists.

    One step further in precision and batch size of the first networks precedes the other networks.
    """
    ranked = [
        (i + j + 2 * (n >= settings["num_first_networks"]), {**of_network, **precision, **size})
        for i, precision in enumerate(each(settings, "precision", "sweep_precisions"))
        for j, size in enumerate(each(settings, "batch_size", "batch_sizes"))
        for n, of_network in enumerate(each(settings, "network", "networks"))
    ]
    return [what for _, what in sorted(ranked, key=lambda one: one[0])]


def random_pixels(shape: tuple[int, ...], seed: int) -> NDArray[np.uint8]:
    """Noise, of which every 64 images are the same."""
    noise = np.random.default_rng(seed).integers(0, 256, (min(64, shape[0]), *shape[1:]), np.uint8)
    return noise[np.arange(shape[0]) % len(noise)]


def each(settings: dict[str, Any], name: str, values: str) -> list[dict[str, Any]]:
    return [{name: value} for value in settings[values]]


def in_windows(measure: Callable[[], float], settings: dict[str, Any]) -> dict[str, float]:
    """The speed of several measurements, as `spread_of` tells it."""
    return spread_of([measure() for _ in range(settings["windows"])])


def spread_of(speeds: Sequence[float]) -> dict[str, float]:
    """The median as `speed`, and beside it the `lowest` and the `highest`, in images per second."""
    found = {"speed": statistics.median(speeds), "lowest": min(speeds), "highest": max(speeds)}
    return {name: round(speed, 1) for name, speed in found.items()}


def affordable_rows(section: Section, speed: float) -> int:
    """Images of a round, such that all rounds fit into the time that is left."""
    settings = section.settings
    left = section.deadline - time.monotonic()
    fitting = int(0.8 * speed * left / settings["rounds"])
    return max(min(settings["rows"], fitting), min(settings["rows"], settings["memory_rows"]))


# The card. ---------------------------------------------------------------------------------------


def card() -> dict[str, Any] | None:
    """The first GPU that this process may use; None where there is none.

    What NVIDIA's driver refuses to tell is None: in a container or of a part of a card, it may.
    """
    found = gpus()
    if not found:
        return None
    gpu, handle = found[0], handle_of(found[0])
    limit = asked("nvmlDeviceGetEnforcedPowerLimit", handle)
    return {
        "id": gpu.id,
        "name": str(gpu),
        "driver": gpu.driver,
        "memory_bytes": gpu.memory_bytes,
        "compute_capability": gpu.compute_capability and list(gpu.compute_capability),
        "pci": gpu.pci,
        "power_limit_watts": None if limit is None else limit / 1000,
        "cards": len(found),
    }


def handle_of(gpu: Gpu) -> Any:
    """NVML's handle of a GPU; None if it cannot be had."""
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        if gpu.id.startswith("MIG-"):
            return pynvml.nvmlDeviceGetHandleByUUID(gpu.id.encode())
        if gpu.pci:
            return pynvml.nvmlDeviceGetHandleByPciBusId(gpu.pci.encode())
    return None


def asked(function: str, handle: Any) -> Any:
    """What NVML tells of a handle by a function; None if it tells nothing."""
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        return None if handle is None else getattr(pynvml, function)(handle)
    return None


@dataclass
class Sample:
    """What was seen at a time; None for what could not be.

    Attributes:
        when: In seconds since the epoch.
        busy: Share of the time that the GPU was, 0 to 1.
        card_bytes: Of its memory that are used.
        host_bytes: Proportional set size of this process and all that it started.
    """

    when: float
    busy: float | None = None
    card_bytes: int | None = None
    host_bytes: int | None = None


class Monitor:
    """Samples the first GPU while something runs, and on request the memory of all processes."""

    def __init__(self, with_host_memory: bool = False) -> None:
        self.samples: list[Sample] = []
        self._with_host_memory = with_host_memory
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> "Monitor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _repeat(self) -> None:
        handle = next(map(handle_of, gpus()), None)
        while True:
            self.samples.append(self._sample(handle))
            if self._ended.wait(SAMPLE_SECONDS):
                return

    def _sample(self, handle: Any) -> Sample:
        sample = Sample(time.time())
        if (rates := asked("nvmlDeviceGetUtilizationRates", handle)) is not None:
            sample.busy = rates.gpu / 100
        if (memory := asked("nvmlDeviceGetMemoryInfo", handle)) is not None:
            sample.card_bytes = memory.used
        if self._with_host_memory:
            # Not every system tells it: then the sum is 0.
            sample.host_bytes = pss_bytes([os.getpid(), *descendants(os.getpid())]) or None
        return sample

    def busy_share(self, begin: float, end: float) -> float | None:
        """Mean between two times, in seconds since the epoch; None where nothing was sampled."""
        samples = [one for one in self.samples if begin <= one.when <= end]
        shares = [one.busy for one in samples if one.busy is not None]
        return round(sum(shares) / len(shares), 3) if shares else None

    @property
    def peaks(self) -> dict[str, int | None]:
        """The most memory; None where nothing was sampled."""
        card = [one.card_bytes for one in self.samples if one.card_bytes is not None]
        host = [one.host_bytes for one in self.samples if one.host_bytes is not None]
        return {
            "peak_host_bytes": max(host, default=None),
            "peak_card_bytes": max(card, default=None),
        }
