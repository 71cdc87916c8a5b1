"""Keras heads: scikit-learn's contract, what each parameter does, streams, files."""

import json
import pickle
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.exceptions import SkipTestWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator

from embedder.engines import call_apart
from embedder.errors import RequestError, StoreError, WeightsError
from embedder.heads.keras_head import KerasHead, _held_out
from embedder.libraries import import_keras
from tests.heads.in_jax import fit_and_save, logits_of

DIM = 6
ANIMALS = np.array(["cat", "dog", "owl"])
# Large steps, as the tests' few images give few of them.
FAST: dict[str, Any] = {"learning_rate": 0.1, "epochs": 10, "scaling": "standard"}
FAST |= {"dropout": 0.0, "weight_decay": 0.0}


def clusters(num_images: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.str_]]:
    """Images of the three animals in turn; feature 0, 1 or 2 is 4 larger, noise has deviation 1."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num_images, DIM)).astype(np.float32)
    codes = np.arange(num_images) % 3
    features[np.arange(num_images), codes] += 4
    return features, ANIMALS[codes]


@pytest.fixture(scope="module")
def head() -> KerasHead:
    """A head with every kind of layer but those of `l2`, trained on 90 images."""
    return KerasHead(hidden=(8,), **FAST | {"dropout": 0.2}).fit(*clusters(90))


def kernel(head: KerasHead) -> NDArray[np.float32]:
    weights: NDArray[np.float32] = head.network_.layers[-1].get_weights()[0]
    return weights


# scikit-learn's contract -----------------------------------------------------------------------


@pytest.mark.filterwarnings(f"ignore::{SkipTestWarning.__module__}.{SkipTestWarning.__name__}")
def test_every_check_of_scikit_learn_passes() -> None:
    check_estimator(KerasHead(**FAST | {"learning_rate": 0.3, "batch_size": 256}))


def test_a_head_learns_and_answers_for_each_class(head: KerasHead) -> None:
    features, animals = clusters(60, seed=1)
    probabilities, logits = head.predict_proba(features), head.decision_function(features)
    assert head.score(features, animals) > 0.9
    assert head.classes_.tolist() == ANIMALS.tolist()
    assert head.n_features_in_ == DIM
    assert probabilities.shape == logits.shape == (60, 3)
    assert probabilities.dtype == logits.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4)
    assert (ANIMALS[probabilities.argmax(axis=1)] == head.predict(features)).all()


def test_of_two_classes_the_second_is_decided_for_above_zero() -> None:
    features, animals = clusters(60)
    is_owl = np.where(animals == "owl", "owl", "none")
    head = KerasHead(**FAST).fit(features, is_owl)
    decision = head.decision_function(features)
    assert decision.shape == (60,)
    assert (np.where(decision > 0, "owl", "none") == head.predict(features)).all()
    expected = 1 / (1 + np.exp(-decision))
    np.testing.assert_allclose(head.predict_proba(features)[:, 1], expected, rtol=1e-4)


def test_an_image_can_have_several_labels_or_none() -> None:
    features = np.random.default_rng(0).normal(size=(200, DIM)).astype(np.float32)
    labels = (features[:, :3] > 0).astype(int)  # all eight combinations
    head = KerasHead(**FAST).fit(features, labels)
    predicted, probabilities = head.predict(features), head.predict_proba(features)
    assert (predicted == labels).mean() > 0.85
    assert predicted.dtype == np.int64
    assert ((probabilities > 0.5) == predicted).all()
    assert head.classes_.tolist() == [0, 1, 2]
    assert head.decision_function(features).shape == (200, 3)


def test_a_head_works_in_a_pipeline_and_a_grid_search() -> None:
    features, animals = clusters(60)
    pipeline = make_pipeline(FunctionTransformer(np.negative), KerasHead(**FAST))
    search = GridSearchCV(pipeline, {"kerashead__learning_rate": [1e-7, 0.1]}, cv=2)
    search.fit(features, animals)
    assert search.best_params_ == {"kerashead__learning_rate": 0.1}
    assert search.best_score_ > 0.8


def test_the_same_seed_gives_the_same_head_and_another_seed_another(head: KerasHead) -> None:
    features, animals = clusters(90)
    logits = head.decision_function(features)
    again = clone(head).fit(features, animals).decision_function(features)
    other = clone(head).set_params(seed=1).fit(features, animals).decision_function(features)
    assert (again == logits).all()
    assert np.abs(other - logits).max() > 0.1


def test_training_leaves_the_global_random_states_alone(head: KerasHead) -> None:
    before = random.getstate(), pickle.dumps(np.random.get_state())
    clone(head).set_params(epochs=1).fit(*clusters(9))
    assert (random.getstate(), pickle.dumps(np.random.get_state())) == before


def test_importing_the_module_does_not_import_keras() -> None:
    code = "import sys, embedder.heads.keras_head; print('keras' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden", (16, 0)),
        ("dropout", 1.0),
        ("label_smoothing", -0.1),
        ("learning_rate", 0.0),
        ("weight_decay", -1.0),
        ("batch_size", 0),
        ("epochs", 0),
        ("patience", 0),
        ("validation_fraction", 1.0),
        ("scaling", "minmax"),
        ("seed", -1),
    ],
)
def test_a_parameter_out_of_its_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"`{name}` must be .*Received: "):
        KerasHead(**{name: value}).fit(*clusters(9))


def test_one_class_is_refused_as_both_callers_expect() -> None:
    features, _ = clusters(9)
    for error in (RequestError, ValueError):
        with pytest.raises(error, match="at least two classes. Received: 1 class"):
            KerasHead().fit(features, np.zeros(9, int))


def test_a_matrix_of_other_numbers_than_0_and_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0 and 1|multiclass-multioutput"):
        KerasHead().fit(np.zeros((2, DIM)), np.array([[0, 2], [2, 0]]))


def test_hidden_layers_and_dropout_are_where_they_should_be(head: KerasHead) -> None:
    names = [type(layer).__name__ for layer in head.network_.layers]
    assert names == ["Normalization", "Dense", "Dropout", "Dense"]
    assert head.network_.layers[1].units == 8
    assert head.network_.layers[2].rate == 0.2


def test_standard_scaling_takes_away_offset_and_unit_and_bears_a_constant() -> None:
    features, animals = clusters(60)
    moved = features * 1000 + 50
    features[:, 5] = moved[:, 5] = 7
    plain, other = (KerasHead(**FAST).fit(x, animals) for x in (features, moved))
    np.testing.assert_allclose(
        other.decision_function(moved), plain.decision_function(features), atol=0.01
    )
    features[:, 5] += 1e-3  # a variance of 0 would make this the largest input by far
    np.testing.assert_allclose(
        other.decision_function(moved), plain.decision_function(features), atol=0.01
    )


def test_l2_scaling_takes_away_the_length_and_none_does_not() -> None:
    features, animals = clusters(60)
    scaled = KerasHead(**FAST | {"scaling": "l2"}).fit(features, animals)
    unit = scaled.network_.layers[1](scaled.network_.layers[0](features))
    np.testing.assert_allclose(np.square(unit).mean(axis=1), 1, rtol=1e-4)
    logits = scaled.decision_function(features)
    np.testing.assert_allclose(scaled.decision_function(features * 9), logits, atol=1e-4)
    plain = KerasHead(**FAST | {"scaling": "none"}).fit(features, animals)
    assert [type(layer).__name__ for layer in plain.network_.layers] == ["Dense"]


def test_label_smoothing_keeps_the_network_from_being_certain() -> None:
    features, animals = clusters(60)
    sure, unsure = (
        KerasHead(**FAST | {"label_smoothing": smoothing, "validation_fraction": 0, "epochs": 40})
        .fit(features * 5, animals)
        .predict_proba(features * 5)
        .max(axis=1)
        for smoothing in (0.0, 0.3)
    )
    assert np.median(sure) > 0.95
    assert np.median(unsure) == pytest.approx(1 - 0.3 + 0.3 / 3, abs=0.05)


def test_weight_decay_keeps_weights_small() -> None:
    free, small = (
        kernel(KerasHead(**FAST | {"weight_decay": decay}).fit(*clusters(60)))
        for decay in (0.0, 5.0)
    )
    assert np.abs(small).mean() < 0.5 * np.abs(free).mean()


def test_balanced_weights_find_more_of_a_rare_class() -> None:
    features = np.random.default_rng(0).normal(size=(200, DIM)).astype(np.float32)
    is_rare = np.arange(200) % 10 == 0
    features[is_rare, 0] += 1
    plain, balanced = (
        KerasHead(class_weight=weight, validation_fraction=0, **FAST).fit(features, is_rare)
        for weight in (None, "balanced")
    )
    assert plain.predict(features)[is_rare].mean() < 0.5
    assert balanced.predict(features)[is_rare].mean() > 0.6


def test_class_weights_are_refused_for_several_labels() -> None:
    features, _ = clusters(8)
    with pytest.raises(RequestError, match="`class_weight` must be None"):
        KerasHead(class_weight="balanced").fit(features, np.eye(2, dtype=int)[[0, 1] * 4])


# Early stopping --------------------------------------------------------------------------------


def test_training_stops_when_validation_gets_worse_and_keeps_the_best_weights() -> None:
    features, animals = clusters(60)
    validation = clusters(30, seed=1)
    validation[1][:10] = np.roll(validation[1][:10], 1)  # to be sure of these gets dear
    head = KerasHead(patience=3, **FAST | {"epochs": 40})
    losses = head.fit(features, animals, validation=validation).validation_losses_
    assert len(losses) == np.argmin(losses) + 1 + 3 < 40
    probabilities = head.predict_proba(validation[0])
    codes = np.searchsorted(head.classes_, validation[1])
    loss = -np.log(probabilities[np.arange(30), codes]).mean()
    assert loss == pytest.approx(min(losses), rel=1e-4)


def test_without_validation_data_training_lasts_all_epochs() -> None:
    epochs: list[int] = []

    def make_batches(epoch: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        epochs.append(epoch)
        yield clusters(9)

    head = KerasHead(**FAST | {"epochs": 3}).fit_stream(make_batches)
    assert epochs == [0, 0, 1, 2]
    assert head.validation_losses_ == []
    assert KerasHead(validation_fraction=0, **FAST).fit(*clusters(9)).validation_losses_ == []


def test_a_share_of_every_class_is_held_out_but_never_all_of_one() -> None:
    labels = np.repeat(["a", "b", "c", "d"], [100, 40, 10, 1])
    is_held = _held_out(labels, 0.2, np.random.default_rng(0))
    sizes = [int(is_held[labels == name].sum()) for name in "abcd"]
    assert is_held.sum() == 30
    np.testing.assert_allclose(sizes, [20, 8, 2, 0], atol=1)
    assert not _held_out(np.array(["a", "b"]), 0.9, np.random.default_rng(0)).any()
    assert _held_out(np.zeros((10, 2)), 0.2, np.random.default_rng(0)).sum() == 2


def test_what_is_held_out_is_not_trained_on(head: KerasHead) -> None:
    features, animals = clusters(90)
    is_held = _held_out(animals, head.validation_fraction, np.random.default_rng(head.seed))
    assert is_held.sum() == 9
    mean = np.ravel(head.network_.layers[0].mean)
    np.testing.assert_allclose(mean, features[~is_held].mean(axis=0), atol=1e-5)


def test_a_label_of_validation_that_training_lacks_is_refused() -> None:
    features, animals = clusters(9)
    animals = np.where(animals == "cat", "gnu", animals)
    with pytest.raises(RequestError, match=r"one of the classes.*Received: \['gnu'\]"):
        KerasHead(**FAST).fit(*clusters(9), validation=(features, animals))


# Views and streams -----------------------------------------------------------------------------


def test_every_view_of_an_image_is_trained_on() -> None:
    plain, animals = clusters(90)
    views = np.stack([np.zeros_like(plain), plain, -plain], axis=1)
    head = KerasHead(hidden=(16,), validation_fraction=0, **FAST | {"epochs": 30})
    head.fit(views, animals)
    assert head.n_features_in_ == DIM
    assert head.score(plain, animals) > 0.8
    assert head.score(-plain, animals) > 0.8


def test_a_head_learns_from_batches() -> None:
    features, animals = clusters(30)

    def make_batches(epoch: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        for rows in np.random.default_rng(epoch).permutation(30).reshape(-1, 6):
            yield features[rows], animals[rows]

    head = KerasHead(**FAST).fit_stream(make_batches, clusters(30, seed=1))
    assert head.score(*clusters(60, seed=2)) > 0.9
    assert len(head.validation_losses_) == 10
    scale, _ = head.network_.layers
    np.testing.assert_allclose(np.ravel(scale.mean), features.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(np.ravel(scale.variance), features.var(axis=0), rtol=1e-4)


def test_an_error_of_the_stream_reaches_the_caller() -> None:
    def make_batches(epoch: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        yield clusters(9)
        if epoch == 1:
            raise StoreError("a shard vanished")

    with pytest.raises(StoreError, match="^a shard vanished$"):
        KerasHead(**FAST).fit_stream(make_batches)


# Files -----------------------------------------------------------------------------------------


def test_a_head_comes_back_from_its_file_and_json(head: KerasHead, tmp_path: Path) -> None:
    head.save(tmp_path / "head.keras")
    back = KerasHead.load(tmp_path / "head.keras", json.loads(json.dumps(head.to_json())))
    features, _ = clusters(30, seed=1)
    assert (back.decision_function(features) == head.decision_function(features)).all()
    assert (back.predict(features) == head.predict(features)).all()
    assert back.get_params() == head.get_params()
    assert back.n_features_in_ == DIM
    assert clone(back).fit(*clusters(90)).score(*clusters(30)) > 0.9


def write_network(path: Path, *layers: Any) -> Path:
    with warnings.catch_warnings(action="ignore"):  # TensorFlow's variables and NumPy 2
        import_keras().Sequential([import_keras().Input((DIM,)), *layers]).save(path)
    return path


def test_a_file_with_a_lambda_layer_is_refused(head: KerasHead, tmp_path: Path) -> None:
    keras = import_keras()
    path = write_network(tmp_path / "evil.keras", keras.layers.Lambda(lambda x: x[:, :3]))
    with pytest.raises(WeightsError, match=r"could run code. Received: .*evil.keras with .*Lambda"):
        KerasHead.load(path, head.to_json())


def test_a_file_with_other_layers_than_a_heads_is_refused(head: KerasHead, tmp_path: Path) -> None:
    keras = import_keras()
    layers = keras.layers.BatchNormalization(), keras.layers.Dense(3)
    path = write_network(tmp_path / "other.keras", *layers)
    with pytest.raises(WeightsError, match=r"may have the layers .* with BatchNormalization$"):
        KerasHead.load(path, head.to_json())


def test_a_file_of_another_number_of_classes_is_refused(head: KerasHead, tmp_path: Path) -> None:
    path = write_network(tmp_path / "four.keras", import_keras().layers.Dense(4))
    with pytest.raises(WeightsError, match=r"A head of 3 classes .*gives \(4,\)"):
        KerasHead.load(path, head.to_json())


@pytest.mark.parametrize(
    "change", [{"parameters": {"hidden": [], "width": 3}}, {"parameters": None}, {"classes": None}]
)
def test_a_description_that_is_none_is_refused(
    head: KerasHead, tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(WeightsError, match="description must be what `to_json` gave"):
        KerasHead.load(tmp_path / "head.keras", head.to_json() | change)


def test_a_head_is_trained_on_jax_and_read_on_tensorflow_and_the_other_way(
    head: KerasHead, tmp_path: Path
) -> None:
    features, labels = clusters(90)
    path = tmp_path / "head.keras"
    description, logits = call_apart("jax", fit_and_save, FAST, features, labels, path)
    received = KerasHead.load(path, description)
    np.testing.assert_allclose(received.decision_function(features), logits, atol=1e-4)
    assert received.score(*clusters(90, seed=1)) > 0.9
    head.save(path)
    logits = call_apart("jax", logits_of, path, head.to_json(), features)
    np.testing.assert_allclose(head.decision_function(features), logits, atol=1e-4)
