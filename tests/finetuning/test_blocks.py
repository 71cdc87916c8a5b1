"""Blocks: where networks can be cut, and which layers are tuned alike."""

from typing import Any

import pytest

from embedder.backbones.layers import leaf_layers
from embedder.backbones.resolve import make_recipe
from embedder.backbones.table import BACKBONES
from embedder.errors import RequestError
from embedder.finetuning.blocks import (
    MAX_GROUPS,
    block_name,
    can_cut,
    find_cut,
    last_layers,
    layer_groups,
    layers_of,
)
from embedder.finetuning.network import make_trainable
from embedder.libraries import import_keras

SIZE = (96, 128)


def chain(*names: str) -> Any:
    """A network of one convolution for each name."""
    keras = import_keras()
    pixels = keras.Input((4, 6, 3))
    x = pixels
    for name in names:
        x = keras.layers.Conv2D(2, 1, name=name)(x)
    return keras.Model(pixels, x)


@pytest.mark.parametrize(
    ("backbone", "block", "cut"),
    [
        ("efficientnet-lite0", None, "stage5_block3_add"),
        ("efficientnet-lite0", "stage7", "stage6_block4_add"),
        ("efficientnet-lite0", "stage6_block3_depthwise", "stage6_block2_add"),  # not within it
        ("resnet50", None, "conv4_block6_out"),
        ("resnet50", "conv5", "conv4_block6_out"),
        ("resnet50-v2", None, "conv4_block5_out"),
        ("vgg16", None, "block4_pool"),
        ("mobilenet", "conv_dw_13", "conv_pw_12_relu"),
        ("mobilenet-v2", "block_13", "block_12_add"),
        ("inception-v3", None, "mixed7"),
        ("convnext-tiny", None, "add_14"),  # a sum that is no layer
    ],
)
def test_a_network_is_cut_below_a_block(backbone: str, block: str | None, cut: str) -> None:
    network = BACKBONES[backbone].make(SIZE)
    assert find_cut(network, network.outputs[0], block) == cut


def test_a_block_that_is_not_there_or_has_nothing_below_is_refused() -> None:
    network = BACKBONES["mobilenet"].make(SIZE)
    with pytest.raises(RequestError, match="such as .*conv_pw_13.*Received: conv_dw_99"):
        find_cut(network, network.outputs[0], "conv_dw_99")
    with pytest.raises(RequestError, match="none below conv1"):
        find_cut(network, network.outputs[0], "conv1")
    network = BACKBONES["nasnet-mobile"].make(SIZE)  # its stem alone could be cut off
    with pytest.raises(RequestError, match="at most 100 layers below"):
        find_cut(network, network.outputs[0], None)


@pytest.mark.parametrize(
    ("backbone", "first", "last"),
    [
        ("efficientnet-lite0", "stage6_block1_expand_conv", "head_bn"),
        ("resnet50", "conv5_block1_1_conv", "conv5_block3_3_bn"),
        # Without a place to be cut at.
        ("nasnet-mobile", "separable_conv_1_reduction_left1_reduce_8", None),
    ],
)
def test_the_last_layers_are_those_of_the_last_resolution(
    backbone: str, first: str, last: str | None
) -> None:
    network = BACKBONES[backbone].make(SIZE)
    found = [layer.name for layer in last_layers(network) if layer.weights]
    assert found[0] == first
    everything = [layer.name for layer in leaf_layers(network) if layer.weights]
    assert found == everything[everything.index(first) :]
    assert last in (found[-1], None)


def test_a_network_is_not_cut_between_two_uses_of_a_layer() -> None:
    keras = import_keras()
    pixels = keras.Input((8, 8, 3))
    below = keras.layers.Conv2D(4, 3, padding="same", name="block1_conv")(pixels)
    pooled = keras.layers.MaxPooling2D(name="block1_pool")(below)
    twice = keras.layers.Conv2D(4, 3, padding="same", name="block2_conv")
    between = keras.layers.ReLU(name="block2_relu")(twice(pooled))
    top = keras.layers.Conv2D(4, 1, name="block3_conv")(twice(between))
    network = keras.Model(pixels, top)
    # What is above `block2_relu` is below it too: training it would change what it is fed with.
    assert not can_cut(network, between, top)
    for block in (None, "block2", "block3"):
        assert find_cut(network, top, block) == "block1_pool"


