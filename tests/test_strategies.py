"""Strategies: which weights each of them trains, and which channels matter."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from embedder.backbones import make_recipe
from embedder.channels import channel_masks
from embedder.errors import RecipeError
from embedder.strategies import TuneOptions, num_tuned, plan_groups
from embedder.training import Examples, Group
from embedder.tunable import Tunable, is_normalisation, make_tunable
from embedder.weights import import_keras

SIZE = (48, 64)


@pytest.fixture
def tunable() -> Tunable:
    recipe = make_recipe("mobilenet", "random", image_size=SIZE)
    keras = import_keras()
    head = keras.Sequential([keras.Input((1024,)), keras.layers.Dense(2)])
    return replace(make_tunable(recipe, "embedding"), head=head)


def examples(num_images: int = 4) -> Examples:
    random = np.random.default_rng(0)
    return Examples(
        inputs=random.integers(0, 256, (num_images, 1, *SIZE, 3), dtype=np.uint8),
        targets=np.eye(2, dtype=np.float32)[np.arange(num_images) % 2],
        weights=np.ones(num_images, np.float32),
        train=np.arange(num_images),
        validation=np.arange(0),
        are_pixels=True,
    )


def groups_of(tunable: Tunable, strategy: str, **options: Any) -> list[Group]:
    chosen = TuneOptions(strategy=strategy, **options)
    return plan_groups(tunable, examples(), chosen, tunable.upper)


def kinds_of(groups: list[Group]) -> set[str]:
    """Names of the backbone's variables that are trained."""
    return {v.path.rpartition("/")[2] for group in groups[1:] for v in group.variables}


def test_the_head_is_always_trained_at_the_full_rate(tunable: Tunable) -> None:
    for strategy in ("gradual", "full", "norm", "bias"):
        first = groups_of(tunable, strategy)[0]
        assert [v.path for v in first.variables] == [v.path for v in tunable.head.variables]
        assert (first.rate, first.from_epoch) == (1.0, 1)


@pytest.mark.parametrize(
    ("strategy", "kinds"),
    [
        ("full", {"kernel"}),
        ("gradual", {"kernel"}),
        ("norm", {"gamma", "beta"}),
        ("bias", {"beta"}),  # this network's convolutions have none of their own
    ],
)
def test_each_strategy_trains_its_kind_of_weights(
    tunable: Tunable, strategy: str, kinds: set[str]
) -> None:
    groups = groups_of(tunable, strategy)
    assert kinds_of(groups) == kinds
    layers = [layer for layer in tunable.network.layers if layer.weights]
    wanted = [v for x in layers for v in x.variables if v.path.rpartition("/")[2] in kinds]
    found = [v for group in groups[1:] for v in group.variables]
    assert {v.path for v in found} == {v.path for v in wanted}
    assert len(found) == len(wanted)
    head = sum(int(np.prod(v.shape)) for v in tunable.head.variables)
    assert num_tuned(groups) == head + sum(int(np.prod(v.shape)) for v in wanted)


def test_statistics_are_frozen_layer_by_layer_unless_they_are_to_be_trained(
    tunable: Tunable,
) -> None:
    norms = [layer for layer in tunable.network.layers if is_normalisation(layer)]
    groups_of(tunable, "full")
    assert norms
    assert not any(layer.trainable for layer in norms)
    groups = groups_of(tunable, "full", train_norm=True)
    assert all(layer.trainable for layer in norms)
    assert kinds_of(groups) == {"kernel", "gamma", "beta"}


def test_gradual_unfreezes_from_the_top_and_trains_lower_blocks_slower(tunable: Tunable) -> None:
    groups = groups_of(tunable, "gradual", epochs=8, rate_decay=0.5)
    starts, rates = [g.from_epoch for g in groups], [g.rate for g in groups]
    assert starts[0] == 1
    assert starts == sorted(starts)
    assert 4 <= starts[-1] <= 5  # all of them by the middle
    assert rates == [0.5**number for number in range(len(groups))]
    assert "conv_pw_13" in groups[1].variables[-1].path
    assert "conv1" in groups[-1].variables[0].path


