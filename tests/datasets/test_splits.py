"""Splits: every row is where it belongs, and near-duplicates stay together."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from embedder.datasets.splits import Split, grouped_folds, make_split
from embedder.errors import RequestError, SourceError
from embedder.store.store import Store
from tests.support import training_set

CODES = np.arange(60) % 3
ALONE = np.arange(60)
PAIRS = np.arange(60) // 2  # neighbours, of different classes


def split_of(spec: str, store: Store, groups: NDArray[np.int64] = ALONE, seed: int = 0) -> Split:
    return make_split(spec, store, training_set(CODES, groups=groups), seed)


def test_a_share_is_tested_on_and_the_rest_trained_on(store: Store) -> None:
    split = split_of("0.2", store)
    ((train, test),) = split.folds
    assert sorted([*train, *test]) == list(range(60))
    assert np.bincount(CODES[test]).tolist() == [4, 4, 4]  # stratified
    assert len(split.validation) == 0
    ((other_train, _),) = split_of("0.2", store, seed=1).folds
    assert other_train.tolist() != train.tolist()
    ((same, _),) = split_of("0.2", store).folds
    assert same.tolist() == train.tolist()


@pytest.mark.parametrize(
    ("share", "num_tested"), [("0.4", 24), ("0.5", 30), ("0.1", 6), ("0.35", 21)]
)
def test_a_share_is_what_was_asked_for(store: Store, share: str, num_tested: int) -> None:
    ((train, test),) = split_of(share, store).folds
    assert len(test) == num_tested
    assert sorted([*train, *test]) == list(range(60))


def test_folds_test_on_every_row_once(store: Store) -> None:
    split = split_of("kfold:4", store)
    assert len(split.folds) == 4
    assert sorted(row for _, test in split.folds for row in test) == list(range(60))
    for train, test in split.folds:
        assert set(train) | set(test) == set(range(60))


@pytest.mark.parametrize("spec", ["0.3", "kfold:5"])
def test_no_group_stands_on_both_sides(store: Store, spec: str) -> None:
    for train, test in split_of(spec, store, PAIRS).folds:
        assert set(PAIRS[train]) & set(PAIRS[test]) == set()
    straddling = [set(PAIRS[a]) & set(PAIRS[b]) for a, b in split_of(spec, store).folds]
    assert any(straddling)  # which chance alone would not have given


def test_a_class_rarer_than_the_folds_is_no_error() -> None:
    codes = np.array([0] * 20 + [1] * 20 + [2])
    folds = grouped_folds(codes, np.arange(41), 5, seed=0)
    assert sum(40 in test for _, test in folds) == 1


def test_several_labels_an_image_are_split_too() -> None:
    codes = (np.random.default_rng(0).random((60, 4)) > 0.5).astype(np.uint8)
    folds = grouped_folds(codes, PAIRS, 3, seed=0)
    assert sorted(row for _, test in folds for row in test) == list(range(60))


def test_each_set_of_labels_is_in_every_fold_alike() -> None:
    codes = np.array([[1, 0], [1, 1], [0, 1]], np.uint8)[np.repeat([0, 1, 2], [10, 15, 35])]
    for _, test in grouped_folds(codes, ALONE, 5, seed=0):
        both = codes[test].sum(axis=1) == 2
        assert (both.sum(), (~both & (codes[test][:, 0] == 1)).sum()) == (3, 2)


def test_fewer_groups_than_folds_are_refused() -> None:
    with pytest.raises(RequestError, match="at least 3 groups.*Received: 60 images in 2 group"):
        grouped_folds(CODES, ALONE // 30, 3, seed=0)


def test_official_lists_are_kept_as_they_are(store: Store, tmp_path: Path) -> None:
    lines = [f"{n}.jpg, {n % 3}, 0" for n in range(60)]
    (tmp_path / "train.txt").write_text("\n".join(lines[:30]))
    (tmp_path / "val.txt").write_text("\n".join(lines[30:40]))
    (tmp_path / "test.txt").write_text("\n".join([*lines[40:55], "elsewhere.jpg, 1, 0"]))
    (tmp_path / "notes.txt").write_text("nothing of a split\n")
    split = split_of(str(tmp_path), store, PAIRS)
    ((train, test),) = split.folds
    assert train.tolist() == list(range(40))
    assert split.validation.tolist() == list(range(30, 40))
    assert test.tolist() == list(range(40, 55))
    assert split.is_official


def test_a_column_can_say_what_an_image_is_for(store: Store, tmp_path: Path) -> None:
    parts = ["Train", "test", "valid"]
    rows = "\n".join(f"{n}.jpg,{parts[n % 3]}" for n in range(59))
    (tmp_path / "s.csv").write_text(f"path,part\n{rows}\n")
    split = split_of(f"{tmp_path}/s.csv:part", store)
    ((train, test),) = split.folds
    assert test.tolist() == list(range(1, 59, 3))
    assert split.validation.tolist() == list(range(2, 59, 3))
    assert set(train) == set(range(59)) - set(test)


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ("half", "must be a share between 0 and 1, kfold:K, a folder with train.txt.*'half'"),
        ("kfold:1", "must be a share.*'kfold:1'"),
        ("", "must be a share.*''"),
        ("0.7", "above 0 and at most 0.5. Received: split=0.7"),
        ("0", "above 0 and at most 0.5. Received: split=0"),
        ("kfold:61", "at least 61 groups.*Received: 60 images in 60 group"),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(store: Store, spec: str, rule: str) -> None:
    with pytest.raises(RequestError, match=rule):
        split_of(spec, store)


def test_a_folder_without_a_test_list_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("1.jpg, 1\n")
    with pytest.raises(RequestError, match="which names 1 to train on and 0 to test on, of 60"):
        split_of(str(tmp_path), store)


def test_an_image_in_two_lists_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("1.jpg, 1\n2.jpg, 1\n")
    (tmp_path / "test.txt").write_text("2.jpg, 1\n")
    with pytest.raises(SourceError, match=r"2\.jpg in test\.txt and train\.txt"):
        split_of(str(tmp_path), store)


def test_a_part_of_no_known_name_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("path,part\n1.jpg,train\n2.jpg,holdout\n")
    with pytest.raises(RequestError, match=r"train, val or test of each image\. Received: holdout"):
        split_of(f"{tmp_path}/s.csv:part", store)
