"""The recipes that a fine-tuning makes of a model's own."""

from dataclasses import replace

import pytest

from embedder.finetuning.network import FEATURES
from embedder.finetuning.options import TuneOptions
from embedder.finetuning.tuned_model import activations_recipe, tuned_recipe
from embedder.heads.model import Model
from embedder.recipe import Recipe
from embedder.store.store import Store
from embedder.training.options import TrainOptions
from embedder.training.train import train


@pytest.fixture
def model(zoo: Store) -> Model:
    """A head on one of two layers, in views, in half precision, of unit length."""
    model = train(zoo, "parent", "centroid", TrainOptions(duplicates=None)).model
    recipe = Recipe(
        backbone="mean-colour",
        weights="0" * 64,
        image_size=(48, 64),
        layers=("low", "high"),
        pooling="max",
        l2_normalise=True,
        views=4,
        precision="bfloat16",
    )
    return replace(model, recipe=recipe, column="high")


def changes_of(recipe: Recipe, model: Model) -> dict[str, object]:
    before = model.recipe.model_dump()
    return {name: value for name, value in recipe.model_dump().items() if value != before[name]}


def test_tuned_features_are_the_models_own_in_one_view(model: Model) -> None:
    same = {"layers": ("high",), "views": 1}
    assert changes_of(tuned_recipe(model, TuneOptions(strategy="gradual")), model) == same
    # With a new head they can be pooled in another way.
    assert changes_of(tuned_recipe(model, TuneOptions(strategy="cut")), model) == same
    flat = tuned_recipe(model, TuneOptions(strategy="cut", pooling="flatten"))
    assert changes_of(flat, model) == same | {"pooling": "flatten"}


def test_a_network_from_scratch_has_none_of_the_models_layers(model: Model) -> None:
    recipe = tuned_recipe(model, TuneOptions(strategy="scratch", pooling="avg"))
    wanted = {"layers": (), "l2_normalise": False, "pooling": "avg", "views": 1}
    assert changes_of(recipe, model) == wanted


def test_activations_are_what_the_layer_gives_in_full_precision(model: Model) -> None:
    maps = activations_recipe(model.recipe, "middle", 2)
    assert changes_of(maps, model) == {
        "layers": ("middle",),
        "pooling": "none",
        "l2_normalise": False,
        "views": 2,
        "precision": "float32",
    }
    features = activations_recipe(model.recipe, FEATURES, 2)  # as the head has them
    assert changes_of(features, model) == {"views": 2, "precision": "float32"}
