"""Strategies: which weights each of them trains, and which channels matter."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from embedder.backbones.resolve import make_recipe
from embedder.errors import RequestError
from embedder.finetuning.channels import channel_group
from embedder.finetuning.inputs import Examples
from embedder.finetuning.network import TrainableNetwork, is_normalisation, make_trainable
from embedder.finetuning.options import STRATEGIES, TuneOptions
from embedder.finetuning.parameter_groups import num_tuned, plan_groups
from embedder.finetuning.schedule import Group
from embedder.libraries import import_keras

SIZE = (48, 64)


@pytest.fixture
def tunable() -> TrainableNetwork:
    recipe = make_recipe("mobilenet", "random", image_size=SIZE)
    keras = import_keras()
    head = keras.Sequential([keras.Input((1024,)), keras.layers.Dense(2)])
    return replace(make_trainable(recipe, "embedding"), head=head)


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


def groups_of(tunable: TrainableNetwork, strategy: str, **options: Any) -> list[Group]:
    chosen = TuneOptions(strategy=strategy, **options)
    return plan_groups(tunable, examples(), chosen)


def kinds_of(groups: list[Group]) -> set[str]:
    """Names of the backbone's variables that are trained."""
    return {v.path.rpartition("/")[2] for group in groups[1:] for v in group.variables}


def test_the_head_is_always_trained_at_the_full_rate(tunable: TrainableNetwork) -> None:
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
    tunable: TrainableNetwork, strategy: str, kinds: set[str]
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
    tunable: TrainableNetwork,
) -> None:
    norms = [layer for layer in tunable.network.layers if is_normalisation(layer)]
    groups_of(tunable, "full")
    assert norms
    assert not any(layer.trainable for layer in norms)
    groups = groups_of(tunable, "full", train_norm=True)
    assert all(layer.trainable for layer in norms)
    assert kinds_of(groups) == {"kernel", "gamma", "beta"}


