"""Images per second, end to end: this package beside other pipelines, in one run.

All embed the same JPEG files with EfficientNet-Lite0 on the same cores, in turn, several rounds;
each measurement is a process of its own, after a warm-up that is not counted.

- `keras`: `image_dataset_from_directory` and `model.predict`.
- `timm float32`, `timm bfloat16`: a `DataLoader` with a process per core and timm's own
  transforms, channels last, `torch.autocast` for bfloat16. Random weights: only the speed counts.
- `embedder float32`, `embedder bfloat16`: `embedder.extraction.extract` into a new store; its run's
  `images_per_second`, from the first byte read to the last shard written.

Each of our measurements also times the parts alone, in the same process: reading and decoding on
all cores, and the network on batches that are in memory. What no overlap on shared cores can
exceed is `1 / (1 / decode + 1 / inference)`; `efficiency` is our speed as a share of it.

    python benchmarks/throughput.py SOURCE --images 1000 --rounds 3 --chart throughput.svg
"""

import argparse
import importlib.util
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import embedder
from embedder import engines
from embedder.backbones import build, make_recipe
from embedder.columns import EMBEDDING
from embedder.decode import decode_rgb
from embedder.errors import EngineError
from embedder.libraries import import_keras, versions
from embedder.machine import gpus, num_cores
from embedder.recipe import Recipe
from embedder.sources import list_images, read_bytes

PIPELINES = ("keras", "timm float32", "timm bfloat16", "embedder float32", "embedder bfloat16")
NUM_WARM_UP = 64
BATCH_SIZE = 32  # of the other pipelines: their fastest here


def link_images(source: str, folder: Path, num_images: int) -> Path:
    """Link so many images into one class folder, repeating them under other names if need be."""
    paths = [Path(path.decode()) for path in list_images(source).refs["path"].to_pylist()]
    (folder / "images").mkdir(parents=True)
    for number in range(num_images):
        path = paths[number % len(paths)]
        (folder / "images" / f"{number:06d}{path.suffix.lower()}").symlink_to(path.absolute())
    return folder


def keras_speed(model: Any, folder: Path, recipe: Recipe) -> float:
    keras = import_keras()
    begin = time.perf_counter()
    dataset = keras.utils.image_dataset_from_directory(
        folder,
        labels=None,
        image_size=recipe.image_size,
        crop_to_aspect_ratio=True,
        batch_size=BATCH_SIZE,
        shuffle=False,
        verbose=False,
    )
    vectors = model.predict(dataset.prefetch(2), verbose=0)[EMBEDDING]
    return len(vectors) / (time.perf_counter() - begin)


class TimmImages:
    """The data set of a folder: `torch.utils.data.Dataset` needs no more than these methods."""

    def __init__(self, folder: Path, transform: Any) -> None:
        self.paths, self.transform = sorted((folder / "images").iterdir()), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Any:
        from PIL import Image

        with Image.open(self.paths[number]) as image:
            return self.transform(image.convert("RGB"))


def timm_speed(model: Any, folder: Path, precision: str) -> float:
    import timm.data
    import torch

    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    begin = time.perf_counter()
    loader = torch.utils.data.DataLoader(
        TimmImages(folder, transform), batch_size=BATCH_SIZE, num_workers=num_cores()
    )
    vectors = []
    cast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with torch.inference_mode(), cast:
        for batch in loader:
            vectors.append(model(batch.to(memory_format=torch.channels_last)).float().numpy())
    return len(np.concatenate(vectors)) / (time.perf_counter() - begin)


def embedder_speed(folder: Path, store: Path, recipe: Recipe) -> float:
    shutil.rmtree(store, ignore_errors=True)
    options = {"precision": recipe.precision, "decode": recipe.decode}
    return float(embedder.extract(folder, store, **options).runs()[-1]["images_per_second"])


def decode_speed(folder: Path, recipe: Recipe) -> float:
    """Images per second of reading and decoding alone, on as many threads as cores."""
    paths = list_images(folder).refs["path"].to_pylist()
    begin = time.perf_counter()
    with ThreadPoolExecutor(num_cores()) as threads:
        for _ in threads.map(lambda path: decode_rgb(read_bytes(path), recipe), paths):
            pass
    return len(paths) / (time.perf_counter() - begin)


