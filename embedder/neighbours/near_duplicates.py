"""Groups of near-duplicates: pictures so alike that a split must not divide them."""

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from embedder.errors import RecipeError

# Of EfficientNet-Lite0's features. Of 5,421 shop photographs 716 have a near-duplicate, in groups
# of up to 21; at 0.85 1,896, in groups of up to 112. Of 2,000 pictures
# of one textile 52, in groups of up to 9, and at 0.88 up to 92.
DEFAULT_THRESHOLD = 0.9

_NUM_NEIGHBOURS = 32
_LISTS_SEARCHED = 8
_ROWS_PER_LIST = 64
_BLOCK_ROWS = 8192
_SEED = 0
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
    least the threshold. Without the mean, all pictures of one material would be: it is what they
    share. Groups are the connected components of these pairs, so a group can be a chain whose ends
    are unlike. In a large set of similar pictures chains would join into one: in a group of more
    than 100 rows and 5 % of all, pairs must be closer and closer, until it falls into smaller ones
    or holds only copies.

    Pairs are looked for among the 32 nearest neighbours that the 8 nearest of many lists of vectors
    hold (inverted lists: Sivic and Zisserman, "Video Google", 2003), never among all pairs. Few are
    missed. The same vectors always give the same groups.

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
        RecipeError: The threshold is outside its range, or the vectors are not finite vectors.
    """
    if not 0 < threshold <= 1:
        raise RecipeError(
            f"`threshold` must be a cosine above 0 and at most 1. Received: threshold={threshold}"
        )
    if vectors.ndim != 2 or len(vectors) == 0:
        raise RecipeError(
            "`vectors` must be of shape (n_rows, dim), of at least one row. "
            f"Received: vectors of shape {vectors.shape}"
        )
    mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    if not np.isfinite(mean).all():
        raise RecipeError("`vectors` must be finite. Received: nan or infinity among them")
    rows, neighbours, cosines = _close_pairs(vectors, mean, threshold)
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
    vectors: NDArray[Any], mean: NDArray[np.float32], threshold: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Rows, neighbours and cosines of pairs of at least the threshold; (n_pairs,) each."""
    index = _make_index(vectors, mean)
    found: list[tuple[NDArray[Any], ...]] = []
    for start in range(0, len(vectors), _BLOCK_ROWS):
        units = _units(vectors[start : start + _BLOCK_ROWS], mean)
        cosines, neighbours = index.search(units, min(_NUM_NEIGHBOURS, len(vectors)))
        # Where fewer are found, the rest of the neighbours are -1.
        row, place = np.nonzero((cosines >= threshold - _ROUNDING) & (neighbours >= 0))
        found.append((row + start, neighbours[row, place], cosines[row, place]))
    rows, others, close = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return rows, others, close


def _make_index(vectors: NDArray[Any], mean: NDArray[np.float32]) -> Any:
    """Inverted lists of all vectors, about some of them.

    Training would find better centres, by sums whose rounding depends on the number of threads;
    random vectors of the set are as good here, where close pairs are wanted.
    """
    num_rows, dim = vectors.shape
    num_lists = max(1, min(num_rows // _ROWS_PER_LIST, int(4 * num_rows**0.5)))
    chosen = np.random.default_rng(_SEED).choice(num_rows, num_lists, replace=False)
    # Copies would be lists of which only the first is filled, and others searched.
    centres = np.unique(_units(vectors[np.sort(chosen)], mean), axis=0)
    quantizer = faiss.IndexFlatIP(dim)
    quantizer.add(centres)
    index = faiss.IndexIVFFlat(quantizer, dim, len(centres), faiss.METRIC_INNER_PRODUCT)
    index.train(centres)  # does nothing but see that the centres are there
    index.nprobe = _LISTS_SEARCHED
    for start in range(0, num_rows, _BLOCK_ROWS):
        index.add(_units(vectors[start : start + _BLOCK_ROWS], mean))
    return index


def _units(vectors: NDArray[Any], mean: NDArray[np.float32]) -> NDArray[np.float32]:
    """Differences from the mean, of length 1; those that are 0 have one direction of their own."""
    units = vectors.astype(np.float32) - mean
    lengths = np.linalg.norm(units, axis=1, keepdims=True)
    units /= np.where(lengths > 0, lengths, 1)
    units[lengths[:, 0] == 0, 0] = 1
    return units


def _components(
    num_rows: int, rows: NDArray[np.int64], neighbours: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Connected components, numbered by their first row."""
    pairs = coo_array((np.ones(len(rows), np.bool_), (rows, neighbours)), (num_rows, num_rows))
    groups = connected_components(pairs, directed=False)[1]
    _, first, places = np.unique(groups, return_index=True, return_inverse=True)
    numbers: NDArray[np.int64] = np.argsort(np.argsort(first))[places]
    return numbers
