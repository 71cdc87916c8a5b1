"""Augmentation in the graph: shapes and ranges stay, labels go with their pictures."""

import numpy as np
import pytest

from embedder.augmentation import AUGMENTATIONS, Augmenter
from embedder.errors import RecipeError
from embedder.strategies import TuneOptions

BATCH, HEIGHT, WIDTH = 6, 20, 28


def pixels() -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(0).uniform(0, 255, (BATCH, HEIGHT, WIDTH, 3)).astype(np.float32)


def targets() -> np.ndarray:  # type: ignore[type-arg]
    return np.eye(3, dtype=np.float32)[np.arange(BATCH) % 3]


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_changes_pictures_within_their_range_and_the_same_seed_alike(name: str) -> None:
    (x, y), (again, _) = (Augmenter((name,), 3)(pixels(), targets()) for _ in range(2))
    x, y = np.asarray(x), np.asarray(y)
    assert x.shape == (BATCH, HEIGHT, WIDTH, 3)
    assert x.dtype == np.float32
    assert x.min() >= -1e-3
    assert x.max() <= 255 + 1e-3
    assert not np.array_equal(x, pixels())
    assert np.array_equal(x, np.asarray(again))
    np.testing.assert_allclose(y.sum(axis=1), 1.0, atol=1e-5)
    assert np.array_equal(y, targets()) is (name not in ("mixup", "cutmix"))


def test_a_flip_mirrors_some_of_the_pictures_and_no_more() -> None:
    x = np.asarray(Augmenter(("flip",), 1)(pixels(), targets())[0])
    kinds = {
        "same" if np.array_equal(ours, old) else "mirrored" * np.array_equal(ours, old[:, ::-1])
        for ours, old in zip(x, pixels(), strict=True)
    }
    assert kinds == {"same", "mirrored"}


def test_mixup_mixes_labels_as_it_mixes_pictures() -> None:
    plain = np.zeros((2, 4, 4, 3), np.float32)
    plain[1] = 200.0
    x, y = Augmenter(("mixup",), 2)(plain, np.eye(2, dtype=np.float32))
    shares = np.asarray(x)[:, 0, 0, 0] / 200.0
    np.testing.assert_allclose(np.asarray(y)[:, 1], shares, atol=1e-5)


def test_none_changes_nothing() -> None:
    x, y = Augmenter((), 0)(pixels(), targets())
    assert np.array_equal(x, pixels())
    assert np.array_equal(y, targets())


def test_one_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RecipeError, match="must be of flip.*Received: sepia"):
        TuneOptions(augment=("sepia",))
