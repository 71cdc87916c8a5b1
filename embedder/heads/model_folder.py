"""The folder of a model: its files, what they say of it, and that it is so.

Anybody can edit them. Whoever reads them gets what is described here, or a `ModelError`.
"""

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
from numpy.typing import NDArray

from embedder.backbones import read_json
from embedder.errors import ModelError
from embedder.files import is_temporary, local_path, regular

MODEL_FILE = "model.json"
METRICS_FILE = "metrics.json"
PREDICTIONS_FILE = "predictions.parquet"
PSEUDO_LABELS_FILE = "pseudo_labels.parquet"
REPORT_FILE = "report.html"
HEAD_FILES = {"skops": "head.skops", "keras": "head.keras"}  # one of them holds the head
BACKBONE_FILES = ("backbone.weights.h5", "backbone.keras")  # of a backbone that was tuned
_FILES = {MODEL_FILE, METRICS_FILE, PREDICTIONS_FILE, PSEUDO_LABELS_FILE, REPORT_FILE}
_FILES |= {*HEAD_FILES.values(), *BACKBONE_FILES}

_KEYS = [pa.field(name, pa.string(), nullable=False) for name in ("image_id", "sha256", "label")]
PREDICTIONS_SCHEMA = pa.schema(
    [
        *_KEYS,
        pa.field("part", pa.string(), nullable=False),
        pa.field("group", pa.int64(), nullable=False),
        pa.field("predicted", pa.string()),
        pa.field("probability", pa.float64()),
    ]
)
PSEUDO_LABELS_SCHEMA = pa.schema(
    [*_KEYS, pa.field("confidence", pa.float64()), pa.field("round", pa.int64())]
)
FORMAT = 1
_TOGETHER = ("fingerprint", "column", "head", "classes", "temperature", "thresholds")


# What `model.json` says. --------------------------------------------------------------------


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    for value in settings.values():
        is_infinite = isinstance(value, float) and not math.isfinite(value)
        if is_infinite or isinstance(value, (dict, list, bool)):
            raise ValueError("must be an object of texts and numbers")
    return settings


def _different(names: list[str]) -> list[str]:
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError("must be a list of two or more different texts")
    return names


def _one_for_each_class(values: list[float] | None, info: pydantic.ValidationInfo) -> Any:
    classes = info.data.get("classes", [])
    if values is not None and len(values) != len(classes):
        raise ValueError(f"must be one for each of {len(classes)} classes")
    return values


_Path = pydantic.InstanceOf[str]  # which need not be UTF-8, as pydantic's own texts


class _Said(pydantic.BaseModel):
    """What a file says; members that are not known are kept."""

    model_config: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(
        frozen=True, strict=True, extra="allow", allow_inf_nan=False, defer_build=True
    )


class HeadFile(_Said):
    """The head of a model.

    Attributes:
        kind: As in `heads.HEADS`.
        settings: What was chosen for it.
        file: Its name.
        sha256: Of its bytes.
        keras: Of a `KerasHead`, what it is made of.
    """

    kind: str
    settings: Annotated[dict[str, Any], pydantic.AfterValidator(_plain)]
    file: Literal["head.skops", "head.keras"]
    sha256: str = pydantic.Field(pattern=r"^[0-9a-f]{64}$")
    keras: Any = None


class Description(_Said):
    """What a model is, as `model.json` says it.

    Attributes:
        recipe: Values of the recipe of its features.
        fingerprint: Of the recipe.
        weights_source: Where the weights of its backbone are; a name within the folder, or a path.
        column: Which feature, where a store has several.
        head: Its head.
        classes: In the order of the probabilities.
        temperature: As in `Model`.
        thresholds: As in `Model`.
        tables: sha256 of the bytes of the tables in the folder, by file name; none of models that
            were made before they were kept.
        checksum: Of what must go together; as with `tables`.
    """

    recipe: dict[str, Any]
    fingerprint: str
    weights_source: _Path
    column: str
    head: HeadFile
    classes: Annotated[list[str], pydantic.AfterValidator(_different)]
    temperature: float = pydantic.Field(gt=0)
    thresholds: Annotated[list[float] | None, pydantic.AfterValidator(_one_for_each_class)]
    tables: dict[str, str] = {}
    checksum: str | None = None


class RecordedOptions(_Said):
    """How a head was trained; see `training.TrainOptions`."""

    split: str
    duplicates: float | None = None
    class_weight: str | None = None
    separator: str | None = None
    column: str | None = None
    coarse: _Path | None = None
    unlabelled: _Path | None = None
    unlabelled_method: str = "self-training"
    seed: pydantic.NonNegativeInt = 0


