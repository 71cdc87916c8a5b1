"""Figures of a card: one command, for a machine with a GPU and no network.

It checks first, then measures, each section in a process of its own and with its share of the time.
Whatever fails or is not there is named with its reason, and the others go on. The JSON file is
written after each section, so that what ends the command loses nothing.

- `vectors`: of each engine that is installed, in each precision, beside float32 vectors that
  `reference.py` stored: the lowest cosine of eight images.
- `repeated`: two runs of the command line beside each other, and one with a limit on the card's
  memory which its batch cannot fit.
- `inference`: images per second of the networks alone, uint8 pixels in and float32 vectors out in
  the host's memory, and on the card; by batch size. Beside it `inference of peers`: the same
  network of timm under `torch.compile`, channels last, autocast, as many batches in flight.
- `decoding`: of decoder processes alone. `cores`: decoders and OpenVINO on some of the CPU's cores.
- `end to end`: the photographs, linked under other names to `--rows` of them, from JPEG files to a
  store; beside it timm with a `DataLoader` of 16 workers, to a `.npy` file. The bound is the
  smaller of decoding alone and inference alone. Busy is the mean of what NVML tells, of the time
  in which images went through.

    python benchmarks/gpu.py --photos FOLDER --out FOLDER

`--small` runs all of it at a size that says nothing about speed, on a CPU where there is no card.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
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
from sections import card, is_installed, run_section

FULL: dict[str, Any] = {
    "networks": ["resnet50", "vit-b16", "efficientnet-lite0", "mobilenet", "efficientnet-v2-s"],
    "num_first_networks": 2,  # of them the larger batches are measured before the other networks
    "light_network": "efficientnet-lite0",
    "image_size": None,  # each network's own
    "reference_networks": list(NETWORKS),
    "precisions": ["float32", "bfloat16", "float16"],
    "sweep_precisions": ["bfloat16", "float32"],
    "batch_sizes": [256, 1024, 64],
    "seconds": 1.0,  # of each measurement
    "decoders": [1, 2, 4, 8, 16],
    "decoded": 4096,  # photographs, again and again
    "loader_workers": 16,
    "loader_batch_size": 256,  # so that each worker has several of them to load
    "rows": 20_000,
    "rounds": 2,
    "end_to_end": ["resnet50", "efficientnet-lite0"],
    "end_to_end_precision": "bfloat16",
    "shard_sizes": [None, 8192],  # the package's own, and one of several large batches
    "compile_modes": ["default", "max-autotune"],
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
    "seconds": 0.1,
    "decoders": [1, 2],
    "decoded": 64,
    "loader_workers": 1,
    "loader_batch_size": 4,
    "rows": 48,
    "rounds": 1,
    "end_to_end": ["mobilenet"],
    "end_to_end_precision": "float32",
    "shard_sizes": [None],
    "compile_modes": ["default"],
    "large_batch_size": 65_536,
}
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "keras",
    "keras-hub",
    "numpy",
)
PACKAGES += ("pillow", "pyarrow", "tensorflow", "openvino", "torch", "torchvision", "timm")


IN_FILE_ALONE = ("rounds", "traceback")


@dataclass(frozen=True)
class Part:
    """A section of the benchmark.

    Attributes:
        name: In the JSON file.
        script: With the function.
        function: That does it, in a process of its own.
        weight: Seconds of the default budget; what one leaves over is shared by the later ones.
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
    names = [own] if options.small else [own, *sorted(modules.keys() - {own})]
    for name in names:
        needs, settings = (modules[name],), {"engine": name}
        yield Part(f"vectors {name}", OURS, "vectors", 45, needs, settings=settings)
    needs = (modules[own],)
    yield Part("inference", OURS, "inference", 110, needs, needs_card=True)
    yield Part("inference of peers", PEERS, "inference", 120, PEER_NEEDS, needs_card=True)
    yield Part("decoding", OURS, "decoding", 20)
    yield Part("end to end", OURS, "end_to_end", 60, needs, needs_card=True)
    yield Part("end to end of peers", PEERS, "end_to_end", 60, PEER_NEEDS, needs_card=True)
    yield Part("repeated", OURS, "repeated", 45, needs, needs_card=True)
    yield Part("cores", OURS, "cores", 35)


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
    photos = options.photos.resolve() if options.photos else make_photos(scratch / "photos")
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
    settings["many_photos"] = str(link_photos(photos, scratch / "many", settings["rows"]))
    result: dict[str, Any] = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": f"{machine()}, {cpu_name()}",
        "card": settings["card"],
        "versions": versions(),
        "settings": settings,
        "sections": {},
    }
    environment = {"EMBEDDER_CACHE": os.environ.get("EMBEDDER_CACHE") or str(scratch / "cache")}
    end = time.monotonic() + options.budget
    to_do = [part for part in parts(options) if part.name in (options.sections or [part.name])]
    for number, part in enumerate(to_do):
        reason = why_not(part, settings)
        if reason is None:
            later = [one for one in to_do[number:] if why_not(one, settings) is None]
            left = end - time.monotonic()
            seconds = left * part.weight / sum(one.weight for one in later)
            print(f"{part.name}: up to {seconds:.0f} s", flush=True)
            found = run_section(
                part.script, part.function, settings | part.settings, seconds, environment
            )
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
    paths = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise SystemExit(f"There must be JPEG files. Received: {photos}")
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:06d}.jpg").symlink_to(paths[number % len(paths)])
    return folder


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "")


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