def test_gradual_unfreezes_from_the_top_and_trains_lower_blocks_slower(
    tunable: TrainableNetwork,
) -> None:
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
    tiny = TrainableNetwork(network, lambda p: p / 255.0, None, upper, head)
    for criterion in ("taylor", "fisher"):
        options = TuneOptions("partial", fraction=0.4, importance=criterion, batch_size=2)
        group = channel_group(tiny, network.layers, examples(), options)
        by_path = {variable.path: mask for variable, mask in group.masked}
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
    options = TuneOptions("partial", fraction=0.01, batch_size=2)
    group = channel_group(tiny, [conv, depthwise], examples(), options)
    assert all(mask.any() for mask in group.masks)  # one at least


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (
            {"strategy": "magic"},
            "must be head, gradual, full, .*: strategy='magic'",
        ),
        ({"epochs": 0}, "`epochs` must be at least 1. Received: epochs=0"),
        ({"fraction": 0.0}, "`fraction` must be above 0"),
        ({"ema": 1.0}, "`ema` must be below 1"),
        ({"rate_decay": 2.0}, "`rate_decay` must be at most 1"),
        ({"precision": "float16"}, "must be auto, float32 or bfloat16. Received: precision="),
        ({"strategy": "full", "hidden": 8}, "`hidden` is of strategies with a new head"),
        ({"strategy": "full", "cut": "conv5"}, "`cut` is of the strategy cut"),
        ({"strategy": "full", "blocks": ("conv5",)}, "`blocks` is of the strategy partial"),
        ({"strategy": "full", "fraction": 0.1}, "`fraction` is of the strategy partial"),
        ({"importance": "fisher"}, "`importance` is of the strategy partial"),
        ({"loss_weights": (1.0, 2.0)}, "`loss_weights` is of training with `auxiliary`"),
        ({"strategy": "full", "views": 2}, "`views` is of training from activations"),
        ({"strategy": "cut", "augment": ("flip",)}, "`augment` is of training from pixels"),
        ({"strategy": "head", "auxiliary": "x"}, "`auxiliary` is of strategies that train a pre"),
        ({"strategy": "scratch", "auxiliary": "x"}, "`auxiliary` is of strategies that train a"),
        ({"strategy": "norm", "dropout": 0.0}, "`dropout` is of strategies with a new head"),
        ({"strategy": "partial", "pooling": "max"}, "Received: strategy=partial, pooling='max'"),
        ({"strategy": "head", "cut": "conv5"}, "`cut` is of the strategy cut. Received: s.*=head,"),
        ({"strategy": "cut", "blocks": ("conv5",)}, "`blocks` is of the strategy partial"),
        ({"strategy": "cut", "unlabelled": "x"}, "`unlabelled` is of training from pixels"),
        ({"strategy": "head", "augment": ()}, "`augment` is of training from pixels"),
        ({"strategy": "cut", "from_pixels": True, "views": 2}, "`views` is of training from act"),
        ({"strategy": "scratch", "views": 2}, "`views` is of training from activations"),
        ({"augment": ("flip", "sepia")}, "`augment` must be flip, .*Received: augment='sepia'"),
        ({"batch_size": 0}, "`batch_size` must be at least 1. Received: batch_size=0"),
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0. Received: learning_rate=0.0"),
        ({"rate_decay": 0.0}, "`rate_decay` must be above 0"),
        ({"weight_decay": -0.1}, "`weight_decay` must be at least 0"),
        ({"label_smoothing": 1.0}, "`label_smoothing` must be below 1"),
        (
            {"class_weight": "even"},
            "`class_weight` must be balanced. .*='even'",
        ),
        ({"strategy": "head", "views": 0}, "`views` must be at least 1"),
        ({"fraction": 1.5}, "`fraction` must be at most 1"),
        (
            {"importance": "size"},
            "`importance` must be taylor or fisher. .*='size'",
        ),
        ({"loss_weights": (1.0, -1.0)}, "`loss_weights` must be at least 0"),
        (
            {"strategy": "cut", "pooling": "none"},
            "must be avg, max, gem or flatten",
        ),
        ({"strategy": "cut", "hidden": -1}, "`hidden` must be at least 0"),
        ({"strategy": "cut", "dropout": 1.0}, "`dropout` must be below 1"),
        ({"ema": -0.5}, "`ema` must be at least 0"),
        ({"patience": 0}, "`patience` must be at least 1"),
        ({"seed": -1}, "`seed` must be at least 0"),
    ],
)
def test_options_that_would_not_be_heeded_are_refused(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(RequestError, match=rule):
        TuneOptions(**options)


def test_an_auxiliary_layer_must_be_above_the_cut() -> None:
    recipe = make_recipe("mobilenet", "random", image_size=SIZE)
    with pytest.raises(RequestError, match="above the cut and below the features"):
        make_trainable(recipe, "embedding", None, "conv_pw_12_relu", auxiliary="conv_pw_3_relu")
    with pytest.raises(RequestError, match="must name a layer"):
        make_trainable(recipe, "embedding", None, "conv_pw_99")


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "cut", "cut": "conv5", "views": 2, "auxiliary": "x", "pooling": "flatten"},
        {"strategy": "cut", "from_pixels": True, "augment": ("flip", "mixup")},
        {"strategy": "head", "hidden": 0, "dropout": 0.0, "views": 1},
        {"strategy": "partial", "blocks": ("conv5",), "fraction": 1.0, "importance": "fisher"},
        {"strategy": "gradual", "augment": (), "auxiliary": "x", "rate_decay": 1.0, "ema": 0.0},
    ],
)
def test_options_that_are_heeded_are_taken(options: dict[str, Any]) -> None:
    taken = TuneOptions(**options)
    assert all(getattr(taken, name) == value for name, value in options.items())


def test_what_is_not_given_is_as_usual_with_the_strategy() -> None:
    cut = TuneOptions(strategy="cut")
    assert [cut.resolved(name) for name in ("epochs", "hidden", "dropout")] == [20, 128, 0.5]
    own = TuneOptions(strategy="cut", epochs=2, hidden=0, dropout=0.0, rate_decay=0.1)
    names = ("epochs", "hidden", "dropout", "rate_decay", "learning_rate")
    assert [own.resolved(name) for name in names] == [2, 0, 0.0, 0.1, 1e-3]  # 0 is given too
    for name in STRATEGIES:
        schedule = TuneOptions(strategy=name).schedule()
        assert schedule.epochs == STRATEGIES[name].epochs
        assert schedule.optimizer == STRATEGIES[name].optimizer
        assert schedule.learning_rate == STRATEGIES[name].learning_rate


