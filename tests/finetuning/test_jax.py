"""Fine-tuning on JAX, on the CPU: the same steps as on TensorFlow, in a process of its own."""

from pathlib import Path

import numpy as np
import pytest

import embedder
from embedder.decode import decode_rgb
from embedder.engines import Runtime, call_apart, load
from embedder.errors import Unfinished
from embedder.inference.evaluate import evaluate_model
from embedder.store.store import Store
from embedder.training.options import TrainOptions
from embedder.training.train import train
from tests.finetuning import in_jax
from tests.finetuning.test_trainer import PLAIN, groups_of, make_tiny, run
from tests.support import make_archive


def test_steps_and_channels_are_those_of_tensorflow() -> None:
    losses, weights, masks = call_apart("jax", in_jax.trained_without_chance)
    other_losses, other_weights, other_masks = in_jax.trained_without_chance()
    np.testing.assert_allclose(losses[1:], other_losses[1:], rtol=1e-4)
    for ours, theirs in zip(weights, other_weights, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert len(masks) == 4
    for ours, theirs in zip(masks, other_masks, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_a_training_that_was_killed_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    tiny = make_tiny()
    run(tiny, groups_of(tiny), PLAIN, checkpoint=tmp_path / "tensorflow.npz")
    found = call_apart("jax", in_jax.killed_and_continued, tmp_path)
    assert found["backend"] == "jax"
    whole, again = found["losses"]
    np.testing.assert_allclose(again[1:], whole[1:], rtol=1e-4)
    for ours, theirs in zip(*found["weights"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert "must be of a training on jax, which this is. Received: one on t" in found["refused"]
    with pytest.raises(Unfinished, match="on tensorflow, which this is. Received: one on jax. D"):
        run(tiny, groups_of(tiny), PLAIN, checkpoint=tmp_path / "jax.npz")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["scratch", "full"])
def test_a_model_that_is_tuned_on_jax_is_a_model_on_tensorflow(
    strategy: str, tmp_path: Path
) -> None:
    photos = make_archive(tmp_path / "photos", 24)
    store = embedder.extract(photos, tmp_path / "features", image_size=(64, 96))
    train(store, "folder", "logistic", TrainOptions(duplicates=None)).save(tmp_path / "model")
    arguments = tmp_path / "model", photos, tmp_path / "tuned", strategy
    metrics = call_apart("jax", in_jax.tuned_metrics, *arguments)
    assert metrics["backend"] == "jax"
    tuned = Store(tmp_path / "tuned.features")
    result = evaluate_model(tmp_path / "tuned", tuned, "folder")
    assert result.metrics["test"]["accuracy"] == metrics["test"]["accuracy"]
    ids = tuned.ids()[:4]
    pixels = np.stack([decode_rgb((photos / i).read_bytes(), tuned.recipe).pixels for i in ids])
    engine = load(tuned.recipe, Runtime("tensorflow"), len(pixels), 2)
    ours, theirs = engine.embed(pixels)["embedding"], tuned.vectors()[:4]
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
