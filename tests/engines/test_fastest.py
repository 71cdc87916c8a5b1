"""Where several engines can use a card, the fastest is taken: measured once, and remembered."""

import json
from pathlib import Path

import pytest

from embedder.engines import Runtime, choice, fastest, loading
from embedder.engines.batch_size import _batch_size_file, remembered_speed
from embedder.machine import Gpu
from embedder.recipe import Recipe

GPU = Gpu("0", "NVIDIA H100", (9, 0))
CHOSEN = Runtime("jax", ("0",))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, on a machine whose card two engines can use."""
    monkeypatch.setenv("EMBEDDER_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "installed", lambda asked: dict.fromkeys(asked, "1.0"))
    return tmp_path


def remember(recipe: Recipe, engine: str, speed: float) -> None:
    file = _batch_size_file(recipe, Runtime(engine, ("0",)), 2)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"batch_size": 64, "images_per_second": {"64": speed}}))


@pytest.mark.parametrize(("jax", "tensorflow"), [(3000.0, 2000.0), (2000.0, 3000.0)])
def test_the_faster_one_is_taken(lite0: Recipe, cache: Path, jax: float, tensorflow: float) -> None:
    remember(lite0, "jax", jax)
    remember(lite0, "tensorflow", tensorflow)
    for is_worth_it in (True, False):
        found = fastest(lite0, [GPU], CHOSEN, 2, is_worth_it)
        assert found == Runtime("jax" if jax > tensorflow else "tensorflow", ("0",))


def test_a_short_run_measures_nothing(lite0: Recipe, cache: Path) -> None:
    remember(lite0, "tensorflow", 5000.0)
    assert fastest(lite0, [GPU], CHOSEN, 2, is_worth_it=False) == CHOSEN
    assert [file.name for file in cache.iterdir()] == ["batch-sizes"]


def test_one_engine_alone_is_not_measured(
    lite0: Recipe, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blackwell = Gpu("0", "RTX 5090", (12, 0))
    assert fastest(lite0, [blackwell], CHOSEN, 2, is_worth_it=True) == CHOSEN
    assert not list(cache.iterdir())


def test_an_engine_that_does_not_find_the_card_is_not_taken(
    lite0: Recipe, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As both do here, in processes of their own: there is none."""
    small = lite0.model_copy(update={"image_size": (32, 48)})
    remember(small, "jax", 1.0)
    assert fastest(small, [GPU], CHOSEN, 2, is_worth_it=True) == CHOSEN
    assert "tensorflow cannot be used: tensorflow must find the GPU 0" in caplog.text


@pytest.mark.slow
def test_each_is_measured_in_a_process_of_its_own(
    lite0: Recipe, cache: Path, model_cache: Path
) -> None:
    """On the CPU, where both can be."""
    small = lite0.model_copy(update={"image_size": (32, 48)})
    for engine in ("tensorflow", "jax"):
        runtime = Runtime(engine)
        speed = loading._measured_speed(small, runtime, 2)
        assert speed > 0
        assert remembered_speed(small, runtime, 2) == speed
