"""Near-duplicates: groups among planted, real and hostile vectors."""

from pathlib import Path

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

import embedder
from embedder.errors import RequestError
from embedder.neighbours.near_duplicates import near_duplicate_groups
from tests.support import make_archive


def vectors_with_copies(num_rows: int, num_copies: int, cosine: float) -> NDArray[np.float32]:
    """Random directions, (num_rows, 64); the last are at a cosine of the first ones."""
    random = np.random.default_rng(3)
    vectors = random.standard_normal((num_rows, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for row in range(num_copies):
        original = vectors[row]
        across = random.standard_normal(64)
        across -= (across @ original) * original
        across /= np.linalg.norm(across)
        vectors[num_rows - num_copies + row] = cosine * original + (1 - cosine**2) ** 0.5 * across
    return vectors


def test_planted_near_duplicates_are_found_in_many_lists() -> None:
    vectors = vectors_with_copies(20_000, 300, cosine=0.93)
    groups = near_duplicate_groups(vectors, 0.9)
    # In no direction are there more than in others: for inverted lists there is nothing worse.
    assert np.mean(groups[:300] == groups[-300:]) >= 0.98
    assert 19_700 <= groups.max() + 1 <= 19_706


def test_pairs_below_the_threshold_are_apart() -> None:
    vectors = vectors_with_copies(1000, 100, cosine=0.93)
    assert len(np.unique(near_duplicate_groups(vectors, 0.96))) == 1000
    assert len(np.unique(near_duplicate_groups(vectors, 0.90))) == 900


def test_groups_are_numbered_by_their_first_row() -> None:
    a, b, c = np.eye(3, dtype=np.float32)
    groups = near_duplicate_groups(np.stack([a, b, b, a, c, b]))
    assert groups.tolist() == [0, 1, 1, 0, 2, 1]
    assert groups.dtype == np.int64


def test_a_group_is_a_chain_of_close_pairs() -> None:
    angles = np.deg2rad([0, 20, 40, 180, 200, 220])  # their mean is 0
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert vectors[0] @ vectors[2] < 0.8
    assert near_duplicate_groups(vectors, 0.9).tolist() == [0, 0, 0, 1, 1, 1]


def test_what_all_vectors_share_makes_none_alike() -> None:
    vectors = vectors_with_copies(1000, 100, cosine=0.93) + np.float32(5)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (unit @ unit.T).min() > 0.99
    assert len(np.unique(near_duplicate_groups(vectors))) == 900


def test_a_chain_of_a_large_share_of_all_falls_apart() -> None:
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    around = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    random = np.random.default_rng(0).standard_normal((400, 30)).astype(np.float32) / 14
    groups = near_duplicate_groups(np.concatenate([around, random], axis=1), 0.8)
    assert np.bincount(groups).max() <= 100


def test_any_number_of_copies_is_one_group() -> None:
    vectors = vectors_with_copies(20_000, 0, cosine=0.9)
    copies = np.random.default_rng(0).choice(20_000, 6000, replace=False)
    vectors[copies] = vectors[copies[0]]
    groups = near_duplicate_groups(vectors)
    assert len(np.unique(groups[copies])) == 1
    assert groups.max() + 1 == 14_001
    assert near_duplicate_groups(vectors[copies]).max() == 0


def test_groups_do_not_depend_on_the_number_of_threads() -> None:
    vectors = vectors_with_copies(5000, 1000, cosine=0.91)
    threads = faiss.omp_get_max_threads()
    found = []
    for num_threads in (1, 2, 2):
        faiss.omp_set_num_threads(num_threads)
        found.append(near_duplicate_groups(vectors))
    faiss.omp_set_num_threads(threads)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[1], found[2])


def test_float16_vectors_and_a_single_row_will_do() -> None:
    vectors = vectors_with_copies(1000, 100, cosine=0.93)
    groups = near_duplicate_groups(vectors.astype(np.float16))
    np.testing.assert_array_equal(groups, near_duplicate_groups(vectors))
    assert near_duplicate_groups(vectors[:1]).tolist() == [0]


@pytest.mark.parametrize("threshold", [0.0, 1.1, float("nan")])
def test_a_threshold_that_is_no_cosine_is_told(threshold: float) -> None:
    with pytest.raises(RequestError, match=r"cosine above 0 and at most 1. Received: threshold="):
        near_duplicate_groups(np.eye(3, dtype=np.float32), threshold)


def test_vectors_that_are_none_are_told() -> None:
    with pytest.raises(RequestError, match=r"Received: vectors of shape \(0, 5\)"):
        near_duplicate_groups(np.zeros((0, 5), np.float32))
    with pytest.raises(RequestError, match=r"Received: vectors of shape \(2, 3, 4\)"):
        near_duplicate_groups(np.zeros((2, 3, 4), np.float32))
    with pytest.raises(RequestError, match="finite"):
        near_duplicate_groups(np.full((4, 5), np.nan, np.float32))


def test_changed_copies_of_a_photograph_are_one_group(shared: Path, tmp_path: Path) -> None:
    """Among other images, as in any archive: the mean must not be that of the copies."""
    archive = make_archive(tmp_path / "photos", 40)
    for path in (shared / "neardup").rglob("*.jpg"):
        (archive / path.name).write_bytes(path.read_bytes())
    store = embedder.extract(archive, tmp_path / "store", backbone="efficientnet-lite0")
    group = dict(zip(store.ids(), near_duplicate_groups(store.vectors()), strict=True))
    copies = ("blur-a-little", "high-contrast", "high-saturation", "sharpen-a-little")
    assert {group[f"{name}.jpg"] for name in copies} == {group["aaa-orig.jpg"]}
    others = [g for name, g in group.items() if name.startswith(("q", "ukbench0"))]
    assert group["aaa-orig.jpg"] not in others
    assert group["ukbench08996.jpg"] != group["ukbench09012.jpg"]
