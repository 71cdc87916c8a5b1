"""A model's head as plain Keras layers: for export, and for training it with its backbone."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.svm import LinearSVC

from embedder.errors import RequestError
from embedder.heads.centroid_head import CentroidHead
from embedder.heads.keras_head import KerasHead
from embedder.heads.model import Model
from embedder.heads.ridge_head import RidgeHead
from embedder.libraries import import_keras

if TYPE_CHECKING:
    import keras

FOLDABLE = ("logistic", "svm", "ridge", "lda", "centroid", "linear", "mlp")
LOGITS_LAYER = "logits"
_WITH_COEFFICIENTS = (LogisticRegression, LinearSVC, RidgeHead, LinearDiscriminantAnalysis)


def as_keras_layers(model: Model) -> "keras.Sequential":
    """The head of a model, its temperature included, as Keras layers of their own.

    What it gives is `model.logits(features) / model.temperature`, up to rounding: softmax of it, or
    sigmoid where labels are multi-label, is the model's calibrated probabilities.
    Training the layers does not change the model.

    Returns:
        From float32 features (batch, dim) to float32 logits (batch, n_classes), two of two classes.
        Its layers are of the kinds that `KerasHead.load` takes; the last is a Dense `logits`.

    Raises:
        RequestError: The head is not made of such layers, as k nearest neighbours are not.
    """
    is_network = isinstance(model.estimator, KerasHead)
    layers, kernel, bias = _of_network(model.estimator) if is_network else _of_pipeline(model)
    if kernel.shape[1] == 1:  # scikit-learn's way with two classes: the second one's
        kernel, bias = np.pad(kernel, ((0, 0), (1, 0))), np.pad(bias, (1, 0))
    elif kernel.shape[1] == 2 and not model.is_multilabel:  # which `logits_of` gives that way too
        kernel, bias = kernel - kernel[:, :1], bias - bias[:1]
    keras = import_keras()
    num_features = model.estimator.n_features_in_
    last = keras.layers.Dense(len(bias), name=LOGITS_LAYER, dtype="float32")
    network = keras.Sequential([keras.Input((num_features,), name="features"), *layers, last])
    last.set_weights([kernel / model.temperature, bias / model.temperature])
    return network


# What comes before the last layer, and the last layer's kernel (dim, n) and bias (n,).
_Folded = tuple[list[Any], NDArray[Any], NDArray[Any]]


def _of_network(head: KerasHead) -> _Folded:
    """Copies of a Keras head's layers."""
    *before, last = head.network_.layers
    layers = []
    for layer in before:
        copy = type(layer).from_config(layer.get_config())
        copy.build(layer.input.shape)
        copy.set_weights(layer.get_weights())
        layers.append(copy)
    kernel, bias = (array.astype(np.float64) for array in last.get_weights())
    return layers, kernel, bias


def _of_pipeline(model: Model) -> _Folded:
    """Layers of a scaler and a linear classifier; a scaler by dimension becomes part of the last.

    Raises:
        RequestError: There is another step, or the classifier is not linear.
    """
    if not isinstance(model.estimator, Pipeline) or len(model.estimator) != 2:
        raise _not_foldable(model)
    scaler, classifier = model.estimator
    kernel, bias = _linear_terms(model, classifier)
    if isinstance(scaler, StandardScaler):
        scaled = kernel / scaler.scale_[:, np.newaxis]
        return [], scaled, bias - scaler.mean_ @ scaled
    if isinstance(scaler, Normalizer) and scaler.norm == "l2":
        return [import_keras().layers.UnitNormalization()], kernel, bias
    raise _not_foldable(model)


def _linear_terms(model: Model, classifier: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Kernel (dim, n) and bias (n,) of a classifier, float64; n can be 1 of two classes."""
    if isinstance(classifier, _WITH_COEFFICIENTS):
        kernel = np.asarray(classifier.coef_, np.float64).T
        return kernel, np.broadcast_to(classifier.intercept_, kernel.shape[1:]).astype(np.float64)
    if isinstance(classifier, CentroidHead):
        centroids = classifier.centroids_.astype(np.float64)
        return 2 * centroids.T, -(centroids**2).sum(axis=1)
    if isinstance(classifier, OneVsRestClassifier):
        terms = [_linear_terms(model, label) for label in classifier.estimators_]
        kernels, biases = zip(*terms, strict=True)
        return np.concatenate(kernels, axis=1), np.concatenate(biases)
    if hasattr(classifier, "y_"):  # of a label that all images have, or none: always the same
        constant = np.asarray(classifier.y_, np.float64).reshape(1)
        return np.zeros((model.estimator.n_features_in_, 1)), constant
    raise _not_foldable(model)


def _not_foldable(model: Model) -> RequestError:
    return RequestError(
        f"The head must be linear or a network, to become layers of Keras: one of "
        f"{', '.join(FOLDABLE)}. Received: a model with a head of kind {model.head}"
    )
