"""Coordinates of the map."""

import numpy as np
import pytest

from embedder.analysis.layout import map_coordinates


def test_the_map_keeps_clusters_apart_and_is_the_same_each_time() -> None:
    clusters = np.repeat(np.eye(3, 60), 20, axis=0) * 9
    features = clusters + np.random.default_rng(0).normal(size=clusters.shape) * 0.1
    coordinates = map_coordinates(features.astype(np.float32), seed=3)
    np.testing.assert_array_equal(coordinates, map_coordinates(features.astype(np.float32), seed=3))
    centres = coordinates.reshape(3, 20, 2).mean(axis=1)
    spread = np.linalg.norm(coordinates.reshape(3, 20, 2) - centres[:, None], axis=-1).max()
    assert min(np.linalg.norm(centres[i] - centres[i - 1]) for i in range(3)) > 2 * spread


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (2, 5), (9, 4), (10, 1), (12, 2)])
def test_few_or_short_vectors_have_a_place_too(shape: tuple[int, int]) -> None:
    coordinates = map_coordinates(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    assert coordinates.shape == (shape[0], 2)
    assert np.isfinite(coordinates).all()
    assert not map_coordinates(np.ones(shape, np.float32)).any()
