"""Labels: found by image, when a head is trained, never when features are extracted."""

import csv
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from embedder.errors import RecipeError, SourceError, StoreError
from embedder.files import regular
from embedder.store import Store

_JOINT = ";"  # between several labels of an image, where they are one text
_RULE = "`labels` must be folder, parent, FILE.csv:COLUMN, LIST.txt:NUMBER or column:NAME."


@dataclass(frozen=True)
class Targets:
    """What the rows of a store are to be told apart by.

    Attributes:
        classes: (n_classes,) str, sorted.
        codes: What the labelled rows are: int64 (n,), places in `classes`; or with several labels
            an image, uint8 (n, n_classes), one where it has the label.
        rows: int64 (n,), the labelled rows of the store, in its order.
        num_unlabelled: Rows of the store that have no label.
    """

    classes: NDArray[np.str_]
    codes: NDArray[np.integer]
    rows: NDArray[np.int64]
    num_unlabelled: int

    @property
    def is_multilabel(self) -> bool:
        """Whether an image can have several labels."""
        return self.codes.ndim == 2

    def texts(self) -> NDArray[np.str_]:
        """What each row is called: str (n,); several labels are joined."""
        return texts_of(self.codes, self.classes)


def texts_of(
    codes: NDArray[np.integer] | NDArray[np.bool_], classes: NDArray[np.str_]
) -> NDArray[np.str_]:
    """What `Targets.codes` say, as text: str (n,); several labels are joined."""
    if codes.ndim == 1:
        return np.asarray(classes[codes.astype(np.int64)], dtype=np.str_)
    return np.array([_JOINT.join(classes[row.astype(bool)]) for row in codes], dtype=np.str_)


def codes_of(
    texts: NDArray[np.object_], is_multilabel: bool, known: NDArray[np.str_]
) -> tuple[NDArray[np.str_], NDArray[np.integer]]:
    """Classes, and the codes that `texts_of` wrote as these texts (n,).

    Args:
        texts: As `texts_of` gives them.
        is_multilabel: Whether they can name several labels.
        known: Classes that there are whether or not a text names them.
    """
    several = [text.split(_JOINT) if is_multilabel else [text] for text in texts]
    return encoded(several, is_multilabel, known)


def read_targets(
    store: Store,
    labels: str,
    separator: str | None = None,
    known: NDArray[np.str_] | None = None,
) -> Targets:
    """Join labels to the rows of a store.

    Args:
        store: Features.
        labels: `folder` (first folder under the source's root), `parent` (the containing folder),
            `FILE.csv:COLUMN` (joined on its `path` column), `LIST.txt:NUMBER` (lines of fields
            with no names, of which the first is the path; NUMBER counts from 1; with `*` in the
            name, several files) or `column:NAME` (of the store).
        separator: What separates several labels of one image; None where each has one.
        known: Classes that there are whether or not an image has them.

    Raises:
        RecipeError: The labels make no sense, or name fewer than two classes.
        SourceError: The label file cannot be read.
        StoreError: The store has an image twice.
    """
    by_id = read_labels(store, labels)
    ids = store.ids()
    if repeated := len(ids) - len(set(ids)):
        raise StoreError(
            f"A store must have each image once. Received: {store.path}, in which {repeated:,} "
            f"stand again, as a run that was killed can leave them. `embedder extract` drops those "
            f"that are not of the source's bytes"
        )
    rows = np.array([row for row, image_id in enumerate(ids) if image_id in by_id], dtype=np.int64)
    several = [
        [name.strip() for name in by_id[ids[row]].split(separator)]
        if separator
        else [by_id[ids[row]]]
        for row in rows
    ]
    classes, codes = encoded(several, separator is not None, known)
    if separator is not None and (torn := [name for name in classes if _JOINT in name]):
        raise RecipeError(
            f"Where images have several labels, none may contain `{_JOINT}`, which separates them "
            f"in what is written. Received: {torn[0]}"
        )
    if len(classes) < 2:
        raise RecipeError(
            f"Labels must name at least two classes. "
            f"Received: labels={labels!r}, which gives {len(rows)} of {len(ids)} images a label "
            f"and {len(classes) if len(rows) else 0} class(es)"
        )
    return Targets(classes, codes, rows, len(ids) - len(rows))


