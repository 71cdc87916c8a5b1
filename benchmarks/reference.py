"""Reference vectors of made images, which other engines and machines are checked against.

The images are noise of several sizes, of whole numbers alone, so that they are the same to the last
bit wherever they are made. The vectors are those of Keras on TensorFlow in float32 on a CPU: of
EfficientNet-Lite0 with its weights, of MobileNet with random weights, and of MobileNet with its
published weights, whose file is given.

    python benchmarks/reference.py --mobilenet-weights FILE
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).with_name("reference.npz")
SIDE = 224  # of the images, in pixels
NUM_IMAGES = 8
# (backbone, weights), by name in the file; a weights file where it is `published`.
PUBLISHED = "published"
NETWORKS = {
    "efficientnet-lite0": ("efficientnet-lite0", None),
    "mobilenet, random weights": ("mobilenet", "random:0"),
    "mobilenet": ("mobilenet", PUBLISHED),
}


def make_images() -> NDArray[np.uint8]:
    """Noise whose details are 112 pixels to 7 pixels large: uint8 (8, 224, 224, 3)."""
    generator = np.random.Generator(np.random.PCG64(0))
    total = np.zeros((NUM_IMAGES, SIDE, SIDE, 3), np.int64)
    for detail in (112, 56, 28, 14, 7):
        side = SIDE // detail
        shape = (NUM_IMAGES, side, side, 3)
        coarse = np.frombuffer(generator.bytes(int(np.prod(shape))), np.uint8).reshape(shape)
        total += coarse.astype(np.int64).repeat(detail, axis=1).repeat(detail, axis=2) * detail
    return (total // (112 + 56 + 28 + 14 + 7)).astype(np.uint8)


def digest_of(images: NDArray[np.uint8]) -> str:
    return hashlib.sha256(images.tobytes()).hexdigest()


def load_reference() -> tuple[NDArray[np.uint8], dict[str, NDArray[np.float32]]]:
    """The images, and by name of the network their vectors, float32 (8, dim).

    Raises:
        SystemExit: The images are not those that the vectors were made of.
    """
    images = make_images()
    with np.load(FILE) as file:
        if str(file["sha256"]) != digest_of(images):
            raise SystemExit(f"The images are not those of {FILE}: NumPy makes other numbers")
        return images, {name: file[name] for name in NETWORKS if name in file}


def cosines(vectors: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of each vector and the other in its row."""
    a, b = vectors.astype(np.float64), others.astype(np.float64)
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def main() -> None:
    from embedder import engines
    from embedder.backbones import make_recipe
    from embedder.columns import EMBEDDING
    from embedder.machine import num_cores

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mobilenet-weights", help="MobileNet's published weights, a file")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    images = make_images()
    found: dict[str, NDArray[np.float32]] = {}
    for name, (backbone, weights) in NETWORKS.items():
        weights = options.mobilenet_weights if weights == PUBLISHED else weights
        if name == "mobilenet" and weights is None:
            print(f"{name}: left out, its weights are not given")
            continue
        recipe = make_recipe(backbone, weights)
        engine = engines.load(recipe, engines.Runtime("tensorflow"), NUM_IMAGES, num_cores())
        found[name] = engine.embed(images)[EMBEDDING]
        print(f"{name}: {' x '.join(map(str, found[name].shape))}")
    np.savez_compressed(options.out, sha256=digest_of(images), **found)
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
