"""Models: what is saved comes back, nothing in them runs, and strange features are refused."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from embedder.errors import EmbedderError, ModelError, RecipeMismatch
from embedder.heads.model import Model, logits_of
from embedder.store.store import Store
from embedder.training.options import TrainOptions
from embedder.training.train import train
from tests.support import add_rows, animal_vectors


@pytest.fixture
def model(zoo: Store, tmp_path: Path) -> Path:
    """A saved model of a linear head."""
    train(zoo, "parent", "ridge", TrainOptions(duplicates=None)).save(tmp_path / "model")
    return tmp_path / "model"


def edit(model: Path, **changes: object) -> None:
    """Change what a model says, as if it had been made before there were checksums."""
    content = json.loads((model / "model.json").read_text())
    del content["checksum"]
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


def test_a_model_says_in_a_line_what_it_is(model: Path) -> None:
    loaded = Model.load(model)
    backbone = loaded.recipe.backbone
    assert repr(loaded) == f"<Model ridge on {backbone}: 3 classes, accuracy 1.000>"
    (model / "metrics.json").write_text("{}")
    assert repr(Model.load(model)) == f"<Model ridge on {backbone}: 3 classes>"


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
    with pytest.raises(ModelError, match=r"must be 'head\.skops' or 'head\.keras'"):
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


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{", "model.json cannot be read"),
        ("\xff", "model.json cannot be read"),
        ("[" * 10**5, "nested more than 100 deep"),
        ('{"a": "' + "a" * 2**24 + '"}', "longer than 16,777,216 bytes"),
        ("[]", r"must hold an object\. Received: \[\]"),
        ("null", r"must hold an object\. Received: null"),
        ('{"format": 1}', r"`recipe` of .*model.json must be there\. Received: nothing"),
    ],
)
def test_a_damaged_description_is_refused(model: Path, text: str, rule: str) -> None:
    (model / "model.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ModelError, match=rule):
        Model.load(model)


NAN = float("nan")


@pytest.mark.parametrize(
    ("member", "value"),
    [
        *(("recipe", x) for x in (None, [], "lite0", {})),
        *(("fingerprint", x) for x in (None, 1, "0" * 16)),
        *(("weights_source", x) for x in (None, 1, [])),
        *(("column", x) for x in (None, 1, "other")),
        *(("head", x) for x in (None, [], "ridge", {})),
        *(("head.kind", x) for x in (None, 1, [])),
        *(("head.settings", x) for x in (None, [], {"C": []}, {"C": NAN})),
        *(("head.file", x) for x in (None, "model.json", ["head.skops"])),
        *(("head.sha256", x) for x in (None, 1, "0" * 63, "x" * 64, "0" * 64)),
        *(("classes", x) for x in (None, "abc", {}, [1, 2, 3], ["a"], ["cats", "cats", "dogs"])),
        *(("classes", x) for x in (["cats", "dogs"], ["cats", "dogs", None])),
        *(("temperature", x) for x in (None, "1", True, [], 0, -1.0, NAN, float("inf"), 10**400)),
        *(("thresholds", x) for x in ("1", [0.5], [0.5] * 4, [NAN] * 3, ["a", "b", "c"], {})),
        *(("labels", x) for x in (None, 1)),
        *(("options", x) for x in (None, [])),
        *((f"options.{name}", []) for name in ("split", "duplicates", "separator", "seed")),
        *(("provenance", x) for x in (None, "store")),
        *((f"provenance.{name}", []) for name in ("store", "source", "num_trained_on")),
        *(("coarse_of", x) for x in ("1", [1.5], [-1], {})),
        *(("tuning", x) for x in ([], {})),
    ],
)
def test_what_a_model_says_is_checked(model: Path, member: str, value: object) -> None:
    content = json.loads((model / "model.json").read_text())
    outer, _, inner = member.partition(".")
    changed = content[outer] | {inner: value} if inner else value
    edit(model, **{outer: changed})
    with pytest.raises(ModelError) as caught:
        Model.load(model)
    assert member.split(".")[-1] in str(caught.value) or "head" in str(caught.value)


@pytest.mark.parametrize("member", ["recipe", "fingerprint", "column", "head", "classes"])
def test_what_a_model_must_say_is_missed(model: Path, member: str) -> None:
    content = json.loads((model / "model.json").read_text())
    del content[member]
    (model / "model.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=f"`{member}` of .* must be there. Received: nothing"):
        Model.load(model)


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("classes", ["dogs", "cats", "owls"]),
        ("classes", ["cats", "dogs", "hens"]),
        ("temperature", 2.0),
        ("thresholds", [0.5, 0.5, 0.5]),
        ("head.settings", {"scaling": "standard"}),
        ("head.kind", "svm"),
    ],
)
def test_what_goes_together_cannot_be_changed_by_hand(
    model: Path, member: str, value: object
) -> None:
    content = json.loads((model / "model.json").read_text())
    outer, _, inner = member.partition(".")
    content[outer] = content[outer] | {inner: value} if inner else value
    (model / "model.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="has been changed: .* are no longer those that were"):
        Model.load(model)
    edit(model)  # as of a model that was made before there were checksums
    assert Model.load(model).head == content["head"]["kind"]


def test_where_its_images_are_may_be_changed_by_hand(model: Path) -> None:
    content = json.loads((model / "model.json").read_text())
    content["provenance"]["source"] = "moved"
    (model / "model.json").write_text(json.dumps(content))
    assert Model.load(model).recorded().provenance.source == "moved"


def test_a_model_elsewhere_is_no_path(model: Path) -> None:
    with pytest.raises(EmbedderError, match="Received: s3://bucket/model"):
        Model.load("s3://bucket/model")
    with pytest.raises(ModelError, match="is not a model: it has no model.json"):
        Model.load(model / "model.json")


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
