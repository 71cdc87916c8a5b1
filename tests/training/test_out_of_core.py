"""Heads on stores larger than memory: as good as any other, and never all features at once."""

from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

from embedder.columns import TRAIN, VALIDATION
from embedder.errors import RequestError
from embedder.heads.calibration import fit_temperature
from embedder.heads.model import Model, logits_of
from embedder.heads.ridge_head import RidgeHead
from embedder.heads.table import HEADS
from embedder.inference.evaluate import evaluate_model
from embedder.inference.predict import predict
from embedder.recipe import Recipe
from embedder.report.model_report import notes_of, report_of, write_head_report
from embedder.store.schema import FAILURE_SCHEMA
from embedder.store.shard_file import vector_array, vectors_of
from embedder.store.store import Store
from embedder.training import out_of_core
from embedder.training.options import TrainOptions
from embedder.training.out_of_core import make_out_of_core_split, read_features
from embedder.training.train import train
from embedder.training.trained_head import TrainedHead
from tests.support import ANIMALS, DIM, add_rows, animal_vectors, rows_of, training_set

ALONE = TrainOptions(duplicates=None)


@pytest.fixture(autouse=True)
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any store is too large, and nobody may read one whole."""

    def vectors(*_: Any, **__: Any) -> NoReturn:
        raise MemoryError

    for name in ("linear", "mlp"):
        monkeypatch.setattr(HEADS[name].classifier, "min_steps", 300)
    monkeypatch.setattr(out_of_core, "IN_CORE_BYTES", 0)
    monkeypatch.setattr(Store, "vectors", vectors)


def all_vectors(store: Store) -> NDArray[Any]:
    """What `Store.vectors(view=None)` gives."""
    tables = [store.read_shard(path.name) for path in store.shards()]
    return np.concatenate([vectors_of(t["embedding"].combine_chunks()) for t in tables])


def animals_of(store: Store) -> NDArray[np.str_]:
    return np.array([image_id.split("/")[1] for image_id in store.ids()])


def check_whole_way(head: TrainedHead, store: Store, labels: str, folder: Path) -> None:
    """Save, report, predict and evaluate; all say the same of the test rows."""
    found = head.save(folder)
    path = write_head_report(head, found, folder, None)
    assert path.stat().st_size > 10_000
    points = {point.image_id for point in report_of(head, found).map_points}
    assert points == set(head.images.ids[head.images.split.tested_on])
    assert predict(folder, store.path, folder / "all.parquet").num_predicted == 60
    judged = evaluate_model(folder, store, labels)
    assert judged.metrics["test"] == pytest.approx(head.metrics()["test"], rel=1e-5)
    assert judged.metrics["test"]["num_images"] == len(head.images.split.tested_on)
    probabilities = head.model.probabilities(all_vectors(store)[:4])
    np.testing.assert_allclose(
        Model.load(folder).probabilities(all_vectors(store)[:4]), probabilities, atol=1e-6
    )


@pytest.mark.parametrize("name", out_of_core.OUT_OF_CORE_HEADS)
def test_a_head_trained_out_of_core_goes_the_whole_way(
    zoo: Store, tmp_path: Path, name: str
) -> None:
    head = train(zoo, "parent", name, ALONE)
    assert head.is_out_of_core
    assert head.images.features is None
    assert head.evaluate()["accuracy"]["value"] == 1.0
    assert len(head.images.split.tested_on) == 12
    assert head.learning_curve() == []
    assert head.leak()["num_groups"] == 0
    assert head.model.classes.tolist() == list(ANIMALS)
    new = animal_vectors(["dogs", "owls", "cats"], seed=9)
    assert np.asarray(head.estimator.predict(new)).tolist() == ["dogs", "owls", "cats"]
    check_whole_way(head, zoo, "parent", tmp_path / "model")
    parts = pq.read_table(tmp_path / "model/predictions.parquet")["part"].to_pylist()
    held = parts.count(VALIDATION)
    assert (parts.count(TRAIN), held) == (48 - held, len(head.images.split.validation))
    assert 0 < held < 10
    assert f"Trained on 48 images ({held} of them to choose" in notes_of(head, head.metrics())[0]


@pytest.mark.parametrize("name", out_of_core.OUT_OF_CORE_HEADS)
def test_a_head_trained_out_of_core_gives_several_labels_an_image(
    store: Store, tmp_path: Path, name: str
) -> None:
    sets = [["cats"], ["dogs"], ["cats", "owls"], ["dogs", "owls"]] * 15
    ids = [f"{n:02d}.jpg" for n in range(60)]
    vectors = sum(animal_vectors([kinds[-k] for kinds in sets], seed=k, noise=0.1) for k in (0, 1))
    for part in (slice(0, 30), slice(30, 60)):
        add_rows(store, ids[part], vectors[part])
    lines = [f"{i},{';'.join(kinds)}" for i, kinds in zip(ids, sets, strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,kinds", *lines]))
    labels = f"{tmp_path}/labels.csv:kinds"
    head = train(store, labels, name, TrainOptions(duplicates=None, separator=";"))
    assert head.evaluate()["macro_f1"]["value"] > 0.8
    assert head.model.thresholds is not None
    assert head.fitted.trials[0]["accuracy"] > 0.5
    check_whole_way(head, store, labels, tmp_path / "model")
    balanced = TrainOptions(duplicates=None, separator=";", class_weight="balanced")
    with pytest.raises(
        RequestError, match="`class_weight` must be None where labels are multi-label"
    ):
        train(store, labels, name, balanced)


# A ridge head ------------------------------------------------------------------------------


def noise(store: Store) -> Store:
    """Three classes of different sizes in two shards, hardly apart, and far from zero."""
    animals = np.random.default_rng(0).choice(ANIMALS, 400, p=[0.1, 0.3, 0.6])
    ids = [f"{n:03d}/{animal}/1.jpg" for n, animal in enumerate(animals)]
    vectors = animal_vectors(animals, noise=1.0) + 5
    for part in (slice(0, 250), slice(250, 400)):
        add_rows(store, ids[part], vectors[part])
    return store


@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_ridge_is_that_of_all_training_rows_in_memory(
    store: Store, class_weight: str | None
) -> None:
    head = train(
        noise(store), "parent", "ridge", TrainOptions(duplicates=None, class_weight=class_weight)
    )
    rows = head.images.split.trained_on
    features, animals = all_vectors(store)[rows], animals_of(store)[rows]
    scaler = StandardScaler().fit(features)
    same = RidgeHead(alphas=[head.estimator.alpha_], class_weight=class_weight)
    same.fit(features.astype(np.float64), animals)
    np.testing.assert_allclose(head.estimator.coef_, same.coef_, atol=1e-5)
    np.testing.assert_allclose(head.estimator.intercept_, same.intercept_, atol=1e-4)
    if class_weight is None:  # standardised beforehand, it is the same once more
        standard = RidgeHead(alphas=[same.alpha_]).fit(scaler.transform(features), animals)
        np.testing.assert_allclose(standard.coef_ / scaler.scale_, same.coef_, atol=1e-5)
    assert head.model.settings == {"scaling": "standard"}
    assert head.images.split.tested_on.tolist() == head.images.split.folds[0][1].tolist()


def test_ridge_is_calibrated_by_images_it_has_not_learned(store: Store) -> None:
    head = train(noise(store), "parent", "ridge", ALONE)
    held = head.images.split.validation
    rest = np.setdiff1d(head.images.split.trained_on, held)
    features, animals = all_vectors(store), animals_of(store)
    without = RidgeHead().fit(features[rest], animals[rest])
    assert head.estimator.alpha_ == without.alpha_
    codes = np.searchsorted(ANIMALS, animals[held])
    expected = fit_temperature(logits_of(without, features[held]), codes)
    assert head.model.temperature == pytest.approx(expected, rel=1e-3)
    (trial,) = head.fitted.trials
    assert trial["accuracy"] == without.score(features[held], animals[held])


def test_ridge_learns_from_every_view_and_is_judged_by_the_plain_one(
    tmp_path: Path, mean_colour_recipe: Recipe
) -> None:
    recipe = mean_colour_recipe.model_copy(update={"views": 2})
    store = Store.open_or_create(tmp_path / "views", recipe, {})
    animals = np.array(["owls", "cats", "dogs"] * 20)
    plain, other = animal_vectors(animals, seed=1), animal_vectors(animals, seed=2, noise=0.5)
    views = np.stack([plain, other], axis=1)
    for part in (slice(0, 24), slice(24, 60)):
        ids = [f"a/{animal}/{n}.jpg" for n, animal in enumerate(animals)][part]
        rows = rows_of(mean_colour_recipe, list(np.repeat(ids, 2)), views[part].reshape(-1, DIM))
        rows = rows.replace_schema_metadata()  # they are of another recipe, which the store refuses
        rows = rows.add_column(1, "view", [np.tile(np.arange(2, dtype=np.int16), len(ids))])
        store.write_shard(rows, FAILURE_SCHEMA.empty_table(), f"{part.start:02d}.parquet")
    head = train(store, "parent", "ridge", ALONE)
    rows = head.images.split.trained_on
    same = RidgeHead(alphas=[head.estimator.alpha_])
    same.fit(views[rows].reshape(-1, DIM).astype(np.float64), np.repeat(animals[rows], 2))
    np.testing.assert_allclose(head.estimator.coef_, same.coef_, atol=1e-5)
    np.testing.assert_allclose(
        head.test.logits, head.model.logits(plain[head.images.split.tested_on])
    )


# Keras heads -------------------------------------------------------------------------------


def official_split(store: Store, parts: NDArray[np.str_], folder: Path) -> str:
    lines = [f"{i},{part}" for i, part in zip(store.ids(), parts, strict=True)]
    (folder / "split.csv").write_text("\n".join(["path,part", *lines]))
    return f"{folder}/split.csv:part"


def test_a_keras_head_stops_by_images_it_has_not_learned(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: set[str] = set()
    watched: list[str] = []
    batches, reads = out_of_core.shuffled_batches, out_of_core.read_features

    def seen_batches(store: Store, by_id: Any, *others: Any) -> Any:
        learned.update(by_id)
        return batches(store, by_id, *others)

    def seen_features(store: Store, column: str, rows: Any) -> Any:
        watched.extend(store.ids()[rows])
        return reads(store, column, rows)

    monkeypatch.setattr(out_of_core, "shuffled_batches", seen_batches)
    monkeypatch.setattr(out_of_core, "read_features", seen_features)
    monkeypatch.setattr(out_of_core, "_HELD_OUT_ROWS", 50)
    parts = np.resize(["train", "train", "test", "val"], len(noise(store)))
    options = TrainOptions(duplicates=None, split=official_split(store, parts, tmp_path))
    head = train(store, "parent", "linear", options)
    ids, features, animals = store.ids(), all_vectors(store), animals_of(store)
    is_held = parts == "val"
    assert learned == set(ids[parts == "train"])
    assert len(head.estimator.validation_losses_) > 1
    assert len(watched) == 50
    assert set(watched) < set(ids[is_held])
    expected = fit_temperature(
        head.model.logits(features[is_held]), np.searchsorted(ANIMALS, animals[is_held])
    )
    assert head.model.temperature == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["ridge", "linear"])
def test_labels_stay_with_their_images_where_some_have_none(
    zoo: Store, tmp_path: Path, name: str
) -> None:
    ids, animals = zoo.ids(), animals_of(zoo)
    is_labelled = np.arange(60) % 4 > 0
    lines = [f"{i},{animal}" for i, animal in zip(ids, animals, strict=True)]
    labelled = [line for line, is_kept in zip(lines, is_labelled, strict=True) if is_kept]
    (tmp_path / "labels.csv").write_text("\n".join(["path,animal", *labelled]))
    # Only the second and third class are learned: its codes are not those of the labels.
    parts = np.where((animals == "cats") | (np.arange(60) % 5 == 0), "test", "train")
    options = TrainOptions(duplicates=None, split=official_split(zoo, parts, tmp_path))
    head = train(zoo, f"{tmp_path}/labels.csv:animal", name, options)
    assert head.model.classes.tolist() == ["dogs", "owls"]
    tested = head.images.ids[head.images.split.tested_on]
    assert tested.tolist() == ids[is_labelled & (parts == "test")].tolist()
    rights = np.array(["/cats/" not in image_id for image_id in tested])
    assert head.test.is_right.tolist() == rights.tolist()
    assert head.fitted.trials[0]["accuracy"] > 0.6  # of a handful of held-out rows
    features = all_vectors(zoo)[is_labelled]
    np.testing.assert_array_equal(
        head.features_of(head.images.split.tested_on), features[head.images.split.tested_on]
    )
    if name == "ridge":
        rows = head.images.split.trained_on
        same = RidgeHead(alphas=[head.estimator.alpha_])
        same.fit(features[rows], animals[is_labelled][rows])
        np.testing.assert_allclose(head.estimator.coef_, same.coef_, atol=1e-5)
    head.save(tmp_path / "model")
    judged = evaluate_model(tmp_path / "model", zoo, f"{tmp_path}/labels.csv:animal")
    assert judged.metrics["test"] == pytest.approx(head.metrics()["test"], rel=1e-5)


# Splits ------------------------------------------------------------------------------------


def test_blocks_of_neighbours_are_divided_and_few_are_held_out(store: Store) -> None:
    codes = np.arange(300_000) % 3
    split = make_out_of_core_split("0.2", store, training_set(codes), 0)
    train_rows, test = split.folds[0]
    assert len(test) == pytest.approx(60_000, rel=0.01)
    assert np.bincount(codes[test]) == pytest.approx(20_000, rel=0.01)
    assert 19_000 < len(split.validation) < 20_200
    assert np.isin(split.validation, train_rows).all()
    is_test = np.isin(np.arange(300_000), test)[codes == 0]
    # A class has 100 images in a block: a change at each block at most.
    assert 100 < (is_test[1:] != is_test[:-1]).sum() < 1000


def test_a_class_is_never_held_out_whole(zoo: Store, tmp_path: Path) -> None:
    animals = animals_of(zoo)
    parts = np.resize(["train", "train", "train", "test", "val"], 60)
    parts[(animals == "owls") & (parts == "train")] = "val"
    options = TrainOptions(duplicates=None, split=official_split(zoo, parts, tmp_path))
    head = train(zoo, "parent", "ridge", options)
    expected = (parts == "val") & (animals != "owls")
    assert head.images.split.validation.tolist() == np.flatnonzero(expected).tolist()
    assert (head.images.parts[(parts == "val") & (animals == "owls")] == TRAIN).all()
    assert head.images.split.is_official
    assert head.evaluate()["accuracy"]["value"] == 1.0


def test_without_a_row_to_hold_out_there_is_no_head(zoo: Store) -> None:
    with pytest.raises(RequestError, match="must be held out, of classes that have others"):
        make_out_of_core_split("0.5", zoo, training_set(np.arange(60)), 0)


# Reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[0, 2, 29, 30, 59], [31]])
def test_features_are_of_the_rows_asked_for(zoo: Store, rows: list[int]) -> None:
    found = read_features(zoo, "embedding", np.array(rows))
    np.testing.assert_array_equal(found, all_vectors(zoo)[rows])
    assert found.dtype == np.float32


# What is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TrainOptions(), r"Near-duplicates .* duplicates=None or --duplicates none.*0\.9"),
        (TrainOptions(duplicates=None, split="kfold:3"), "no cross-validation on .*kfold:3"),
        (
            TrainOptions(duplicates=None, unlabelled="pool"),
            "Unlabelled images need one of the heads",
        ),
    ],
)
def test_what_needs_all_features_is_refused(
    zoo: Store, options: TrainOptions, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        train(zoo, "parent", "ridge", options)


def test_one_of_several_features_must_be_named(tmp_path: Path, mean_colour_recipe: Recipe) -> None:
    recipe = mean_colour_recipe.model_copy(update={"layers": ("low", "top")})
    store = Store.open_or_create(tmp_path / "layers", recipe, {})
    rows = rows_of(mean_colour_recipe, ["cats/1.jpg", "dogs/1.jpg"], np.eye(2))
    rows = rows.replace_schema_metadata()  # they are of another recipe, which the store refuses
    low, top = rows["embedding"], vector_array(np.ones((2, 5), np.float32))
    rows = rows.drop_columns("embedding").append_column("low", low).append_column("top", top)
    store.write_shard(rows, FAILURE_SCHEMA.empty_table(), "0.parquet")
    assert [store.dim(name) for name in ("low", "top")] == [2, 5]
    with pytest.raises(RequestError, match="`column` must be one of.*low, top.*Received: None"):
        train(store, head="ridge", options=ALONE)


def test_other_heads_are_refused_only_where_memory_is_too_small(
    zoo: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(out_of_core, "memory_bytes", lambda: 2 * 60 * DIM * 4)
    with pytest.raises(MemoryError):  # it would have read them all
        train(zoo, "parent", "svm", ALONE)
    monkeypatch.setattr(out_of_core, "memory_bytes", lambda: 2 * 60 * DIM * 4 - 1)
    with pytest.raises(RequestError, match="The head svm needs .* one of ridge, linear, mlp"):
        train(zoo, "parent", "svm", ALONE)


def test_a_store_that_is_not_too_large_is_read_whole(
    zoo: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(out_of_core, "IN_CORE_BYTES", 60 * DIM * 4)
    with pytest.raises(MemoryError):
        train(zoo, "parent", "ridge", ALONE)
