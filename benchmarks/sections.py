"""Sections of a benchmark: each a process of its own, with a limit of time, that tells rows.

What a section has told is in a file, so that nothing is lost when it fails, or is ended because its
time is up. Two frameworks that each take the memory of a GPU thus never share a process.
"""

import contextlib
import importlib.util
import json
import os
import signal
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
from runs import descendants, environment_of, pss_bytes

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
        seconds: Until it is killed, with all that it started.
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
            end_all(process.pid)
            process.wait()
            reason = f"took longer than its {seconds:.0f} s"
    found: dict[str, Any] = {"seconds": round(time.monotonic() - begin, 1)}
    if reason is not None:
        found["reason"] = reason
    return found | {"rows": [json.loads(line) for line in file.read_text().splitlines()]}


def end_all(process_id: int) -> None:
    """Kill a process, and all that it started."""
    for pid in (process_id, *descendants(process_id)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def sweep(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What is measured of networks alone: first what comes first in all of the settings' lists."""
    ranked = [
        (i + j + (n >= settings["num_first_networks"]), {**of_network, **precision, **size})
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


# The card. ---------------------------------------------------------------------------------------


def card() -> dict[str, Any] | None:
    """The first GPU, as NVIDIA's driver tells it; None where there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return {
            "name": pynvml.nvmlDeviceGetName(handle),
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "memory_bytes": pynvml.nvmlDeviceGetMemoryInfo(handle).total,
            "compute_capability": list(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
            "power_limit_watts": pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "cards": pynvml.nvmlDeviceGetCount(),
        }
    except Exception:  # noqa: BLE001 - no library, no driver, no card: of many kinds
        return None


class Monitor:
    """Samples the GPU while something runs, and on request the memory of all processes.

    Attributes:
        samples: (seconds since the epoch, busy share of the GPU 0 to 1, bytes of its memory).
        peak_bytes: Largest proportional set size of this process and all that it started.
    """

    def __init__(self, with_host_memory: bool = False) -> None:
        self.samples: list[tuple[float, float, int]] = []
        self.peak_bytes = 0
        self._with_host_memory = with_host_memory
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Monitor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        handle = None
        with contextlib.suppress(Exception):
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        while not self._ended.wait(SAMPLE_SECONDS):
            if handle is not None:
                busy = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                used = pynvml.nvmlDeviceGetMemoryInfo(handle).used
                self.samples.append((time.time(), busy, used))
            if self._with_host_memory:
                pids = [os.getpid(), *descendants(os.getpid())]
                self.peak_bytes = max(self.peak_bytes, pss_bytes(pids))

    def busy_share(self, begin: float, end: float) -> float | None:
        """Mean between two times, in seconds since the epoch; None where nothing was sampled."""
        shares = [busy for when, busy, _ in self.samples if begin <= when <= end]
        return round(sum(shares) / len(shares), 3) if shares else None

    @property
    def peak_card_bytes(self) -> int | None:
        return max((used for *_, used in self.samples), default=None)
