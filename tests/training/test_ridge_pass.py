"""Sums over a store: those of its rows, wherever they are computed."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedder.errors import RequestError, StoreError
from embedder.extraction.cluster import connect
from embedder.heads.ridge_head import RidgeHead
from embedder.heads.ridge_statistics import SufficientStatistics, one_vs_rest_targets, sums_by_fold
from embedder.recipe import Recipe
from embedder.store.store import Store
from embedder.training import ridge_pass as streaming
from embedder.training.ridge_pass import ridge_sums
from tests.extraction.test_cluster import scheduler_with_workers
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from planning import make_listing, write_store

NUM_ROWS, DIM, NUM_CLASSES = 3000, 12, 5  # three shards


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("store")
    vectors = np.random.default_rng(1).random((NUM_ROWS, DIM), np.float32)
    write_store(path, make_listing(NUM_ROWS), vectors)
    return Store(path)


@pytest.fixture(scope="module")
def codes() -> NDArray[np.int64]:
    return np.random.default_rng(2).integers(0, NUM_CLASSES, NUM_ROWS)


@pytest.fixture(scope="module")
def folds() -> NDArray[np.int64]:
    return np.random.default_rng(3).integers(-1, 3, NUM_ROWS)


def assert_same(received: list[SufficientStatistics], expected: list[SufficientStatistics]) -> None:
    assert len(received) == len(expected)
    for one, other in zip(received, expected, strict=True):
        for name, value in vars(other).items():
            np.testing.assert_allclose(getattr(one, name), value, rtol=1e-5, atol=1e-3)


def expected_of(
    store: Store, codes: Any, folds: Any, weights: NDArray[Any] | None = None
) -> list[SufficientStatistics]:
    targets = one_vs_rest_targets(np.arange(NUM_ROWS), codes, NUM_ROWS, NUM_CLASSES)
    return sums_by_fold(store.vectors().astype(np.float64), targets, folds, 3, weights)


def test_sums_are_the_same_wherever_shards_are_read(
    store: Store, codes: Any, folds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "CHUNK_ROWS", 1)  # a task for each shard
    expected = expected_of(store, codes, folds)
    with connect(None, 1) as pool:
        assert_same(ridge_sums(store, codes, NUM_CLASSES, folds, pool), expected)
    with connect(None, 2) as pool:
        assert_same(ridge_sums(store, codes, NUM_CLASSES, folds, pool), expected)
    with scheduler_with_workers("--nthreads 1") as address, connect(address, 1) as pool:
        assert_same(ridge_sums(store, codes, NUM_CLASSES, folds, pool), expected)


def test_rows_can_have_weights_or_several_classes(store: Store, codes: Any, folds: Any) -> None:
    weights = np.random.default_rng(4).random(NUM_ROWS)
    labels = (codes[:, None] == np.arange(NUM_CLASSES)).astype(np.uint8)
    with connect(None, 1) as pool:
        weighted = ridge_sums(store, codes, NUM_CLASSES, folds, pool, weights)
        several = ridge_sums(store, labels, NUM_CLASSES, folds, pool)
    assert_same(weighted, expected_of(store, codes, folds, weights))
    assert_same(several, expected_of(store, codes, folds))


def test_a_head_is_fitted_to_a_store(store: Store, folds: Any) -> None:
    vectors = store.vectors()
    codes = vectors[:, :NUM_CLASSES].argmax(axis=1)
    with connect(None, 1) as pool:
        head = RidgeHead().fit_sums(
            ridge_sums(store, codes, NUM_CLASSES, folds, pool), np.arange(NUM_CLASSES)
        )
    assert head.score(vectors, codes) > 0.9


def test_codes_of_another_store_are_told(store: Store, codes: Any, folds: Any) -> None:
    with connect(None, 1) as pool:
        with pytest.raises(StoreError, match="3000. Received: 2999 codes, 3000 folds"):
            ridge_sums(store, codes[1:], NUM_CLASSES, folds, pool)
        with pytest.raises(RequestError, match="must have a fold. Received: none of 3000"):
            ridge_sums(store, codes, NUM_CLASSES, np.full(NUM_ROWS, -1), pool)
        with pytest.raises(RequestError, match="one of the store's features: embedding"):
            ridge_sums(store, codes, NUM_CLASSES, folds, pool, column="top_conv")


def test_feature_maps_are_told(tmp_path: Path, codes: Any, folds: Any) -> None:
    recipe = Recipe(backbone="maps", weights="0" * 64, image_size=(64, 64), pooling="none")
    store = Store.open_or_create(tmp_path, recipe, {})
    with pytest.raises(RequestError, match="Received: embedding, a feature map of pooling=none"):
        streaming.vector_column(store, None)
