"""Figures of a card: one command, for a machine with a GPU and no network.

Each section is a process of its own with its share of the time: what matters most comes first.
Whatever fails or is not there is named with its reason, and the others go on. The JSON file is
written after each section, so that what ends the command loses nothing. What was compiled is kept
in `--cache`: another run finds it.

- `decoding`: of decoder processes alone. `cores`: decoders and OpenVINO on some of the CPU's cores.
- `inference`: images per second of the networks alone, uint8 pixels in and float32 vectors out in
  the host's memory, and on the card; by batch size. Beside it `inference of peers`: the same
  networks of timm under `torch.compile`, channels last, autocast, as many batches in flight. With
  `autotuned`, the compiler tries more (`max-autotune-no-cudagraphs`: a CUDA graph has a single
  place for its batch, and there are several in flight).
- `end to end`: the photographs, linked under other names to `--rows` of them, from JPEG files to a
  store; beside it timm with a `DataLoader` of 16 workers, to a `.npy` file. Fewer rows where the
  time would not do. The bound is the smaller of decoding alone with all cores and inference alone.
  Busy is the mean of what NVML tells, of the time in which images went through.
- `vectors`: of each engine that is installed, in each precision, beside float32 vectors that
  `reference.py` stored: the lowest cosine of eight images.
- `repeated`: two runs of the command line beside each other, and one with a limit on the card's
  memory which its batch cannot fit.

A speed is the median of several windows or rounds, between the `lowest` and the `highest`.
`gflops` is the work of an image: the two sides' networks of one name differ in it.

    python benchmarks/gpu.py --photos FOLDER --out FOLDER

`--small` runs all of it at a size that says nothing about speed, on a CPU where there is no card.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from reference import NETWORKS
from runs import machine, print_table
from sections import ROOT, card, is_installed, run_section

import embedder
from embedder.machine import num_cores

FULL: dict[str, Any] = {
    "networks": ["resnet50", "vit-b16", "efficientnet-lite0", "mobilenet", "efficientnet-v2-s"],
    "num_first_networks": 2,  # of them the larger batches are measured before the other networks
    "light_network": "efficientnet-lite0",
    "image_size": None,  # each network's own
    "reference_networks": list(NETWORKS),
    "precisions": ["float32", "bfloat16", "float16"],
    "sweep_precisions": ["bfloat16", "float32"],
    "batch_sizes": [256, 1024, 64],
    "seconds": 0.5,  # of each window
    "windows": 3,
    "decoders": [16, 8, 4, 2, 1],  # where there are as many cores; and one for each core
    "decoded": 128,  # photographs in a pass, for each decoder
    "loader_workers": 16,
    "loader_batch_size": 256,  # so that each worker has several of them to load
    "rows": 20_000,
    "memory_rows": 4096,  # to warm up, and to see the memory
    "rounds": 3,
    "end_to_end": ["resnet50", "efficientnet-lite0"],
    "end_to_end_precision": "bfloat16",
    "shard_sizes": [None, 8192],  # the package's own, and one of several large batches
    "compile_modes": ["default"],
    "large_batch_size": 1024,
    "memory_limit_bytes": 4 * 2**30,
}
SMALL: dict[str, Any] = FULL | {
    "networks": ["mobilenet"],
    "light_network": "mobilenet",
    "image_size": [32, 32],
    "reference_networks": ["mobilenet, random weights"],
    "precisions": ["float32"],
    "sweep_precisions": ["float32"],
    "batch_sizes": [4, 2],
    "seconds": 0.02,
    "windows": 2,
    "decoders": [1],
    "decoded": 16,
    "loader_workers": 1,
    "loader_batch_size": 4,
    "rows": 20,
    "memory_rows": 6,
    "rounds": 2,
    "end_to_end": ["mobilenet"],
    "end_to_end_precision": "float32",
    "shard_sizes": [None],
    "large_batch_size": 65_536,
}
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "keras", "keras-hub")
PACKAGES += ("numpy", "pillow", "pyarrow", "tensorflow", "openvino", "torch", "torchvision", "timm")
PACKAGES += ("triton", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "cykooz-resizer")
IN_FILE_ALONE = ("rounds", "traceback", "pixels", "library", "why")
MIN_SECONDS = 3.0  # less would not even start a section


@dataclass(frozen=True)
class Part:
    """A section of the benchmark.

    Attributes:
        name: In the JSON file.
        script: With the function.
        function: That does it, in a process of its own.
        weight: Its share of the time; what one leaves over is shared by the later ones.
        needs: Modules without which it cannot run.
        needs_card: Whether a CPU can do it in a small size alone.
        settings: Beside those of the benchmark.
    """

    name: str
    script: str
    function: str
    weight: float
    needs: tuple[str, ...] = ()
    needs_card: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


OURS, PEERS = "gpu_ours.py", "gpu_peers.py"
PEER_NEEDS = ("torch", "timm", "torchvision")


def parts(options: argparse.Namespace) -> Iterator[Part]:
    """The sections, in their order."""
    own = options.engine
    modules = {"jax": "jax", "tensorflow": "tensorflow", "openvino": "openvino"}
    others = [] if options.small else sorted(modules.keys() - {own})
    networks = (SMALL if options.small else FULL)["end_to_end"]
    # One network alone in each process: the memory is then that of this network.
    whole = [
        (name, script, network, weight)
        for network, weight in zip(networks, (45, 15), strict=False)
        for name, script in (("end to end", OURS), ("end to end of peers", PEERS))
    ]

    def end_to_end(name: str, script: str, network: str, weight: float) -> Part:
        needs = (modules[own],) if script == OURS else PEER_NEEDS
        settings = {"end_to_end": [network]}
        return Part(f"{name}, {network}", script, "end_to_end", weight, needs, True, settings)

    def vectors(engine: str, weight: float) -> Part:
        settings = {"engine": engine}
        return Part(
            f"vectors {engine}", OURS, "vectors", weight, (modules[engine],), settings=settings
        )

    yield Part("decoding", OURS, "decoding", 20)
    yield Part("inference", OURS, "inference", 130, (modules[own],), needs_card=True)
    yield Part("inference of peers", PEERS, "inference", 130, PEER_NEEDS, needs_card=True)
    yield from (end_to_end(*one) for one in whole[:2])
    yield vectors(own, 30)
    yield Part("repeated", OURS, "repeated", 40, (modules[own],), needs_card=True)
    yield from (end_to_end(*one) for one in whole[2:])
    if not options.small:
        settings = {"compile_modes": ["max-autotune-no-cudagraphs"]}
        name = "inference of peers, autotuned"
        yield Part(name, PEERS, "inference", 10, PEER_NEEDS, True, settings)
    yield Part("cores", OURS, "cores", 20)
    yield from (vectors(engine, 10) for engine in others)


def why_not(part: Part, settings: dict[str, Any]) -> str | None:
    """Why a section cannot run here."""
    missing = [module for module in part.needs if not is_installed(module)]
    if missing:
        return f"not measured: no {' and no '.join(missing)}"
    if part.needs_card and not settings["card"] and not settings["small"]:
        return "not measured: no card"
    return None


def run_all(options: argparse.Namespace, scratch: Path, write: Callable[[Any], None]) -> Any:
    """Run the sections one after the other.

    Args:
        options: Of the command line.
        scratch: A folder for what they make.
        write: Is given the result after each section.
    """
    end = time.monotonic() + options.budget
    photos = options.photos.resolve() if options.photos else make_photos(scratch / "photos")
    settings = settings_of(options, photos, scratch)
    result: dict[str, Any] = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": f"{machine()}, {cpu_name()}",
        "card": settings["card"],
        "versions": versions(),
        "tools": tools(),
        "photographs": described(photos),
        "settings": settings,
        "sections": {},
    }
    to_do = chosen(options)
    for number, part in enumerate(to_do):
        later = [one for one in to_do[number:] if why_not(one, settings) is None]
        left = end - time.monotonic()
        reason = why_not(part, settings)
        if reason is None and left < MIN_SECONDS:
            reason = "not measured: no time was left"
        if reason is None:
            seconds = left * part.weight / sum(one.weight for one in later)
            print(f"{part.name}: up to {seconds:.0f} s", flush=True)
            asked = settings | part.settings
            found = run_section(part.script, part.function, asked, seconds, caches(options))
        else:
            found = {"reason": reason, "rows": []}
            print(f"{part.name}: {reason}", flush=True)
        result["sections"][part.name] = found
        if part.name == "inference":
            settings["best_batch_sizes"] = best_sizes(found)
        result["summary"] = summary(result)
        result["seconds"] = round(time.monotonic() - end + options.budget, 1)
        write(result)
    return result


def settings_of(options: argparse.Namespace, photos: Path, scratch: Path) -> dict[str, Any]:
    """What all sections are asked."""
    settings = (SMALL if options.small else FULL) | {
        "small": options.small,
        "card": card(),
        "engine": options.engine,
        "photos": str(photos),
        "scratch": str(scratch),
        "mobilenet_weights": options.mobilenet_weights and str(options.mobilenet_weights.resolve()),
        "best_batch_sizes": {},
    }
    if options.rows:
        settings["rows"] = options.rows
    cores = num_cores()
    settings["decoders"] = [cores, *(n for n in settings["decoders"] if n < cores)]
    settings["many_photos"] = str(link_photos(photos, scratch / "many", settings["rows"]))
    return settings


def chosen(options: argparse.Namespace) -> list[Part]:
    """The sections that are asked for."""
    found = list(parts(options))
    names = [part.name for part in found]
    if unknown := set(options.sections or ()) - set(names):
        raise SystemExit(f"`--sections` must be of {names}. Received: {sorted(unknown)}")
    return [part for part in found if part.name in (options.sections or names)]


def caches(options: argparse.Namespace) -> dict[str, str]:
    """The environment that has everybody keep there what was compiled."""
    folder = (options.cache or options.out / "cache").resolve()
    own = Path(os.environ.get("EMBEDDER_CACHE") or folder / "embedder").resolve()
    return {
        "EMBEDDER_CACHE": str(own),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }


def tools() -> dict[str, Any]:
    """What `torch.compile` and the workers of a `DataLoader` need of a machine."""
    shared = Path("/dev/shm")
    return {
        "c_compiler": next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None),
        "python_header": Path(sysconfig.get_path("include"), "Python.h").is_file(),
        "shared_memory_bytes": shutil.disk_usage(shared).free if shared.is_dir() else None,
    }


def described(photos: Path) -> dict[str, Any]:
    """How many photographs there are, and the medians of the sizes of up to 200."""
    paths = photos_in(photos)
    sizes = []
    for path in paths[:: -(-len(paths) // 200)]:
        with Image.open(path) as image:
            sizes.append((image.width, image.height, path.stat().st_size))
    width, height, num_bytes = map(statistics.median, zip(*sizes, strict=True))
    return {"count": len(paths), "width": width, "height": height, "bytes": num_bytes}


def make_photos(folder: Path) -> Path:
    """Some smooth images, where no photographs were given."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(8):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((348, 348), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    return folder


