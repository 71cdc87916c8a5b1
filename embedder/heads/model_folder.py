"""What the files of a model say of it, checked: `model.json`, `metrics.json`, its tables.

Anybody can edit them. Whoever reads them gets what is described here, or a `ModelError`.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from embedder.backbones import read_json
from embedder.errors import ModelError
from embedder.files import regular

MODEL_FILE = "model.json"
METRICS_FILE = "metrics.json"
PREDICTIONS_FILE = "predictions.parquet"
PSEUDO_LABELS_FILE = "pseudo_labels.parquet"
PREDICTIONS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("part", pa.string(), nullable=False),
        pa.field("group", pa.int64(), nullable=False),
        pa.field("predicted", pa.string()),
        pa.field("probability", pa.float64()),
    ]
)
PSEUDO_LABELS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("confidence", pa.float64()),
        pa.field("round", pa.int64()),
    ]
)
CHECKSUM = "checksum"
FORMAT = 1
_TOGETHER = ("fingerprint", "column", "head", "classes", "temperature", "thresholds")

_Rule: TypeAlias = tuple[str, Callable[[Any], bool]]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _are_classes(value: Any) -> bool:
    are_texts = isinstance(value, list) and all(map(_is_text, value))
    return are_texts and len(value) > 1 and len(set(value)) == len(value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_any_number(value: Any) -> bool:
    """Whether it is a number, which may be NaN: a metric of what there was none of."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_any_number, value)) and len(value) == 2


_TEXT: _Rule = ("a text", _is_text)
_TEXT_OR_NULL: _Rule = ("a text or null", _is_text_or_null)
_COUNT: _Rule = ("a whole number, 0 or more", _is_count)
_NUMBER: _Rule = ("a finite number", _is_number)
_OBJECT: _Rule = ("an object", _is_object)
_SETTINGS: _Rule = (
    "an object of texts and numbers",
    lambda x: _is_object(x) and all(_is_text_or_null(v) or _is_number(v) for v in x.values()),
)
_HASH: _Rule = ("64 hexadecimal digits", lambda x: _is_text(x) and len(x) == 64 and int(x, 16) >= 0)

_MODEL: dict[str, _Rule] = {
    "recipe": _OBJECT,
    "fingerprint": _TEXT,
    "weights_source": _TEXT,
    "column": _TEXT,
    "head": _OBJECT,
    "classes": ("a list of two or more different texts", _are_classes),
    "temperature": ("a finite number above 0", lambda x: _is_number(x) and x > 0),
    "thresholds": ("null or a list of finite numbers", lambda x: x is None or _are_numbers(x)),
}
_HEAD: dict[str, _Rule] = {
    "kind": _TEXT,
    "settings": _SETTINGS,
    "file": ("head.skops or head.keras", lambda x: x in ("head.skops", "head.keras")),
    "sha256": _HASH,
}
# What is recorded besides; models that were not made by `train` need not have it.
_RECORD: dict[str, _Rule] = {
    "labels": _TEXT,
    "options": _OBJECT,
    "provenance": _OBJECT,
    "tuning": _OBJECT,
    "coarse_of": ("null or a list of whole numbers", lambda x: x is None or _are_counts(x)),
}
_OPTIONS: dict[str, _Rule] = {
    "split": _TEXT,
    "duplicates": ("null or a number", lambda x: x is None or _is_number(x)),
    **dict.fromkeys(("class_weight", "separator", "column", "coarse", "unlabelled"), _TEXT_OR_NULL),
    "unlabelled_method": _TEXT,
    "seed": _COUNT,
}
_PROVENANCE: dict[str, _Rule] = {
    "store": _TEXT,
    "source": _TEXT_OR_NULL,
    "when": _TEXT,
    "versions": _OBJECT,
    "num_trained_on": _COUNT,
    "num_unlabelled": _COUNT,
}
_METRICS: dict[str, _Rule] = {"test": _OBJECT, "intervals": _OBJECT, "seconds": _OBJECT}
_TEST: dict[str, _Rule] = {"accuracy": _NUMBER, "log_loss": _NUMBER}
_TUNING: dict[str, _Rule] = {"strategy": _TEXT, "num_tuned": _COUNT, "num_weights": _COUNT}
_TUNED: dict[str, _Rule] = {
    "verdict": _TEXT,
    "accuracy_before": _NUMBER,
    "against_before": _OBJECT,
}
_AGAINST: dict[str, _Rule] = {"num_better": _COUNT, "num_worse": _COUNT, "p_value": _NUMBER}


def columns_of(*names: str) -> pa.Schema:
    """Some of the columns of `predictions.parquet`."""
    return pa.schema([PREDICTIONS_SCHEMA.field(name) for name in names])


