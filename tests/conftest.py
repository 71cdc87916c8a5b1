"""Fixtures that several tests share."""

import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedder.backbones.resolve import make_recipe
from embedder.recipe import Recipe
from embedder.store.store import Store
from tests.support import SHARED, WebServer, add_rows, animal_vectors, make_archive

# JAX, which Keras imports, sets another level, also for the commands that tests start.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


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
    """A folder of 20 images in two folders, JPEG and PNG, none like another."""
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


@pytest.fixture
def mean_colour_recipe() -> Recipe:
    """A recipe for `MeanColour`; height and width differ, so that swapped axes show."""
    return Recipe(backbone="mean-colour", weights="0" * 64, image_size=(48, 64))


@pytest.fixture
def store(tmp_path: Path, mean_colour_recipe: Recipe) -> Store:
    """An empty store."""
    return Store.open_or_create(tmp_path / "features", mean_colour_recipe, {})


@pytest.fixture
def zoo(store: Store) -> Store:
    """Twenty images of each class in `set-N/CLASS/`, in two shards, the classes mixed."""
    for number in (1, 2):
        animals = ["owls", "cats", "dogs"] * 10
        ids = [f"set-{number}/{animal}/{i:02d}.jpg" for i, animal in enumerate(animals)]
        add_rows(store, ids, animal_vectors(animals, seed=number))
    return store


@pytest.fixture
def web() -> Iterator[WebServer]:
    server = WebServer()
    yield server
    server.close()
