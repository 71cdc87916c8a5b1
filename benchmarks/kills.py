"""Kills at random moments: what the same command makes of what is left.

Each command is killed (SIGKILL, with its worker processes) at random moments of its run, on top of
an older result of another request. After each kill the older result must be whole, or the newer;
the same command is then started again, and killed again, and every fifth time left alone: what it
makes must be what an undisturbed run makes, and it must never be refused. `two runs` starts two at
once on one store, the second with --wait, and kills either or both.

    python benchmarks/kills.py --kills 50
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from embedder.checks import verify
from embedder.errors import EmbedderError
from embedder.heads import Model
from embedder.store import Store

CLASSES = ("red", "green", "blue")
IN_A_ROW = 5  # kills before the command is left alone
SMALL = "--image-size", "64x96"


def make_photos(folder: Path, num_images: int, seed: int) -> Path:
    """Images of smooth random colours with a tint for each class, in a folder each."""
    random_colours = np.random.default_rng(seed)
    for number in range(num_images):
        kind = number % len(CLASSES)
        coarse = random_colours.integers(0, 200, (4, 5, 3), dtype=np.uint8)
        coarse[..., kind] //= 2
        coarse[..., kind] += 100
        path = folder / CLASSES[kind] / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((120, 90), Image.Resampling.BICUBIC).save(path)
    return folder


class World:
    """Photographs, their store and two models, in a folder in which the commands run."""

    def __init__(self, folder: Path, num_images: int) -> None:
        self.folder = folder
        make_photos(folder / "photos", num_images, 0)
        make_photos(folder / "others", num_images // 4, 1)
        self.run("extract", "photos", "store", *SMALL)
        self.run("train", "store", "model", "--labels", "folder")
        self.run("train", "store", "other-model", "--labels", "folder", "--head", "centroid")

    def start(self, *words: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "embedder", *words],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str) -> None:
        done = self.start(*words)
        output, _ = done.communicate()
        if done.returncode:
            raise SystemExit(f"embedder {' '.join(words)}: exit {done.returncode}\n{output}")

    def copy(self, older: str | None, out: str) -> None:
        """Put an older result in the place of a new one; OUT.features and .OUT.logits too."""
        for left in [*self.folder.glob(f"{out}*"), *self.folder.glob(f".{out}*")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        made = [*self.folder.glob(f"{older}*"), *self.folder.glob(f".{older}*")] if older else []
        for path in made:
            copy = path.with_name(path.name.replace(str(older), out))
            shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and bool(np.allclose(one, other, atol=1e-5 * abs(other).max()))


# What each command is, what is there before, and how its result is compared. ----------------


@dataclass(frozen=True)
class Attack:
    """A command to be killed.

    Attributes:
        words: Of the command; OUT stands for the place of its result.
        older: Of the command that made what is there before; None where nothing is.
        is_whole: Whether a result can be used, of whichever request.
        differs: What is wrong with a result beside that of an undisturbed run; empty if nothing.
        num_runs: Started at the same time.
    """

    words: tuple[str, ...]
    older: tuple[str, ...] | None
    is_whole: Callable[[Path], bool]
    differs: Callable[[Path, Path], str]
    num_runs: int = 1


def store_is_whole(out: Path) -> bool:
    if not (out / "recipe.json").exists():  # killed before it was made
        return True
    store = Store(out)
    return len(store) == len(store.ids())


def stores_differ(out: Path, expected: Path) -> str:
    one, other = Store(out), Store(expected)
    failed = [c.name for c in verify(one, str(expected.parent / "photos")) if not c.passed]
    if failed:
        return f"verify: {failed}"
    order, other_order = np.argsort(one.ids()), np.argsort(other.ids())
    if one.ids()[order].tolist() != other.ids()[other_order].tolist():
        return "other ids"
    if list(out.rglob("*.tmp")):
        return "temporary files are left"
    return "" if same(one.vectors()[order], other.vectors()[other_order]) else "other vectors"


def model_is_whole(out: Path) -> bool:
    Model.load(out)
    names = {path.name for path in out.iterdir()}
    return {"metrics.json", "predictions.parquet", "report.html", "model.json"} <= names


def models_differ(out: Path, expected: Path) -> str:
    if not model_is_whole(out):
        return "not whole"
    one, other = (pq.read_table(path / "predictions.parquet") for path in (out, expected))
    tests = [json.loads((path / "metrics.json").read_text())["test"] for path in (out, expected)]
    columns = ["image_id", "sha256", "label", "part", "predicted"]
    if one.select(columns) != other.select(columns):
        return "other predictions"
    return "" if np.isclose(tests[0]["log_loss"], tests[1]["log_loss"], rtol=1e-4) else "other loss"


def table_is_whole(out: Path) -> bool:
    return pq.read_table(out).num_rows > 0


def tables_differ(out: Path, expected: Path) -> str:
    one, other = (pq.read_table(path).sort_by("image_id") for path in (out, expected))
    columns = ["image_id", "sha256", "class", "error"]
    if one.select(columns) != other.select(columns):
        return "other predictions"
    values = [np.array(table["probability"].to_pylist(), np.float32) for table in (one, other)]
    return "" if same(*values) else "other probabilities"


def export_is_whole(out: Path) -> bool:
    content = json.loads((out / "export.json").read_text())
    return (out / content["file"]).exists() and (out / "labels.txt").exists()


def exports_differ(out: Path, expected: Path) -> str:
    names = [sorted(p.relative_to(path) for p in path.rglob("*")) for path in (out, expected)]
    if names[0] != names[1]:
        return "other files"
    heads = [json.loads((path / "export.json").read_text())["head"] for path in (out, expected)]
    return "" if heads[0] == heads[1] else "another head"


FINETUNE = ("finetune", "model", "photos", "OUT", "--strategy", "bias", "--epochs", "2")
ATTACKS = {
    "extract": Attack(
        ("extract", "photos", "OUT", *SMALL, "--shard-size", "16"),
        None,
        store_is_whole,
        stores_differ,
    ),
    "two runs": Attack(
        ("extract", "photos", "OUT", *SMALL, "--shard-size", "16"),
        None,
        store_is_whole,
        stores_differ,
        num_runs=2,
    ),
    "train": Attack(
        ("train", "store", "OUT", "--labels", "folder"),
        ("train", "store", "OUT", "--labels", "folder", "--head", "centroid"),
        model_is_whole,
        models_differ,
    ),
    "predict": Attack(
        ("predict", "model", "photos", "OUT", "--shard-size", "16"),
        ("predict", "model", "others", "OUT"),
        table_is_whole,
        tables_differ,
    ),
    "export": Attack(
        ("export", "model", "OUT", "--format", "openvino"),
        ("export", "other-model", "OUT", "--format", "openvino"),
        export_is_whole,
        exports_differ,
    ),
    "finetune": Attack(FINETUNE, (*FINETUNE[:-1], "1"), model_is_whole, models_differ),
}


# Killing. ----------------------------------------------------------------------------------


def wait(process: "subprocess.Popen[str]", seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def kill(process: "subprocess.Popen[str]") -> bool:
    """End a process and its workers; false where it had come to its end."""
    is_running = process.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return is_running


def attack(world: World, name: str, num_kills: int, seed: int) -> dict[str, int]:
    """Kill one command at random moments, and count what became of it."""
    row, moments = ATTACKS[name], random.Random(seed)
    suffix = ".parquet" if name == "predict" else ""
    out, expected, older = (f"{name.split()[0]}-{part}{suffix}" for part in ("out", "x", "old"))
    words = [out if word == "OUT" else word for word in row.words]
    begin = time.perf_counter()
    world.run(*(expected if word == "OUT" else word for word in row.words))
    seconds = time.perf_counter() - begin
    if row.older:
        world.run(*(older if word == "OUT" else word for word in row.older))
    found = dict.fromkeys(("kills", "ends", "refused", "not whole", "different"), 0)
    while found["kills"] < num_kills:
        world.copy(older if row.older else None, out)
        for _ in range(IN_A_ROW):
            waiting = ["--wait"] if row.num_runs > 1 else []
            runs = [world.start(*words, *waiting) for _ in range(row.num_runs)]
            for process in moments.sample(runs, moments.randint(1, len(runs))):
                # Most of the work is in the second half: before that, libraries are loaded.
                wait(process, moments.triangular(0, seconds, 0.7 * seconds))
                found["kills"] += kill(process)
            for process in runs:
                found["refused"] += is_refused(process, name)
            found["not whole"] += not is_usable(row, world.folder / out, name)
        found["ends"] += 1
        if is_refused(world.start(*words), name):
            found["refused"] += 1
        elif reason := row.differs(world.folder / out, world.folder / expected):
            found["different"] += 1
            print(f"{name}: {reason}")
    return found


def is_refused(process: "subprocess.Popen[str]", name: str) -> bool:
    """Whether a command that was started came to another end than to its own, or to a kill."""
    output, _ = process.communicate()
    if process.returncode in (0, -signal.SIGKILL):
        return False
    print(f"{name}: exit {process.returncode}: {output[-600:]}")
    return True


def is_usable(row: Attack, out: Path, name: str) -> bool:
    try:
        return row.is_whole(out)
    except (EmbedderError, OSError, ValueError, KeyError) as error:
        print(f"{name}: {type(error).__name__}: {error}")
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        world = World(Path(scratch), options.images)
        for name in options.commands:
            found = attack(world, name, options.kills, options.seed)
            counts = ", ".join(f"{count} {what}" for what, count in found.items())
            print(f"{name:<9} {counts}", flush=True)


if __name__ == "__main__":
    main()
