"""Published weights, found and checked; and random ones."""

from pathlib import Path

import numpy as np
import pytest

from embedder.backbones.graph import load_network
from embedder.backbones.resolve import make_recipe
from embedder.backbones.weights import PublishedWeights
from embedder.errors import WeightsError

SIZE = (64, 96)


def test_published_weights_that_cannot_be_downloaded_say_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    weights = PublishedWeights("http://127.0.0.1:9/file.h5", "file.h5", "0" * 64)
    with pytest.raises(WeightsError) as caught:
        weights.find()
    for words in (weights.url, "sha256 " + "0" * 64, str(tmp_path / "models" / "file.h5")):
        assert words in str(caught.value)


def test_published_weights_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "file.h5").write_bytes(b"good")
    right = PublishedWeights("http://x/file.h5", "file.h5", "755f85c2723bb39381c7379a604160d8")
    assert right.find() == tmp_path / "models" / "file.h5"
    wrong = PublishedWeights("http://x/file.h5", "file.h5", "0" * 32)
    with pytest.raises(WeightsError, match=r"its md5 must be 0000.*Received: 755f85c2.*Delete it"):
        wrong.find()


def test_random_weights_are_the_same_for_a_seed_and_warn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipes = [make_recipe("mobilenet", f"random:{s}", image_size=SIZE) for s in (1, 1, 2)]
    assert "mobilenet has random weights: its vectors are for tests only" in caplog.text
    assert recipes[0].fingerprint == recipes[1].fingerprint != recipes[2].fingerprint
    first, again, other = (load_network(recipe).get_weights() for recipe in recipes)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