def link_photos(photos: Path, folder: Path, count: int) -> Path:
    """Link to photographs under so many names."""
    paths = photos_in(photos)
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:06d}.jpg").symlink_to(paths[number % len(paths)])
    return folder


def photos_in(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise SystemExit(f"There must be JPEG files. Received: {folder}")
    return paths


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "")


def versions() -> dict[str, str]:
    found = {"embedder": embedder.__version__, "commit": commit()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """Of the checkout, with a mark where it was changed; "not known" without Git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not known"


# What the figures say. ---------------------------------------------------------------------------


def rows_of(result: dict[str, Any], section: str) -> list[dict[str, Any]]:
    """Those that have a speed, of a section and of its parts: `end to end, resnet50`."""
    return [
        row
        for name, found in result["sections"].items()
        if name == section or name.startswith(f"{section}, ")
        for row in found["rows"]
        if "speed" in row
    ]


def best_sizes(found: dict[str, Any]) -> dict[str, int]:
    """The fastest batch size of each network, in the precision that is measured end to end."""
    best: dict[str, dict[str, Any]] = {}
    for row in found["rows"]:
        before = best.get(row["network"], {}).get("speed", 0.0)
        if row["precision"] == found["rows"][0]["precision"] and row.get("speed", 0.0) > before:
            best[row["network"]] = row
    return {network: row["batch_size"] for network, row in best.items()}


def compared(result: dict[str, Any]) -> list[dict[str, Any]]:
    """By network and precision: the best of both sweeps, over the batch sizes that both have."""
    ours, peers = rows_of(result, "inference"), rows_of(result, "inference of peers")
    found = []
    for network, precision in dict.fromkeys((row["network"], row["precision"]) for row in ours):
        mine, of_peers = (
            [row for row in rows if is_of(row, network, precision)] for rows in (ours, peers)
        )
        sizes, others = ({row["batch_size"] for row in rows} for rows in (mine, of_peers))
        both = sizes & others
        row: dict[str, Any] = {"network": network, "precision": precision}
        row["sizes"] = sorted(both or sizes)
        best = best_of(mine, both)
        row |= {name: best.get(name) for name in ("device", "speed", "batch_size")}
        row |= {name: best.get(name) for name in ("speed_on_device", "gflops")}
        if both:
            row |= beside(best, best_of(of_peers, both))
        found.append(row)
    return found


def best_of(rows: list[dict[str, Any]], sizes: set[int]) -> dict[str, Any]:
    """The fastest row, of those batch sizes if there are any."""
    return max(
        (row for row in rows if not sizes or row["batch_size"] in sizes),
        key=lambda row: row["speed"],
    )


def beside(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """The peer's figures, and the ratio to them: none of a card to a CPU."""
    row = {"peer": peer["speed"], "peer_mode": peer["mode"]}
    if is_of_cpu(ours) != is_of_cpu(peer):
        return row | {"reason": f"not compared: {ours['device']} and {peer['device']}"}
    row["ratio"] = round(ours["speed"] / peer["speed"], 3)
    for name in ("batch_size", "speed_on_device", "gflops"):
        row[f"peer_{name}"] = peer.get(name)
    if ours.get("gflops") and peer.get("gflops"):
        work = ours["gflops"] / peer["gflops"]
        row["ratio_by_gflops"] = round(row["ratio"] * work, 3)
    return row


def is_of_cpu(row: dict[str, Any]) -> bool:
    return str(row["device"]).lower() == "cpu"


def is_of(row: dict[str, Any], network: str, precision: str) -> bool:
    return bool(row["network"] == network and row["precision"] == precision)


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The bound, the share of it that is reached, and how many cores would fill the card."""
    found: dict[str, Any] = {"inference": compared(result), "end to end": [], "in words": []}
    whole = [row for row in rows_of(result, "decoding") if row["decoders"] >= row["cores"]]
    decoding = max(whole, key=lambda row: row["speed"], default=None)
    inference = rows_of(result, "inference")
    for row in rows_of(result, "end to end"):
        alone = [
            r["speed"]
            for r in inference
            if is_of(r, row["network"], row["precision"]) and is_of_cpu(r) == is_of_cpu(row)
        ]
        kept = ("network", "precision", "device", "shard_size", "batch_size", "speed", "busy")
        one = {key: row[key] for key in kept}
        if decoding and alone:
            one |= {"decoding": decoding["speed"], "inference": max(alone)}
            one["bound"] = min(decoding["speed"], max(alone))
            one["share of bound"] = round(row["speed"] / one["bound"], 3)
        for peer in rows_of(result, "end to end of peers"):
            if is_of(peer, row["network"], row["precision"]):
                one |= beside(row, peer)
        found["end to end"].append(one)
    if decoding:
        found["in words"] = [*cores_in_words(found["inference"], decoding, result["card"])]
    else:
        found["in words"] = ["Decoding with all cores was not measured: there is no bound."]
    return found


def cores_in_words(
    inference: list[dict[str, Any]], decoding: dict[str, Any], card: dict[str, Any] | None
) -> Iterator[str]:
    """How many cores of decoding would fill the card, of each network."""
    used = min(decoding["cores"], decoding["decoders"])
    per_core = decoding["speed"] / used
    yield (
        f"{decoding['decoders']} decoders on {decoding['cores']} cores decode "
        f"{decoding['speed']:,.0f} photographs a second, {per_core:,.0f} a core."
    )
    for row in inference if card else ():
        yield (
            f"{row['network']} in {row['precision']} takes {row['speed']:,.0f} a second on this "
            f"card: {row['speed'] / per_core:.0f} cores of decoding would fill it."
        )


def print_result(result: dict[str, Any]) -> None:
    """The tables."""
    found = result["card"]
    name = "no card" if found is None else f"{found['name']}, driver {found['driver'] or '?'}"
    print(f"\n{result['machine']}; {name}")
    print(", ".join(f"{package} {version}" for package, version in result["versions"].items()))
    print("; ".join(f"{name} {value}" for name, value in result["tools"].items()))
    print(", ".join(f"{name} {value}" for name, value in result["photographs"].items()))
    for section, content in result["sections"].items():
        print(f"\n{section}: {content.get('reason') or ''}")
        print_rows(content["rows"])
    for title in ("inference", "end to end"):
        print(f"\nIn short, {title}:")
        print_rows(result["summary"][title])
    print("", *result["summary"]["in words"], sep="\n")
    if found is None:
        print("There is no card here: none of these figures is of one.")


def print_rows(rows: list[dict[str, Any]]) -> None:
    heads = list(dict.fromkeys(key for row in rows for key in row if key not in IN_FILE_ALONE))
    if rows:
        print_table(heads, ([cell(row.get(head)) for head in heads] for row in rows))


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5f}" if abs(value) <= 1 else f"{value:,.1f}"
    return str(value).replace("\n", " ").replace("|", "/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=Path, help="folder of JPEG files; if not given, made ones")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for gpu.json")
    parser.add_argument("--cache", type=Path, help="folder of what is compiled; else OUT/cache")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for all of it")
    parser.add_argument("--sections", nargs="+", metavar="NAME", help="only these, in their order")
    parser.add_argument("--engine", default="jax", help="that is measured on the card")
    parser.add_argument("--rows", type=int, help="images of a run from end to end")
    parser.add_argument("--mobilenet-weights", type=Path, help="its published weights, a file")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU if need be")
    options = parser.parse_args()
    # Sections run in another folder, and what ends this command must end them too.
    if paths := os.environ.get("PYTHONPATH"):
        absolute = (str(Path(path).resolve()) for path in paths.split(os.pathsep))
        os.environ["PYTHONPATH"] = os.pathsep.join(absolute)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("It was told to end (SIGTERM)"))
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "gpu.json"

    def write(result: Any) -> None:
        new = file.with_suffix(".tmp")
        new.write_text(json.dumps(result, indent=1))
        new.replace(file)

    with tempfile.TemporaryDirectory() as scratch:
        result = run_all(options, Path(scratch), write)
    print_result(result)
    print(f"\n{file}", file=sys.stderr)


if __name__ == "__main__":
    main()
