"""Channels: those that matter most are chosen, on networks where one can tell by eye."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, softmax

from embedder.errors import RequestError
from embedder.finetuning.channels import channel_group
from embedder.finetuning.inputs import Examples
from embedder.finetuning.network import TrainableNetwork
from embedder.finetuning.options import Importance, TuneOptions
from embedder.libraries import import_keras

HEIGHT, WIDTH = 6, 9
NUM_CLASSES = 3
CRITERIA = get_args(Importance)


def make_tiny(
    layers: "list[Any]", head_kernel: NDArray[Any], dropout: float = 0.0
) -> TrainableNetwork:
    """Layers one after another on pixels of 0 to 1, their mean, and a head without bias."""
    keras = import_keras()
    pixels = keras.Input((HEIGHT, WIDTH, 3))
    x = pixels
    for layer in layers:
        x = layer(x)
    features = keras.layers.GlobalAveragePooling2D()(x)
    head = keras.Sequential(
        [
            keras.Input((len(head_kernel),)),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(NUM_CLASSES, use_bias=False),
        ]
    )
    head.layers[-1].set_weights([head_kernel])
    upper = keras.Model(pixels, {"features": features})
    return TrainableNetwork(keras.Model(pixels, x), lambda p: p / 255.0, None, upper, head)


def make_examples(num_images: int = 6, seed: int = 0) -> Examples:
    """Pixels of a colour for each image, of which the last is not to be learned from."""
    random = np.random.default_rng(seed)
    brightest = random.integers(2, 256, (num_images, 1, 1, 1, 3))
    return Examples(
        inputs=random.integers(0, brightest, (num_images, 1, HEIGHT, WIDTH, 3)).astype(np.uint8),
        targets=np.eye(NUM_CLASSES, dtype=np.float32)[np.arange(num_images) % NUM_CLASSES],
        weights=np.ones(num_images, np.float32),
        train=np.arange(num_images - 1),
        validation=np.arange(num_images - 1, num_images),
        are_pixels=True,
    )


def random_kernel(num_channels: int, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).normal(size=(num_channels, NUM_CLASSES))


def choosing(fraction: float, criterion: str, **options: Any) -> TuneOptions:
    return TuneOptions("partial", fraction=fraction, importance=criterion, **options)


def masks_of(
    tiny: TrainableNetwork, layers: "list[Any]", fraction: float, criterion: str
) -> dict[str, NDArray[np.float32]]:
    """Masks by the last two parts of their variable's name, such as `conv/kernel`."""
    options = choosing(fraction, criterion, batch_size=3)
    masked = channel_group(tiny, layers, make_examples(), options).masked
    return {"/".join(variable.path.split("/")[-2:]): mask for variable, mask in masked}


def chosen_by(mask: NDArray[np.float32]) -> list[int]:
    """The channels of the last axis that are chosen, each of them wholly or not at all."""
    channels = mask.reshape(-1, mask.shape[-1])
    assert (channels == channels[0]).all()
    return np.flatnonzero(channels[0]).tolist()


def test_a_channel_of_zeros_changes_nothing_and_is_never_chosen_by_taylor() -> None:
    conv = import_keras().layers.Conv2D(5, 3, name="conv")
    head = random_kernel(5)
    head[2] *= 100  # and yet the loss depends on it most of all
    tiny = make_tiny([conv], head)
    kernel, bias = conv.get_weights()
    kernel[..., 2] = 0.0
    conv.set_weights([kernel, bias])
    taylor, fisher = (masks_of(tiny, [conv], 0.8, name) for name in CRITERIA)
    assert chosen_by(taylor["conv/kernel"]) == [0, 1, 3, 4]
    assert 2 in chosen_by(fisher["conv/kernel"])  # where only gradients count
    assert chosen_by(masks_of(tiny, [conv], 0.2, "fisher")["conv/kernel"]) == [2]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_channel_that_the_output_does_not_see_is_never_chosen(criterion: str) -> None:
    conv = import_keras().layers.Conv2D(5, 3, name="conv")
    head = random_kernel(5)
    head[1] = 0.0
    masks = masks_of(make_tiny([conv], head), [conv], 0.8, criterion)
    assert chosen_by(masks["conv/kernel"]) == [0, 2, 3, 4]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("seed", "is_multilabel"), [(0, False), (1, True), (2, False)])
def test_scores_are_those_of_the_papers_worked_out_by_hand(
    criterion: str, seed: int, is_multilabel: bool
) -> None:
    dense = import_keras().layers.Dense(30, use_bias=False, name="dense")
    head = random_kernel(30, seed)
    # A head with dropout: the network is looked at as it is after training.
    tiny = make_tiny([dense], head, dropout=0.9)
    examples = replace(make_examples(7, seed), is_multilabel=is_multilabel)
    kernel = np.random.default_rng(seed).normal(size=(3, 30)).astype(np.float32)
    dense.set_weights([kernel])
    scores = np.zeros(30)
    order = np.random.default_rng(5).permutation(examples.train)
    for rows in (order[:4], order[4:]):  # 6 images to learn from, in batches of 4
        x = examples.inputs[rows, 0].mean(axis=(1, 2)) / 255.0
        logits = x @ kernel @ head
        found = expit(logits) / NUM_CLASSES if is_multilabel else softmax(logits, axis=1)
        wanted = examples.targets[rows] / (NUM_CLASSES if is_multilabel else 1)
        errors = (found - wanted) / len(rows)
        gradient = x.T @ errors @ head.T
        if criterion == "taylor":
            scores += (gradient * kernel).sum(axis=0) ** 2
        else:
            scores += (gradient**2).sum(axis=0)
    options = choosing(0.5, criterion, batch_size=4, seed=5)
    (mask,) = channel_group(tiny, [dense], examples, options).masks
    assert chosen_by(mask) == sorted(np.argsort(scores)[-15:].tolist())


