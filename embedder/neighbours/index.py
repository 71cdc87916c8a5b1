"""An index of vectors by their direction from the mean of all of them."""

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from embedder.errors import RequestError

BLOCK_ROWS = 8192  # of vectors that are worked on at a time
_LISTS_SEARCHED = 8
_ROWS_PER_LIST = 64
_SEED = 0


class NeighbourIndex:
    """Inverted lists of vectors about some of them (Sivic and Zisserman, "Video Google", 2003).

    Near are vectors whose differences from the mean of all have a high cosine: what all share would
    make them all alike. Training would find better centres of the lists, by sums whose rounding
    depends on the number of threads; random vectors of the set are as good here, where close pairs
    are wanted.
    """

    def __init__(self, vectors: NDArray[Any]) -> None:
        """Index vectors of shape (n_rows, dim), float32 or float16; as many float32 are kept.

        Raises:
            RequestError: They are not finite vectors, or there are none.
        """
        if vectors.ndim != 2 or len(vectors) == 0:
            raise RequestError(
                "`vectors` must be of shape (n_rows, dim), of at least one row. "
                f"Received: vectors of shape {vectors.shape}"
            )
        self._mean: NDArray[np.float32] = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
        if not np.isfinite(self._mean).all():
            raise RequestError("`vectors` must be finite. Received: nan or infinity among them")
        num_rows, dim = vectors.shape
        num_lists = max(1, min(num_rows // _ROWS_PER_LIST, int(4 * num_rows**0.5)))
        chosen = np.random.default_rng(_SEED).choice(num_rows, num_lists, replace=False)
        # Copies would be lists of which only the first is filled, and others searched.
        centres = np.unique(self._units(vectors[np.sort(chosen)]), axis=0)
        quantizer = faiss.IndexFlatIP(dim)
        quantizer.add(centres)
        self._lists = faiss.IndexIVFFlat(quantizer, dim, len(centres), faiss.METRIC_INNER_PRODUCT)
        self._lists.train(centres)  # does nothing but see that the centres are there
        self._lists.nprobe = _LISTS_SEARCHED
        for start in range(0, num_rows, BLOCK_ROWS):
            self._lists.add(self._units(vectors[start : start + BLOCK_ROWS]))

    def search(
        self, vectors: NDArray[Any], num_neighbours: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find the nearest of the indexed vectors, among those of the 8 nearest lists.

        Args:
            vectors: (n, dim), any others or some of the indexed ones, which find themselves too.
            num_neighbours: How many to find for each.

        Returns:
            Cosines, the largest first, and rows of the indexed vectors, (n, num_neighbours) each;
            where fewer are found, the rest of the rows are -1.
        """
        cosines, rows = self._lists.search(self._units(vectors), num_neighbours)
        return cosines, rows

    def _units(self, vectors: NDArray[Any]) -> NDArray[np.float32]:
        """Differences from the mean, of length 1; zeros have one direction."""
        units: NDArray[np.float32] = vectors.astype(np.float32) - self._mean
        lengths = np.linalg.norm(units, axis=1, keepdims=True)
        units /= np.where(lengths > 0, lengths, 1)
        units[lengths[:, 0] == 0, 0] = 1
        return units