def test_activations_are_computed_once_where_a_network_is_cut_unless_told_otherwise() -> None:
    cached = {name for name in STRATEGIES if TuneOptions(strategy=name).is_cached}
    assert cached == {"head", "cut"}
    assert not TuneOptions(strategy="cut", from_pixels=True).is_cached


def test_loss_weights_are_the_auxiliarys_and_the_mains_and_count_if_there_is_one() -> None:
    options = TuneOptions(loss_weights=(2.0, 7.0), auxiliary="x")
    assert options.schedule().loss_weights == (2.0, 7.0)
    assert TuneOptions().schedule().loss_weights == (0.0, 1.0)


def make_mixed() -> TrainableNetwork:
    """A layer of each kind that strategies tell apart; the scale of one is left out."""
    keras = import_keras()
    layers = keras.layers
    pixels = keras.Input((*SIZE, 3))
    x = layers.Conv2D(4, 3, name="block1_conv")(pixels)
    x = layers.BatchNormalization(name="block1_bn", scale=False, trainable=False)(x)
    x = layers.DepthwiseConv2D(3, use_bias=False, name="block2_depthwise")(x)
    x = layers.BatchNormalization(name="block2_bn", trainable=False)(x)
    x = layers.GroupNormalization(2, name="block3_groups")(x)
    x = layers.Dense(4, name="block4_dense")(x)
    x = layers.LayerNormalization(name="block5_layers")(x)
    features = layers.GlobalAveragePooling2D()(x)
    head = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    upper = keras.Model(pixels, {"features": features})
    return TrainableNetwork(keras.Model(pixels, x), lambda p: p / 255.0, None, upper, head)


def paths_of(groups: list[Group]) -> set[str]:
    return {v.path for group in groups[1:] for v in group.variables}


def test_norm_trains_the_scales_and_shifts_of_every_kind_of_normalisation() -> None:
    groups = groups_of(make_mixed(), "norm", rate_decay=0.5)
    assert paths_of(groups) == {
        *("block1_bn/beta", "block2_bn/gamma", "block2_bn/beta"),
        *("block3_groups/gamma", "block3_groups/beta"),
        *("block5_layers/gamma", "block5_layers/beta"),
    }
    # What has nothing to train counts all the same: the rate is of the place in the network.
    found = {group.name: (group.rate, group.from_epoch) for group in groups}
    assert found == {
        "head": (1.0, 1),
        "block5": (0.5, 1),
        "block3": (0.125, 1),
        "block2": (0.0625, 1),
        "block1": (0.03125, 1),
    }


def test_bias_trains_biases_and_the_shifts_of_batch_normalisation() -> None:
    paths = paths_of(groups_of(make_mixed(), "bias"))
    assert {path for path in paths if "block5" not in path and "block3" not in path} == {
        *("block1_conv/bias", "block1_bn/beta", "block2_bn/beta", "block4_dense/bias"),
    }
    assert not any(path.endswith(("kernel", "gamma")) for path in paths)


def test_full_trains_all_but_batch_normalisation_at_one_rate() -> None:
    tiny = make_mixed()
    groups = groups_of(tiny, "full")
    every = {v.path for v in tiny.network.trainable_variables}
    norms = {v.path for x in tiny.network.layers if is_normalisation(x) for v in x.variables}
    assert norms
    assert paths_of(groups) == every - norms
    assert {(group.rate, group.from_epoch) for group in groups} == {(1.0, 1)}
    thawed = paths_of(groups_of(make_mixed(), "full", train_norm=True))
    assert thawed == every | {"block1_bn/beta", "block2_bn/gamma", "block2_bn/beta"}


def test_above_a_cut_nothing_below_it_is_trained() -> None:
    recipe = make_recipe("mobilenet", "random", image_size=SIZE)
    head = import_keras().Sequential()
    cut = replace(make_trainable(recipe, "embedding", None, "conv_pw_11_relu"), head=head)
    groups = groups_of(cut, "cut")
    layers = {path.partition("/")[0] for path in paths_of(groups)}
    assert layers == {"conv_dw_12", "conv_pw_12", "conv_dw_13", "conv_pw_13"}
    assert [group.rate for group in groups] == [0.5**number for number in range(len(groups))]


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_gradual_trains_every_block_however_short_it_is(
    tunable: TrainableNetwork, epochs: int
) -> None:
    starts = [group.from_epoch for group in groups_of(tunable, "gradual", epochs=epochs)]
    assert starts == sorted(starts)
    assert starts[0] == 1
    assert starts[-1] == 1 + epochs // 2


