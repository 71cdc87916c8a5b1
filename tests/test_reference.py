"""Vectors as the first release made them: speeding things up must not change what is stored.

`reference_vectors.json` was written by this file, run as a script, with the code of 0.1.0 before
any work on speed: float32, `decode="exact"`, through `embedder.extraction.extract`.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import embedder
from embedder.sources.demo_images import images_folder
from tests.support import TESTS, picture

FILE = TESTS / "reference_vectors.json"
NUM_VALUES = 32  # of each vector's 1,280
TOLERANCE = 1e-4  # as a share of the largest value: OpenVINO sums in another order on other CPUs


def vectors_now(folder: Path) -> dict[str, list[float]]:
    """First values of the vectors of three generated images and two demo photographs."""
    archive = folder / "photos"
    archive.mkdir()
    for seed, (height, width) in enumerate([(300, 400), (640, 480), (224, 900)]):
        Image.fromarray(picture(seed, height, width)).save(archive / f"picture-{seed}.png")
    for path in sorted(images_folder().rglob("*.jpg"))[:2]:
        (archive / path.name).write_bytes(path.read_bytes())
    store = embedder.extract(archive, folder / "store", decode="exact")
    return {
        image_id: [round(float(value), 6) for value in vector[:NUM_VALUES]]
        for image_id, vector in zip(store.ids(), store.vectors(), strict=True)
    }


def test_vectors_are_what_they_were(tmp_path: Path) -> None:
    expected = json.loads(FILE.read_text())
    now = vectors_now(tmp_path)
    assert now.keys() == expected.keys()
    for image_id, values in expected.items():
        np.testing.assert_allclose(
            now[image_id], values, atol=TOLERANCE * max(np.abs(values)), err_msg=image_id
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        json.dump(vectors_now(Path(scratch)), sys.stdout, indent=1)
