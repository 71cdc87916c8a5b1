"""A training set: labelled images, what there is to learn of them, and what each is for."""

from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from embedder.datasets.labels import check_joinable, encoded, read_labels, texts_of
from embedder.datasets.splits import Indices, Split, no_indices
from embedder.errors import RequestError, StoreError
from embedder.store import Store


@dataclass(frozen=True)
class TrainingSet:
    """The n labelled images that a model learns from and is tested on, read once.

    Indices of images count in its arrays, 0 to n - 1.

    Attributes:
        ids: (n,) str.
        sha256: (n,) str, of their bytes.
        classes: (n_classes,) str, sorted; images may lack some.
        codes: What the images are: int64 (n,), indices in `classes`; or multi-label,
            uint8 (n, n_classes), one where an image has the label.
        groups: int (n,), which images are near-duplicates of each other.
        split: What each image is for.
        rows: int64 (n,), where the images are in `Store.ids()`, rising; none of images that are
            not of one store.
        num_unlabelled: Images of the store that have no label.
        features: float32 (n, n_views, dim), of which view 0 is unaugmented: heads are trained on
            all views, and chosen and calibrated on that one. None where they are not in memory.
    """

    ids: NDArray[np.object_]
    sha256: NDArray[np.object_]
    classes: NDArray[np.str_]
    codes: NDArray[np.integer]
    groups: NDArray[np.integer]
    split: Split = field(default_factory=Split)
    rows: Indices = field(default_factory=no_indices)
    num_unlabelled: int = 0
    features: NDArray[np.float32] | None = None

    @property
    def is_multilabel(self) -> bool:
        """Whether an image can have several labels (multi-label)."""
        return self.codes.ndim == 2

    @property
    def in_memory(self) -> NDArray[np.float32]:
        """`features`.

        Raises:
            StoreError: They are not in memory.
        """
        if self.features is None:
            raise StoreError("Features must be in memory. They were left in the store")
        return self.features

    @property
    def unaugmented(self) -> NDArray[np.float32]:
        """float32 (n, dim), features of the images as they are."""
        return self.in_memory[:, 0]

    @property
    def parts(self) -> NDArray[np.str_]:
        """(n,) what each image is for; see `splits`."""
        return self.split.parts(len(self.ids))

    def texts(self) -> NDArray[np.str_]:
        """What each image is called: str (n,); several labels are joined."""
        return texts_of(self.codes, self.classes)

    def known_classes(self, indices: Indices) -> Indices:
        """The classes that a head can learn from these images."""
        if self.is_multilabel:
            return np.arange(len(self.classes))
        return np.unique(self.codes[indices]).astype(np.int64)

    def with_features(self, store: Store, column: str) -> Self:
        """The same images with their features, read from their store."""
        vectors = store.vectors(column, view=None)
        vectors = vectors.reshape(-1, store.recipe.views, vectors.shape[-1])
        return replace(self, features=np.ascontiguousarray(vectors[self.rows], np.float32))

    def reordered(self, order: Indices) -> Self:
        """The same images in another order: (n,), their indices now."""
        index = np.argsort(order)
        split = replace(
            self.split,
            folds=[(np.sort(index[a]), np.sort(index[b])) for a, b in self.split.folds],
            validation=np.sort(index[self.split.validation]),
        )
        arrays = {name: getattr(self, name)[order] for name in ("ids", "sha256", "codes", "groups")}
        return replace(self, split=split, **arrays)


def read_training_set(
    store: Store,
    labels: str,
    separator: str | None = None,
    known: NDArray[np.str_] | None = None,
) -> TrainingSet:
    """Join labels to the images of a store; features are not read, and nothing is divided.

    Args:
        store: Features.
        labels: `folder` (first folder under the source's root), `parent` (the containing folder),
            `FILE.csv:COLUMN` (joined on its `path` column), `LIST.txt:NUMBER` (lines of fields
            with no names, of which the first is the path; NUMBER counts from 1; with `*` in the
            name, several files) or `column:NAME` (of the store).
        separator: What separates several labels of one image; None where each has one.
        known: Classes that there are whether or not an image has them.

    Raises:
        RequestError: The labels make no sense, or name fewer than two classes.
        SourceError: The label file cannot be read.
        StoreError: The store has an image twice.
    """
    ids, sha256 = store.texts("image_id", "sha256")
    by_id = read_labels(store, labels, ids)
    if repeated := len(ids) - len(set(ids)):
        raise StoreError(
            f"A store must have each image once. Received: {store}, in which {repeated:,} "
            f"stand again, as a run that was killed can leave them. `embedder extract` drops those "
            f"that are not of the source's bytes"
        )
    rows = np.array([row for row, image_id in enumerate(ids) if image_id in by_id], dtype=np.int64)
    several = [[by_id[image_id]] for image_id in ids[rows]]
    if separator is not None:
        several = [[name.strip() for name in text.split(separator)] for (text,) in several]
    classes, codes = encoded(several, separator is not None, known)
    if separator is not None:
        check_joinable(classes)
    if len(classes) < 2:
        raise RequestError(
            f"Labels must name at least two classes. "
            f"Received: labels={labels!r}, which gives {len(rows)} of {len(ids)} images a label "
            f"and {len(classes) if len(rows) else 0} class(es)"
        )
    return TrainingSet(
        ids=ids[rows],
        sha256=sha256[rows],
        classes=classes,
        codes=codes,
        groups=np.arange(len(rows)),
        rows=rows,
        num_unlabelled=len(ids) - len(rows),
    )


def coarse_classes(store: Store, coarse: str, images: TrainingSet) -> NDArray[np.int64]:
    """The coarse class of each class, as a number.

    Args:
        store: Where the images are of.
        coarse: Labels of the coarser level, as in `read_training_set`.
        images: Their classes.

    Returns:
        (n_classes,).

    Raises:
        RequestError: Images of one class are of several coarse classes, or of none.
    """
    if images.is_multilabel:
        raise RequestError("Coarse labels need images of one label each")
    by_id = read_labels(store, coarse, images.ids, images.rows)
    names: dict[int, str] = {}
    for image_id, code in zip(images.ids, images.codes, strict=True):
        name = by_id.get(image_id)
        if name is None or names.setdefault(int(code), name) != name:
            raise RequestError(
                f"Every image of a class must be of the same coarse class. Received: {image_id} of "
                f"the class {images.classes[code]}, which is of {name}"
                + (f", others of {names[int(code)]}" if name is not None else "")
            )
    # A class that no image has is of a coarse class of its own: nothing tells of another.
    own = [names.get(c, f"\0{c}") for c in range(len(images.classes))]
    return np.unique(own, return_inverse=True)[1]
