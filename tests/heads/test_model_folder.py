"""Whoever reads a model's files that somebody edited is told what is wrong with them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedder.errors import ModelError
from embedder.evaluation import tested_model  # pytest would take its class for a test
from embedder.finetuning.labelled_images import read_labelled
from embedder.heads.model import Model
from embedder.heads.model_folder import ModelFolder
from embedder.inference.evaluate import evaluate_model
from embedder.store.store import Store
from embedder.training.cross_validation import refit
from embedder.training.fitting import HeadSpec
from embedder.training.options import TrainOptions
from embedder.training.train import train


@pytest.fixture
def model(zoo: Store, tmp_path: Path) -> Path:
    """A saved model of a centroid head."""
    train(zoo, "parent", "centroid", TrainOptions(duplicates=None)).save(tmp_path / "model")
    return tmp_path / "model"


def without_digests(model: Path) -> None:
    """As a model that was made before its tables' digests were kept."""
    content = json.loads((model / "model.json").read_text())
    del content["tables"]
    (model / "model.json").write_text(json.dumps(content))


def drop(name: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.drop_columns([name])


def cast(name: str, type_: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        column = pa.nulls(table.num_rows, type_)
        return table.set_column(table.column_names.index(name), name, column)

    return change


def twice(table: pa.Table) -> pa.Table:
    return table.append_column("label", table["label"])


def repeated(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table, table])


def untrained(table: pa.Table) -> pa.Table:
    return table.set_column(3, "part", pa.array(["test"] * table.num_rows))


READERS: dict[str, Callable[[Path, Store], Any]] = {
    "evaluate": lambda model, store: evaluate_model(model, store, "parent"),
    "compare": lambda model, _: tested_model.TestedModel.read(model),
    "finetune": lambda model, _: read_labelled(model, Model.load(model), 0),
}


@pytest.mark.parametrize(
    ("reader", "change"),
    [
        *((name, cast("sha256", pa.int64())) for name in READERS),
        *((name, cast("part", pa.string())) for name in READERS),  # all of them null
        *((name, drop("part")) for name in READERS),
        *((name, drop("image_id")) for name in ("compare", "finetune")),
        *((name, cast("label", pa.binary())) for name in ("compare", "finetune")),
        *((name, twice) for name in ("compare", "finetune")),
        ("compare", drop("predicted")),
        ("finetune", cast("group", pa.string())),
        ("finetune", repeated),
        ("finetune", untrained),
    ],
)
def test_predictions_that_somebody_edited_are_refused(
    zoo: Store, model: Path, reader: str, change: Callable[[pa.Table], pa.Table]
) -> None:
    file = model / "predictions.parquet"
    without_digests(model)
    READERS[reader](model, zoo)
    pq.write_table(change(pq.read_table(file)), file)
    with pytest.raises(ModelError, match=r"predictions\.parquet"):
        READERS[reader](model, zoo)


@pytest.mark.parametrize("content", [b"", b"PAR1 nothing of the kind PAR1"])
@pytest.mark.parametrize("reader", READERS)
def test_predictions_that_are_no_table_are_refused(
    zoo: Store, model: Path, reader: str, content: bytes
) -> None:
    (model / "predictions.parquet").write_bytes(content)
    with pytest.raises(ModelError, match=r"predictions\.parquet cannot be read"):
        READERS[reader](model, zoo)


@pytest.mark.parametrize(
    "table",
    [pa.table({"image_id": ["a"]}), pa.table({"sha256": [1]}), pa.table({"sha256": ["a"]})],
)
def test_pseudo_labels_that_somebody_edited_are_refused(
    zoo: Store, model: Path, table: pa.Table
) -> None:
    pq.write_table(table, model / "pseudo_labels.parquet")
    with pytest.raises(ModelError, match=r"pseudo_labels\.parquet must have one column"):
        evaluate_model(model, zoo, "parent")


@pytest.mark.parametrize(
    ("member", "value"),
    [
        *((name, x) for name in ("test", "intervals", "seconds") for x in (None, [], 1)),
        *(("test.accuracy", x) for x in (None, "1", [])),
        ("test.balanced_accuracy", "1"),
        *(("intervals.test", x) for x in (None, {}, {"accuracy": [1]}, {"accuracy": ["a", "b"]})),
        ("seconds.fit", "1"),
        *(("tuning", x) for x in ([], {}, {"strategy": "norm", "num_tuned": "1"})),
    ],
)
def test_metrics_that_somebody_edited_are_refused(model: Path, member: str, value: object) -> None:
    metrics = json.loads((model / "metrics.json").read_text())
    outer, _, inner = member.partition(".")
    metrics[outer] = metrics[outer] | {inner: value} if inner else value
    (model / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ModelError, match=r"metrics\.json must "):
        tested_model.TestedModel.read(model)


@pytest.mark.parametrize("text", ["", "null", "[]", "[" * 10**5])
def test_metrics_that_are_no_object_are_refused(model: Path, text: str) -> None:
    (model / "metrics.json").write_text(text)
    with pytest.raises(ModelError, match=r"metrics\.json (cannot be read|must hold an object)"):
        ModelFolder(model).read_metrics()


@pytest.mark.parametrize(
    "change", [{"settings": {"nonsense": 1}}, {"head": "nonsense"}, {"settings": {"scaling": 1}}]
)
def test_settings_that_there_are_not_are_refused(zoo: Store, change: dict[str, Any]) -> None:
    head = train(zoo, "parent", "centroid", TrainOptions(duplicates=None))
    model = replace(head.model, **change)
    with pytest.raises(ModelError, match="kind of head and settings that there are"):
        refit(HeadSpec(model.head), head.images, model, np.arange(30))


@pytest.mark.parametrize("name", ["predictions.parquet", "pseudo_labels.parquet"])
def test_a_table_that_is_another_than_was_written_is_refused(
    zoo: Store, model: Path, name: str
) -> None:
    pseudo = pa.table({"image_id": ["a"], "sha256": ["b"], "label": ["cats"]})
    pseudo = pseudo.append_column("confidence", pa.array([1.0]))
    pseudo = pseudo.append_column("round", pa.array([1]))
    pq.write_table(pseudo, model / "pseudo_labels.parquet")
    Model.load(model).save(model)
    evaluate_model(model, zoo, "parent")
    table = pq.read_table(model / name)
    pq.write_table(table.slice(0, table.num_rows - 1), model / name)
    with pytest.raises(ModelError, match=rf"{name} is not the one that model\.json names: its sha"):
        evaluate_model(model, zoo, "parent")
    without_digests(model)
    assert ModelFolder(model).read_pseudo_labels() is not None


def test_a_model_without_a_record_is_refused_where_it_is_needed(zoo: Store, model: Path) -> None:
    replace(Model.load(model), record=None).save(model)
    with pytest.raises(ModelError, match=r"must say how the model was trained.*Train it again"):
        evaluate_model(model, zoo, "parent")