def test_a_block_is_named_by_whole_words() -> None:
    network = BACKBONES["mobilenet"].make(SIZE)
    names = [layer.name for layer in layers_of(network, "conv_dw_1")]
    assert names == ["conv_dw_1", "conv_dw_1_bn", "conv_dw_1_relu"]  # and no conv_dw_10


def test_a_block_is_not_another_ones_beginning() -> None:
    network = chain("conv5", "conv5_block1", "conv50_block1", "conv5a_block1", "my_conv5_block1")
    assert [layer.name for layer in layers_of(network, "conv5")] == ["conv5", "conv5_block1"]
    assert [layer.name for layer in layers_of(network, "conv50")] == ["conv50_block1"]
    with pytest.raises(RequestError, match=r"Received: conv\.$"):
        layers_of(network, "conv.")  # a name, not a pattern


def test_there_is_no_cut_where_another_path_leads_around_it() -> None:
    network = BACKBONES["mobilenet-v2"].make(SIZE)
    places = {"block_12_add": True, "block_14_expand_relu": False, "block_14_project_BN": False}
    for name, is_one in places.items():
        assert can_cut(network, network.get_layer(name).output, network.outputs[0]) is is_one, name
    recipe = make_recipe("mobilenet-v2", "random", image_size=SIZE)
    assert make_trainable(recipe, "embedding", network, "block_12_add").lower is not None
    with pytest.raises(RequestError, match="in two there. Received: cut=block_14_expand_relu"):
        make_trainable(recipe, "embedding", network, "block_14_expand_relu")


def test_without_feature_maps_the_place_to_cut_must_be_named() -> None:
    keras = import_keras()
    features = keras.Input((5,))
    x = keras.layers.Dense(3, name="low")(features)
    network = keras.Model(features, keras.layers.Dense(3, name="top")(x))
    with pytest.raises(RequestError, match="must have feature maps"):
        find_cut(network, network.outputs[0], None)
    assert find_cut(network, network.outputs[0], "top") == "low"


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("conv5_block1_1_conv", "conv5"),
        ("stage6_block1_expand_bn", "stage6"),
        ("block6a_se_reduce", "block6a"),
        ("stem_conv", "stem"),
        ("conv_dw_13_bn", "conv_dw_13"),
    ],
)
def test_a_layers_name_begins_with_its_blocks(layer: str, block: str) -> None:
    assert block_name(layer) == block


@pytest.mark.parametrize("backbone", ["efficientnet-lite0", "resnet50", "mobilenet"])
def test_every_layer_with_weights_is_in_one_group_from_the_bottom_to_the_top(backbone: str) -> None:
    network = BACKBONES[backbone].make(SIZE)
    groups = layer_groups(network)
    assert 1 < len(groups) <= MAX_GROUPS
    layers = [layer for group in groups.values() for layer in group]
    assert layers == [layer for layer in network.layers if layer.weights]


def test_neighbouring_blocks_share_a_group_where_there_are_too_many() -> None:
    few = layer_groups(chain("a1_x", "a1_y", "a2_x", "stem"))
    assert {name: len(layers) for name, layers in few.items()} == {"a1": 2, "a2": 1, "stem": 1}
    many = layer_groups(chain(*(f"a{number}_conv" for number in range(1, MAX_GROUPS + 3))))
    assert list(many) == ["a1", "a3", "a5", "a6", "a7", "a8", "a9", "a10"]
    assert [len(layers) for layers in many.values()] == [2, 2, 1, 1, 1, 1, 1, 1]


def test_a_network_without_weights_has_no_groups() -> None:
    keras = import_keras()
    pixels = keras.Input((4, 6, 3))
    assert layer_groups(keras.Model(pixels, keras.layers.ReLU()(pixels))) == {}


@pytest.mark.parametrize("backbone", ["inception-v3", "nasnet-mobile"])
def test_layers_that_are_named_by_counting_are_in_one_group_each(backbone: str) -> None:
    network = BACKBONES[backbone].make((96, 128))
    layers = [layer for group in layer_groups(network).values() for layer in group]
    assert layers == [layer for layer in leaf_layers(network) if layer.weights]
