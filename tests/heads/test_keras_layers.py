"""Folding: the Keras layers give what the model gives, for every head there is."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, softmax

from embedder.errors import RequestError
from embedder.heads.keras_head import KerasHead
from embedder.heads.keras_layers import FOLDABLE, as_keras_layers
from embedder.heads.model import Model
from embedder.heads.table import HEADS, make_estimator
from embedder.recipe import Recipe

DIM = 12
TEMPERATURE = 0.7  # not 1, so that a head that forgets it shows
SETTINGS = [
    *(
        (head, {"scaling": scaling})
        for head in ("logistic", "ridge")
        for scaling in ("l2", "standard")
    ),
    *(("svm", {}), ("lda", {"shrinkage": 0.2}), ("centroid", {})),
    *(
        (head, {"scaling": scaling})
        for head in ("linear", "mlp")
        for scaling in ("l2", "standard", "none")
    ),
]
IDS = [" ".join([head, *map(str, settings.values())]) for head, settings in SETTINGS]


def features_of(num_images: int, num_classes: int) -> NDArray[np.float32]:
    """Clusters far from the origin, in dimensions of unlike scale: (num_images, DIM)."""
    random = np.random.default_rng(num_classes)
    codes = np.arange(num_images) % num_classes
    noise = random.normal(size=(num_images, DIM))
    scales = np.geomspace(0.1, 30, DIM)
    features = (random.normal(size=(num_classes, DIM))[codes] + 0.7 * noise + 2) * scales
    return features.astype(np.float32)


def model_of(head: str, settings: dict[str, Any], labels: NDArray[Any]) -> Model:
    """A head fitted to `features_of`: of classes (n,), or multi-label (n, n_labels)."""
    is_multilabel = labels.ndim == 2
    num_classes = labels.shape[1] if is_multilabel else len(np.unique(labels))
    estimator = make_estimator(head, settings, None, 0, is_multilabel)
    if isinstance(estimator, KerasHead):
        estimator.set_params(epochs=3, min_steps=0)
    estimator.fit(features_of(len(labels), num_classes), labels)
    return Model(
        estimator=estimator,
        recipe=Recipe(backbone="mean-colour", weights="0" * 64, image_size=(48, 64)),
        column="embedding",
        classes=np.array([f"class-{code}" for code in range(num_classes)]),
        temperature=TEMPERATURE,
        thresholds=np.full(num_classes, 0.5) if is_multilabel else None,
        head=head,
        settings=settings,
    )


def several_labels(num_images: int, num_labels: int) -> NDArray[np.int64]:
    """Each image has the label of its cluster, and every second one the first label too."""
    labels = np.eye(num_labels, dtype=np.int64)[np.arange(num_images) % num_labels]
    labels[::2, 0] = 1
    return labels


def assert_folds(model: Model) -> None:
    """The layers are of the kinds that are loaded back, and give the model's own logits."""
    network = as_keras_layers(model)
    features = features_of(40, len(model.classes))
    features[0] = 0  # which has no direction
    expected = model.logits(features) / model.temperature
    received = np.asarray(network(features))
    assert received.dtype == np.float32
    # Rounding alone, in float32, of sums of some ten numbers.
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    probabilities = expit(received) if model.is_multilabel else softmax(received, axis=1)
    np.testing.assert_allclose(probabilities, model.probabilities(features), rtol=0, atol=1e-5)
    assert network.layers[-1].name == "logits"
    kinds = {type(layer).__name__ for layer in network.layers}
    assert kinds <= {"Normalization", "UnitNormalization", "Rescaling", "Dense", "Dropout"}


@pytest.mark.parametrize(("head", "settings"), SETTINGS, ids=IDS)
@pytest.mark.parametrize("num_classes", [2, 5])
def test_the_layers_give_the_logits_of_the_model(
    head: str, settings: dict[str, Any], num_classes: int
) -> None:
    assert_folds(model_of(head, settings, np.arange(60) % num_classes))


@pytest.mark.parametrize(
    ("head", "settings"), [pair for pair in SETTINGS if HEADS[pair[0]].can_multilabel]
)
@pytest.mark.parametrize("num_labels", [2, 4])
def test_of_several_labels_too(head: str, settings: dict[str, Any], num_labels: int) -> None:
    assert_folds(model_of(head, settings, several_labels(60, num_labels)))


@pytest.mark.filterwarnings("ignore:Label .* is present in all training examples")
def test_a_label_that_all_images_have_has_a_logit_of_its_own() -> None:
    labels = several_labels(60, 4)
    labels[:, 2] = 1
    assert_folds(model_of("logistic", {"scaling": "standard"}, labels))


def test_every_head_there_is_can_be_folded_but_nearest_neighbours() -> None:
    assert set(FOLDABLE) == set(HEADS) - {"knn"} == {head for head, _ in SETTINGS}


def test_nearest_neighbours_are_refused_with_the_heads_that_can_be_folded() -> None:
    model = model_of("knn", {"n_neighbors": 3}, np.arange(60) % 5)
    with pytest.raises(RequestError, match=r"one of logistic, svm, ridge.* Received: .* kind knn"):
        as_keras_layers(model)


def test_training_the_layers_leaves_the_model_as_it_is() -> None:
    model = model_of("mlp", {}, np.arange(60) % 5)
    features = features_of(60, 5)
    before = model.logits(features)
    network = as_keras_layers(model)
    network.set_weights([array + 1 for array in network.get_weights()])
    assert np.array_equal(model.logits(features), before)
