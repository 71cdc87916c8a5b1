"""Comparison: paired, on the same images, with a verdict in words."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from embedder.cli import app
from embedder.comparison import compare, judge, row_of
from embedder.errors import ModelError, RecipeError


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
    found = judge(*outcomes(better, worse), seconds=1.0)
    assert (found.num_better, found.num_worse) == (better, worse)
    assert found.p_value == pytest.approx(p_value)
    total = better + worse + 48
    assert found.gain["value"] == pytest.approx((better - worse) / total)


def test_the_verdict_says_what_to_do() -> None:
    assert judge(*outcomes(30, 2), 140.4).verdict.startswith("fine-tuning gains 35.0 points [")
    assert judge(*outcomes(30, 2), 140.4).verdict.endswith("] for 140 s: take it")
    assert judge(*outcomes(2, 30), 140.4).verdict.startswith("fine-tuning loses 35.0 points [")
    assert judge(*outcomes(2, 30), 140.4).verdict.endswith("keep the head")
    assert judge(*outcomes(4, 2), 9.0).verdict.startswith("no gain beyond the interval, +3.7")
    assert judge(*outcomes(4, 2), 9.0).verdict.endswith("keep the head")


def write_model(
    folder: Path, right: list[bool], ids: list[str] | None = None, part: str = "test"
) -> Path:
    """What `compare` reads of a model."""
    folder.mkdir()
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
    (folder / "model.json").write_text(json.dumps({"head": {"kind": "<i>svm"}}))
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
    with pytest.raises(RecipeError, match="on 2 images, of which 1 have the same id"):
        compare([first, second])
    table = pq.read_table(first / "predictions.parquet")
    other = table.set_column(1, "sha256", pa.array(["other bytes", "bytes of b"]))
    (tmp_path / "third").mkdir()
    for name in ("metrics.json", "model.json"):
        (tmp_path / "third" / name).write_text((first / name).read_text())
    pq.write_table(other, tmp_path / "third" / "predictions.parquet")
    with pytest.raises(RecipeError, match="of which 2 have the same id"):
        compare([first, tmp_path / "third"])


def test_what_is_no_model_or_was_tested_on_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        compare([tmp_path])
    whole = write_model(tmp_path / "whole", [True], part="cross-validated")
    with pytest.raises(ModelError, match="trained with cross-validation; train it with --split"):
        compare([whole])