# What the figures say. ---------------------------------------------------------------------------


def rows_of(result: dict[str, Any], section: str) -> list[dict[str, Any]]:
    """Those that have a speed."""
    found = result["sections"].get(section, {"rows": []})
    return [row for row in found["rows"] if "speed" in row]


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
        row: dict[str, Any] = {"network": network, "precision": precision}
        mine = {r["batch_size"]: r for r in ours if is_of(r, network, precision)}
        of_peers: dict[int, dict[str, Any]] = {}
        for r in peers:
            if is_of(r, network, precision):
                other = of_peers.get(r["batch_size"])
                if other is None or r["speed"] > other["speed"]:
                    of_peers[r["batch_size"]] = r
        both = mine.keys() & of_peers.keys()
        row["sizes"] = sorted(both or mine)
        for name, rows in (("speed", mine), ("peer", of_peers)):
            among = [rows[size] for size in rows if size in both or not both]
            if among:
                best = max(among, key=lambda r: r["speed"])
                row[name] = best["speed"]
                row[f"{name}_batch_size"] = best["batch_size"]
                row[f"{name}_on_device"] = best.get("speed_on_device")
        if both:
            row["ratio"] = round(row["speed"] / row["peer"], 3)
        found.append(row)
    return found


def is_of(row: dict[str, Any], network: str, precision: str) -> bool:
    return bool(row["network"] == network and row["precision"] == precision)


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The bound, the share of it that is reached, and how many cores would fill the card."""
    found: dict[str, Any] = {"inference": compared(result), "end to end": [], "in words": []}
    decoding = max(rows_of(result, "decoding"), key=lambda row: row["speed"], default=None)
    inference = rows_of(result, "inference")
    for row in rows_of(result, "end to end"):
        alone = [r["speed"] for r in inference if is_of(r, row["network"], row["precision"])]
        kept = ("network", "precision", "shard_size", "batch_size", "speed", "busy")
        one = {key: row[key] for key in kept}
        if decoding and alone:
            one |= {"decoding": decoding["speed"], "inference": max(alone)}
            one["bound"] = min(decoding["speed"], max(alone))
            one["share of bound"] = round(row["speed"] / one["bound"], 3)
        peers = [
            r for r in rows_of(result, "end to end of peers") if r["network"] == row["network"]
        ]
        for peer in peers:
            one[peer["loader"]] = peer["speed"]
        if peers:
            one["ratio"] = round(row["speed"] / max(peer["speed"] for peer in peers), 2)
        found["end to end"].append(one)
    rows = rows_of(result, "decoding")
    if whole := [row for row in rows if row["decoders"] >= row["cores"]] or rows:
        most = max(whole, key=lambda row: row["speed"])
        found["in words"] = [*cores_in_words(found["inference"], most, result["card"])]
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
    name = "no card" if found is None else f"{found['name']}, driver {found['driver']}"
    print(f"\n{result['machine']}; {name}")
    print(", ".join(f"{package} {version}" for package, version in result["versions"].items()))
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
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for all of it")
    parser.add_argument("--sections", nargs="+", metavar="NAME", help="only these, in their order")
    parser.add_argument("--engine", default="jax", help="that is measured on the card")
    parser.add_argument("--rows", type=int, help="images of a run from end to end")
    parser.add_argument("--mobilenet-weights", type=Path, help="its published weights, a file")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU if need be")
    options = parser.parse_args()
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