def test_a_mask_covers_a_channel_in_kernels_of_every_kind_and_in_biases() -> None:
    keras = import_keras()
    conv = keras.layers.Conv2D(4, 3, name="conv")
    depthwise = keras.layers.DepthwiseConv2D((2, 3), depth_multiplier=2, name="depthwise")
    dense = keras.layers.Dense(5, name="dense")
    head = random_kernel(5)
    head[3] = 0.0  # cuts off the dense layer's channel 3
    tiny = make_tiny([conv, depthwise, dense], head)
    kernel, bias = dense.get_weights()
    kernel[[2, 3, 7]] = 0.0  # and the depthwise layer's 2, 3 and 7: the 2 of the filter 1, so that
    dense.set_weights([kernel, bias])  # the convolution's 1 is cut off too, and one of filter 3
    found = {}
    for layer, fraction in ((conv, 3 / 4), (depthwise, 5 / 8), (dense, 4 / 5)):
        found |= masks_of(tiny, [layer], fraction, "fisher")
    assert {name: mask.shape for name, mask in found.items()} == {
        "conv/kernel": (3, 3, 3, 4),
        "conv/bias": (4,),
        "depthwise/kernel": (2, 3, 4, 2),
        "depthwise/bias": (8,),
        "dense/kernel": (8, 5),
        "dense/bias": (5,),
    }
    assert all(mask.dtype == np.float32 for mask in found.values())
    for name in ("kernel", "bias"):
        assert chosen_by(found[f"conv/{name}"]) == [0, 2, 3]
        assert chosen_by(found[f"dense/{name}"]) == [0, 1, 2, 4]
    assert chosen_by(found["depthwise/bias"]) == [0, 1, 4, 5, 6]
    filters = found["depthwise/kernel"]  # (height, width, filter, 2 channels of each)
    assert (filters == filters[0, 0]).all()
    assert filters[0, 0].tolist() == [[1, 1], [0, 0], [1, 1], [1, 0]]


@pytest.mark.parametrize(
    ("fraction", "num_chosen"), [(0.01, 1), (0.3, 2), (0.35, 3), (0.5, 4), (1.0, 8)]
)
def test_a_share_of_the_channels_is_chosen_and_one_at_least(
    fraction: float, num_chosen: int
) -> None:
    conv = import_keras().layers.Conv2D(8, 3, name="conv")
    masks = masks_of(make_tiny([conv], random_kernel(8)), [conv], fraction, "taylor")
    assert masks["conv/bias"].sum() == num_chosen
    assert masks["conv/kernel"].sum() == num_chosen * 3 * 3 * 3


def test_choosing_changes_no_weight_and_the_same_seed_chooses_alike() -> None:
    layers = import_keras().layers
    conv, norm = layers.Conv2D(8, 3, name="conv"), layers.BatchNormalization(name="norm")
    tiny = make_tiny([conv, norm, layers.ReLU()], random_kernel(8))
    before = [variable.numpy() for variable in tiny.network.variables]
    first, again = (masks_of(tiny, tiny.network.layers, 0.5, "taylor") for _ in range(2))
    assert set(first) == {"conv/kernel", "conv/bias"}  # normalisations have no channels to choose
    assert all(np.array_equal(first[name], again[name]) for name in first)
    after = [variable.numpy() for variable in tiny.network.variables]
    assert all(np.array_equal(old, new) for old, new in zip(before, after, strict=True))


def test_layers_without_channels_are_refused() -> None:
    relu = import_keras().layers.ReLU()
    with pytest.raises(RequestError, match="must have layers with channels. Received: none"):
        masks_of(make_tiny([relu], random_kernel(3)), [relu], 0.5, "taylor")


def test_a_separable_convolutions_channels_are_its_second_kernels() -> None:
    conv = import_keras().layers.SeparableConv2D(5, 3, name="conv")
    head = random_kernel(5)
    head[1] = 0.0
    tiny = make_tiny([conv], head)
    masks = masks_of(tiny, [conv], 0.8, "taylor")
    assert set(masks) == {"conv/pointwise_kernel", "conv/bias"}
    assert chosen_by(masks["conv/pointwise_kernel"]) == [0, 2, 3, 4]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_layers_that_the_features_do_not_come_from_are_refused(criterion: str) -> None:
    keras = import_keras()
    conv = keras.layers.Conv2D(4, 3, name="conv")
    tiny = make_tiny([conv], random_kernel(4))
    above = keras.layers.Conv2D(4, 1, name="above")
    above(tiny.network.output)
    with pytest.raises(RequestError, match="Received: above"):
        masks_of(tiny, [conv, above], 0.5, criterion)


def test_layers_that_the_features_are_not_made_of_are_refused() -> None:
    layers = import_keras().layers
    tiny = make_tiny([layers.Conv2D(4, 3, name="conv")], random_kernel(4))
    other = layers.Conv2D(4, 3, name="aside")
    other.build((None, 8, 8, 3))
    with pytest.raises(RequestError, match="the features are made of. Received: aside"):
        masks_of(tiny, [other], 0.5, "taylor")
