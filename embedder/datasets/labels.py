"""Labels: found by image, when a head is trained, never when features are extracted."""

import csv
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.errors import RequestError, SourceError
from embedder.files import regular
from embedder.store import Store

_JOINT = ";"  # between several labels of an image, where they are one text
_RULE = "`labels` must be folder, parent, FILE.csv:COLUMN, LIST.txt:NUMBER or column:NAME."


def texts_of(
    codes: NDArray[np.integer] | NDArray[np.bool_], classes: NDArray[np.str_]
) -> NDArray[np.str_]:
    """What `TrainingSet.codes` say, as text: str (n,); several labels are joined."""
    if codes.ndim == 1:
        return np.asarray(classes[codes.astype(np.int64)], dtype=np.str_)
    return np.array([_JOINT.join(classes[row.astype(bool)]) for row in codes], dtype=np.str_)


def codes_of(
    texts: NDArray[np.object_], is_multilabel: bool, known: NDArray[np.str_]
) -> tuple[NDArray[np.str_], NDArray[np.integer]]:
    """Classes, and the codes that `texts_of` wrote as these texts (n,).

    Args:
        texts: As `texts_of` gives them.
        is_multilabel: Whether they are multi-label.
        known: Classes that there are whether or not a text names them.
    """
    several = [text.split(_JOINT) if is_multilabel else [text] for text in texts]
    return encoded(several, is_multilabel, known)


def check_joinable(classes: NDArray[np.str_]) -> None:
    """Refuse classes that could not be told apart once several are joined.

    Raises:
        RequestError: The name of one holds what joins them.
    """
    if torn := [name for name in classes if _JOINT in name]:
        raise RequestError(
            f"Where labels are multi-label, none may contain `{_JOINT}`, which separates them "
            f"in what is written. Received: {torn[0]}"
        )


def encoded(
    several: list[list[str]], is_multilabel: bool, known: NDArray[np.str_] | None = None
) -> tuple[NDArray[np.str_], NDArray[np.integer]]:
    """Classes and codes, as `TrainingSet` has them, of the names of each image's labels.

    Args:
        several: Of each image; one each, unless they are multi-label. Empty ones are none.
        is_multilabel: Whether they are.
        known: (n_known,) classes that there are whether or not an image has them.
    """
    pairs = [(row, name) for row, names in enumerate(several) for name in names if name]
    names = np.array([name for _, name in pairs], np.str_)
    classes = np.union1d(names, np.array([], np.str_) if known is None else known)
    indices = np.searchsorted(classes, names)
    if not is_multilabel:
        return classes, indices
    codes = np.zeros((len(several), len(classes)), np.uint8)
    codes[[row for row, _ in pairs], indices] = 1
    return classes, codes


def read_labels(
    store: Store,
    labels: str,
    ids: NDArray[np.object_],
    rows: NDArray[np.int64] | None = None,
) -> dict[str, str]:
    """Labels by image id, for those images that have one.

    Args:
        store: Where the columns are.
        labels: As in `datasets.read_training_set`.
        ids: (n,), images of the store.
        rows: (n,), where these are in `Store.ids()`, if they are not all that there are.

    Raises:
        RequestError: The labels make no sense.
        SourceError: The label file cannot be read.
    """
    if labels in ("folder", "parent"):
        parts = {image_id: PurePosixPath(image_id).parts for image_id in ids}
        index = 0 if labels == "folder" else -2
        return {image_id: part[index] for image_id, part in parts.items() if len(part) > 1}
    kind, _, name = labels.rpartition(":")
    if kind == "column":
        values = _read_column(store, name)
        chosen = values if rows is None else [values[row] for row in rows]
        pairs = zip(ids, chosen, strict=True)
        return {image_id: str(value) for image_id, value in pairs if value is not None}
    if kind.endswith(".csv"):
        return read_named_column(Path(kind), name)
    if kind.endswith(".txt") and name.isdecimal():
        return _read_list(kind, int(name))
    raise RequestError(f"{_RULE} Received: labels={labels!r}")


def _read_column(store: Store, name: str) -> list[Any]:
    """A column of a store, a value for each image."""
    if name not in store.column_names():
        raise RequestError(
            f"`labels` must name a column of the store. Received: {name}. "
            f"It has: {', '.join(store.column_names())}"
        )
    values: list[Any] = store.table([name])[name].to_pylist()
    return values[:: store.recipe.views]


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
