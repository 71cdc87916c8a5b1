"""Images per second of read + decode + resize: both ways of this package, beside other decoders.

All read the same JPEG files and bring them to EfficientNet-Lite0's size with its crop, on as many
threads as cores, in turn, several rounds, after a warm-up that is not counted. The two others are
measured where they are installed: `pip install opencv-python-headless simplejpeg`.

- `exact`, `scaled`: `embedder.decode.decode.decode_rgb`.
- `opencv`: `cv2.imdecode`, crop, `cv2.resize` with `INTER_AREA`. It rotates by EXIF itself.
- `simplejpeg`: `simplejpeg.decode_jpeg`, rotation, crop and resize by Pillow.

Then what is lost: mean absolute difference of the pixels to `exact`, and cosine of the embeddings
of `scaled` to those of `exact`.

    python benchmarks/decode.py SOURCE --images 64 --rounds 5
"""

import argparse
import importlib
import io
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, features

from embedder import engines
from embedder.backbones import make_recipe
from embedder.columns import EMBEDDING
from embedder.decode import decode_rgb, prepare_decoders
from embedder.machine import gpus, num_cores
from embedder.recipe import Recipe
from embedder.sources import list_images, read_bytes

Pixels = NDArray[np.uint8]
Decoder = Callable[[bytes], Pixels]


def import_if_installed(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def opencv_decoder(cv2: ModuleType, recipe: Recipe) -> Decoder:
    height, width = recipe.image_size
    cv2.setNumThreads(1)  # the images are spread over the cores already

    def decode(encoded: bytes) -> Pixels:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
        scale = min(image.shape[0] / height, image.shape[1] / width) * recipe.crop_fraction
        crop_height, crop_width = round(height * scale), round(width * scale)
        top, left = (image.shape[0] - crop_height) // 2, (image.shape[1] - crop_width) // 2
        crop = image[top : top + crop_height, left : left + crop_width]
        crop = cv2.resize(crop, (width, height), interpolation=cv2.INTER_AREA)
        return cv2.cvtColor(crop, cv2.COLOR_BGR2RGB)

    return decode


def simplejpeg_decoder(simplejpeg: ModuleType, recipe: Recipe) -> Decoder:
    size, bleed = recipe.image_size[::-1], (1 - recipe.crop_fraction) / 2
    resample = Image.Resampling[recipe.interpolation.upper()]

    def decode(encoded: bytes) -> Pixels:
        image = Image.fromarray(simplejpeg.decode_jpeg(encoded))
        with Image.open(io.BytesIO(encoded)) as header:
            orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation != 1:
            image.getexif()[ExifTags.Base.Orientation] = orientation
            image = ImageOps.exif_transpose(image)
        return np.asarray(ImageOps.fit(image, size, resample, bleed))

    return decode


def decode_all(decode: Decoder, paths: list[bytes]) -> list[Pixels]:
    with ThreadPoolExecutor(num_cores()) as threads:
        return list(threads.map(lambda path: decode(read_bytes(path)), paths))


def embed_all(engine: engines.Engine, images: list[Pixels]) -> NDArray[np.float32]:
    """Embeddings of unit length."""
    size = engine.batch_size
    padded = images + images[:1] * (-len(images) % size)
    batches = [np.stack(padded[begin : begin + size]) for begin in range(0, len(padded), size)]
    vectors = np.concatenate([engine.embed(batch)[EMBEDDING] for batch in batches])[: len(images)]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="folder of JPEG images, in colour")
    parser.add_argument("--images", type=int, default=64, help="repeated if there are fewer")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    prepare_decoders()
    listed = list_images(options.source).refs["path"].to_pylist()
    # Evenly over the whole source, which may be sorted by class.
    step = max(1, len(listed) // options.images)
    distinct = listed[::step][: options.images]
    paths = [distinct[number % len(distinct)] for number in range(options.images)]

    recipe = make_recipe(decode="exact")
    scaled_recipe = make_recipe(decode="scaled")
    decoders: dict[str, Decoder] = {
        "exact": lambda encoded: decode_rgb(encoded, recipe).pixels,
        "scaled": lambda encoded: decode_rgb(encoded, scaled_recipe).pixels,
    }
    versions = [f"pillow {Image.__version__}", f"libjpeg-turbo {features.version('libjpeg_turbo')}"]
    others = {"opencv": ("cv2", opencv_decoder), "simplejpeg": ("simplejpeg", simplejpeg_decoder)}
    for name, (module_name, make_decoder) in others.items():
        if module := import_if_installed(module_name):
            decoders[name] = make_decoder(module, recipe)
            versions.append(f"{name} {module.__version__}")

    print(f"{options.images:,} images, {len(distinct):,} different, to {recipe.image_size}")
    print(f"{num_cores()} cores, {platform.machine()}, {', '.join(versions)}")
    pixels = {name: decode_all(decode, distinct) for name, decode in decoders.items()}  # warm-up
    speeds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(options.rounds):
        for name, decode in decoders.items():
            begin = time.perf_counter()
            decode_all(decode, paths)
            speeds[name].append(len(paths) / (time.perf_counter() - begin))
    base = statistics.median(speeds["exact"])
    for name, values in speeds.items():
        median = statistics.median(values)
        print(
            f"{name:<12} median {median:7.1f} images/s ({min(values):.1f} to {max(values):.1f}), "
            f"ratio {median / base:.2f}"
        )
    for name in sorted(others.keys() - decoders.keys()):
        print(f"{name:<12} not installed")

    exact = np.stack(pixels["exact"]).astype(np.float32)
    for name in list(decoders)[1:]:
        difference = np.abs(np.stack(pixels[name]) - exact).mean(axis=(1, 2, 3))
        print(
            f"{name:<12} pixels differ from exact by {difference.mean():.2f} of 255 in the mean, "
            f"{difference.max():.2f} in the worst image; {sum(difference == 0)} are identical"
        )

    engine = engines.load(recipe, engines.choose("auto", gpus()), None, num_cores())
    cosines = (embed_all(engine, pixels["exact"]) * embed_all(engine, pixels["scaled"])).sum(axis=1)
    print(
        f"cosine of scaled to exact embeddings: median {np.median(cosines):.5f}, "
        f"1st percentile {np.percentile(cosines, 1):.5f}, minimum {cosines.min():.5f}"
    )


if __name__ == "__main__":
    main()
