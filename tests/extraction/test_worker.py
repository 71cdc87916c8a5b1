"""What a worker keeps between shards, and what it makes of the network's outputs."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from embedder.engines import Runtime, batch_size, remembered_batch_size
from embedder.engines.model_cache import exported_model
from embedder.extraction import worker
from embedder.extraction.worker import Job, finished_vectors, worker_state_of
from embedder.recipe import Recipe


def test_lengths_are_one_when_asked(mean_colour_recipe: Recipe) -> None:
    recipe = mean_colour_recipe.model_copy(update={"l2_normalise": True})
    features = {
        "embedding": np.array([[3, 4], [0, 0]], np.float32),
        "map": np.array([[[3, 0], [0, 4]]], np.float32),  # of shape (1, 2, 2)
    }
    vectors = finished_vectors(features, recipe)
    np.testing.assert_allclose(vectors["embedding"], [[0.6, 0.8], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(vectors["map"], [[[0.6, 0], [0, 0.8]]], rtol=1e-6)


def test_a_state_is_made_once_and_measures_batch_sizes_for_long_runs(
    lite0: Recipe, model_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported_model(lite0)
    keep = shutil.ignore_patterns("batch-sizes")
    shutil.copytree(model_cache, tmp_path / "cache", ignore=keep)
    monkeypatch.setenv("EMBEDDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(batch_size, "_KNEE_SECONDS", 0.01)
    monkeypatch.setattr(worker, "_states", {})

    def job(num_images: int, batch_size: int | None = None, recipe: Recipe = lite0) -> Job:
        return Job(recipe, "store", "openvino", batch_size, num_images)

    def is_measured() -> bool:
        return remembered_batch_size(lite0, Runtime("openvino"), 2) is not None

    short = worker_state_of(job(1999), 2)
    assert worker_state_of(job(1999), 2) is short
    assert (
        worker_state_of(job(1999, recipe=lite0.model_copy(update={"crop": "pad"})), 2) is not short
    )
    assert worker_state_of(job(2000, 3), 2).engine.batch_size == 3
    assert not is_measured()
    worker._states.clear()
    found = worker_state_of(job(2000), 2).engine.batch_size
    assert is_measured()
    (file,) = (tmp_path / "cache" / "batch-sizes").iterdir()
    measured = file.read_bytes()
    worker._states.clear()
    assert worker_state_of(job(2000), 2).engine.batch_size == found
    assert file.read_bytes() == measured  # and not measured again
