"""Images that kill, hang or fill their decoder: what becomes of them, and of all the others.

Five of the images carry a comment at which a shim does it to whatever process opens them with
Pillow. The shim is no part of the package: a `sitecustomize.py`, which Python imports as it
starts, in a folder on PYTHONPATH. Beside that run stands one over the same images without it:

- `rows`, `failures`: in the store. Of the failures, `as wanted` are those of a poisoned image,
  with stage `decode` and a reason that says what happened; all reasons are printed below.
- `vectors`: how many of the other images have the same vectors as without the shim, bit for bit.
- `seconds`: of the command; the ratio is to the run without the shim in the same round.
- `status`: the command's; `left` are processes that were still there 10 seconds later.

Each is run in process, with two local workers, and on a Dask scheduler with two workers, which
are real processes on the loopback. Batches hold one image: else neighbours would differ, and with
them perhaps the last bits of a vector.

    python benchmarks/poison.py --images 500 --timeout 5 --before CHECKOUT

A checkout that dies of them is shown as it is. The shim takes 4 GiB at most, and no run lasts
longer than `--most-seconds`, so that the machine lives.
"""

import argparse
import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from runs import (
    Run,
    add_arguments,
    environment_of,
    extract,
    has_option,
    machine,
    packages_of,
    print_table,
    ratios,
    spread,
)

TIMEOUT = "--decode-timeout"  # takes the seconds that an image's decoder has
PLACES = ("in process", "2 workers", "scheduler")
NETWORK = ("--backbone", "mobilenet-v3-small", "--weights", "random:0", "--image-size", "64x96")

# By what an image does to its decoder: what the reason of its failure has to say.
REASONS = {
    "segfault": r"signal 11\b|SIGSEGV",
    "abort": r"signal 6\b|SIGABRT",
    "hang": r"longer than",
    "memory": r"memory|GiB|signal 9\b|SIGKILL",
    "exit": r"exit|ended|died",
}
SHIM = r"""
import ctypes, os, re, resource, signal
from pathlib import Path
import PIL.Image

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def fill_memory():
    import numpy

    blocks = [numpy.zeros(2**25, numpy.uint8) for _ in range(128)]  # of the address space alone
    for block in blocks:
        block[::4096] = 1
    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does at last, but before others suffer


POISONS = {
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    # It holds Python's lock for ever, as a decoder written in C may.
    "hang": lambda: re.match("(a+)+$", 64 * "a" + "b"),
    "memory": fill_memory,
    "exit": lambda: os._exit(3),
}


def open_poisoned(file, *arguments, **options):
    if isinstance(file, (str, bytes, os.PathLike)):
        content = Path(os.fsdecode(file)).read_bytes()
    else:
        position = file.tell()
        content = file.read()
        file.seek(position)
    if found := re.search(rb"poison: (\w+)", content):
        POISONS[found[1].decode()]()
    return open_image(file, *arguments, **options)


open_image, PIL.Image.open = PIL.Image.open, open_poisoned
"""


@dataclass
class Outcome:
    """What a run left in its store.

    Attributes:
        run: What it took.
        vectors: By image, as bytes.
        failures: Stage and reason, by image.
    """

    run: Run
    vectors: dict[str, bytes] = field(default_factory=dict)
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)


def make_images(folder: Path, num_images: int) -> tuple[Path, dict[str, str]]:
    """Write images of smooth random colours.

    Returns:
        The folder, and what the poisoned images do, by id.
    """
    folder.mkdir()
    generator = np.random.default_rng(0)
    step = num_images // (len(REASONS) + 1)
    poisoned = {f"{step * number:04d}.jpg": name for number, name in enumerate(REASONS, start=1)}
    for number in range(num_images):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        path = folder / f"{number:04d}.jpg"
        comment = f"poison: {poisoned.get(path.name, '')}"
        coarse.resize((160, 120), Image.Resampling.BICUBIC).save(path, comment=comment)
    return folder, poisoned


def outcome_of(run: Run, store: Path) -> Outcome:
    """Read a store, by whichever checkout it was made."""
    outcome = Outcome(run)
    for file in (store / "embeddings").glob("*.parquet"):
        table = pq.read_table(file, columns=["image_id", "embedding"])
        for image_id, vector in zip(*map(pq_list, table.columns), strict=True):
            outcome.vectors[image_id] = np.array(vector, np.float32).tobytes()
    for file in (store / "failures").glob("*.parquet"):
        table = pq.read_table(file, columns=["image_id", "stage", "error"])
        for image_id, *failure in zip(*map(pq_list, table.columns), strict=True):
            outcome.failures[image_id] = tuple(failure)
    return outcome


def pq_list(column: object) -> list[object]:
    return column.to_pylist()


