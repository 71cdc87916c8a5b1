"""Unlabelled images: they help a head where they can, and never tell it what it is tested on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from embedder.errors import RecipeMismatch, RequestError, StoreError
from embedder.evaluation.evaluation import Evaluation
from embedder.heads.model import logits_of
from embedder.heads.table import make_estimator
from embedder.recipe import Recipe
from embedder.store.schema import FAILURE_SCHEMA, shard_name
from embedder.store.store import Store
from embedder.training import semi_supervised as unlabelled
from embedder.training.options import TrainOptions
from embedder.training.train import train
from embedder.training.trained_head import TrainedHead
from tests.support import ANIMALS, DIM, animal_vectors, rows_of

NOISE = 0.4  # clusters touch: four labels of each leave every fifth image wrong


def names(prefix: str, num_each: int) -> list[str]:
    return [f"{prefix}/{animal}/{i:03d}.jpg" for i in range(num_each) for animal in ANIMALS]


def animals_of(ids: list[str]) -> list[str]:
    return [image_id.split("/")[1] for image_id in ids]


def add(
    store: Store, ids: list[str], vectors: NDArray[Any], bytes_of: list[str] | None = None
) -> None:
    """Write one shard; with `bytes_of`, the images have the bytes of those ids."""
    rows = rows_of(store.recipe, ids, vectors)
    if bytes_of is not None:
        sha256 = rows_of(store.recipe, bytes_of, vectors)["sha256"]
        rows = rows.set_column(rows.column_names.index("sha256"), rows.field("sha256"), sha256)
    store.write_shard(rows, FAILURE_SCHEMA.empty_table(), shard_name(store.recipe, ids))


def another(store: Store, name: str, recipe: Recipe | None = None) -> Store:
    return Store.open_or_create(store.path.parent / name, recipe or store.recipe, {})


@pytest.fixture
def few(store: Store) -> Store:
    """Four images of each class to train on, `few/`, and forty to test on, `test/`."""
    for prefix, num_each, seed in (("few", 4, 3), ("test", 40, 13)):
        ids = names(prefix, num_each)
        add(store, ids, animal_vectors(animals_of(ids), seed, NOISE))
    return store


@pytest.fixture
def pool(few: Store) -> Store:
    """Sixty more images of each class, in a store of their own."""
    ids = names("new", 60)
    new = another(few, "pool")
    add(new, ids, animal_vectors(animals_of(ids), 23, NOISE))
    return new


@pytest.fixture
def alone(few: Store, tmp_path: Path) -> TrainOptions:
    """Options with the official split, without unlabelled images."""
    parts = [f"{i},{'train' if i.startswith('few') else 'test'}" for i in few.ids()]
    (tmp_path / "split.csv").write_text("\n".join(["path,part", *parts]))
    return TrainOptions(duplicates=None, split=f"{tmp_path}/split.csv:part")


def with_images(alone: TrainOptions, store: Store, **changes: Any) -> TrainOptions:
    return replace(alone, unlabelled=str(store.path), **changes)


def accuracy(evaluation: Evaluation) -> float:
    return float((evaluation.predicted == evaluation.codes).mean())


def pseudo_labels(head: TrainedHead) -> list[dict[str, Any]]:
    assert head.semi_supervised is not None
    return head.semi_supervised.pseudo_labels().to_pylist()


@pytest.mark.parametrize(
    ("kind", "method"),
    [("svm", "self-training"), ("svm", "label-spreading"), ("logistic", "self-training")],
)
def test_more_images_of_the_same_clusters_help(
    few: Store, pool: Store, alone: TrainOptions, kind: str, method: str
) -> None:
    without = train(few, "parent", kind, alone)
    head = train(few, "parent", kind, with_images(alone, pool, unlabelled_method=method))
    assert head.semi_supervised is not None and head.supervised_test is not None
    assert head.semi_supervised.training.kept_round > 0
    assert accuracy(head.test) > accuracy(head.supervised_test) + 0.03
    assert head.supervised_test.logits.tolist() == without.test.logits.tolist()
    assert len(head.semi_supervised.training.rounds) == (6 if method == "self-training" else 2)
    # What is saved and judged is the semi-supervised head itself.
    assert head.model.estimator is head.semi_supervised.fitted.estimator is head.fitted.estimator
    assert head.model.temperature == head.fitted.temperature != without.model.temperature
    assert head.model.settings == without.model.settings
    assert head.model.settings["C"] == head.estimator.steps[-1][1].C
    held = head.model.logits(head.images.unaugmented[head.images.split.tested_on])
    np.testing.assert_array_equal(head.test.logits, held)


def test_every_pseudo_label_is_a_row_of_its_file(
    few: Store, pool: Store, alone: TrainOptions, tmp_path: Path
) -> None:
    head = train(few, "parent", "svm", with_images(alone, pool))
    head.save(tmp_path / "model")
    table = pq.read_table(tmp_path / "model/pseudo_labels.parquet")
    assert table.column_names == ["image_id", "sha256", "label", "confidence", "round"]
    assert head.semi_supervised is not None
    training, rows = head.semi_supervised.training, table.to_pylist()
    assert len(rows) == training.rounds[training.kept_round].num_pseudo_labels > 0
    assert len({row["image_id"] for row in rows}) == len(rows)
    checksums = dict(zip(pool.ids(), pool.sha256(), strict=True))
    assert all(checksums[row["image_id"]] == row["sha256"] for row in rows)
    right = [row["label"] == row["image_id"].split("/")[1] for row in rows]
    assert np.mean(right) > 0.8  # chance is a third: labels stand beside their own images
    assert all(training.threshold <= row["confidence"] <= 1 for row in rows)
    assert all(1 <= row["round"] <= training.kept_round for row in rows)


def test_the_metrics_say_what_the_images_did(
    few: Store, pool: Store, alone: TrainOptions, tmp_path: Path
) -> None:
    head = train(few, "parent", "svm", with_images(alone, pool))
    head.save(tmp_path / "model")
    found = json.loads((tmp_path / "model/metrics.json").read_text())
    entry = found["unlabelled"]
    assert head.supervised_test is not None
    assert entry["method"] == "self-training"
    assert entry["num_images"] == len(pool)
    assert entry["num_pseudo_labels"] == len(pseudo_labels(head))
    assert entry["rounds"][0]["num_pseudo_labels"] == 0
    assert entry["rounds"][entry["kept_round"]]["num_pseudo_labels"] == len(pseudo_labels(head))
    assert entry["is_rolled_back"] == (entry["kept_round"] < len(entry["rounds"]) - 1)
    assert entry["verdict"].startswith(("kept round", "rolled back to round"))
    assert 0 < entry["threshold"] <= 1
    without, with_them = accuracy(head.supervised_test), accuracy(head.test)
    assert entry["accuracy_without"]["value"] == pytest.approx(without)
    assert entry["accuracy_with"]["value"] == pytest.approx(with_them)
    assert found["test"]["accuracy"] == pytest.approx(with_them)
    gain = entry["gain"]
    assert gain["value"] == pytest.approx(with_them - without)
    assert gain["low"] < gain["value"] < gain["high"]


def test_a_head_without_unlabelled_images_has_no_entry(
    few: Store, alone: TrainOptions, tmp_path: Path
) -> None:
    head = train(few, "parent", "svm", alone)
    head.save(tmp_path / "model")
    assert "unlabelled" not in head.metrics()
    assert not (tmp_path / "model/pseudo_labels.parquet").exists()
    with pytest.raises(RequestError, match="trained without unlabelled images"):
        head.semi_supervised_metrics()


def test_labelled_images_get_no_pseudo_label_under_any_name(
    few: Store, pool: Store, alone: TrainOptions
) -> None:
    """Least of all those that are tested on: they are told by their bytes, not by their names."""
    old = few.ids().tolist()
    copies = [f"copies/{i}" for i in old]
    add(pool, copies, np.array(few.vectors()), bytes_of=old)
    head = train(few, "parent", "svm", with_images(alone, pool))
    assert head.semi_supervised is not None
    images = head.semi_supervised.images
    assert sorted(images.ids) == sorted(names("new", 60))
    assert not set(images.sha256) & set(few.sha256())
    assert not {row["sha256"] for row in pseudo_labels(head)} & set(few.sha256())
    by_id = dict(zip(pool.ids(), pool.vectors(), strict=True))
    np.testing.assert_array_equal(images.features, [by_id[i] for i in images.ids])


def test_labelled_images_that_the_split_leaves_out_get_no_pseudo_label_either(
    few: Store, alone: TrainOptions, tmp_path: Path
) -> None:
    left_out = names("test", 40)[60:]
    parts = [
        f"{i},{'train' if i.startswith('few') else 'test'}" for i in few.ids() if i not in left_out
    ]
    (tmp_path / "part.csv").write_text("\n".join(["path,part", *parts]))
    options = replace(alone, split=f"{tmp_path}/part.csv:part", unlabelled=str(few.path))
    with pytest.raises(RequestError, match="must hold some that are not among the labelled ones"):
        train(few, "parent", "svm", options)


def test_rows_without_a_label_of_the_same_store_are_what_it_learns_from(
    few: Store, alone: TrainOptions, tmp_path: Path
) -> None:
    new = names("new", 60)
    add(few, new, animal_vectors(animals_of(new), 23, NOISE))
    labelled = [i for i in few.ids() if not i.startswith("new")]
    lines = [f"{i},{i.split('/')[1]}" for i in labelled]
    (tmp_path / "labels.csv").write_text("\n".join(["path,animal", *lines]))
    head = train(few, f"{tmp_path}/labels.csv:animal", "svm", with_images(alone, few))
    assert head.semi_supervised is not None
    assert sorted(head.semi_supervised.images.ids) == sorted(new)
    assert head.semi_supervised.training.kept_round > 0


def test_neither_pseudo_labels_nor_calibration_depend_on_the_test_images(
    few: Store, pool: Store, alone: TrainOptions
) -> None:
    first = train(few, "parent", "svm", with_images(alone, pool))
    changed = another(few, "changed")
    vectors = np.array(few.vectors())
    is_test = np.array([i.startswith("test") for i in few.ids()])
    vectors[is_test] = np.random.default_rng(5).normal(size=(is_test.sum(), DIM))
    add(changed, few.ids().tolist(), vectors)
    second = train(changed, "parent", "svm", with_images(alone, pool))
    assert pseudo_labels(second) == pseudo_labels(first)
    assert second.model.temperature == first.model.temperature
    np.testing.assert_array_equal(second.model.logits(vectors), first.model.logits(vectors))


def test_the_temperature_of_a_semi_supervised_head_comes_from_rows_it_has_not_seen(
    few: Store, pool: Store, alone: TrainOptions
) -> None:
    head = train(few, "parent", "svm", with_images(alone, pool))
    temperatures = {}
    for factor in (0.1, 1.0, 10.0):
        model = replace(head.model, temperature=head.model.temperature * factor)
        rows = head.images.split.tested_on
        judged = Evaluation.of(model, head.images, rows)
        temperatures[factor] = judged.scores["log_loss"]["value"]
    assert min(temperatures, key=lambda factor: temperatures[factor]) == 1.0


def test_pseudo_labels_leave_each_class_the_weight_of_its_labels(
    few: Store, pool: Store, alone: TrainOptions
) -> None:
    options = with_images(alone, pool, unlabelled_method="label-spreading")
    head = train(few, "parent", "svm", options)
    pseudo = pseudo_labels(head)
    assert len(pseudo) > 0
    by_id = dict(zip(pool.ids(), pool.vectors(), strict=True))
    is_trained = head.images.parts == "train"
    features = [*head.images.unaugmented[is_trained], *(by_id[row["image_id"]] for row in pseudo)]
    labels = [*head.images.texts()[is_trained], *(row["label"] for row in pseudo)]
    sizes = {name: labels.count(name) for name in ANIMALS}
    assert len(set(sizes.values())) > 1
    weights = np.array([len(labels) / 3 / sizes[name] for name in labels])
    expected = make_estimator("svm", head.model.settings, None, 0, False)
    expected.fit(np.array(features), np.array(labels), linearsvc__sample_weight=weights)
    new = animal_vectors(ANIMALS * 5, seed=77)
    np.testing.assert_allclose(
        head.model.logits(new), logits_of(expected, new), rtol=1e-3, atol=1e-3
    )


def test_where_no_label_would_be_sure_enough_nothing_is_added(
    few: Store, pool: Store, alone: TrainOptions, tmp_path: Path
) -> None:
    blind = another(few, "blind")
    vectors = np.random.default_rng(1).normal(size=few.vectors().shape)
    add(blind, few.ids().tolist(), vectors)
    head = train(blind, "parent", "svm", with_images(alone, pool))
    entry = head.semi_supervised_metrics()
    assert entry["verdict"].startswith("nothing was added: no row got a label")
    assert (len(entry["rounds"]), entry["threshold"]) == (1, 1.0)
    head.save(tmp_path / "model")
    assert "Infinity" not in (tmp_path / "model/metrics.json").read_text()  # which is not JSON


def hurtful(few: Store) -> Store:
    """One heap of bats, which are a little like every class and most like cats."""
    bats = np.zeros((200, DIM))
    bats[:, :3] = 0.8, 0.6, 0.3
    bats += 0.2 * np.random.default_rng(5).normal(size=bats.shape)
    store = another(few, "bats")
    add(store, [f"bats/{i:03d}.jpg" for i in range(200)], bats)
    return store


def test_images_that_would_hurt_leave_the_head_as_it_was(
    store: Store, tmp_path: Path, alone: TrainOptions
) -> None:
    clear = another(store, "clear")
    for prefix, num_each, seed in (("few", 6, 0), ("test", 40, 10)):
        ids = names(prefix, num_each)
        add(clear, ids, animal_vectors(animals_of(ids), seed, 0.3))
    kinds = ("train", "train", "train", "val")
    parts = [
        f"{i},{kinds[n % 4] if i.startswith('few') else 'test'}" for n, i in enumerate(clear.ids())
    ]
    (tmp_path / "split.csv").write_text("\n".join(["path,part", *parts]))
    without = train(clear, "parent", "svm", alone)
    head = train(clear, "parent", "svm", with_images(alone, hurtful(store)))
    entry = head.semi_supervised_metrics()
    assert len(entry["rounds"]) > 1
    assert entry["rounds"][-1]["num_pseudo_labels"] > 100
    assert entry["rounds"][-1]["log_loss_change"]["low"] > 0  # it would have hurt
    assert entry["kept_round"] == entry["num_pseudo_labels"] == 0
    assert entry["is_rolled_back"]
    assert entry["verdict"].startswith("rolled back to round 0 of")
    assert entry["gain"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert pseudo_labels(head) == []
    new = animal_vectors(ANIMALS * 5, seed=77)
    np.testing.assert_array_equal(head.model.logits(new), without.model.logits(new))
    assert head.model.temperature == without.model.temperature
    head.save(tmp_path / "model")
    assert pq.read_table(tmp_path / "model/pseudo_labels.parquet").num_rows == 0


def test_of_images_with_views_the_plain_ones_are_labelled(
    few: Store, pool: Store, alone: TrainOptions
) -> None:
    views = another(few, "views", few.recipe.model_copy(update={"views": 3}))
    ids = [i for i in pool.ids() for _ in range(3)]
    vectors = np.repeat(np.array(pool.vectors()), 3, axis=0)
    vectors[1::3] = vectors[2::3] = 99.0
    number = pa.array([0, 1, 2] * len(pool), pa.int16())
    rows = rows_of(few.recipe, ids, vectors).add_column(1, "view", number)
    rows = rows.replace_schema_metadata(None)  # they are of another recipe now
    views.write_shard(rows, FAILURE_SCHEMA.empty_table(), shard_name(views.recipe, ids))
    ours = train(few, "parent", "svm", with_images(alone, views))
    theirs = train(few, "parent", "svm", with_images(alone, pool))
    assert pseudo_labels(ours) == pseudo_labels(theirs) != []


@pytest.mark.parametrize("head", ["knn", "centroid", "lda", "ridge", "linear", "mlp"])
def test_a_head_that_knows_no_weights_is_refused(
    few: Store, pool: Store, alone: TrainOptions, head: str
) -> None:
    with pytest.raises(RequestError, match=rf"heads logistic, svm.* Received: head='{head}'"):
        train(few, "parent", head, with_images(alone, pool))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"separator": ";"}, "labelled images of one label each"),
        ({"split": "kfold:3"}, "a split with one part to test on, not kfold"),
        ({"unlabelled_method": "guessing"}, "must be self-training or label-spreading.*guessing"),
    ],
)
def test_what_unlabelled_images_cannot_do_is_refused(
    few: Store, pool: Store, alone: TrainOptions, changes: dict[str, Any], rule: str
) -> None:
    with pytest.raises(RequestError, match=rule):
        train(few, "parent", "svm", with_images(alone, pool, **changes))


def test_unlabelled_features_of_another_recipe_are_refused(few: Store, alone: TrainOptions) -> None:
    other = another(few, "other", few.recipe.model_copy(update={"crop": "squash"}))
    add(other, ["a/cats/1.jpg"], animal_vectors(["cats"]))
    with pytest.raises(RecipeMismatch, match=r"the store .*other.*crop: center, not squash"):
        train(few, "parent", "svm", with_images(alone, other))


@pytest.mark.parametrize("name", ["features", "copy"])
def test_a_store_with_nothing_new_is_refused(few: Store, alone: TrainOptions, name: str) -> None:
    ids = few.ids().tolist()
    if name == "copy":
        copy = another(few, name)
        add(copy, [f"copy/{i}" for i in ids], np.array(few.vectors()), bytes_of=ids)
    options = replace(alone, unlabelled=str(few.path.parent / name))
    with pytest.raises(RequestError, match=r"not among the labelled ones\. Received: .* of 132 im"):
        train(few, "parent", "svm", options)


def test_a_store_that_is_not_there_is_refused(few: Store, alone: TrainOptions) -> None:
    with pytest.raises(StoreError, match="nowhere is not a feature store"):
        train(few, "parent", "svm", replace(alone, unlabelled=str(few.path.parent / "nowhere")))


def test_only_heads_with_weights_are_able() -> None:
    unlabelled.check_head("svm", False)
    unlabelled.check_head("logistic", False)
    with pytest.raises(RequestError, match="one label each"):
        unlabelled.check_head("svm", True)