def inference_speed(recipe: Recipe, num_images: int) -> float:
    """Images per second of the network alone, its batches in memory already."""
    engine = engines.load(recipe, engines.choose("auto", gpus()), None, num_cores())
    shape = (engine.batch_size, *recipe.image_size, 3)
    batches = np.random.default_rng(0).integers(0, 256, (4, *shape), dtype=np.uint8)
    num_batches = max(1, num_images // engine.batch_size)
    begin = time.perf_counter()
    with ThreadPoolExecutor(engine.num_parallel) as threads:
        for _ in threads.map(lambda number: engine.embed(batches[number % 4]), range(num_batches)):
            pass
    return num_batches * engine.batch_size / (time.perf_counter() - begin)


def measure(pipeline: str, decode: str, warm_up: Path, folder: Path, store: Path) -> dict[str, Any]:
    """One measurement of one pipeline, in this process."""
    kind, _, precision = pipeline.partition(" ")
    if kind == "keras":
        recipe = make_recipe()
        model = build(recipe)
        keras_speed(model, warm_up, recipe)
        return {"speed": keras_speed(model, folder, recipe)}
    if kind == "timm":
        import timm
        import torch

        torch.set_num_threads(num_cores())
        model = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
        model = model.to(memory_format=torch.channels_last)
        timm_speed(model, warm_up, precision)
        return {"speed": timm_speed(model, folder, precision)}
    recipe = make_recipe(precision=precision, decode=decode)
    embedder_speed(warm_up, store, recipe)
    num_images = len(list((folder / "images").iterdir()))
    # The parts before and after the whole: the machine's speed drifts.
    parts = [(decode_speed(folder, recipe), inference_speed(recipe, num_images))]
    speed = embedder_speed(folder, store, recipe)
    parts.append((decode_speed(folder, recipe), inference_speed(recipe, num_images)))
    decoding, inference = (statistics.mean(values) for values in zip(*parts, strict=True))
    bound = 1 / (1 / decoding + 1 / inference)
    return {
        "speed": speed,
        "decode alone": decoding,
        "inference alone": inference,
        "efficiency": speed / bound,
    }


def available(pipelines: Iterable[str]) -> Iterator[str]:
    """Which of these can run here; says which cannot, and why."""
    for pipeline in pipelines:
        kind, _, precision = pipeline.partition(" ")
        if kind == "timm" and not all(map(importlib.util.find_spec, ("torch", "timm"))):
            print(f"{pipeline}: left out, torch and timm are not installed")
            continue
        try:
            engines.check_precision(precision or "float32", engines.choose("auto", gpus()))
        except EngineError as error:
            print(f"{pipeline}: left out. {error}")
            continue
        yield pipeline


def draw(speeds: dict[str, list[float]], num_images: int, file: Path) -> None:
    """A bar for each pipeline, as long as its median; a line from its slowest to its fastest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "embedder", "font.size": 10}
    figure, axes = pyplot.subplots(figsize=(7, 0.5 * len(speeds) + 1.1), layout="constrained")
    for position, (pipeline, values) in enumerate(speeds.items()):
        median = statistics.median(values)
        is_ours = pipeline.startswith("embedder")
        axes.barh(position, median, 0.62, color="#1f6f8b" if is_ours else "#b8c4c9")
        axes.plot([min(values), max(values)], [position, position], color="#222222", linewidth=1)
        end = max(values) + 0.01 * max(map(max, speeds.values()))
        axes.text(end, position, f"{median:.0f}", va="center", weight="bold" if is_ours else None)
    axes.set_yticks(range(len(speeds)), speeds)
    axes.invert_yaxis()
    axes.set_xlabel(f"images per second, {num_images:,} images, {num_cores()} cores")
    axes.set_title("EfficientNet-Lite0, from JPEG files to embeddings", loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.margins(x=0.08)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="folder of JPEG images")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decode", default=None, help="exact or scaled, for our own")
    parser.add_argument("--pipelines", nargs="+", choices=PIPELINES, default=PIPELINES)
    parser.add_argument("--chart", type=Path, help="SVG or PNG file to draw; needs matplotlib")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # in a child process
    options = parser.parse_args()
    if options.measure:
        folders = map(Path, options.measure)
        print(json.dumps(measure(options.pipelines[0], options.decode, *folders)))
        return
    print(
        f"{options.images:,} images, EfficientNet-Lite0, {num_cores()} cores, {platform.machine()}"
    )
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    pipelines = list(available(options.pipelines))
    results: dict[str, list[dict[str, float]]] = {name: [] for name in pipelines}
    with tempfile.TemporaryDirectory() as scratch:
        warm_up = link_images(options.source, Path(scratch) / "warm-up", NUM_WARM_UP)
        folder = link_images(options.source, Path(scratch) / "images", options.images)
        for _ in range(options.rounds):
            for pipeline in pipelines:
                command = [sys.executable, __file__, options.source, "--pipelines", pipeline]
                command += ["--decode", options.decode] if options.decode else []
                command += ["--measure", str(warm_up), str(folder), str(Path(scratch) / "store")]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                results[pipeline].append(json.loads(done.stdout.splitlines()[-1]))
    base = statistics.median(result["speed"] for result in results[pipelines[0]])
    for pipeline, measured in results.items():
        speeds = [result["speed"] for result in measured]
        median = statistics.median(speeds)
        line = f"{pipeline:<18} median {median:6.1f} images/s ({min(speeds):.1f} to "
        line += f"{max(speeds):.1f}), ratio {median / base:.2f}"
        for name in measured[0].keys() - {"speed"}:
            line += f", {name} {statistics.median(result[name] for result in measured):.3g}"
        print(line)
    if options.chart:
        speeds = {name: [one["speed"] for one in measured] for name, measured in results.items()}
        draw(speeds, options.images, options.chart)


if __name__ == "__main__":
    main()
