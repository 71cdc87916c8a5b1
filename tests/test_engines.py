"""The engines: the same vectors on each, whatever the batch; a cache that can be trusted."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from numpy.typing import NDArray

from embedder import engines
from embedder.engines import exported_model, load
from embedder.errors import EngineError
from embedder.recipe import Recipe


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return np.stack([picture(seed, 64, 96) for seed in range(6)])


def embed_all(
    recipe: Recipe, engine: str, batch_size: int, pixels: NDArray[np.uint8]
) -> np.ndarray:
    loaded = load(recipe, engine, batch_size, 2)
    return np.concatenate(
        [loaded.embed(pixels[i : i + batch_size]) for i in range(0, len(pixels), batch_size)]
    )


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_a_vector_does_not_depend_on_its_batch(
    lite0: Recipe, pixels: NDArray[np.uint8], engine: str
) -> None:
    alone = embed_all(lite0, engine, 1, pixels)
    together = embed_all(lite0, engine, 3, pixels)
    np.testing.assert_allclose(alone, together, atol=1e-5 * np.abs(alone).max())
    assert alone.shape == (6, 1280)
    assert alone.dtype == np.float32


def test_engines_agree(lite0: Recipe, pixels: NDArray[np.uint8]) -> None:
    one, other = (embed_all(lite0, name, 3, pixels) for name in engines.ENGINES)
    cosines = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    assert cosines.min() > 0.9999
    assert np.linalg.norm(one[0] - one[1]) > 0.1 * np.linalg.norm(one[0])  # pictures do differ


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(EngineError, match=r"auto or one of openvino, tensorflow. Received: jax"):
        engines.choose("jax")


def test_a_cached_model_needs_no_tensorflow(lite0: Recipe, model_cache: Path) -> None:
    exported_model(lite0)
    code = """
import sys
from embedder import engines
from embedder.backbones import make_recipe
engines.load(make_recipe(image_size=(64, 96)), "openvino", 2, 1)
print([name for name in ("tensorflow", "keras", "openvino_telemetry") if sys.modules.get(name)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_cache_is_mended(lite0: Recipe, pixels: NDArray[np.uint8], damage: str) -> None:
    before = embed_all(lite0, "openvino", 3, pixels)
    file = exported_model(lite0).with_suffix(".bin")
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        file.unlink()
    np.testing.assert_array_equal(embed_all(lite0, "openvino", 3, pixels), before)


def test_a_cache_that_cannot_be_written_says_what_to_set(
    lite0: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EMBEDDER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(EngineError, match="Set EMBEDDER_CACHE"):
        exported_model(lite0)


def test_recipes_that_share_a_graph_share_its_export(lite0: Recipe) -> None:
    squashed = lite0.model_copy(update={"crop": "squash", "l2_normalise": True})
    assert exported_model(squashed) == exported_model(lite0)
    assert exported_model(lite0.model_copy(update={"pooling": "max"})) != exported_model(lite0)


def test_many_threads_may_embed_first(lite0: Recipe) -> None:
    """In a new process, where OpenVINO's binding has still to set itself up."""
    exported_model(lite0)
    code = """
import faulthandler, sys, threading
import numpy as np
from embedder import engines
from embedder.backbones import make_recipe
faulthandler.dump_traceback_later(60, exit=True)  # of a deadlock
sys.setswitchinterval(1e-6)
engine = engines.load(make_recipe(image_size=(64, 96)), "openvino", 1, 8)
together = threading.Barrier(8)
def embed():
    together.wait()
    engine.embed(np.zeros((1, 64, 96, 3), np.uint8))
threads = [threading.Thread(target=embed) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    for _ in range(3):  # without the care it takes, four of five such processes hang
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_openvino_telemetry_cannot_be_loaded() -> None:
    engines.import_openvino()
    with pytest.raises(ImportError):
        __import__("openvino_telemetry")


def test_nothing_is_written_to_standard_error() -> None:
    code = "from embedder.backbones import build, make_recipe; build(make_recipe())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
