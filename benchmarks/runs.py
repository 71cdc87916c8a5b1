"""One `embedder extract` of any checkout, and what it took: the machinery of several benchmarks.

Each run is measured by a process of its own (this module as a script), which becomes the parent
of whatever the command leaves behind, and waits for that too. So CPU seconds are exact, whether a
process is waited for by the command, killed or outlives it:

- `own_cpu_seconds`: user and system time of the command's own process, all of its threads, as
  the kernel holds them when it has ended and is not yet waited for; no child's time.
- `children_cpu_seconds`: of all other processes that the command and its children started.
- `peak_bytes`: the largest sum, sampled each 0.1 s, of the proportional set sizes (PSS) of all
  these processes: memory that several of them map counts once. What `/dev/shm` holds counts
  where a process maps it.
- `num_left`: processes that still ran `GRACE_SECONDS` after the command; they are killed.

    python benchmarks/runs.py --memory COMMAND...
"""

import argparse
import contextlib
import ctypes
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.1
GRACE_SECONDS = 10
TICKS = os.sysconf("SC_CLK_TCK")
PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl.h


@dataclass
class Run:
    """What one run of the command line took, and its record in the store."""

    returncode: int
    seconds: float
    own_cpu_seconds: float
    children_cpu_seconds: float
    peak_bytes: int
    num_left: int
    output: str
    record: dict[str, Any]

    @property
    def speed(self) -> float:
        """Images per second, from the first byte read to the last shard written."""
        return float(self.record["images_per_second"])

    @property
    def cpu_seconds(self) -> float:
        return self.own_cpu_seconds + self.children_cpu_seconds


