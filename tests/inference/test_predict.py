"""Prediction: on images as on their features, with every image a row."""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import embedder
from embedder.checks.verify import verify
from embedder.errors import EmbedderError, RecipeMismatch, RequestError, StoreError
from embedder.extraction.extract import run_extraction
from embedder.extraction.options import RunOptions
from embedder.heads.model import Model
from embedder.inference.predict import SCHEMA, predict, prediction_table
from embedder.sources.listing import Listing, list_images
from embedder.store.store import Store
from embedder.training.options import TrainOptions
from embedder.training.train import train
from tests.support import make_archive, picture

SIZE = (64, 96)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, `photos`, their features, `features`, and a model of each kind."""
    folder = tmp_path_factory.mktemp("world")
    make_archive(folder / "photos", 24)
    store = embedder.extract(folder / "photos", folder / "features", image_size=SIZE)
    for head in ("logistic", "linear"):
        train(store, "folder", head, TrainOptions(duplicates=None)).save(folder / head)
    return folder


def rows_of(path: Path) -> list[dict]:  # type: ignore[type-arg]
    return sorted(pq.read_table(path).to_pylist(), key=lambda row: row["image_id"])


@pytest.mark.parametrize("head", ["logistic", "linear"])
def test_on_images_it_is_as_on_their_store(world: Path, tmp_path: Path, head: str) -> None:
    on_images = predict(world / head, world / "photos", tmp_path / "images.parquet")
    on_store = predict(world / head, world / "features", tmp_path / "store.parquet")
    assert on_images.num_predicted == on_store.num_predicted == 24
    assert on_images.summary is not None
    assert on_store.summary is None
    ours, theirs = rows_of(tmp_path / "images.parquet"), rows_of(tmp_path / "store.parquet")
    assert [row["image_id"] for row in ours] == sorted(Store(world / "features").ids())
    for row, other in zip(ours, theirs, strict=True):
        assert row["sha256"] == other["sha256"]
        assert row["class"] == other["class"]
        assert row["probability"] == pytest.approx(other["probability"], abs=1e-5)
        assert row["classes"] == [row["class"]]
        assert row["top_k"][0] == {"class": row["class"], "probability": row["probability"]}
        assert len(row["top_k"]) == 2  # there are two classes
        assert row["error"] is None


def test_features_are_not_stored_unless_asked_for(world: Path, tmp_path: Path) -> None:
    result = predict(world / "logistic", world / "photos", tmp_path / "p.parquet")
    assert Store(result.store).vectors().shape == (24, 2)
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["p.parquet"]  # it is out of sight
    kept = tmp_path / "kept"
    predict(world / "logistic", world / "photos", tmp_path / "q.parquet", keep=str(kept))
    assert Store(kept).vectors().shape == (24, 1280)
    assert {path.name for path in tmp_path.glob("*q.*")} == {"q.parquet"}
    assert rows_of(tmp_path / "p.parquet") == rows_of(tmp_path / "q.parquet")


def test_logits_are_audited_as_features_are(world: Path, tmp_path: Path) -> None:
    result = predict(world / "logistic", world / "photos", tmp_path / "p.parquet")
    checks = verify(Store(result.store), str(world / "photos"), audit=3)
    assert [check.name for check in checks if not check.passed] == []
    assert any("3 images embedded again" in check.detail for check in checks)


def test_again_only_what_is_new_is_computed(world: Path, tmp_path: Path) -> None:
    photos = make_archive(tmp_path / "photos", 8)
    out = tmp_path / "p.parquet"
    first = predict(world / "logistic", photos, out)
    assert first.summary is not None and first.summary.num_embedded == 8
    make_archive(tmp_path / "photos", 11)  # three more; the others are written as they were
    second = predict(world / "logistic", photos, out)
    assert second.summary is not None and second.summary.num_embedded == 3
    assert second.num_predicted == len(rows_of(out)) == 11


def test_an_image_that_fails_is_a_row_with_its_reason(world: Path, tmp_path: Path) -> None:
    photos = make_archive(tmp_path / "photos", 12)
    (photos / "cats/broken.jpg").write_bytes(b"no picture")
    result = predict(world / "logistic", photos, tmp_path / "p.parquet")
    assert (result.num_predicted, result.num_failed) == (12, 1)
    (failed,) = (row for row in rows_of(tmp_path / "p.parquet") if row["error"])
    assert failed["image_id"] == "cats/broken.jpg"
    assert failed["error"].startswith("decode: ")
    assert failed["class"] is failed["probability"] is failed["top_k"] is None
    assert pq.read_schema(tmp_path / "p.parquet").equals(SCHEMA)


def test_another_model_does_not_continue_the_logits_of_the_first(
    world: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.parquet"
    first = predict(world / "logistic", world / "photos", out)
    second = predict(world / "linear", world / "photos", out)
    assert second.summary is not None and second.summary.num_embedded == 24
    assert not first.store.exists()
    assert [store.name for store in second.store.parent.iterdir()] == [second.store.name]
    predict(world / "linear", world / "features", tmp_path / "store.parquet")
    for row, other in zip(rows_of(out), rows_of(tmp_path / "store.parquet"), strict=True):
        assert row["probability"] == pytest.approx(other["probability"], abs=1e-5)


@pytest.mark.parametrize("keep", [False, True])
def test_the_rows_are_the_images_of_this_source_and_no_others(
    world: Path, tmp_path: Path, keep: bool
) -> None:
    photos = make_archive(tmp_path / "photos", 6)
    (photos / "cats" / "broken.jpg").write_bytes(b"no picture")
    one = make_archive(tmp_path / "one", 1, first_seed=50)
    out = tmp_path / "p.parquet"
    options = RunOptions(max_failures=0.5)
    where = {"options": options, "keep": str(tmp_path / "kept") if keep else None}
    predict(world / "logistic", photos, out, **where)
    assert len(rows_of(out)) == 7
    (photos / "cats" / "broken.jpg").unlink()
    (photos / "dogs" / "001.jpg").unlink()
    result = predict(world / "logistic", photos, out, **where)
    assert (result.num_predicted, result.num_failed) == (5, 0)
    assert len(rows_of(out)) == 5
    if not keep:
        result = predict(world / "logistic", one, out, **where)
        assert result.num_predicted == 1
        assert [row["image_id"] for row in rows_of(out)] == ["cats/000.png"]


def test_images_of_two_sources_that_look_alike_from_outside_are_told_apart(
    world: Path, tmp_path: Path
) -> None:
    first, second = (tmp_path / name for name in ("first", "second"))
    for folder, seed in ((first, 1), (second, 2)):
        folder.mkdir()
        Image.fromarray(picture(seed)).save(folder / "a.bmp")
        os.utime(folder / "a.bmp", (10**9, 10**9))
    assert (first / "a.bmp").stat().st_size == (second / "a.bmp").stat().st_size
    checksums = []
    for folder in (first, second):
        predict(world / "logistic", folder, tmp_path / "p.parquet")
        checksums += [row["sha256"] for row in rows_of(tmp_path / "p.parquet")]
    assert checksums == [
        hashlib.sha256((folder / "a.bmp").read_bytes()).hexdigest() for folder in (first, second)
    ]


def test_with_a_part_the_rows_are_those_of_the_part(world: Path, tmp_path: Path) -> None:
    photos, out = make_archive(tmp_path / "photos", 12), tmp_path / "p.parquet"
    predict(world / "logistic", photos, out)
    whole = {row["image_id"]: row["probability"] for row in rows_of(out)}
    for keep in (None, str(tmp_path / "kept")):
        together = {}
        for part in ("1/2", "2/2"):
            out = tmp_path / f"{part[0]}.parquet"
            options = RunOptions(part=part)
            predict(world / "logistic", photos, out, options=options, keep=keep)
            rows = {row["image_id"]: row["probability"] for row in rows_of(out)}
            assert 0 < len(rows) < 12
            together |= rows
        assert together == pytest.approx(whole)
    (photos / "cats").rename(tmp_path / "cats")
    for path in sorted((photos / "dogs").iterdir())[1:]:
        path.unlink()
    done = [
        predict(world / "logistic", photos, out, options=RunOptions(part=part)).num_predicted
        for part in ("1/2", "2/2")
    ]
    assert sorted(done) == [0, 1]
    with pytest.raises(RequestError, match=r"`part` must be of a source .*part=2/2 of the store"):
        predict(world / "logistic", str(tmp_path / "kept"), out, options=options)


def test_with_a_limit_the_rows_are_those_looked_at_or_known(world: Path, tmp_path: Path) -> None:
    photos, out = make_archive(tmp_path / "photos", 6), tmp_path / "p.parquet"
    predict(world / "logistic", photos, out, options=RunOptions(limit=4))
    assert len(rows_of(out)) == 4
    predict(world / "logistic", photos, out, options=RunOptions(limit=2))
    assert len(rows_of(out)) == 4


def test_logits_that_an_older_version_kept_are_gone_on_with(world: Path, tmp_path: Path) -> None:
    out, photos = tmp_path / "p.parquet", world / "photos"
    older = tmp_path / "p.parquet.logits"
    recipe = Model.load(world / "logistic").logits_recipe(world / "logistic")
    run_extraction(photos, {str(older): recipe}, RunOptions(limit=20))
    result = predict(world / "logistic", photos, out)
    assert result.summary is not None and result.summary.num_embedded == 4
    assert not older.exists()
    older.mkdir()
    (older / "diary.txt").write_text("mine")
    predict(world / "logistic", photos, out)
    assert (older / "diary.txt").exists()


def test_logits_that_are_damaged_are_made_again(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.parquet"
    store = Store(predict(world / "logistic", world / "photos", out).store)
    expected = rows_of(out)
    (shard,) = store.shards()
    shard.write_bytes(shard.read_bytes()[:-100])
    result = predict(world / "logistic", world / "photos", out)
    assert result.summary is not None and result.summary.num_embedded == 24
    assert rows_of(out) == expected


def test_the_source_is_listed_once(world: Path, tmp_path: Path) -> None:
    listing = list_images(world / "photos")
    assert listing.source == str(world / "photos")
    recipe = Store(world / "features").recipe
    gone = Listing(listing.refs.slice(0, 3), source="was here")
    (summary,) = run_extraction(gone, {str(tmp_path / "features"): recipe}, RunOptions())
    assert (summary.source, summary.num_embedded) == ("was here", 3)


def test_a_url_is_no_place_for_predictions(world: Path) -> None:
    with pytest.raises(EmbedderError, match=r"Received: s3://bucket/p\.parquet"):
        predict(world / "logistic", world / "features", "s3://bucket/p.parquet")


def test_a_store_of_another_recipe_is_refused(world: Path, tmp_path: Path) -> None:
    embedder.extract(world / "photos", tmp_path / "other", image_size=SIZE, crop="squash")
    with pytest.raises(RecipeMismatch, match="crop: center, not squash"):
        predict(world / "logistic", tmp_path / "other", tmp_path / "p.parquet")
    assert not (tmp_path / "p.parquet").exists()


def test_of_a_store_with_views_the_plain_one_is_predicted(world: Path, tmp_path: Path) -> None:
    embedder.extract(world / "photos", tmp_path / "views", image_size=SIZE, views=3)
    predict(world / "logistic", tmp_path / "views", tmp_path / "views.parquet")
    predict(world / "logistic", world / "features", tmp_path / "plain.parquet")
    ours, theirs = rows_of(tmp_path / "views.parquet"), rows_of(tmp_path / "plain.parquet")
    np.testing.assert_allclose(
        [row["probability"] for row in ours], [row["probability"] for row in theirs], atol=1e-5
    )


@pytest.mark.parametrize(("out", "top_k"), [("nowhere/p.parquet", 5), ("p.parquet", 0), ("", 5)])
def test_what_makes_no_sense_is_refused(world: Path, tmp_path: Path, out: str, top_k: int) -> None:
    with pytest.raises(RequestError, match=r"a file in a folder that exists|at least 1"):
        predict(world / "logistic", world / "features", tmp_path / out, top_k=top_k)


def test_probabilities_are_calibrated_and_several_labels_have_no_one_class(world: Path) -> None:
    model = replace(Model.load(world / "logistic"), temperature=2.0)
    ids, logits = pa.array(["a.jpg", "b.jpg"]), np.array([[3.0, -1.0], [-2.0, 2.0]])
    single = prediction_table(model, ids, ids, logits, 1).to_pylist()
    assert [row["class"] for row in single] == ["cats", "dogs"]
    sure = [1 / (1 + np.exp(-2.0))] * 2  # a margin of 4, halved
    assert [row["probability"] for row in single] == pytest.approx(sure, rel=1e-6)
    several = replace(model, thresholds=np.array([0.5, 0.3]))
    rows = prediction_table(several, ids, ids, logits, 2).to_pylist()
    assert [row["class"] for row in rows] == [None, None]
    assert [row["classes"] for row in rows] == [["cats", "dogs"], ["dogs"]]
    assert rows[0]["probability"] == pytest.approx(1 / (1 + np.exp(-1.5)), rel=1e-6)


def test_a_damaged_store_leaves_no_half_of_a_file(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "features", tmp_path / "features")
    shard = next((tmp_path / "features/embeddings").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-100])
    (tmp_path / "p.parquet").write_text("older")
    with pytest.raises(StoreError, match="is damaged"):
        predict(world / "logistic", tmp_path / "features", tmp_path / "p.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features", "p.parquet"]
    assert (tmp_path / "p.parquet").read_text() == "older"


def test_worker_processes_apply_the_head_too(world: Path, tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / "embedder", "predict", world / "logistic"]
    arguments = [world / "photos", tmp_path / "p.parquet", "--workers", "2", "--shard-size", "6"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "predicted    24 images" in done.stdout
    predict(world / "logistic", world / "features", tmp_path / "store.parquet")
    ours, theirs = rows_of(tmp_path / "p.parquet"), rows_of(tmp_path / "store.parquet")
    for row, other in zip(ours, theirs, strict=True):
        assert row["probability"] == pytest.approx(other["probability"], abs=1e-5)