def test_an_auxiliary_head_is_trained_with_the_main_one(tunable: TrainableNetwork) -> None:
    keras = import_keras()
    auxiliary = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    both = replace(tunable, auxiliary_head=auxiliary)
    wanted = [*tunable.head.trainable_variables, *auxiliary.trainable_variables]
    found = groups_of(both, "full")[0].variables
    assert [id(variable) for variable in found] == [id(variable) for variable in wanted]


def test_partial_trains_chosen_channels_of_the_blocks_and_the_head() -> None:
    tiny = make_mixed()
    head, channels = groups_of(tiny, "partial", blocks=("block1", "block2"), fraction=0.5)
    assert [v.path for v in head.variables] == [v.path for v in tiny.head.variables]
    wanted = ["block1_conv/kernel", "block1_conv/bias", "block2_depthwise/kernel"]
    assert [v.path for v in channels.variables] == wanted
    assert (channels.rate, channels.from_epoch) == (1.0, 1)
    num_chosen = [3 * 3 * 3 * 2, 2, 3 * 3 * 2]  # 2 of 4 channels each
    assert [int(m.sum()) for m in channels.masks if m is not None] == num_chosen
    assert num_tuned([channels]) == sum(num_chosen)
    assert num_tuned([head, channels]) == 4 * 2 + 2 + sum(num_chosen)


def test_partial_takes_the_last_blocks_where_none_is_named() -> None:
    tiny = make_mixed()
    groups = groups_of(tiny, "partial", fraction=0.25)
    wanted = {"block2_depthwise/kernel", "block4_dense/kernel", "block4_dense/bias"}
    assert paths_of(groups) == wanted


@pytest.mark.parametrize("strategy", ["norm", "bias"])
def test_a_strategy_that_finds_nothing_to_train_is_refused(strategy: str) -> None:
    keras = import_keras()
    pixels = keras.Input((*SIZE, 3))
    x = keras.layers.Conv2D(4, 3, use_bias=False, name="block1_conv")(pixels)
    upper = keras.Model(pixels, {"features": keras.layers.GlobalAveragePooling2D()(x)})
    head = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    tiny = TrainableNetwork(keras.Model(pixels, x, name="bare"), lambda p: p, None, upper, head)
    with pytest.raises(RequestError, match=f"strategy={strategy} for bare, which has none"):
        groups_of(tiny, strategy)
    with pytest.raises(RequestError, match="`train_norm` is of networks with BatchNormalization"):
        groups_of(tiny, "full", train_norm=True)
    assert paths_of(groups_of(tiny, "full")) == {"block1_conv/kernel"}


def test_a_block_that_is_named_twice_is_trained_once() -> None:
    groups = groups_of(make_mixed(), "partial", blocks=("block1", "block1_conv"), fraction=0.5)
    assert [v.path for v in groups[1].variables] == ["block1_conv/kernel", "block1_conv/bias"]


def test_bias_leaves_a_scale_alone_that_has_no_shift_beside_it() -> None:
    keras = import_keras()
    pixels = keras.Input((*SIZE, 3))
    x = keras.layers.BatchNormalization(center=False, trainable=False, name="a_bn")(pixels)
    x = keras.layers.LayerNormalization(name="b_layers")(x)
    upper = keras.Model(pixels, {"features": keras.layers.GlobalAveragePooling2D()(x)})
    head = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    tiny = TrainableNetwork(keras.Model(pixels, x), lambda p: p, None, upper, head)
    groups = groups_of(tiny, "bias")
    assert paths_of(groups) == {"b_layers/beta"}


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"strategy": "full", "from_pixels": True}, "`from_pixels` is of the strategies head"),
        ({"strategy": "partial", "train_norm": True}, "`train_norm` is of strategies that train"),
        ({"strategy": "partial", "rate_decay": 0.5}, "`rate_decay` is of strategies that train"),
        ({"strategy": "head", "rate_decay": 0.5}, "`rate_decay` is of strategies that train"),
    ],
)
def test_these_are_not_heeded_either(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(RequestError, match=rule):
        TuneOptions(**options)