class Provenance(_Said):
    """Where a model comes from.

    Attributes:
        store: Folder of its features.
        source: Where the images are, as the store's last run had it.
        when: In ISO 8601.
        versions: Of libraries, by name.
        num_trained_on: Images with a label that it has learned from.
        num_unlabelled: Rows of the store that have no label.
    """

    store: _Path
    source: _Path | None = None
    when: str
    versions: dict[str, Any]
    num_trained_on: pydantic.NonNegativeInt
    num_unlabelled: pydantic.NonNegativeInt = 0


class RecordedTuning(_Said):
    """What a model was fine-tuned from, and what decided the result."""

    model: _Path
    request: dict[str, Any]


class Record(_Said):
    """How a model was trained, as `model.json` says it.

    Attributes:
        labels: As in `datasets.read_training_set`.
        options: As it was asked for.
        coarse_of: (n_classes,) the coarse class of each class of the labels, if there are any.
        provenance: On what.
        tuning: How it was fine-tuned; None of a head on frozen features.
    """

    labels: _Path
    options: RecordedOptions
    coarse_of: list[pydantic.NonNegativeInt] | None = None
    provenance: Provenance
    tuning: RecordedTuning | None = None


# What `metrics.json` says, as far as it is shown. -------------------------------------------

_Number = Annotated[
    float, pydantic.Field(allow_inf_nan=True)
]  # NaN: a metric of what there was none of
_Bounds = Annotated[list[_Number], pydantic.Field(min_length=2, max_length=2)]


class _Scores(_Said):
    __pydantic_extra__: dict[str, _Number]
    accuracy: float
    log_loss: float


class _IntervalsOfScores(_Said):
    __pydantic_extra__: dict[str, _Bounds]
    accuracy: _Bounds


class _Intervals(_Said):
    test: _IntervalsOfScores


class _Tuning(_Said):
    strategy: str
    num_tuned: pydantic.NonNegativeInt
    num_weights: pydantic.NonNegativeInt


class _Metrics(_Said):
    test: _Scores
    intervals: _Intervals
    seconds: dict[str, float]
    tuning: _Tuning | None = None


class _TunedScores(_Scores):
    num_images: pydantic.NonNegativeInt


class _PairedTest(_Said):
    num_better: pydantic.NonNegativeInt
    num_worse: pydantic.NonNegativeInt
    p_value: float


class _WholeTuning(_Tuning):
    verdict: str
    accuracy_before: float
    against_before: _PairedTest


class _TunedMetrics(_Metrics):
    test: _TunedScores
    tuning: _WholeTuning


_SaidT = TypeVar("_SaidT", bound=_Said)