def test_the_channels_with_the_largest_gradients_are_chosen() -> None:
    keras = import_keras()
    layers = keras.layers
    pixels = keras.Input((*SIZE, 3))
    conv, depthwise = layers.Conv2D(5, 3, name="conv"), layers.DepthwiseConv2D(3, name="depthwise")
    x = layers.GlobalAveragePooling2D()(depthwise(conv(pixels)))
    head = keras.Sequential([keras.Input((5,)), layers.Dense(2)])
    kernel = np.zeros((5, 2), np.float32)
    kernel[3], kernel[1] = (2.0, -2.0), (1.0, -1.0)  # the loss depends on channels 3 and 1 alone
    head.layers[-1].set_weights([kernel, np.zeros(2, np.float32)])
    network = keras.Model(pixels, x)
    upper = keras.Model(pixels, {"features": x})
    tiny = Tunable(network, lambda p: p / 255.0, None, upper, head)
    for criterion in ("taylor", "fisher"):
        masks = channel_masks(tiny, network.layers, examples(), 0.4, criterion, 2, 0)
        by_path = {variable.path: mask for variable, mask in masks}
        assert set(by_path) == {v.path for v in (*conv.weights, *depthwise.weights)}
        for variable in (*conv.weights, *depthwise.weights):
            mask = by_path[variable.path]
            assert mask.shape == tuple(variable.shape)
            axis = 2 if variable is depthwise.kernel else mask.ndim - 1
            chosen = mask.max(axis=tuple(i for i in range(mask.ndim) if i != axis))
            assert chosen.tolist() == [0, 1, 0, 1, 0], (criterion, variable.path)
            assert mask.min(axis=tuple(i for i in range(mask.ndim) if i != axis)).tolist() == (
                chosen.tolist()
            )
    conv.set_weights([np.zeros_like(w) for w in conv.get_weights()])
    masks = channel_masks(tiny, [conv, depthwise], examples(), 0.01, "taylor", 2, 0)
    assert all(mask.any() for _, mask in masks)  # one at least


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"strategy": "magic"}, "must be one of head, gradual"),
        ({"epochs": 0}, "`epochs` must be at least 1. Received: 0"),
        ({"fraction": 0.0}, "`fraction` must be above 0 to 1"),
        ({"ema": 1.0}, "`ema` must be 0 to below 1"),
        ({"rate_decay": 2.0}, "`rate_decay` must be above 0 to 1"),
        ({"precision": "float16"}, "one of auto, float32, bfloat16"),
        ({"strategy": "full", "hidden": 8}, "`hidden` is of a new head, and full keeps"),
        ({"strategy": "full", "cut": "conv5"}, "`cut` is of the strategy cut"),
        ({"strategy": "full", "blocks": ("conv5",)}, "`blocks` are of the strategy partial"),
        ({"strategy": "full", "views": 2}, "`views` are of activations"),
        ({"strategy": "cut", "augment": ("flip",)}, "`augment` is of training from pixels"),
        ({"strategy": "head", "auxiliary": "x"}, "`auxiliary` needs a pretrained network"),
    ],
)
def test_options_that_would_not_be_heeded_are_refused(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(RecipeError, match=rule):
        TuneOptions(**options)


def test_an_auxiliary_layer_must_be_above_the_cut() -> None:
    recipe = make_recipe("mobilenet", "random", image_size=SIZE)
    with pytest.raises(RecipeError, match="above the cut and below the features"):
        make_tunable(recipe, "embedding", None, "conv_pw_12_relu", auxiliary="conv_pw_3_relu")
    with pytest.raises(RecipeError, match="must name a layer"):
        make_tunable(recipe, "embedding", None, "conv_pw_99")
