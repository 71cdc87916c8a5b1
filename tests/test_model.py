"""Models: what is saved comes back, nothing in them runs, and strange features are refused."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import add_rows, animal_vectors
from scipy.special import softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from embedder.errors import ModelError, RecipeMismatch
from embedder.heads import train
from embedder.model import Model, logits_of
from embedder.store import Store
from embedder.trained import TrainOptions


@pytest.fixture
def model(zoo: Store, tmp_path: Path) -> Path:
    """A saved model of a linear head."""
    train(zoo, "parent", "ridge", TrainOptions(duplicates=None)).save(tmp_path / "model")
    return tmp_path / "model"


def edit(model: Path, **changes: object) -> None:
    content = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps(content | changes))


def test_a_model_says_what_it_is(model: Path, zoo: Store) -> None:
    content = json.loads((model / "model.json").read_text())
    assert content["fingerprint"] == zoo.recipe.fingerprint
    assert content["classes"] == ["cats", "dogs", "owls"]
    assert content["head"]["kind"] == "ridge"
    assert content["head"]["file"] == "head.skops"
    assert content["options"] == {
        "split": "0.2",
        "duplicates": None,
        "class_weight": None,
        "separator": None,
        "column": None,
        "coarse": None,
        "unlabelled": None,
        "unlabelled_method": "self-training",
        "seed": 0,
    }
    assert content["labels"] == "parent"
    provenance = content["provenance"]
    assert provenance["num_trained_on"] == 48
    assert "scikit-learn" in provenance["versions"]
    metrics = json.loads((model / "metrics.json").read_text())
    assert {"accuracy", "balanced_accuracy", "macro_f1", "log_loss", "ece"} <= set(metrics["test"])
    assert metrics["intervals"]["test"]["accuracy"] == [1.0, 1.0]


def test_a_head_of_untrusted_types_is_refused_and_not_run(model: Path, tmp_path: Path) -> None:
    import hashlib

    import skops.io
    from sklearn.preprocessing import FunctionTransformer

    skops.io.dump(FunctionTransformer(print_something), model / "head.skops")
    digest = hashlib.sha256((model / "head.skops").read_bytes()).hexdigest()
    head = json.loads((model / "model.json").read_text())["head"]
    edit(model, head=head | {"sha256": digest})
    with pytest.raises(ModelError, match=r"types of scikit-learn and NumPy.*print_something"):
        Model.load(model)


def print_something(values: object) -> object:
    raise AssertionError("code of a model was run")


def test_another_head_than_the_one_named_is_refused(model: Path) -> None:
    with zipfile.ZipFile(model / "head.skops", "a") as file:
        file.writestr("more", "x")
    with pytest.raises(ModelError, match="is not the head that model.json names"):
        Model.load(model)


def test_a_head_elsewhere_is_refused(model: Path) -> None:
    head = json.loads((model / "model.json").read_text())["head"]
    edit(model, head=head | {"file": "../../head.skops"})
    with pytest.raises(ModelError, match=r"must be head\.skops or head\.keras"):
        Model.load(model)


def test_a_model_of_a_later_format_is_refused(model: Path) -> None:
    edit(model, format=2)
    with pytest.raises(ModelError, match=r"of format 1\. Received: .*, of format 2"):
        Model.load(model)


@pytest.mark.parametrize("name", ["model.json", "head.skops"])
def test_half_a_model_is_no_model(model: Path, name: str) -> None:
    (model / name).unlink()
    with pytest.raises(ModelError, match=rf"is not a model: it has no {name}"):
        Model.load(model)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}'])
def test_a_damaged_description_is_refused(model: Path, text: str) -> None:
    (model / "model.json").write_text(text)
    with pytest.raises(ModelError, match="cannot be read"):
        Model.load(model)


def test_features_of_another_recipe_are_refused_with_the_difference(
    model: Path, tmp_path: Path, zoo: Store
) -> None:
    other = zoo.recipe.model_copy(update={"crop": "pad", "l2_normalise": True})
    store = Store.open_or_create(tmp_path / "other", other, {})
    add_rows(store, ["a/1.jpg"], animal_vectors(["cats"]))
    with pytest.raises(RecipeMismatch, match=r"crop: center, not pad; l2_normalise: False, not T"):
        Model.load(model).check_recipe(store.recipe, "the store")


def test_features_with_more_views_are_of_the_same_recipe(model: Path, zoo: Store) -> None:
    Model.load(model).check_recipe(zoo.recipe.model_copy(update={"views": 8}), "the store")


def test_images_are_predicted_by_their_plain_view(model: Path, zoo: Store) -> None:
    views = zoo.recipe.model_copy(update={"views": 8})
    recipe = replace(Model.load(model), recipe=views).logits_recipe(model)
    assert (recipe.views, recipe.columns) == (1, ("logits",))


def test_a_store_without_the_models_feature_is_refused(model: Path, zoo: Store) -> None:
    other = zoo.recipe.model_copy(update={"layers": ("block1", "block2")})
    with pytest.raises(RecipeMismatch, match="feature: embedding, not block1, block2"):
        Model.load(model).check_recipe(other, "the store")


def test_each_label_has_its_own_threshold(model: Path) -> None:
    thresholds = np.array([0.2, 0.6, 0.9])
    loaded = replace(Model.load(model), thresholds=thresholds)
    chosen = loaded.chosen(np.array([[0.3, 0.5, 0.8], [0.1, 0.7, 0.95]]))
    assert chosen.tolist() == [[True, False, False], [False, True, True]]
    single = replace(loaded, thresholds=None).chosen(np.array([[0.3, 0.5, 0.2]]))
    assert single.tolist() == [[False, True, False]]


def test_logits_of_two_classes_give_the_probabilities_of_the_head() -> None:
    features = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    names = np.where(features[:, 0] + features[:, 1] > 0, "dogs", "cats")
    for estimator in (LogisticRegression(), LinearDiscriminantAnalysis()):
        estimator.fit(features, names)
        found = softmax(logits_of(estimator, features), axis=1)
        np.testing.assert_allclose(found, estimator.predict_proba(features), atol=1e-5)


def test_a_class_that_no_neighbour_has_is_not_impossible() -> None:
    features = np.eye(3, dtype=np.float32)
    neighbours = KNeighborsClassifier(1).fit(features, list("abc"))
    logits = logits_of(neighbours, features)
    np.testing.assert_allclose(np.exp(logits), np.where(features == 1, 1, 1e-4), rtol=1e-4)


def test_a_model_keeps_its_temperature(model: Path, zoo: Store) -> None:
    loaded = Model.load(model)
    made = train(zoo, "parent", "ridge", TrainOptions(duplicates=None)).model
    assert loaded.temperature == made.temperature != 1.0
    features = np.array(zoo.vectors())[:5]
    sharp = loaded.probabilities(features).max(axis=1)
    edit(model, temperature=loaded.temperature * 10)
    assert (Model.load(model).probabilities(features).max(axis=1) < sharp).all()
