"""Blocks: where networks can be cut, and which layers are tuned alike."""

import pytest

from embedder.blocks import MAX_GROUPS, block_name, find_cut, layer_groups, layers_of
from embedder.errors import RecipeError
from embedder.networks import BACKBONES

SIZE = (96, 128)


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
    ],
)
def test_a_network_is_cut_below_a_block(backbone: str, block: str | None, cut: str) -> None:
    network = BACKBONES[backbone].make(SIZE)
    assert find_cut(network, network.outputs[0], block) == cut


def test_a_block_that_is_not_there_or_has_nothing_below_is_refused() -> None:
    network = BACKBONES["mobilenet"].make(SIZE)
    with pytest.raises(RecipeError, match="such as .*conv_pw_13.*Received: conv_dw_99"):
        find_cut(network, network.outputs[0], "conv_dw_99")
    with pytest.raises(RecipeError, match="none below conv1"):
        find_cut(network, network.outputs[0], "conv1")


def test_a_block_is_named_by_whole_words() -> None:
    network = BACKBONES["mobilenet"].make(SIZE)
    names = [layer.name for layer in layers_of(network, "conv_dw_1")]
    assert names == ["conv_dw_1", "conv_dw_1_bn", "conv_dw_1_relu"]  # and no conv_dw_10


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
