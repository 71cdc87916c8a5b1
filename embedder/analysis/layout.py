"""Where images lie on a map of their embeddings."""

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

_NUM_COMPONENTS = 50  # of PCA before t-SNE, as in van der Maaten and Hinton (2008)
_NUM_STEPS = 500  # of t-SNE; 1000 keep no more neighbours
_PERPLEXITY = 30
_MIN_POINTS = 10  # fewer have no neighbourhoods to keep


def map_coordinates(features: NDArray[np.floating], seed: int = 0) -> NDArray[np.float32]:
    """Lay vectors out on a plane so that neighbours stay neighbours.

    t-SNE (van der Maaten and Hinton, 2008) after PCA. Distances between clusters mean nothing.

    Args:
        features: (n, dim).
        seed: The same seed and features give the same map.

    Returns:
        (n, 2). Of fewer than 10 vectors, or of 1 value each, their first two principal components;
        of vectors that are all alike, zeros.
    """
    if len(features) < 2 or not np.ptp(features, axis=0).any():
        return np.zeros((len(features), 2), np.float32)
    num_components = min(_NUM_COMPONENTS, *features.shape)
    # One thread: the threads of scikit-learn's t-SNE wait by spinning, so that on cores that others
    # use too, two of them take longer than one.
    with threadpool_limits(1):
        reduced = PCA(num_components, random_state=seed).fit_transform(features)
        if len(features) < _MIN_POINTS or num_components < 2:
            return np.pad(reduced, ((0, 0), (0, 2)))[:, :2].astype(np.float32)
        perplexity = min(_PERPLEXITY, (len(features) - 1) / 3)
        tsne = TSNE(2, perplexity=perplexity, max_iter=_NUM_STEPS, random_state=seed)
        return np.asarray(tsne.fit_transform(reduced), np.float32)