@contextlib.contextmanager
def scheduler(environment: dict[str, str], folder: Path) -> Iterator[str]:
    """A Dask scheduler and two workers, processes on the loopback; its address.

    Args:
        environment: Of all three.
        folder: Where they work and write what they have to say.
    """
    script = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1"]
    log = folder / "scheduler.log"
    processes = []

    def start(*command: str, name: Path) -> None:
        with name.open("wb") as file:
            processes.append(
                subprocess.Popen(
                    command, stderr=file, cwd=folder, env=environment, start_new_session=True
                )
            )

    try:
        start(*script, "--port", "0", "--no-dashboard", name=log)
        while not (found := re.search(r"Scheduler at:\s+(\S+)", log.read_text())):
            if processes[0].poll() is not None:
                raise SystemExit(f"the scheduler ended:\n{log.read_text()}")
            time.sleep(0.05)
        for number in range(2):
            script = [sys.executable, "-m", "distributed.cli.dask_worker", found[1]]
            name = folder / f"worker-{number}.log"
            start(*script, "--nthreads", "1", "--no-dashboard", name=name)
        yield found[1]
    finally:
        for process in reversed(processes):  # each is the first of a group of its own
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def embed(
    place: str, package: Path, images: Path, shim: Path | None, options: argparse.Namespace
) -> Outcome:
    """Embed the images into a new store, in one of `PLACES`."""
    more = {"PYTHONPATH": str(shim)} if shim else {}
    arguments = [*NETWORK, "--batch-size", 1, "--shard-size", options.shard_size]
    arguments += ["--max-failures", 1]
    if has_option(package, TIMEOUT):
        arguments += [TIMEOUT, options.timeout]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if place == "2 workers":
            arguments += ["--workers", 2]
        elif place == "scheduler":
            environment = environment_of(package, more)
            address = stack.enter_context(scheduler(environment, Path(folder)))
            arguments += ["--scheduler", address]
        store = Path(folder) / "store"
        how = {"environment": more, "may_fail": True, "most_seconds": options.most_seconds}
        return outcome_of(extract(package, images, store, *arguments, **how), store)


def row_of(
    pairs: list[tuple[Outcome, Outcome]], poisoned: dict[str, str], num_images: int
) -> list[object]:
    """The cells of a place and checkout, from runs without the shim and with it, by round."""
    num_as_wanted = num_same = num_others = 0
    for clean, outcome in pairs:
        for image_id, name in poisoned.items():
            stage, reason = outcome.failures.get(image_id, ("", ""))
            num_as_wanted += stage == "decode" and bool(re.search(REASONS[name], reason))
        others = clean.vectors.keys() - poisoned.keys()
        num_others += num_images - len(poisoned)
        num_same += sum(clean.vectors[name] == outcome.vectors.get(name) for name in others)
    runs = [outcome.run for _, outcome in pairs]
    before = [clean.run.seconds for clean, _ in pairs]
    return [
        spread((len(outcome.vectors) for _, outcome in pairs), ".0f"),
        spread((len(outcome.failures) for _, outcome in pairs), ".0f"),
        f"{num_as_wanted} of {len(poisoned) * len(pairs)}",
        f"{num_same:,} of {num_others:,}",
        spread(run.seconds for run in runs),
        ratios((run.seconds for run in runs), before),
        ", ".join(sorted({str(run.returncode) for run in runs})),
        sum(run.num_left for run in runs),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--places", nargs="+", choices=PLACES, default=PLACES)
    parser.add_argument("--timeout", type=float, default=5, help="seconds of --decode-timeout")
    parser.add_argument("--shard-size", type=int, default=64)
    parser.add_argument("--most-seconds", type=float, default=300, help="of one run")
    add_arguments(parser, rounds=1)
    options = parser.parse_args()
    print(machine(), flush=True)
    packages = packages_of(options.before)
    for name, package in packages.items():
        if not has_option(package, TIMEOUT):
            print(f"{name}: {TIMEOUT} is left out, this checkout has no such option")
    pairs: dict[tuple[str, str], list[tuple[Outcome, Outcome]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        images, poisoned = make_images(Path(folder) / "images", options.images)
        shim = Path(folder) / "shim"
        shim.mkdir()
        (shim / "sitecustomize.py").write_text(SHIM)
        for package in packages.values():  # a warm-up, which exports the network
            embed("in process", package, images, None, options)
        for _, place in itertools.product(range(options.rounds), options.places):
            for name, package in packages.items():
                clean = embed(place, package, images, None, options)
                if len(clean.vectors) != options.images:
                    reason = clean.run.output.splitlines()[-1:]
                    print(f"{place}, {name}: left out, it fails without the shim too: {reason}")
                    continue
                outcome = embed(place, package, images, shim, options)
                pairs[place, name].append((clean, outcome))
    heads = (
        "",
        "",
        "rows",
        "failures",
        "as wanted",
        "vectors",
        "seconds",
        "ratio",
        "status",
        "left",
    )
    rows = [[*key, *row_of(found, poisoned, options.images)] for key, found in pairs.items()]
    print_table(heads, rows)
    for (place, name), found in pairs.items():
        _, outcome = found[-1]
        print(f"\n{place}, {name}:")
        for image_id, (stage, reason) in sorted(outcome.failures.items()):
            print(f"- {poisoned.get(image_id, image_id)}: {stage}: {reason}")
        if outcome.run.returncode:
            print(f"- it said: {outcome.run.output[-300:]}")


if __name__ == "__main__":
    main()
