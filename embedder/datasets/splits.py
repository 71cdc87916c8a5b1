"""Splits: which labelled rows a head is trained on, chosen by, and judged by."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from embedder.columns import CROSS_VALIDATED, TEST, TRAIN, UNUSED, VALIDATION
from embedder.datasets.labels import read_fields, read_labels
from embedder.errors import RequestError, SourceError
from embedder.store import Store

if TYPE_CHECKING:
    from embedder.datasets.training_set import TrainingSet

_NAMES = {"train": TRAIN, "training": TRAIN, "val": VALIDATION, "validation": VALIDATION}
_NAMES |= {"valid": VALIDATION, "dev": VALIDATION, "test": TEST, "testing": TEST}
_FINE_FOLDS = 20
_RULE = (
    "`split` must be a share between 0 and 1, kfold:K, a folder with train.txt and test.txt (and "
    "val.txt), FILE.csv:COLUMN or column:NAME."
)

Codes = NDArray[np.integer]
Groups = NDArray[np.integer]
Indices = NDArray[np.int64]
Folds = list[tuple[Indices, Indices]]


def no_indices() -> Indices:
    """An empty array."""
    return np.zeros(0, np.int64)


@dataclass(frozen=True)
class Split:
    """What each of n labelled rows is for.

    Attributes:
        name: As asked for: `0.2`, `kfold:5`, or where the official lists are.
        folds: (rows to train on, rows to test on) for each round: one, or K with `kfold:K`, or
            none of what is not divided yet. Indices of the labelled rows.
        validation: Rows of the one round's training that choose the settings and calibrate; empty
            where cross-validation within the training rows does so.
        is_official: Whether somebody else decided it: then rows stay where they are, though
            near-duplicates may stand on both sides.
    """

    name: str = ""
    folds: Folds = field(default_factory=list)
    validation: Indices = field(default_factory=no_indices)
    is_official: bool = False

    @property
    def trained_on(self) -> Indices:
        """Rows that the model is trained on, rising, validation included; all with `kfold:K`."""
        return self.folds[0][0] if len(self.folds) == 1 else np.sort(self.tested_on)

    @property
    def tested_on(self) -> Indices:
        """Rows that are tested on, round by round."""
        return np.concatenate([test for _, test in self.folds])

    @property
    def train(self) -> Indices:
        """Rows that the model is trained on, rising, without validation."""
        return np.setdiff1d(self.trained_on, self.validation)

    def parts(self, num_rows: int) -> NDArray[np.str_]:
        """(num_rows,) what each of the labelled rows is for."""
        if len(self.folds) > 1:
            return np.full(num_rows, CROSS_VALIDATED)
        parts = np.full(num_rows, UNUSED, dtype="<U15")
        parts[self.train], parts[self.validation], parts[self.tested_on] = TRAIN, VALIDATION, TEST
        return parts


def make_split(spec: str, store: Store, images: "TrainingSet", seed: int) -> Split:
    """Divide labelled rows into those to train on and those to test on.

    Args:
        spec: A share to test on, such as `0.2`, to the nearest 1/K or 5 %; `kfold:K`, every row
            tested on once; or an official split: a folder with the lists train.txt, test.txt and
            perhaps val.txt, of which the first field of each line is the path, `FILE.csv:COLUMN`
            or `column:NAME` with train, val or test for each image.
        store: Where the columns are.
        images: What is to be divided; images of one group are never, but by an official split.
        seed: Of the shuffling.

    Raises:
        RequestError: The split makes no sense, or leaves nothing to train or to test on.
        SourceError: A list cannot be read.
    """
    codes, groups = images.codes, images.groups
    if spec.startswith("kfold:") and spec[6:].isdecimal() and int(spec[6:]) > 1:
        return Split(spec, grouped_folds(codes, groups, int(spec[6:]), seed))
    share = share_of(spec)
    if share is None:
        return _official(spec, store, images)
    if not 0 < share <= 0.5:
        raise RequestError(
            f"The share to test on must be above 0 and at most 0.5. Received: split={spec}"
        )
    # Of 1/K one of K folds is tested on; of another share so many of twenty as come nearest.
    num_folds, num_tested = round(1 / share), 1
    if abs(1 / share - num_folds) > 0.01:
        num_folds, num_tested = _FINE_FOLDS, max(1, round(share * _FINE_FOLDS))
    tested = [test for _, test in grouped_folds(codes, groups, num_folds, seed)[:num_tested]]
    test = np.sort(np.concatenate(tested))
    train = np.setdiff1d(np.arange(len(codes)), test)
    return Split(spec, [(train, test)])


def share_of(spec: str) -> float | None:
    """The share that a split is to test on; None where it is not said as a number."""
    try:
        return float(spec)
    except ValueError:
        return None


def grouped_folds(codes: Codes, groups: Groups, num_folds: int, seed: int) -> Folds:
    """Stratified folds that no group straddles: (train, test) rows of each, sorted.

    Args:
        codes: (n,), or if multi-label (n, n_classes).
        groups: (n,).
        num_folds: How many.
        seed: Of the order.

    Raises:
        RequestError: There are fewer groups than folds.
    """
    num_groups = len(np.unique(groups))
    if num_groups < num_folds:
        raise RequestError(
            f"Labelled images must be of at least {num_folds} groups of near-duplicates, one for "
            f"each fold. Received: {len(groups)} images in {num_groups} group(s)"
        )
    strata = strata_of(codes)
    # Of classes with fewer rows than folds scikit-learn warns: they are missing in some folds.
    counts = np.bincount(strata)
    rare = np.isin(strata, np.flatnonzero(counts < num_folds))
    strata = np.where(rare, -1, strata)
    if 0 < rare.sum() < num_folds:
        strata[rare] = strata[~rare][0] if (~rare).any() else 0
    if num_groups == len(groups):  # the other would take a hundred times as long
        divided = StratifiedKFold(num_folds, shuffle=True, random_state=seed).split(codes, strata)
    else:
        folder = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
        divided = folder.split(codes, strata, groups)
    return [(np.sort(train), np.sort(test)) for train, test in divided]


def strata_of(codes: Codes) -> NDArray[np.integer]:
    """What is to be spread evenly, (n,): classes, or if multi-label, sets of them."""
    return codes if codes.ndim == 1 else np.unique(codes, axis=0, return_inverse=True)[1]


def _official(spec: str, store: Store, images: "TrainingSet") -> Split:
    ids, by_id = images.ids, _parts(spec, store, images)
    unknown = sorted({part for part in by_id.values() if part.lower() not in _NAMES})
    if unknown:
        raise RequestError(
            f"A split must say train, val or test of each image. Received: {', '.join(unknown[:5])}"
        )
    parts = np.array([_NAMES[by_id[i].lower()] if i in by_id else UNUSED for i in ids])
    train = np.flatnonzero(np.isin(parts, [TRAIN, VALIDATION]))
    test = np.flatnonzero(parts == TEST)
    if not (parts == TRAIN).any() or not len(test):
        raise RequestError(
            f"A split must name labelled images of the store both to train and to test on. "
            f"Received: {spec}, which names {(parts == TRAIN).sum()} to train on and {len(test)} "
            f"to test on, of {len(ids)} labelled images"
        )
    return Split(spec, [(train, test)], np.flatnonzero(parts == VALIDATION), is_official=True)


def _parts(spec: str, store: Store, images: "TrainingSet") -> dict[str, str]:
    folder = Path(spec)
    if spec and os.path.isdir(folder):  # unlike Path's, false also of what is too long for a name
        parts: dict[str, str] = {}
        lists = [path for path in sorted(folder.glob("*.txt")) if path.stem.lower() in _NAMES]
        for path in lists:
            for fields in read_fields(path):
                if parts.setdefault(fields[0], path.stem) != path.stem:
                    raise SourceError(
                        f"An image must be in one list of a split. Received: {fields[0]} in "
                        f"{parts[fields[0]]}.txt and {path.name}"
                    )
        return parts
    if spec.startswith("column:") or ".csv:" in spec:
        return read_labels(store, spec, images.ids, images.rows)
    raise RequestError(f"{_RULE} Received: split={spec!r}")
