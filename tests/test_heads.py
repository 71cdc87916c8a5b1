"""Heads: labels find their images, and scores are what they say."""

from collections.abc import Iterable
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss
from test_store import rows_of

from embedder import heads
from embedder.errors import RecipeError, SourceError, StoreError
from embedder.heads import read_labels, scores, train
from embedder.recipe import Recipe
from embedder.store import FAILURE_SCHEMA, Store, shard_name

DIM = 5
CENTRES = {"cats": 0.0, "dogs": 20.0, "owls": 40.0}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred resamples are enough to see that there is an interval, and ten times as fast."""
    monkeypatch.setattr(heads, "_NUM_RESAMPLES", 100)


def add_rows(
    store: Store,
    ids: list[str],
    vectors: NDArray[Any],
    extras: dict[str, list[Any]] | None = None,
) -> None:
    """Write one shard."""
    rows = rows_of(store.recipe, ids, vectors, extras)
    store.write_shard(rows, FAILURE_SCHEMA.empty_table(), shard_name(store.recipe, ids))


def vectors_of(animals: Iterable[str], seed: int = 0) -> NDArray[np.float32]:
    """Clusters far apart: each class has its own mean, with noise of deviation 1."""
    means = np.array([CENTRES[animal] for animal in animals], np.float32)
    noise = np.random.default_rng(seed).normal(size=(len(means), DIM))
    return (means[:, None] + noise).astype(np.float32)


@pytest.fixture
def store(tmp_path: Path, mean_colour_recipe: Recipe) -> Store:
    return Store.open_or_create(tmp_path / "features", mean_colour_recipe, {})


@pytest.fixture
def zoo(store: Store) -> Store:
    """Ten images of each class in `set-N/CLASS/`, in two shards, the classes mixed."""
    for number in (1, 2):
        animals = ["owls", "cats", "dogs"] * 5
        ids = [f"set-{number}/{animal}/{i:02d}.jpg" for i, animal in enumerate(animals)]
        add_rows(store, ids, vectors_of(animals, seed=number))
    return store


def animal_of(image_id: str) -> str:
    return image_id.split("/")[1]


# Labels ----------------------------------------------------------------------------------------


def test_folder_is_the_first_folder_and_parent_the_containing_one(store: Store) -> None:
    add_rows(store, ["a/b/c/1.jpg", "a/2.jpg", "d/e/3.jpg"], np.zeros((3, DIM)))
    assert read_labels(store, "folder") == {"a/b/c/1.jpg": "a", "a/2.jpg": "a", "d/e/3.jpg": "d"}
    assert read_labels(store, "parent") == {"a/b/c/1.jpg": "c", "a/2.jpg": "a", "d/e/3.jpg": "e"}


@pytest.mark.parametrize("labels", ["folder", "parent"])
def test_an_image_in_no_folder_has_no_label(store: Store, labels: str) -> None:
    add_rows(store, ["1.jpg", "a/2.jpg"], np.zeros((2, DIM)))
    assert read_labels(store, labels) == {"a/2.jpg": "a"}


def test_a_column_of_the_store_gives_labels_as_text(store: Store) -> None:
    add_rows(store, ["1.jpg", "2.jpg", "3.jpg"], np.zeros((3, DIM)), {"kind": [7, None, 0]})
    assert read_labels(store, "column:kind") == {"1.jpg": "7", "3.jpg": "0"}


def test_a_label_file_is_joined_on_its_path_column(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "my: labels.csv"
    file.write_text(
        "\ufeffkind, path, note\n"  # as a spreadsheet writes it, and with spaces as grocery has
        '007, a/1.jpg, "x, y"\n'
        "cats, elsewhere.jpg,\n"
        ", a/2.jpg,\n"
        '"two words", "b, c.jpg",\n',
        encoding="utf-8",
    )
    assert read_labels(store, f"{file}:kind") == {
        "a/1.jpg": "007",
        "elsewhere.jpg": "cats",
        "b, c.jpg": "two words",
    }
    assert read_labels(store, f"{file}:note") == {"a/1.jpg": "x, y"}


@pytest.mark.parametrize("labels", ["", "folders", "kind", "labels.csv", "labels.txt:kind", ":x"])
def test_labels_of_no_known_spelling_are_refused(store: Store, labels: str) -> None:
    rule = r"must be folder, parent, FILE\.csv:COLUMN or column:NAME\. Received: labels="
    with pytest.raises(RecipeError, match=rule) as caught:
        read_labels(store, labels)
    assert str(caught.value).endswith(repr(labels))


def test_a_column_that_is_not_there_is_refused_with_those_that_are(store: Store) -> None:
    add_rows(store, ["1.jpg"], np.zeros((1, DIM)), {"kind": ["x"]})
    rule = r"must name a column of the store\. Received: colour\. It has: image_id, .*, kind, "
    with pytest.raises(RecipeError, match=rule):
        train(store, "column:colour")


@pytest.mark.parametrize("header", ["path,colour", "file,kind"])
def test_a_label_file_without_the_columns_is_refused(
    zoo: Store, tmp_path: Path, header: str
) -> None:
    (tmp_path / "labels.csv").write_text(f"{header}\na.jpg,x\n")
    rule = rf"columns `path` and `kind`\. Received: .*labels\.csv with {header.replace(',', ', ')}$"
    with pytest.raises(SourceError, match=rule):
        train(zoo, f"{tmp_path}/labels.csv:kind")


def test_a_label_file_that_does_not_exist_is_refused(zoo: Store, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"label file .*nope\.csv cannot be read: .*No such file"):
        train(zoo, f"{tmp_path}/nope.csv:kind")


def test_a_label_file_that_is_not_utf8_is_refused(zoo: Store, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"path,kind\ncaf\xe9.jpg,x\n")
    with pytest.raises(SourceError, match=r"labels\.csv cannot be read: 'utf-8' codec"):
        train(zoo, f"{tmp_path}/labels.csv:kind")


# Training --------------------------------------------------------------------------------------


def test_every_label_stays_with_its_own_vector(zoo: Store) -> None:
    head = train(zoo, "parent")
    assert sorted(set(head.labels)) == ["cats", "dogs", "owls"]
    assert head.features.shape == (30, DIM)
    assert head.features.dtype == np.float32
    assert head.num_unlabelled == 0
    for vector, label in zip(head.features, head.labels, strict=True):
        assert abs(vector.mean() - CENTRES[label]) < 3


def test_rows_without_a_label_are_left_out_and_counted(zoo: Store, tmp_path: Path) -> None:
    ids = zoo.ids().tolist()
    labelled = ids[1::2]
    lines = [f"{image_id},{animal_of(image_id)}" for image_id in reversed(labelled)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,animal", *lines, "nowhere.jpg,cats"]))
    head = train(zoo, f"{tmp_path}/labels.csv:animal")
    assert head.num_unlabelled == 15
    assert head.labels.tolist() == [animal_of(image_id) for image_id in labelled]
    np.testing.assert_array_equal(head.features, zoo.vectors()[1::2])


def test_a_head_knows_clusters_that_are_far_apart(zoo: Store) -> None:
    head = train(zoo, "parent")
    animals = ["dogs", "owls", "cats", "cats"]
    assert head.estimator.predict(vectors_of(animals, seed=9)).tolist() == animals


def test_features_are_standardised(store: Store) -> None:
    # Of two components, the one of great range says nothing.
    animals = ["cats", "dogs"] * 20
    random = np.random.default_rng(3)
    vectors = np.stack([random.normal(size=40) * 1e4, np.tile([-0.01, 0.01], 20)], axis=1)
    add_rows(store, [f"{animal}/{i}.jpg" for i, animal in enumerate(animals)], vectors)
    assert train(store).estimator.predict([[3e4, -0.01], [-3e4, 0.01]]).tolist() == ["cats", "dogs"]


def test_half_precision_features_are_trained_on_in_single(
    tmp_path: Path, mean_colour_recipe: Recipe
) -> None:
    recipe = Recipe(**(mean_colour_recipe.model_dump() | {"store_dtype": "float16"}))
    store = Store.open_or_create(tmp_path / "half", recipe, {})
    animals = ["cats", "dogs"] * 5
    add_rows(store, [f"{a}/{i}.jpg" for i, a in enumerate(animals)], vectors_of(animals))
    assert store.vectors().dtype == np.float16
    head = train(store)
    assert head.features.dtype == np.float32
    assert head.evaluate()["accuracy"]["value"] == 1.0


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ("column:same", r"which gives 30 of 30 images a label and 1 class\(es\)"),
        ("column:none", r"which gives 0 of 30 images a label and 0 class\(es\)"),
    ],
)
def test_fewer_than_two_classes_are_refused_with_what_was_found(
    store: Store, labels: str, found: str
) -> None:
    extras = {"same": ["x"] * 30, "none": pa.nulls(30, pa.string()).to_pylist()}
    add_rows(store, [f"{i}.jpg" for i in range(30)], np.zeros((30, DIM)), extras)
    rule = rf"at least two classes\. Received: labels='{labels}', {found}$"
    with pytest.raises(RecipeError, match=rule):
        train(store, labels)


def test_a_store_without_rows_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="has no rows yet"):
        train(store)


# Scores ----------------------------------------------------------------------------------------


def test_scores_are_those_one_can_work_out_by_hand() -> None:
    # Three of five right: one `a` taken for `b`, the only `c` taken for `a`. Ten times over, so
    # that every resample has every class.
    labels, classes = np.array(["a", "a", "a", "b", "c"] * 10), np.array(["a", "b", "c"])
    predicted = np.array(["a", "a", "b", "b", "a"] * 10)
    five = [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.3, 0.5, 0.2], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2]]
    probabilities = np.tile(five, (10, 1))
    found = scores(labels, probabilities, classes)
    values = {name: score["value"] for name, score in found.items()}
    f1_of_a, f1_of_b, f1_of_c = 4 / (4 + 1 + 1), 2 / (2 + 1), 0.0  # 2 TP / (2 TP + FP + FN)
    assert values == pytest.approx(
        {
            "accuracy": 3 / 5,
            "balanced_accuracy": (2 / 3 + 1 + 0) / 3,
            "macro_f1": (f1_of_a + f1_of_b + f1_of_c) / 3,
            "log_loss": -(log(0.7) + log(0.6) + log(0.3) + log(0.8) + log(0.2)) / 5,
        }
    )
    assert values == pytest.approx(
        {
            "accuracy": accuracy_score(labels, predicted),
            "balanced_accuracy": balanced_accuracy_score(labels, predicted),
            "macro_f1": f1_score(labels, predicted, average="macro"),
            "log_loss": log_loss(labels, probabilities),
        }
    )


def test_a_resample_may_lack_a_class() -> None:
    classes = np.array(["a", "b", "c"])
    labels = np.array(["a"] * 10 + ["b"] * 9 + ["c"])
    probabilities = np.where(labels[:, None] == classes, 0.9, 0.05)  # every image right
    found = scores(labels, probabilities, classes)
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        assert found[name] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["log_loss"]["high"] == pytest.approx(-log(0.9))


def test_the_interval_of_accuracy_is_the_binomial_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_NUM_RESAMPLES", 300)
    labels = np.array(["a", "b"] * 100)
    right = np.arange(200) % 5 != 0  # 160 of 200
    of_a = np.where((labels == "a") == right, 0.9, 0.1)
    accuracy = scores(labels, np.stack([of_a, 1 - of_a], axis=1), np.array(["a", "b"]))["accuracy"]
    margin = 1.96 * (0.8 * 0.2 / 200) ** 0.5
    assert accuracy["value"] == pytest.approx(0.8)
    assert accuracy["low"] == pytest.approx(0.8 - margin, abs=0.015)
    assert accuracy["high"] == pytest.approx(0.8 + margin, abs=0.015)


def overlapping(store: Store) -> Store:
    """Sixty images of two classes that a linear head tells apart about four times in five."""
    animals = ["cats", "dogs"] * 30
    vectors = np.random.default_rng(5).normal(size=(60, DIM))
    vectors[1::2, 0] += 1.7
    add_rows(store, [f"{animal}/{i}.jpg" for i, animal in enumerate(animals)], vectors)
    return store


def test_intervals_hold_their_value_and_are_the_same_every_time(store: Store) -> None:
    head = train(overlapping(store))
    found = head.evaluate()
    assert list(found) == ["accuracy", "balanced_accuracy", "macro_f1", "log_loss"]
    for score in found.values():
        assert score["low"] < score["value"] < score["high"]
    assert 0.6 < found["accuracy"]["value"] < 0.95
    assert head.evaluate() == found


def test_a_perfect_head_scores_one(zoo: Store) -> None:
    found = train(zoo, "parent").evaluate()
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        assert found[name] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert 0 < found["log_loss"]["value"] < 0.2  # that of a blind guess is log(3), 1.1


def test_an_image_is_scored_by_a_head_that_has_not_seen_it(store: Store) -> None:
    # Noise of more components than images: a head learns any labels by heart, and knows nothing.
    animals = ["cats", "dogs"] * 20
    vectors = np.random.default_rng(7).normal(size=(40, 80))
    add_rows(store, [f"{animal}/{i}.jpg" for i, animal in enumerate(animals)], vectors)
    head = train(store)
    assert head.estimator.score(head.features, head.labels) == 1.0
    assert head.evaluate()["accuracy"]["value"] < 0.75


def test_a_class_of_fewer_images_than_folds_is_refused_with_its_name(zoo: Store) -> None:
    add_rows(zoo, [f"set-3/newts/{i}.jpg" for i in range(4)], vectors_of(["dogs"] * 4))
    rule = r"at least 5 images, one for each fold\. Received: 4 of newts$"
    with pytest.raises(RecipeError, match=rule):
        train(zoo, "parent").evaluate()


def test_as_many_images_as_folds_are_enough(store: Store) -> None:
    animals = ["cats", "dogs"] * 5
    add_rows(store, [f"{a}/{i}.jpg" for i, a in enumerate(animals)], vectors_of(animals))
    assert train(store).evaluate()["accuracy"]["value"] == 1.0
