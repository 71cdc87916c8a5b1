"""What feeds the engine: tiny images, photographs, and images behind slow and faulty servers.

    python benchmarks/feeding.py small --before CHECKOUT
    python benchmarks/feeding.py photos .../grocery/train --before CHECKOUT
    python benchmarks/feeding.py remote .../grocery/train --before CHECKOUT

This checkout (`now`) is measured beside another (`before`), in turn, several rounds; each
measurement is a process of its own. Ratios are of one round; cells are medians and, in brackets,
ranges. Options that a checkout does not have are not given to it.

`small`: images of 32x32 pixels through a nearly empty network, where all that is done for an
image beside the network shows. `plain Pillow` is one thread that opens the same files, converts
them to RGB and makes arrays of them. CPU time is that of `runs.py`, in microseconds an image: of
a whole run less that of a run over a tenth of the images, by the difference of their numbers, so
that starting does not count. `engine's own` is that of the network alone, on black images in
memory, in a process of its own; threads of an engine that wait for work spin for a while, so in a
run it may take more than alone.

`photos`: `benchmarks/throughput.py` of each checkout, whose docstring says what efficiency is.

`remote`: the server is `servers.py`, in a process of its own on the same cores. `of local`: the
speed as a share of that from the local disk in the same round, by the same checkout. CPU time is
of all processes but the server, and what an image takes more than from the local disk. `with
faults` is the same server where 10 % of the attempts go wrong, in four ways. A slow `before` is
measured on fewer images, `--images-before`, of which starting is a larger part.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
from servers import FAULTS as FAULT_KINDS, Server, serving, share_of
from throughput import available, link_images

DECODERS = "--decoders"  # takes the number of decoder processes
READ_AHEAD = "--read-ahead"  # takes the number of reads in flight
PRIVATE = "--allow-private"  # a flag: addresses of the loopback may be asked
NETWORK = ("--backbone", "mobilenet-v3-small", "--weights", "random:0")
SIDE = 32  # of small images, in pixels
FAULTS = ("503=0.05", "reset=0.02", "short=0.02", "hang=0.01")
LOCAL, WITH_FAULTS = "local disk", ", with faults"
METHODS = ("GET", "HEAD", "LIST")
PRECISIONS = ("float32", "bfloat16")

# One thread, as one would write it: opens, converts, makes an array.
PILLOW = """
import sys, time
from pathlib import Path
import numpy as np
from PIL import Image

paths = sorted(path for path in Path(sys.argv[1]).rglob("*") if path.is_file())
begin = time.perf_counter()
for path in paths:
    with Image.open(path) as image:
        np.asarray(image.convert("RGB"))
print(len(paths) / (time.perf_counter() - begin))
"""

# CPU microseconds an image of the network alone, as `find_batch_size` runs it.
ENGINE = """
import logging, sys, time
from embedder import engines
from embedder.backbones import make_recipe
from embedder.machine import gpus, num_cores

logging.getLogger("embedder").setLevel(logging.ERROR)  # random weights are meant
side, batch_size = map(int, sys.argv[1:])
recipe = make_recipe("mobilenet-v3-small", "random:0", image_size=(side, side))
engine = engines.load(recipe, engines.choose("auto", gpus()), batch_size, num_cores())
engines.images_per_second(engine, recipe)  # a warm-up
num_images, cpu_seconds = 0.0, 0.0
for _ in range(4):
    begin, begin_cpu = time.perf_counter(), time.process_time()
    speed = engines.images_per_second(engine, recipe)
    num_images += speed * (time.perf_counter() - begin)
    cpu_seconds += time.process_time() - begin_cpu
print(1e6 * cpu_seconds / num_images)
"""


def make_images(folder: Path, num_images: int, kind: str) -> Path:
    """Write images of smooth random colours, the same each time, in ten subfolders."""
    generator = np.random.default_rng(0)
    for number in range(num_images):
        path = folder / f"class-{number % 10}" / f"{number:06d}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)
    return folder


def figure_of(code: str, *arguments: object, package: Path, scratch: Path) -> float:
    """The number that a program prints last, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        check=True,
        env=environment_of(package),
        cwd=scratch,
    )
    return float(done.stdout.split()[-1])


