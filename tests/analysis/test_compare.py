"""Comparison: paired, on the same images, with a verdict in words."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from embedder.analysis.compare import compare, row_of
from embedder.cli.app import app
from embedder.errors import ModelError, RequestError
from embedder.evaluation import tested_model  # pytest would take its class for a test
from embedder.evaluation.paired_test import PairedTest
from embedder.heads.model_folder import ModelFolder
from embedder.store.store import Store
from embedder.training.options import TrainOptions
from embedder.training.train import train
from tests.support import add_rows, animal_vectors

paired = PairedTest.of


def outcomes(better: int, worse: int, both: int = 40, neither: int = 8) -> tuple[np.ndarray, ...]:  # type: ignore[type-arg]
    ours = [True] * better + [False] * worse + [True] * both + [False] * neither
    theirs = [False] * better + [True] * worse + [True] * both + [False] * neither
    return np.array(ours), np.array(theirs)


@pytest.mark.parametrize(
    # Two-sided: twice the chance of as many heads or more in so many throws of a coin.
    ("better", "worse", "p_value"),
    [(10, 2, 2 * (66 + 12 + 1) / 2**12), (5, 0, 2 / 2**5), (3, 3, 1.0), (0, 0, 1.0)],
)
def test_the_p_value_is_of_mcnemars_exact_test(better: int, worse: int, p_value: float) -> None:
    found = paired(*outcomes(better, worse), seconds=1.0)
    assert (found.num_better, found.num_worse) == (better, worse)
    assert found.p_value == pytest.approx(p_value)
    total = better + worse + 48
    assert found.gain["value"] == pytest.approx((better - worse) / total)


def test_the_verdict_says_what_to_do() -> None:
    assert paired(*outcomes(30, 2), 140.4).verdict.startswith("fine-tuning gains 35.0 points [")
    assert paired(*outcomes(30, 2), 140.4).verdict.endswith("] for 140 s: take it")
    assert paired(*outcomes(2, 30), 140.4).verdict.startswith("fine-tuning loses 35.0 points [")
    assert paired(*outcomes(2, 30), 140.4).verdict.endswith("keep the head")
    assert paired(*outcomes(4, 2), 9.0).verdict.startswith("no gain beyond the interval, +3.7")
    assert paired(*outcomes(4, 2), 9.0).verdict.endswith("keep the head")
    another = replace(paired(*outcomes(30, 2), 140.4), is_tuned=False)
    assert another.verdict.startswith("it gains 35.0 points [")
    another = replace(paired(*outcomes(4, 2), 9.0), is_tuned=False)
    assert another.verdict.endswith("keep the first")


def write_model(
    folder: Path, right: list[bool], ids: list[str] | None = None, part: str = "test"
) -> Path:
    """What `compare` reads of a model."""
    folder.mkdir()
    head = {"kind": "<i>svm", "settings": {}, "file": "head.skops", "sha256": "0" * 64}
    said = {"recipe": {}, "fingerprint": "", "weights_source": "", "column": "embedding"}
    said |= {"head": head, "classes": ["cat", "dog"], "temperature": 1.0, "thresholds": None}
    ModelFolder(folder).write_description(said, None)
    ids = ids or [f"<b>{number}.jpg" for number in range(len(right))]
    columns = {
        "image_id": ids,
        "sha256": [f"bytes of {image}" for image in ids],
        "label": ["cat"] * len(ids),
        "part": [part] * len(ids),
        "predicted": ["cat" if hit else "dog" for hit in right],
    }
    pq.write_table(pa.table(columns), folder / "predictions.parquet")
    accuracy = float(np.mean(right))
    metrics = {
        "test": {"accuracy": accuracy, "log_loss": 0.5},
        "intervals": {"test": {"accuracy": [accuracy - 0.05, min(1.0, accuracy + 0.05)]}},
        "seconds": {"fit": 1.5, "test": 0.5},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_models_stand_side_by_side_in_a_table_and_on_a_page(tmp_path: Path) -> None:
    ours, theirs = outcomes(20, 1)
    first = write_model(tmp_path / "first", theirs.tolist())
    second = write_model(tmp_path / "second", ours.tolist())
    page, file = tmp_path / "page.html", tmp_path / "c.json"
    done = CliRunner().invoke(
        app, ["compare", str(first), str(second), "--report", str(page), "--json", str(file)]
    )
    assert done.exit_code == 0, done.output
    rows = json.loads(file.read_text())
    assert [row["model"] for row in rows] == [str(first), str(second)]
    assert rows[0]["against_first"] is None
    assert rows[1]["against_first"]["num_better"] == 20
    assert rows[1]["seconds"] == 2.0
    assert rows[1]["verdict"] in page.read_text()
    assert "frozen + &lt;i&gt;svm" in page.read_text()
    assert "<script" not in page.read_text()
    assert [row_of(*pair) for pair in compare([first, second])] == rows


def test_the_order_of_the_images_makes_no_difference(tmp_path: Path) -> None:
    right = [True, False, True, True]
    ids = ["a", "b", "c", "d"]
    first = write_model(tmp_path / "first", right, ids)
    second = write_model(tmp_path / "second", right[::-1], ids[::-1])
    found = compare([first, second])[1][1]
    assert found is not None
    assert (found.num_better, found.num_worse) == (0, 0)


def test_models_that_were_tested_on_other_images_are_refused(tmp_path: Path) -> None:
    first = write_model(tmp_path / "first", [True, False], ["a", "b"])
    second = write_model(tmp_path / "second", [True, False], ["a", "c"])
    with pytest.raises(RequestError, match="on 2 images, of which 1 have the same id"):
        compare([first, second])
    table = pq.read_table(first / "predictions.parquet")
    other = table.set_column(1, "sha256", pa.array(["other bytes", "bytes of b"]))
    (tmp_path / "third").mkdir()
    for name in ("metrics.json", "model.json"):
        (tmp_path / "third" / name).write_text((first / name).read_text())
    pq.write_table(other, tmp_path / "third" / "predictions.parquet")
    with pytest.raises(RequestError, match="of which 2 have the same id"):
        compare([first, tmp_path / "third"])


def test_the_same_bytes_under_other_names_are_refused(tmp_path: Path) -> None:
    paths = [write_model(tmp_path / image, [True], [image]) for image in ("a", "b")]
    for path in paths:
        table = pq.read_table(path / "predictions.parquet")
        table = table.set_column(1, "sha256", pa.array(["same bytes"]))
        pq.write_table(table, path / "predictions.parquet")
    with pytest.raises(RequestError, match="of which 0 have the same id"):
        compare(paths)


def test_what_is_no_model_or_was_tested_on_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        compare([tmp_path])
    whole = write_model(tmp_path / "whole", [True], part="cross-validated")
    with pytest.raises(ModelError, match="trained with cross-validation; train it with --split"):
        compare([whole])


def saved(store: Store, folder: Path, head: str, split: str = "0.3") -> Path:
    """A head that was really trained, every image taken for itself."""
    train(store, "parent", head, TrainOptions(duplicates=None, split=split)).save(folder)
    return folder


def test_heads_that_were_trained_are_compared_on_their_test_images(
    store: Store, tmp_path: Path
) -> None:
    animals = ["owls", "cats", "dogs"] * 20
    ids = [f"{animal}/{number:02d}.jpg" for number, animal in enumerate(animals)]
    add_rows(store, ids, animal_vectors(animals, noise=0.7))  # so that some are wrong
    paths = [saved(store, tmp_path / head, head) for head in ("centroid", "ridge")]
    (first, nothing), (second, found) = compare(paths)
    assert nothing is None
    assert found is not None
    predicted = pq.read_table(paths[1] / "predictions.parquet").to_pylist()
    tested = sorted(
        (row for row in predicted if row["part"] == "test"), key=lambda r: r["image_id"]
    )
    assert 0 < len(tested) < len(ids)
    assert 0 < second.is_right.sum() < len(tested)
    assert second.ids.tolist() == first.ids.tolist() == [row["image_id"] for row in tested]
    assert second.is_right.tolist() == [row["label"] == row["predicted"] for row in tested]
    rows = [row_of(first, None), row_of(second, found)]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [row["kind"] for row in rows] == ["frozen + centroid", "frozen + ridge"]
    assert rows[1]["num_images"] == len(tested)
    assert rows[1]["accuracy"]["value"] == pytest.approx(second.is_right.mean())
    assert rows[1]["accuracy"]["low"] <= rows[1]["accuracy"]["value"] <= rows[1]["accuracy"]["high"]
    assert rows[1]["num_tuned"] is None
    assert rows[0]["verdict"] == ""
    assert rows[1]["verdict"] == found.verdict
    assert "fine-tuning" not in found.verdict  # both are frozen
    assert "keep the head" not in found.verdict


def test_heads_of_other_splits_or_of_no_test_images_are_refused(zoo: Store, tmp_path: Path) -> None:
    first = saved(zoo, tmp_path / "first", "centroid")
    with pytest.raises(RequestError, match="must be tested on the same images to be compared"):
        compare([first, saved(zoo, tmp_path / "half", "centroid", "0.5")])
    with pytest.raises(ModelError, match="cross-validation; train it with --split"):
        compare([first, saved(zoo, tmp_path / "folds", "centroid", "kfold:3")])


def test_a_tuned_model_is_named_by_its_strategy_and_says_what_it_tuned(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tuned", [True, False])
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["tuning"] = {"strategy": "gradual", "num_tuned": 12, "num_weights": 34}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    row = row_of(tested_model.TestedModel.read(folder), None)
    assert (row["kind"], row["num_tuned"], row["num_weights"]) == ("gradual", 12, 34)
    assert row["accuracy"] == {"value": 0.5, "low": 0.45, "high": 0.55}
    assert row["coarse_accuracy"] is None


def test_what_chance_alone_might_do_is_no_gain() -> None:
    ours, theirs = outcomes(10, 4)  # twice as often right as wrong, and yet p is 0.18
    found = paired(ours, theirs, 5.0)
    assert found.p_value == pytest.approx(2 * (1001 + 364 + 91 + 14 + 1) / 2**14)
    assert found.verdict.startswith("no gain beyond the interval, +9.7 points [")
    assert paired(theirs, ours, 5.0).verdict.startswith(
        "no gain beyond the interval, -9.7 points ["
    )
