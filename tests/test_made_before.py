"""A store and models that were made before the package had packages: all goes on with them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from embedder.cli.app import app
from embedder.store.store import Store
from tests.support import TESTS

MADE = TESTS / "made_before"
HEADS = "logistic", "svm", "ridge", "lda", "knn", "centroid", "linear", "mlp"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return shutil.copytree(MADE, tmp_path / "made")


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_store_is_continued(made: Path) -> None:
    before = Store(made / "store")
    old = dict(zip(before.ids(), before.vectors(), strict=True))
    recipe = "--weights random:0 --image-size 64 --layer stage3_block2_project_bn"
    run("extract", made / "images", made / "store", *recipe.split())
    after = Store(made / "store")
    counts = after.runs()[-1]["counts"]
    # Copied files have new times of change: their bytes are compared.
    assert (counts["updated"], counts["changed"], counts["embedded"]) == (40, 0, 8)
    now = dict(zip(after.ids(), after.vectors(), strict=True))
    assert len(now) == 48
    for image_id, vector in old.items():
        np.testing.assert_array_equal(now[image_id], vector)
    run("verify", made / "store", "--source", made / "images", "--audit", 48)


@pytest.mark.parametrize("head", HEADS)
def test_a_model_predicts_what_it_predicted(made: Path, head: str, tmp_path: Path) -> None:
    run("predict", made / "models" / head, made / "images", tmp_path / "out.parquet", "--top-k", 3)
    expected = pq.read_table(made / "predictions" / f"{head}.parquet").to_pylist()
    received = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["image_id"] for row in received] == [row["image_id"] for row in expected]
    assert [row["class"] for row in received] == [row["class"] for row in expected]
    for mine, theirs in zip(received, expected, strict=True):
        assert mine["probability"] == pytest.approx(theirs["probability"], abs=1e-4)


@pytest.mark.parametrize("head", ["linear", "logistic"])
def test_a_model_is_fine_tuned(made: Path, head: str, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    run("finetune", made / "models" / head, made / "images", out, "--epochs", 1, "--no-report")
    before = json.loads((made / "models" / head / "metrics.json").read_text())
    after = json.loads((out / "metrics.json").read_text())
    assert after["tuning"]["accuracy_before"] == before["test"]["accuracy"]
    assert after["test"]["num_images"] == before["test"]["num_images"]


def test_a_model_is_evaluated_and_compared(made: Path) -> None:
    evaluated = run("evaluate", made / "models" / "ridge", made / "store", "--labels", "folder")
    assert "28 images were trained on, and are left out" in evaluated
    compared = run("compare", *(made / "models" / head for head in HEADS))
    assert all(head in compared for head in HEADS)
