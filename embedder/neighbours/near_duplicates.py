"""Groups of near-duplicates: images so alike that a split must not divide them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from embedder.errors import RequestError
from embedder.neighbours.index import BLOCK_ROWS, NeighbourIndex
from embedder.neighbours.options import DEFAULT_THRESHOLD

_NUM_NEIGHBOURS = 32
_ROUNDING = 1e-6  # of the cosine of a float32 vector with itself

# Groups that hold more rows than both are taken apart, unless all are closer than copies.
_LARGE_ROWS = 100
_LARGE_SHARE = 0.05
_COPIES = 0.999


def near_duplicate_groups(
    vectors: NDArray[Any], threshold: float = DEFAULT_THRESHOLD
) -> NDArray[np.int64]:
    """Number the groups of near-duplicates among vectors.

    Two are near-duplicates where the cosine of their differences from the mean of all vectors is at
    least the threshold. Without the mean, all images of one material would be: it is what they
    share. Groups are the connected components of these pairs, so a group can be a chain whose ends
    are unlike. In a large set of similar images chains would join into one: in a group of more
    than 100 rows and 5 % of all, pairs must be closer and closer, until it falls into smaller ones
    or holds only copies.

    Pairs are looked for among the 32 nearest neighbours that the 8 nearest of many lists of vectors
    hold (see `NeighbourIndex`), never among all pairs. Few are missed. The same vectors always give
    the same groups.

    Found are copies that were compressed, sharpened, blurred, slightly reduced or given another
    contrast or saturation, and shots of one burst. Not found are copies that were rotated,
    squeezed, strongly reduced or made grey, and often not mirrored or cut ones: their features
    differ, and through features they hardly leak.

    Args:
        vectors: (n_rows, dim), float32 or float16, finite. An index of as many float32 is made.
        threshold: Cosine, more than 0, at most 1.

    Returns:
        (n_rows,), from 0, in the order of each group's first row. Most groups are of one row.

    Raises:
        RequestError: The threshold is outside its range, or the vectors are not finite vectors.
    """
    if not 0 < threshold <= 1:
        raise RequestError(
            f"`threshold` must be a cosine above 0 and at most 1. Received: threshold={threshold}"
        )
    rows, neighbours, cosines = _close_pairs(vectors, threshold)
    groups = _components(len(vectors), rows, neighbours)
    largest = max(_LARGE_ROWS, _LARGE_SHARE * len(vectors))
    while threshold < _COPIES:
        is_large = np.bincount(groups)[groups[rows]] > largest
        if not is_large.any():
            break
        threshold += (1 - threshold) / 4
        keep = ~is_large | (cosines >= threshold)
        rows, neighbours, cosines = rows[keep], neighbours[keep], cosines[keep]
        groups = _components(len(vectors), rows, neighbours)
    return groups


def _close_pairs(
    vectors: NDArray[Any], threshold: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Rows, neighbours and cosines of pairs of at least the threshold; (n_pairs,) each."""
    index = NeighbourIndex(vectors)
    found: list[tuple[NDArray[Any], ...]] = []
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = vectors[start : start + BLOCK_ROWS]
        cosines, neighbours = index.search(block, min(_NUM_NEIGHBOURS, len(vectors)))
        row, rank = np.nonzero((cosines >= threshold - _ROUNDING) & (neighbours >= 0))
        found.append((row + start, neighbours[row, rank], cosines[row, rank]))
    rows, others, close = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return rows, others, close


def _components(
    num_rows: int, rows: NDArray[np.int64], neighbours: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Connected components, numbered by their first row."""
    pairs = coo_array((np.ones(len(rows), np.bool_), (rows, neighbours)), (num_rows, num_rows))
    groups = connected_components(pairs, directed=False)[1]
    _, first, indices = np.unique(groups, return_index=True, return_inverse=True)
    numbers: NDArray[np.int64] = np.argsort(np.argsort(first))[indices]
    return numbers
