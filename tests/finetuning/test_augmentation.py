"""Augmentation in the graph: shapes and ranges stay, labels go with their images."""

import numpy as np
import pytest

from embedder.backbones.graph import dtype_policy
from embedder.errors import RequestError
from embedder.finetuning.augmentation import AUGMENTATIONS, Augmenter
from embedder.finetuning.options import TuneOptions

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


def test_a_vertical_flip_turns_pictures_upside_down() -> None:
    x = np.asarray(Augmenter(("vertical-flip",), 1)(pixels(), targets())[0])
    kinds = {
        "same" if np.array_equal(ours, old) else "mirrored" * np.array_equal(ours, old[::-1])
        for ours, old in zip(x, pixels(), strict=True)
    }
    assert kinds == {"same", "mirrored"}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_other_seeds_and_other_batches_are_changed_otherwise(name: str) -> None:
    augmenter = Augmenter((name,), 3)
    first, second = (np.asarray(augmenter(pixels(), targets())[0]) for _ in range(2))
    assert not np.array_equal(first, second)
    others = [np.asarray(Augmenter((name,), seed)(pixels(), targets())[0]) for seed in (4, 5)]
    assert not all(np.array_equal(first, other) for other in others)


def test_the_order_of_the_names_makes_no_difference() -> None:
    first, second = (Augmenter(names, 3) for names in (AUGMENTATIONS, AUGMENTATIONS[::-1]))
    for ours, theirs in zip(first(pixels(), targets()), second(pixels(), targets()), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_pixels_keep_all_of_their_bits_where_networks_compute_in_half_precision() -> None:
    with dtype_policy("bfloat16"):
        x = np.asarray(Augmenter(("flip",), 1)(pixels(), targets())[0])
    assert x.dtype == np.float32
    assert set(x[0, 0].ravel()) == set(pixels()[0, 0].ravel())


def test_cutmix_gives_each_class_its_share_of_the_area() -> None:
    plain = np.zeros((8, 100, 140, 3), np.float32)
    plain[1::2] = 200.0
    labels = np.eye(2, dtype=np.float32)[np.arange(8) % 2]
    x, y = (np.asarray(a) for a in Augmenter(("cutmix",), 2)(plain, labels))
    assert set(x.ravel()) == {0.0, 200.0}  # pasted, not blended
    shares = (x[..., 0] == 200.0).mean(axis=(1, 2))
    assert 0.1 < np.abs(shares - labels[:, 1]).max() < 1
    np.testing.assert_allclose(y[:, 1], shares, atol=1 / 100 + 1 / 140)  # a row and a column


def test_labels_that_are_mixed_twice_still_sum_to_1() -> None:
    y = np.asarray(Augmenter(("mixup", "cutmix"), 1)(pixels(), targets())[1])
    assert not np.array_equal(y, targets())
    assert y.min() >= 0
    np.testing.assert_allclose(y.sum(axis=1), 1.0, atol=1e-5)


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
    with pytest.raises(RequestError, match="must be flip, .*Received: augment='sepia'"):
        TuneOptions(augment=("flip", "sepia"))


def test_cutmix_pastes_any_share_of_a_picture_as_often_as_any_other() -> None:
    plain = np.zeros((64, 40, 60, 3), np.float32)
    plain[1::2] = 200.0
    labels = np.eye(2, dtype=np.float32)[np.arange(64) % 2]
    augmenter = Augmenter(("cutmix",), 2)
    mixed = np.concatenate([np.asarray(augmenter(plain, labels)[1]) for _ in range(8)])
    own = np.abs(mixed - np.tile(labels, (8, 1)))[:, 0]
    pasted = own[own > 1e-3]  # half of them get a piece of an image of their own class
    assert 0.4 < np.median(pasted) < 0.6
    assert 0.15 < (pasted < 0.25).mean() < 0.35
