"""Exported models: made once, shared where the graph is the same, mended where damaged."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from embedder.engines.model_cache import exported_model
from embedder.errors import EngineError, WeightsError
from embedder.recipe import Recipe
from tests.engines.test_engine import embed_all


def test_a_cached_model_needs_no_tensorflow(lite0: Recipe, model_cache: Path) -> None:
    exported_model(lite0)
    code = """
import sys
from embedder import engines
from embedder.backbones.resolve import make_recipe
engines.load(make_recipe(image_size=(64, 96)), engines.Runtime("openvino"), 2, 1)
print([name for name in ("tensorflow", "keras", "openvino_telemetry") if sys.modules.get(name)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("damage", ["change", "remove", "no checksum"])
def test_a_damaged_cache_is_mended(lite0: Recipe, pixels: NDArray[np.uint8], damage: str) -> None:
    before = embed_all(lite0, "openvino", 3, pixels)
    file = exported_model(lite0).with_suffix(".bin")
    content = file.read_bytes()
    if damage == "no checksum":
        (file.parent / "model.sha256").write_bytes(b"\xff")
    else:
        file.unlink()  # and not written in place: engines of other tests have it mapped into memory
    if damage == "change":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    np.testing.assert_array_equal(embed_all(lite0, "openvino", 3, pixels), before)
    assert file.read_bytes() == content


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
    for other in ({"pooling": "max"}, {"image_size": (64, 64)}):
        assert exported_model(lite0.model_copy(update=other)) != exported_model(lite0)
    with pytest.raises(WeightsError):
        exported_model(lite0.model_copy(update={"weights": "0" * 64}))


def test_one_export_serves_all_precisions(
    lite0: Recipe, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usual = embed_all(lite0, "openvino", 3, pixels)
    monkeypatch.setenv("EMBEDDER_CACHE", str(tmp_path))
    first = exported_model(lite0.model_copy(update={"precision": "bfloat16"}))
    assert exported_model(lite0) == first
    np.testing.assert_array_equal(embed_all(lite0, "openvino", 3, pixels), usual)