def encoded(
    several: list[list[str]], is_multilabel: bool, known: NDArray[np.str_] | None = None
) -> tuple[NDArray[np.str_], NDArray[np.integer]]:
    """Classes and codes, as `Targets` has them, of the names of each image's labels.

    Args:
        several: Of each image; one each, unless images can have several. Empty ones are none.
        is_multilabel: Whether they can.
        known: Classes that there are whether or not an image has them.
    """
    pairs = [(row, name) for row, names in enumerate(several) for name in names if name]
    names = np.array([name for _, name in pairs], np.str_)
    classes = np.union1d(names, np.array([], np.str_) if known is None else known)
    places = np.searchsorted(classes, names)
    if not is_multilabel:
        return classes, places
    codes = np.zeros((len(several), len(classes)), np.uint8)
    codes[[row for row, _ in pairs], places] = 1
    return classes, codes


def read_labels(store: Store, labels: str) -> dict[str, str]:
    """Labels by image id, for those images that have one; see `read_targets` for their spelling."""
    if labels in ("folder", "parent"):
        parts = {image_id: PurePosixPath(image_id).parts for image_id in store.ids()}
        index = 0 if labels == "folder" else -2
        return {image_id: part[index] for image_id, part in parts.items() if len(part) > 1}
    kind, _, name = labels.rpartition(":")
    if kind == "column":
        return _read_column(store, name)
    if kind.endswith(".csv"):
        return read_named_column(Path(kind), name)
    if kind.endswith(".txt") and name.isdecimal():
        return _read_list(kind, int(name))
    raise RecipeError(f"{_RULE} Received: labels={labels!r}")


def _read_column(store: Store, name: str) -> dict[str, str]:
    if name not in store.column_names():
        raise RecipeError(
            f"`labels` must name a column of the store. Received: {name}. "
            f"It has: {', '.join(store.column_names())}"
        )
    table = store.table(["image_id", name])
    values = zip(table["image_id"].to_pylist(), table[name].to_pylist(), strict=True)
    return {image_id: str(value) for image_id, value in values if value is not None}


def read_named_column(file: Path, column: str) -> dict[str, str]:
    """A column of a CSV file by its `path` column, but for empty fields.

    Raises:
        SourceError: The file cannot be read, or lacks one of the columns.
    """
    try:
        with regular(file).open(newline="", encoding="utf-8-sig") as lines:
            # A path that begins with a space must be quoted: `path, label` is more common.
            reader = csv.DictReader(lines, skipinitialspace=True)
            names = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:  # ValueError: no UTF-8, or a NUL in a name
        raise SourceError(f"The label file {file} cannot be read: {error}") from error
    if "path" not in names or column not in names:
        raise SourceError(
            f"A label file must have the columns `path` and `{column}`. "
            f"Received: {file} with {', '.join(map(str, names))}"
        )
    labels = {row["path"]: (row[column] or "").strip() for row in rows}
    return {path: label for path, label in labels.items() if label}


def _read_list(pattern: str, number: int) -> dict[str, str]:
    labels = {}
    path = Path(pattern)
    try:
        files = sorted(path.parent.glob(path.name)) or [path]
    except (OSError, ValueError) as error:  # such as ** within a name
        raise SourceError(f"The label lists {pattern} cannot be found: {error}") from error
    for file in files:
        for fields in read_fields(file):
            if not 1 < number <= len(fields):
                raise SourceError(
                    f"A label list must have the field {number} in every line, counted from 1, and "
                    f"the path in field 1. Received: {file} with {','.join(fields)}"
                )
            labels[fields[0]] = fields[number - 1]
    return {path: label for path, label in labels.items() if label}


def read_fields(file: Path) -> list[list[str]]:
    """Fields of a list without column names, such as `path, 3`, of each line that is not empty.

    Raises:
        SourceError: The file cannot be read.
    """
    try:
        with regular(file).open(newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.reader(lines, skipinitialspace=True))
    except (OSError, ValueError, csv.Error) as error:  # ValueError: no UTF-8, or a NUL in a name
        raise SourceError(f"The list {file} cannot be read: {error}") from error
    return [[field.strip() for field in row] for row in rows if any(map(str.strip, row))]