@dataclass(frozen=True)
class Way:
    """A checkout, and options of `embedder extract` with which it is measured."""

    name: str
    package: Path
    options: tuple[object, ...] = ()

    def run(self, source: Path | str, scratch: Path, *options: object, **how: object) -> Run:
        """Embed into a new store."""
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            store = Path(folder) / "store"
            return extract(self.package, source, store, *self.options, *options, **how)


def ways_of(before: Path | None, option: str, values: list[int], *flags: str) -> list[Way]:
    """What is compared: the checkouts, and this one with an option of its own.

    Args:
        before: The other checkout.
        option: Whose values are tried.
        values: Of the option.
        *flags: Given to each checkout that has them.
    """
    ways = []
    for name, package in packages_of(before).items():
        given = tuple(flag for flag in flags if has_option(package, flag))
        ways.append(Way(name, package, given))
    now = ways[-1]
    if values and not has_option(now.package, option):
        print(f"{option}: left out, this checkout has no such option")
        return ways
    return ways + [
        Way(f"now, {option} {value}", now.package, (*now.options, option, value))
        for value in values
    ]


@dataclass
class Small:
    """Of one run over small images; CPU times in microseconds an image."""

    speed: float
    own: float
    children: float
    batch_size: int
    engine: float = 0.0


def small_run(way: Way, images: Path, scratch: Path, num_images: int) -> Small:
    """A run over all images, beside one over a tenth of them."""
    few = way.run(images, scratch, "--limit", num_images // 10)
    run = way.run(images, scratch)
    scale = 1e6 / (run.record["counts"]["embedded"] - few.record["counts"]["embedded"])
    return Small(
        run.speed,
        scale * (run.own_cpu_seconds - few.own_cpu_seconds),
        scale * (run.children_cpu_seconds - few.children_cpu_seconds),
        run.record["batch_size"],
    )


def small(options: argparse.Namespace) -> None:
    network = (*NETWORK, "--image-size", f"{SIDE}x{SIDE}")
    ways = [
        Way(way.name, way.package, (*network, *way.options))
        for way in ways_of(options.before, DECODERS, options.decoders)
    ]
    now = packages_of(None)["now"]
    results: dict[str, list[Small]] = {way.name: [] for way in ways}
    pillow = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        images = make_images(scratch / "images", options.images, options.format)
        for way in ways:  # a warm-up, which exports the network and finds the batch size
            way.run(images, scratch)
        for _ in range(options.rounds):
            pillow.append(figure_of(PILLOW, images, package=now, scratch=scratch))
            measured = {way.name: small_run(way, images, scratch, options.images) for way in ways}
            sizes = {result.batch_size for result in measured.values()}
            engine = {
                size: figure_of(ENGINE, SIDE, size, package=now, scratch=scratch) for size in sizes
            }
            for name, result in measured.items():
                result.engine = engine[result.batch_size]
                results[name].append(result)
    print_small(results, pillow)


def print_small(results: dict[str, list[Small]], pillow: list[float]) -> None:
    first = [result.speed for result in next(iter(results.values()))]
    rows = [("plain Pillow, 1 thread", spread(pillow, ".0f"), ratios(pillow, first), "1.00")]
    for name, measured in results.items():
        speeds = [result.speed for result in measured]
        rows.append(
            (
                name,
                spread(speeds, ".0f"),
                ratios(speeds, first),
                ratios(speeds, pillow),
                spread((result.own for result in measured), ".0f"),
                spread((result.engine for result in measured), ".0f"),
                spread((result.own - result.engine for result in measured), ".0f"),
                spread((result.children for result in measured), ".0f"),
                spread((result.batch_size for result in measured), ".0f"),
            )
        )
    heads = ("", "images/s", "ratio", "of Pillow", "CPU of the process, µs", "engine's own, µs")
    heads += ("CPU beside it, µs", "CPU of children, µs", "batch")
    print_table(heads, [(*row, *("",) * (len(heads) - len(row))) for row in rows])


def photos(options: argparse.Namespace) -> None:
    packages = packages_of(options.before)
    pipelines = list(available(f"embedder {precision}" for precision in options.precisions))
    ways = list(itertools.product(pipelines, packages))
    results: dict[tuple[str, str], list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        warm_up = link_images(options.source, scratch / "warm-up", min(64, options.images))
        images = link_images(options.source, scratch / "images", options.images)
        for _ in range(options.rounds):
            for pipeline, name in ways:
                script = packages[name] / "benchmarks" / "throughput.py"
                command = [sys.executable, script, options.source, "--pipelines", pipeline]
                command += ["--measure", warm_up, images, scratch / "store"]
                done = subprocess.run(
                    command,
                    stdout=subprocess.PIPE,
                    check=True,
                    env=environment_of(packages[name]),
                    cwd=scratch,
                )
                results[pipeline, name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for (pipeline, name), measured in results.items():
        speeds = [result["speed"] for result in measured]
        first = [result["speed"] for result in results[pipeline, next(iter(packages))]]
        rows.append((pipeline.split()[-1], name, spread(speeds), ratios(speeds, first)))
        for key, form in (
            ("decode alone", ".0f"),
            ("inference alone", ".0f"),
            ("efficiency", ".3f"),
        ):
            rows[-1] += (spread((result[key] for result in measured), form),)
    heads = ("precision", "", "images/s", "ratio", "decode alone", "inference alone", "efficiency")
    print_table(heads, rows)


@dataclass(frozen=True)
class Place:
    """Where the images are."""

    name: str
    source: Path | str
    server: Server | None = None
    with_faults: bool = False


def places(options: argparse.Namespace, images: Path, scratch: Path, seed: int) -> Iterator[Place]:
    """The same images from the local disk and from servers, each there until the next is taken."""
    settings = [(latency, False) for latency in options.latencies]
    settings += [(options.latencies[-1], True)] * bool(options.faults)
    for latency, with_faults in settings:
        yield Place(LOCAL, images)  # each time, since the machine's speed drifts
        faults = dict(options.faults) if with_faults else {}
        with serving(images, latency, faults, seed) as server:
            for kind in options.kinds:
                name = f"{kind}, {latency:g} ms" + with_faults * WITH_FAULTS
                if kind == "S3":
                    yield Place(name, f"s3://{server.name}", server, with_faults)
                    continue
                manifest = scratch / f"{server.port}.txt"
                manifest.write_text(
                    "\n".join(f"{server.url}/{path.name}" for path in sorted(images.iterdir()))
                )
                yield Place(name, manifest, server, with_faults)


@dataclass
class Remote:
    """Of one run over images behind a server, and of the one over local images before it."""

    run: Run
    requests: Counter[str]
    local: Run

    @property
    def num_embedded(self) -> int:
        return int(self.run.record["counts"]["embedded"])

    @property
    def cpu_beside(self) -> float:
        """CPU milliseconds that an image takes more than from the local disk."""
        local = self.local.cpu_seconds / self.local.record["counts"]["embedded"]
        return 1000 * (self.run.cpu_seconds / max(1, self.num_embedded) - local)

    @property
    def seconds(self) -> float:
        """Of the run, an image."""
        return float(self.run.record["seconds_total"]) / self.run.record["counts"]["inputs"]


def remote(options: argparse.Namespace) -> None:
    ways = ways_of(options.before, READ_AHEAD, options.read_ahead, PRIVATE)
    results: dict[tuple[str, str], list[Remote]] = defaultdict(list)
    local: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        images = link_images(options.source, scratch, options.images) / "images"
        for way in ways:
            way.run(images, scratch, "--limit", 64)  # a warm-up
        for place, way in (
            (place, way)
            for number in range(options.rounds)
            for place in places(options, images, scratch, options.seed + number)
            for way in ways
        ):
            run, requests = remote_run(way, place, scratch, options)
            if place.name == LOCAL:
                local[way.name] = run
            results[place.name, way.name].append(Remote(run, requests, local[way.name]))
    print_remote(results)


def remote_run(
    way: Way, place: Place, scratch: Path, options: argparse.Namespace
) -> tuple[Run, Counter[str]]:
    """A run over the images of a place, and the requests and faults of its server."""
    limit = options.images_before if way.name == "before" else options.images
    how = ("--limit", limit, "--max-failures", 1)
    if place.server is None:
        return way.run(place.source, scratch, *how), Counter()
    place.server.counts()  # from now on
    environment = place.server.environment
    run = way.run(place.source, scratch, *how, environment=environment, may_fail=place.with_faults)
    return run, place.server.counts()


def print_remote(results: dict[tuple[str, str], list[Remote]]) -> None:
    rows = []
    for (place, way), measured in results.items():
        speeds = [each.run.speed for each in measured]
        counts = sum((each.requests for each in measured), Counter())
        num_inputs = sum(each.run.record["counts"]["inputs"] for each in measured)
        row = [place, way, spread(speeds), ratios(speeds, (each.local.speed for each in measured))]
        asked = [f"{counts[name] / num_inputs:.2f} {name}" for name in METHODS if counts[name]]
        row += [", ".join(asked)]
        row += [spread((each.cpu_beside for each in measured), "+.1f") if asked else ""]
        row += [f"{sum(each.num_embedded for each in measured):,} of {num_inputs:,}"]
        if (place_without := place.removesuffix(WITH_FAULTS)) == place:
            rows.append((*row, "", ""))
            continue
        faults = [f"{counts[kind + ' faults']} {kind}" for kind in FAULT_KINDS]
        healthy = (each.seconds for each in results[place_without, way])
        beside = ratios((each.seconds for each in measured), healthy)
        rows.append((*row, ", ".join(faults), beside))
    heads = ("images from", "", "images/s", "of local", "requests an image")
    heads += ("CPU beside local, ms", "embedded", "faults", "seconds beside the healthy server")
    print_table(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="small, photos or remote")

    command = commands.add_parser("small", help="images of 32x32 pixels, a nearly empty network")
    command.set_defaults(run=small)
    command.add_argument("--images", type=int, default=20_000)
    command.add_argument("--format", choices=("png", "jpg"), default="png")
    command.add_argument("--decoders", type=int, nargs="*", default=[1, 2, 4])
    add_arguments(command)

    command = commands.add_parser("photos", help="a folder of photographs")
    command.set_defaults(run=photos)
    command.add_argument("source", help="folder of JPEG images")
    command.add_argument("--images", type=int, default=1000)
    command.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    add_arguments(command)

    command = commands.add_parser("remote", help="images behind HTTP and S3 servers")
    command.set_defaults(run=remote)
    command.add_argument("source", help="folder of images")
    command.add_argument("--images", type=int, default=500)
    command.add_argument("--images-before", type=int, default=100, help="for `before`, is slow")
    command.add_argument("--kinds", nargs="+", choices=("HTTP", "S3"), default=("HTTP", "S3"))
    command.add_argument("--latencies", type=float, nargs="+", default=[5, 200, 50], metavar="MS")
    command.add_argument(
        "--faults",
        type=share_of,
        nargs="*",
        default=list(map(share_of, FAULTS)),
        metavar="KIND=SHARE",
        help="of a server with the last latency; none: no such server",
    )
    command.add_argument("--seed", type=int, default=0, help="of the faults")
    command.add_argument("--read-ahead", type=int, nargs="*", default=[], help="tried beside")
    add_arguments(command)

    options = parser.parse_args()
    print(machine(), flush=True)
    options.run(options)


if __name__ == "__main__":
    main()