def extract(
    package: Path,
    source: Path | str,
    store: Path,
    *options: object,
    environment: dict[str, str] | None = None,
    memory: bool = False,
    may_fail: bool = False,
    most_seconds: float = 4 * 3600,
) -> Run:
    """Run `embedder extract` of a checkout, and measure it.

    Args:
        package: The checkout.
        source: As on the command line.
        store: Not there yet.
        *options: As on the command line.
        environment: Beside this process's own; its PYTHONPATH comes after the package.
        memory: Sample `peak_bytes`, which takes time of the cores.
        may_fail: Whether another exit status than 0 is an outcome, not the end.
        most_seconds: After which the command is killed, with all that it started.
    """
    command = [sys.executable, __file__, *["--memory"] * memory]
    command += ["--most-seconds", str(most_seconds), "--", sys.executable, "-m", "embedder"]
    command += ["extract", str(source), str(store), "--quiet", *map(str, options)]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment_of(package, environment),
        cwd=store.parent,  # `-m` would find a package in this folder first
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
    *output, last = done.stdout.splitlines()
    measured = json.loads(last)
    if measured["returncode"] and not may_fail:
        raise SystemExit(f"{' '.join(command)}:\n" + "\n".join(output))
    records = sorted((store / "runs").glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    record = json.loads(records[-1].read_bytes()) if records else {}
    return Run(**measured, output="\n".join(output), record=record)


def environment_of(package: Path, more: dict[str, str] | None = None) -> dict[str, str]:
    """The environment in which a checkout is imported before the installed package."""
    found = os.environ | (more or {})
    paths = filter(None, (str(package), found.get("PYTHONPATH")))
    return found | {"PYTHONPATH": os.pathsep.join(paths)}


@cache
def has_option(package: Path, option: str) -> bool:
    """Whether a checkout's `embedder extract` has an option."""
    done = subprocess.run(
        [sys.executable, "-m", "embedder", "extract", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=environment_of(package),
        cwd=package,
    )
    return re.search(rf"^\s*{option}\b", done.stdout, re.MULTILINE) is not None


def spread(values: Iterable[float], form: str = ".1f") -> str:
    """Median and range, as a cell of a table."""
    values = list(values)
    median = f"{statistics.median(values):{form}}"
    if len(values) == 1:
        return median
    return f"{median} ({min(values):{form}} to {max(values):{form}})"


def ratios(values: Iterable[float], bases: Iterable[float]) -> str:
    """Median and range of the ratios by round, as a cell of a table."""
    return spread((value / base for value, base in zip(values, bases, strict=True)), ".2f")


def print_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    print(f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", sep="\n")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def machine() -> str:
    """What the figures are of."""
    return f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {sys.version[:6]}"


def packages_of(before: Path | None) -> dict[str, Path]:
    """The checkouts to compare, by name."""
    return ({"before": before.resolve()} if before else {}) | {"now": ROOT}


def add_arguments(parser: argparse.ArgumentParser, rounds: int = 3) -> None:
    """Options that the comparisons of two checkouts have in common."""
    parser.add_argument("--before", type=Path, help="another checkout, measured in alternation")
    parser.add_argument("--rounds", type=int, default=rounds)


def stat_of(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on; the second may hold anything in brackets."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def cpu_seconds_of(pid: int) -> tuple[float, float]:
    """CPU seconds of a process, and of all children that it has waited for."""
    own_user, own_system, children_user, children_system = map(int, stat_of(pid)[11:15])
    return (own_user + own_system) / TICKS, (children_user + children_system) / TICKS


def descendants(root: int) -> list[int]:
    """Process ids of all below a process."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(folder.name)] = int(stat_of(int(folder.name))[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def pss_bytes(pids: Iterable[int]) -> int:
    """Proportional set size of some processes together; 0 where the system does not tell it."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            if found := re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE):
                total += int(found[1]) * 1024
    return total


def repeat_until(ended: threading.Event, sample: Callable[[], None]) -> None:
    while not ended.wait(SAMPLE_SECONDS):
        sample()


def kill_all_below() -> int:
    """Kill all that this process started, and what that started; tell how many."""
    pids = descendants(os.getpid())
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(pids)


def reap_the_rest() -> tuple[float, int]:
    """Wait for what outlived the command: its CPU seconds, and how many had to be killed."""
    cpu_seconds, num_left, deadline = 0.0, 0, time.monotonic() + GRACE_SECONDS
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:  # there is none
            return cpu_seconds, num_left
        if ended is not None:
            cpu_seconds += sum(cpu_seconds_of(ended.si_pid))
            os.waitpid(ended.si_pid, 0)
            continue
        if time.monotonic() > deadline:
            num_left += kill_all_below()
            deadline = time.monotonic() + GRACE_SECONDS
        time.sleep(0.01)


def measure(command: list[str], memory: bool, most_seconds: float) -> dict[str, Any]:
    """Run a command to its end, and that of all that it started."""
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise SystemExit("prctl failed: CPU seconds of orphans would be lost")
    peak, ended = [0], threading.Event()

    def sample() -> None:
        peak[0] = max(peak[0], pss_bytes(descendants(os.getpid())))

    sampler = threading.Thread(target=repeat_until, args=(ended, sample))
    begin = time.perf_counter()
    process = subprocess.Popen(command)
    if memory:
        sampler.start()
    limit = threading.Timer(most_seconds, kill_all_below)
    limit.daemon = True
    limit.start()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    limit.cancel()
    seconds = time.perf_counter() - begin
    own, children = cpu_seconds_of(process.pid)
    returncode = process.wait()
    rest, num_left = reap_the_rest()
    ended.set()
    if memory:
        sampler.join()
    return {
        "returncode": returncode,
        "seconds": seconds,
        "own_cpu_seconds": own,
        "children_cpu_seconds": children + rest,
        "peak_bytes": peak[0],
        "num_left": num_left,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--memory", action="store_true", help="sample the memory too")
    parser.add_argument("--most-seconds", type=float, default=4 * 3600)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    print(json.dumps(measure(options.command, options.memory, options.most_seconds)))


if __name__ == "__main__":
    main()