def read_description(folder: Path) -> dict[str, Any]:
    """Read `model.json`, with the members that a model needs.

    What must go together, such as the classes in their order and the head, has a checksum. Models
    that were made before there was one are taken without.

    Raises:
        ModelError: There is none, or it is not what `Model.save` wrote.
    """
    path = folder / MODEL_FILE
    content = _read_object(folder, MODEL_FILE)
    if content.get("format") != FORMAT:
        raise ModelError(
            f"A model must be of format {FORMAT}. Received: {folder}, of format "
            f"{content.get('format')}"
        )
    _check(path, "", content, _MODEL)
    _check(path, "head.", content["head"], _HEAD)
    _check(path, "", content, _RECORD, are_needed=False)
    _check(path, "options.", content.get("options", {}), _OPTIONS, are_needed=False)
    _check(path, "provenance.", content.get("provenance", {}), _PROVENANCE, are_needed=False)
    thresholds, classes = content["thresholds"], content["classes"]
    if thresholds is not None and len(thresholds) != len(classes):
        raise ModelError(
            f"`thresholds` of {path} must be one for each of {len(classes)} classes. "
            f"Received: {len(thresholds)}"
        )
    if CHECKSUM in content and content[CHECKSUM] != checksum_of(content):
        raise ModelError(
            f"{path} has been changed: {', '.join(_TOGETHER)} are no longer those that were saved. "
            f"Take it from where it came from, or train the model again"
        )
    return content


def read_kind(folder: Path) -> str:
    """The kind of a model's head.

    Raises:
        ModelError: `model.json` does not tell.
    """
    content = _read_object(folder, MODEL_FILE)
    _check(folder / MODEL_FILE, "", content, {"head": _OBJECT})
    _check(folder / MODEL_FILE, "head.", content["head"], {"kind": _TEXT})
    return str(content["head"]["kind"])


def checksum_of(content: dict[str, Any]) -> str:
    """The sha256 of those members of `model.json` that must go together."""
    together = {name: content[name] for name in _TOGETHER}
    return hashlib.sha256(json.dumps(together, sort_keys=True).encode()).hexdigest()


def read_metrics(folder: Path, is_tuned: bool = False) -> dict[str, Any]:
    """Read `metrics.json`, with the members that are shown of it.

    Args:
        folder: Of the model.
        is_tuned: Whether it must say all of how the model was fine-tuned.

    Raises:
        ModelError: There is none, or it is not what `Head.save` wrote.
    """
    path = folder / METRICS_FILE
    metrics = _read_object(folder, METRICS_FILE)
    _check(path, "", metrics, _METRICS)
    _check(path, "test.", metrics["test"], _TEST)
    number: _Rule = ("a number", _is_any_number)
    _check(path, "test.", metrics["test"], dict.fromkeys(metrics["test"], number))
    _check(path, "intervals.", metrics["intervals"], {"test": _OBJECT})
    intervals = metrics["intervals"]["test"]
    bounds: _Rule = ("the two bounds of an interval", _is_interval)
    _check(path, "intervals.test.", intervals, dict.fromkeys(["accuracy", *intervals], bounds))
    _check(path, "seconds.", metrics["seconds"], dict.fromkeys(metrics["seconds"], _NUMBER))
    if is_tuned or "tuning" in metrics:
        _check(path, "", metrics, {"tuning": _OBJECT})
        _check(path, "tuning.", metrics["tuning"], _TUNING)
    if is_tuned:
        _check(path, "test.", metrics["test"], {"num_images": _COUNT})
        _check(path, "tuning.", metrics["tuning"], _TUNED)
        _check(path, "tuning.against_before.", metrics["tuning"]["against_before"], _AGAINST)
    return metrics


def recorded(record: dict[str, Any], *names: str) -> Any:
    """A value of a model's record, by the names that lead to it.

    Raises:
        ModelError: It is not there.
    """
    value: Any = record
    for name in names:
        if not isinstance(value, dict) or name not in value:
            raise ModelError(
                f"{MODEL_FILE} must say `{'.'.join(names)}`, as of a model that `embedder train` "
                f"made. Train it again"
            )
        value = value[name]
    return value


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read columns of a Parquet file of a model.

    Args:
        path: The file.
        schema: Names and types of what is wanted; fields that are not nullable must have no nulls.

    Raises:
        ModelError: It cannot be read, or lacks a column of that type.
    """
    try:
        with pa.OSFile(os.fsencode(regular(path))) as file:  # a text must be UTF-8
            table = pq.read_table(file)
        table.validate(full=True)  # such as that texts are UTF-8
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    for field in schema:
        places = table.schema.get_all_field_indices(field.name)
        if len(places) != 1 or table.schema.field(places[0]).type != field.type:
            found = ", ".join(f"{x.name} ({x.type})" for x in table.schema) or "nothing"
            raise ModelError(
                f"{path} must have one column {field.name} ({field.type}). Received: {found}"
            )
        if not field.nullable and table[field.name].null_count:
            raise ModelError(f"The column {field.name} of {path} must have no nulls")
    return table.select(schema.names)


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        content = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"{folder} is not a model: it has no {name}") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold an object. Received: {_shown(content)}")
    return content


def _check(
    path: Path, within: str, content: Any, rules: dict[str, _Rule], are_needed: bool = True
) -> None:
    for name, (rule, is_kept) in rules.items():
        if name not in content:
            if not are_needed:
                continue
            raise ModelError(f"`{within}{name}` of {path} must be {rule}. Received: nothing")
        try:
            is_right = is_kept(content[name])
        except (ValueError, TypeError, OverflowError):  # such as digits that are none
            is_right = False
        if not is_right:
            raise ModelError(
                f"`{within}{name}` of {path} must be {rule}. Received: {_shown(content[name])}"
            )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
