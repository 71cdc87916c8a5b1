"""Vectors of real weights, made by another way than the package's: Pillow, NumPy and plain Keras.

`golden_vectors.json` was written by this file, run as a script. It does not use the package's
decoding, preprocessing, graph or engines; MobileNet is Keras's own, with weights loaded by Keras.
EfficientNet-Lite is not in Keras: its layers and weights are the package's.
"""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from embedder import engines
from embedder.backbones.graph import load_network
from embedder.backbones.resolve import make_recipe
from embedder.decode.decode import decode_rgb
from embedder.machine import gpus
from embedder.recipe import Recipe
from embedder.sources.demo_images import images_folder
from tests.support import SHARED, TESTS, picture

FILE = TESTS / "golden_vectors.json"
NUM_VALUES = 24  # of each vector
TOLERANCE = 2e-4  # as a share of the largest value: engines sum in another order
MOBILENET = SHARED / "weights" / "mobilenet_1.0_224_imagenet.weights.h5"
NETWORKS = ["efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2", "mobilenet"]


def encoded_images() -> dict[str, bytes]:
    """Three generated images, wide, high and small, and two demo photographs, as files."""
    images = {}
    for seed, (height, width) in enumerate([(300, 400), (640, 480), (64, 90)]):
        file = io.BytesIO()
        Image.fromarray(picture(seed, height, width)).save(file, "PNG")
        images[f"picture-{seed}"] = file.getvalue()
    for path in sorted(images_folder().rglob("*.jpg"))[:2]:
        images[path.name] = path.read_bytes()
    return images


def recipe_of(name: str) -> Recipe:
    if name != "mobilenet":
        return make_recipe(name, decode="exact")
    if not MOBILENET.is_file():
        pytest.skip(f"needs MobileNet's weights, at {MOBILENET}")
    return make_recipe(name, str(MOBILENET), decode="exact")


@pytest.mark.parametrize("engine", ["openvino", "tensorflow"])  # JAX is compared with the latter
@pytest.mark.parametrize("name", NETWORKS)
def test_vectors_are_those_of_plain_keras(name: str, engine: str) -> None:
    recipe, images = recipe_of(name), encoded_images()
    pixels = np.stack([decode_rgb(encoded, recipe).pixels for encoded in images.values()])
    vectors = engines.load(recipe, engines.choose(engine, gpus()), len(pixels), 2).embed(pixels)[
        "embedding"
    ]
    golden = json.loads(FILE.read_text())[name]
    assert list(golden) == list(images)
    for (image, expected), vector in zip(golden.items(), vectors, strict=True):
        tolerance = TOLERANCE * max(np.abs(expected))
        np.testing.assert_allclose(vector[:NUM_VALUES], expected, atol=tolerance, err_msg=image)


def plain_vector(name: str, encoded: bytes) -> np.ndarray:
    """The embedding of one image, written out."""
    import keras

    side, crop = {
        "efficientnet-lite0": (224, 224 / 256),
        "efficientnet-lite1": (240, 240 / 272),
        "efficientnet-lite2": (260, 260 / 292),
        "mobilenet": (224, 224 / 256),
    }[name]
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    square = min(image.size) * crop
    left, top = (image.width - square) / 2, (image.height - square) / 2
    box = (left, top, left + square, top + square)
    x = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box), np.float32)
    if name == "mobilenet":
        network = keras.applications.MobileNet(weights=None)
        network.load_weights(MOBILENET)
        network = keras.Model(network.input, network.get_layer("conv_pw_13_relu").output)
        x = x / 127.5 - 1
    else:
        network = load_network(make_recipe(name))
        x = (x - 127) / 128
    return network.predict(x[None], verbose=0)[0].mean(axis=(0, 1))


if __name__ == "__main__":
    golden = {
        name: {
            image: [round(float(value), 6) for value in plain_vector(name, encoded)[:NUM_VALUES]]
            for image, encoded in encoded_images().items()
        }
        for name in NETWORKS
    }
    json.dump(golden, sys.stdout, indent=1)