class ModelFolder:
    """The folder of a model, whose files are checked as they are read.

    Attributes:
        path: Where it is.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Nothing is read yet.

        Raises:
            EmbedderError: It cannot be a folder of this machine.
        """
        self.path = local_path(path)

    def check_free(self) -> None:
        """Refuse a folder that holds anything but a model, or what is left of one.

        Raises:
            ModelError: It does.
        """
        is_there, is_folder = self.path.exists(), self.path.is_dir()
        held = [x.name for x in self.path.iterdir() if not is_temporary(x)] if is_folder else []
        if (is_there and not is_folder) or not set(held) <= _FILES:
            raise ModelError(
                f"A model must be written to an empty folder, over an older model, or to one that "
                f"does not exist. Received: {self.path}, which holds something else"
            )

    # model.json

    def read_description(self) -> tuple[Description, Record | None]:
        """What the model is, and how it was trained; None of one that `train` did not make.

        What must go together, such as the classes in their order and the head, has a checksum.
        Models that were made before there was one are taken without.

        Raises:
            ModelError: There is none, or it is not what `write_description` wrote.
        """
        path, content = self.path / MODEL_FILE, self._read_object(MODEL_FILE)
        if content.get("format") != FORMAT:
            raise ModelError(
                f"A model must be of format {FORMAT}. Received: {self.path}, of format "
                f"{content.get('format')}"
            )
        description = _validated(Description, content, path)
        if description.checksum not in (None, _checksum_of(content)):
            raise ModelError(
                f"{path} has been changed: {', '.join(_TOGETHER)} are no longer those that were "
                f"saved. Take it from where it came from, or train the model again"
            )
        if not content.keys() & Record.model_fields.keys():
            return description, None
        others = content.keys() - Description.model_fields.keys() - {"format"}
        return description, _validated(Record, {name: content[name] for name in others}, path)

    def write_description(self, content: dict[str, Any], record: Record | None) -> None:
        """Write `model.json`, after the tables.

        Args:
            content: Members of a `Description`, but for `tables` and `checksum`.
            record: How the model was trained.

        Raises:
            OSError: It cannot be written.
        """
        content = {"format": FORMAT, **content}
        if record is not None:
            content |= record.model_dump(exclude_unset=True)
        files = [self.path / name for name in (PREDICTIONS_FILE, PSEUDO_LABELS_FILE)]
        if tables := {file.name: _digest_of(file) for file in files if file.is_file()}:
            content["tables"] = tables
        content["checksum"] = _checksum_of(content)
        (self.path / MODEL_FILE).write_text(json.dumps(content, indent=2))

    # metrics.json

    def read_metrics(self, is_tuned: bool = False) -> dict[str, Any]:
        """Read `metrics.json`, with the members that are shown of it.

        Args:
            is_tuned: Whether it must say all of how the model was fine-tuned.

        Raises:
            ModelError: There is none, or it is not what `TrainedHead.save` wrote.
        """
        metrics = self._read_object(METRICS_FILE)
        _validated(_TunedMetrics if is_tuned else _Metrics, metrics, self.path / METRICS_FILE)
        return metrics

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write `metrics.json`.

        Raises:
            OSError: It cannot be written.
        """
        (self.path / METRICS_FILE).write_text(json.dumps(metrics, indent=2))

    # Tables

    def read_predictions(self, *columns: str) -> dict[str, NDArray[Any]]:
        """Read columns of `predictions.parquet`, or all: arrays (n,), sorted by image.

        Raises:
            ModelError: It cannot be read, lacks one of them, or is not what was written.
        """
        schema = PREDICTIONS_SCHEMA
        if columns:
            schema = pa.schema([schema.field(name) for name in ("image_id", *columns)])
        table = self._read_table(PREDICTIONS_FILE, schema).sort_by("image_id")
        return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}

    def read_pseudo_labels(self) -> pa.Table | None:
        """Read `pseudo_labels.parquet`; None where the model has not learned from any.

        Raises:
            ModelError: As in `read_predictions`.
        """
        if not (self.path / PSEUDO_LABELS_FILE).exists():
            return None
        return self._read_table(PSEUDO_LABELS_FILE, PSEUDO_LABELS_SCHEMA)

    def write_tables(self, predictions: pa.Table, pseudo_labels: pa.Table | None) -> None:
        """Write what was predicted for each image, and pseudo-labels that were learned from.

        Args:
            predictions: As `PREDICTIONS_SCHEMA`.
            pseudo_labels: As `PSEUDO_LABELS_SCHEMA`, if there were any.

        Raises:
            OSError: They cannot be written.
        """
        pq.write_table(predictions, self.path / PREDICTIONS_FILE)
        if pseudo_labels is not None:
            pq.write_table(pseudo_labels, self.path / PSEUDO_LABELS_FILE)

    def _read_table(self, name: str, schema: pa.Schema) -> pa.Table:
        """Columns of a Parquet file; those that are not nullable must have no nulls."""
        path = self.path / name
        try:
            with pa.OSFile(os.fsencode(regular(path))) as file:  # a text must be UTF-8
                content = file.read_buffer()
            table = pq.read_table(pa.BufferReader(content))
            table.validate(full=True)  # such as that texts are UTF-8
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
        tables = self.read_description()[0].tables
        if name in tables and hashlib.sha256(content).hexdigest() != tables[name]:
            raise ModelError(
                f"{path} is not the one that {MODEL_FILE} names: its sha256 is another"
            )
        for field in schema:
            indices = table.schema.get_all_field_indices(field.name)
            if len(indices) != 1 or table.schema.field(indices[0]).type != field.type:
                found = ", ".join(f"{x.name} ({x.type})" for x in table.schema) or "nothing"
                raise ModelError(
                    f"{path} must have one column {field.name} ({field.type}). Received: {found}"
                )
            if not field.nullable and table[field.name].null_count:
                raise ModelError(f"The column {field.name} of {path} must have no nulls")
        return table.select(schema.names)

    def _read_object(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            content = read_json(path)
        except (FileNotFoundError, NotADirectoryError):
            raise ModelError(f"{self.path} is not a model: it has no {name}") from None
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise ModelError(f"{path} must hold an object. Received: {_shown(content)}")
        return content


def _digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _checksum_of(content: dict[str, Any]) -> str:
    """The sha256 of those members of `model.json` that must go together."""
    together = {name: content[name] for name in _TOGETHER}
    return hashlib.sha256(json.dumps(together, sort_keys=True).encode()).hexdigest()


def _validated(kind: type[_SaidT], content: dict[str, Any], path: Path) -> _SaidT:
    try:
        return kind.model_validate(content)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in problem["loc"])
    # "Input should be a valid string" is told as "must be a valid string".
    rule = problem["msg"].removeprefix("Value error, ").replace("Field required", "must be there")
    rule = re.sub(r"^\w+ should ", "must ", rule)
    rule = re.sub(r"a valid dictionary( or instance of \w+)?", "an object", rule)
    received = "nothing" if problem["type"] == "missing" else _shown(problem["input"])
    raise ModelError(f"`{name}` of {path} {rule}. Received: {received}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
