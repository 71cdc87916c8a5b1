"""What several tests share: small generated archives, the shared photographs, the model cache."""

import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from embedder.backbones import make_recipe
from embedder.engines import Features
from embedder.recipe import Recipe

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache of exported models for the session, and none of the user's."""
    folder = tmp_path_factory.mktemp("model-cache")
    os.environ["EMBEDDER_CACHE"] = str(folder)
    yield folder
    del os.environ["EMBEDDER_CACHE"]


@pytest.fixture(scope="session")
def lite0() -> Recipe:
    """The default backbone, with its real weights, at a small input size."""
    return make_recipe("efficientnet-lite0", image_size=(64, 96))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A folder of 20 pictures in two folders, JPEG and PNG, none like another."""
    return make_archive(tmp_path / "photos", 20)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared photographs."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared photographs, at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def odd(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the odd files, with those unpacked that have hostile names."""
    folder = tmp_path_factory.mktemp("odd") / "odd"
    shutil.copytree(shared / "odd", folder, copy_function=shutil.copyfile)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    with tarfile.open(folder / "names.tar") as names:
        names.extractall(folder, filter="data")
    return folder


def make_archive(folder: Path, num_images: int) -> Path:
    """Write pictures of smooth random colours, in folders `cats` and `dogs`."""
    for number in range(num_images):
        path = (
            folder
            / ("cats", "dogs")[number % 2]
            / f"{number:03d}.{('jpg', 'png')[number % 3 == 0]}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)).save(path)
    return folder


def picture(seed: int, height: int = 90, width: int = 120) -> NDArray[np.uint8]:
    """A picture of smooth random colours: uint8 (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def assert_same_vectors(received: NDArray[Any], expected: NDArray[Any]) -> None:
    """Equal but for rounding: to 1e-5 of the largest value, whatever the values' size."""
    largest = np.abs(expected).max()
    assert largest > 0
    np.testing.assert_allclose(received, expected, atol=1e-5 * largest)


class MeanColour:
    """An engine simple enough to check by eye: (batch, height, width, 3) to (batch, 3)."""

    name = "mean-colour"
    device = "CPU"

    def __init__(
        self,
        batch_size: int = 4,
        num_parallel: int = 2,
        before: Callable[[NDArray[np.uint8]], None] | None = None,
    ) -> None:
        self.batch_size, self.num_parallel, self._before = batch_size, num_parallel, before

    def embed(self, pixels: NDArray[np.uint8]) -> Features:
        assert pixels.shape[0] == self.batch_size
        if self._before is not None:
            self._before(pixels)
        return {"embedding": pixels.mean(axis=(1, 2), dtype=np.float32)}


@pytest.fixture
def mean_colour_recipe() -> Recipe:
    """A recipe for `MeanColour`; height and width differ, so that swapped axes show."""
    return Recipe(backbone="mean-colour", weights="0" * 64, image_size=(48, 64))
