"""Images per second, end to end: this package beside Keras's own pipeline, in one run.

Both embed the same JPEG files with the same network and weights on the same cores, alternating,
several rounds; each after a warm-up that is not counted. Keras: `image_dataset_from_directory`
and `model.predict`. Here: `embedder.extract` into a new store, its run's `images_per_second`.

    python benchmarks/throughput.py SOURCE --images 1000 --rounds 3
"""

import argparse
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import embedder
from embedder import engines
from embedder.backbones import EMBEDDING, build, import_keras, make_recipe
from embedder.cluster import NUM_CORES
from embedder.sources import list_images


def link_images(source: str, folder: Path, num_images: int) -> Path:
    """Link so many images into one class folder, repeating them under other names if need be."""
    paths = [Path(path.decode()) for path in list_images(source).refs["path"].to_pylist()]
    (folder / "images").mkdir(parents=True)
    for number in range(num_images):
        path = paths[number % len(paths)]
        (folder / "images" / f"{number:06d}{path.suffix.lower()}").symlink_to(path.absolute())
    return folder


def keras_images_per_second(model: Any, folder: Path, image_size: tuple[int, int]) -> float:
    keras = import_keras()
    dataset = keras.utils.image_dataset_from_directory(
        folder,
        labels=None,
        image_size=image_size,
        crop_to_aspect_ratio=True,
        batch_size=32,
        shuffle=False,
        verbose=False,
    )
    begin = time.perf_counter()
    vectors = model.predict(dataset.prefetch(2), verbose=0)[EMBEDDING]
    return float(len(vectors) / (time.perf_counter() - begin))


def our_images_per_second(folder: Path, store: Path) -> float:
    shutil.rmtree(store, ignore_errors=True)
    return float(embedder.extract(folder, store).runs()[-1]["images_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="folder of JPEG images")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    recipe = make_recipe()
    model = build(recipe)
    with tempfile.TemporaryDirectory() as scratch:
        warm_up = link_images(options.source, Path(scratch) / "warm-up", 64)
        folder = link_images(options.source, Path(scratch) / "images", options.images)
        store = Path(scratch) / "store"
        keras_images_per_second(model, warm_up, recipe.image_size)
        our_images_per_second(warm_up, store)
        speeds: dict[str, list[float]] = {"Keras dataset + predict": [], "embedder float32": []}
        for _ in range(options.rounds):
            speed = keras_images_per_second(model, folder, recipe.image_size)
            speeds["Keras dataset + predict"].append(speed)
            speeds["embedder float32"].append(our_images_per_second(folder, store))
    print(f"{options.images:,} images, {recipe.backbone}, {NUM_CORES} cores, {platform.machine()}")
    print(", ".join(f"{name} {version}" for name, version in engines.versions().items()))
    base = statistics.median(speeds["Keras dataset + predict"])
    for name, values in speeds.items():
        median = statistics.median(values)
        print(
            f"{name:<26} median {median:6.1f} images/s ({min(values):.1f} to {max(values):.1f}), "
            f"ratio {median / base:.2f}"
        )


if __name__ == "__main__":
    main()
