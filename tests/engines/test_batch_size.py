"""The batch size at the knee: found, remembered, and used from then on."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from embedder.engines import (
    Features,
    Runtime,
    batch_size,
    find_batch_size,
    load,
    remembered_batch_size,
)
from embedder.engines.batch_size import remembered_speed
from embedder.engines.model_cache import exported_model
from embedder.errors import OutOfMemory
from embedder.recipe import Recipe

OPENVINO = Runtime("openvino")


class Paced:
    """An engine of so many images per second at each batch size, by a clock of its own."""

    name = "openvino"
    device = "CPU"
    num_parallel = 1

    def __init__(self, batch_size: int, speeds: dict[int, float], clock: list[float]) -> None:
        self.batch_size, self._speeds, self._clock = batch_size, speeds, clock

    def embed(self, pixels: NDArray[np.uint8]) -> Features:
        if len(pixels) not in self._speeds:
            raise OutOfMemory(f"{len(pixels)} images do not fit")
        self._clock[0] += len(pixels) / self._speeds[len(pixels)]
        return {"embedding": np.zeros((len(pixels), 1), np.float32)}

    def resized(self, batch_size: int) -> "Paced":
        return Paced(batch_size, self._speeds, self._clock)


def find_paced_batch_size(
    recipe: Recipe, speeds: list[float], monkeypatch: pytest.MonkeyPatch
) -> int:
    """What is found where batches of 2, 4, 8 ... are so fast, and larger ones do not fit."""
    clock = [0.0]
    monkeypatch.setattr(batch_size, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    engine = Paced(1, dict(zip((2, 4, 8, 16, 32), speeds, strict=False)), clock)
    return find_batch_size(engine, recipe, OPENVINO, 2).batch_size


@pytest.mark.parametrize(
    ("speeds", "found"),
    [
        ([100, 200, 300, 400, 500], 32),
        ([100, 200, 300], 8),  # 16 do not fit
        ([100, 102, 110, 112, 113], 8),  # 3 % more than the best is needed
        ([100, 101, 102, 200, 200], 2),  # two in a row end the search
        ([100, 90, 110, 90, 120], 32),  # one does not, and the count begins again
    ],
)
def test_the_smallest_batch_that_is_as_fast_as_any_is_found(
    lite0: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    speeds: list[float],
    found: int,
) -> None:
    monkeypatch.setenv("EMBEDDER_CACHE", str(tmp_path))
    assert find_paced_batch_size(lite0, speeds, monkeypatch) == found
    (file,) = (tmp_path / "batch-sizes").iterdir()
    measured = json.loads(file.read_text())["images_per_second"]
    assert measured["2"] == pytest.approx(100)


def test_the_batch_size_that_was_found_is_used_from_then_on(
    lite0: Recipe, model_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    exported_model(lite0)
    shutil.copytree(model_cache, tmp_path / "cache")
    monkeypatch.setenv("EMBEDDER_CACHE", str(tmp_path / "cache"))
    assert remembered_batch_size(lite0, OPENVINO, 2) is None
    assert find_paced_batch_size(lite0, [100, 200, 300], monkeypatch) == 8
    assert remembered_batch_size(lite0, OPENVINO, 2) == 8
    assert remembered_batch_size(lite0, OPENVINO, 1) is None
    assert remembered_batch_size(lite0, Runtime("tensorflow"), 2) is None
    bfloat16 = lite0.model_copy(update={"precision": "bfloat16"})
    assert remembered_batch_size(bfloat16, OPENVINO, 2) is None
    (file,) = (tmp_path / "cache" / "batch-sizes").iterdir()
    # Another size, so that it is told from the default.
    file.write_text(json.dumps({"batch_size": 3, "images_per_second": {"3": 7.5}}))
    assert remembered_speed(lite0, OPENVINO, 2) == 7.5
    assert load(lite0, OPENVINO, None, 2).batch_size == 3
    assert load(lite0, OPENVINO, 5, 2).batch_size == 5
    nested, infinite = "[" * 100_000, '{"batch_size": 1e999}'
    for damaged in ("damaged", '{"batch_size": 3}', "[]", infinite, nested):
        file.write_text(damaged)
        assert remembered_batch_size(lite0, OPENVINO, 2) is None
    assert load(lite0, OPENVINO, None, 2).batch_size == 4
