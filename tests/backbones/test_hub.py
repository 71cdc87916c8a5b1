"""Image networks of KerasHub: small ones with random weights, since presets must be downloaded."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedder import extract
from embedder.backbones.graph import build, load_network
from embedder.backbones.resolve import find_backbone, make_recipe
from embedder.checks.conformance import check_features, check_input_stage
from embedder.checks.verify import verify
from embedder.errors import RecipeError, RecipeMismatch, WeightsError
from embedder.extraction.extract import run_extraction
from embedder.extraction.options import RunOptions
from embedder.machine import gpus
from tests.support import assert_same_vectors

keras_hub = pytest.importorskip(
    "keras_hub", reason="needs KerasHub: pip install 'image-embedder[hub]'"
)

TOWER = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "intermediate_dim": 32}
TEXT = TOWER | {"vocabulary_size": 30, "embedding_dim": 16, "max_sequence_length": 8}


def vit() -> Any:
    return keras_hub.models.ViTBackbone(
        *((64, 64, 3), 16, 2, 2, 16, 32), use_class_token=True, name="a_vit"
    )


def dinov2() -> Any:
    return keras_hub.models.DINOV2Backbone(patch_size=16, image_shape=(64, 64, 3), **TOWER)


def clip() -> Any:
    from keras_hub.src.models.clip.clip_text_encoder import CLIPTextEncoder

    vision = keras_hub.models.CLIPVisionEncoder(patch_size=16, image_shape=(64, 64, 3), **TOWER)
    text = {**TEXT, "intermediate_dim": 32}
    return keras_hub.models.CLIPBackbone(vision, CLIPTextEncoder(**text), projection_dim=12)


def siglip() -> Any:
    from keras_hub.src.models.siglip.siglip_text_encoder import SigLIPTextEncoder

    vision = keras_hub.models.SigLIPVisionEncoder(patch_size=16, image_shape=(64, 64, 3), **TOWER)
    text = {**TEXT, "projection_dim": 16}
    return keras_hub.models.SigLIPBackbone(vision, SigLIPTextEncoder(**text))


def resnet() -> Any:
    return keras_hub.models.ResNetBackbone(
        *([64], [7], [64, 32], [1, 1], [1, 2], "basic_block"), image_shape=(64, 64, 3)
    )


def save_preset(backbone: Any, folder: Path, **converter: Any) -> str:
    """Write a folder as `save_to_preset` does, and return its backbone name."""
    options = {"image_size": (64, 64), "scale": 1 / 127.5, "offset": -1.0} | converter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy and Keras, within KerasHub
        backbone.save_to_preset(folder)
        keras_hub.layers.ImageConverter(**options).save_to_preset(folder)
    return f"hub:{folder}"


@pytest.fixture(autouse=True)
def _quiet_keras_hub() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy, within Keras
        yield


@pytest.mark.parametrize(
    ("make", "dim"), [(vit, 16), (dinov2, 16), (clip, 12), (siglip, 16), (resnet, 32)]
)
def test_a_network_gets_its_own_pixels_on_both_engines(make: Any, dim: int, tmp_path: Path) -> None:
    scale, offset = [0.0175, 0.0172, 0.017], [-2.1, -2.0, -1.8]
    name = save_preset(make(), tmp_path / "preset", scale=scale, offset=offset)
    recipe = make_recipe(name)
    assert find_backbone(name)[1].dim == dim
    assert recipe.image_size == (64, 64)
    checks = [check_input_stage(recipe), *check_features(recipe, gpus())]
    assert [check for check in checks if not check.passed] == []


def test_the_image_tower_of_clip_gives_the_embedding_that_texts_are_compared_with(
    tmp_path: Path,
) -> None:
    backbone = clip()
    recipe = make_recipe(save_preset(backbone, tmp_path / "preset"))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    images = pixels.astype(np.float32) / 127.5 - 1
    expected = np.asarray(backbone.get_vision_embeddings(images))
    received = np.asarray(build(recipe)(pixels)["embedding"])
    assert_same_vectors(received, expected)


def test_a_preset_is_extracted_and_audited(archive: Path, tmp_path: Path) -> None:
    name = save_preset(dinov2(), tmp_path / "dino", crop_to_aspect_ratio=False)
    store = extract(archive, tmp_path / "store", backbone=name)
    assert store.vectors().shape == (20, 16)
    assert (store.recipe.backbone, store.recipe.crop) == ("hub:dino", "squash")
    assert all(check.passed for check in verify(store, str(archive), audit=3))
    # The same weights elsewhere are the same recipe; others are another.
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "dino").rename(tmp_path / "elsewhere" / "dino")
    assert make_recipe(f"hub:{moved}").fingerprint == store.recipe.fingerprint
    other = save_preset(dinov2(), tmp_path / "other" / "dino", crop_to_aspect_ratio=False)
    with pytest.raises(RecipeMismatch, match="made with another recipe. It has weights: "):
        extract(archive, tmp_path / "store", backbone=other)


def test_tokens_are_stored_as_they_are_when_asked(archive: Path, tmp_path: Path) -> None:
    name = save_preset(vit(), tmp_path / "vit")
    recipe = make_recipe(name, pooling="none")
    run_extraction(archive, {str(tmp_path / "s"): recipe}, RunOptions(workers=2))
    from embedder import Store

    assert Store(tmp_path / "s").vectors().shape == (20, 17, 16)  # a class token, and 4 x 4 patches


def test_what_is_no_network_of_images_is_refused(tmp_path: Path) -> None:
    text = keras_hub.models.BertBackbone(
        vocabulary_size=30, num_layers=1, num_heads=1, hidden_dim=8, intermediate_dim=8
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text.save_to_preset(tmp_path / "bert")
    with pytest.raises((RecipeError, WeightsError), match="bert"):
        make_recipe(f"hub:{tmp_path / 'bert'}")


def test_a_preset_that_cannot_be_had_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"(?s)nothing_there cannot be loaded.*hub:FOLDER"):
        make_recipe("hub:nothing_there")


def test_a_preset_that_could_run_code_is_refused(tmp_path: Path) -> None:
    name = save_preset(vit(), tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    config["module"], config["registered_name"] = "os", "strange>system"
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"could run code. Received: .*config.json with ViT"):
        make_recipe(name)


def test_a_preset_of_another_size_says_which(tmp_path: Path) -> None:
    name = save_preset(vit(), tmp_path / "vit")
    with pytest.raises(RecipeError, match=r"takes, \(64, 64, 3\).*image_size=\(96, 96\)"):
        load_network(make_recipe(name, image_size=(96, 96)))


def test_a_preset_brings_its_weights(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="brings its own weights. Received: weights=random"):
        make_recipe(f"hub:{tmp_path}", "random")


@pytest.mark.parametrize("content", ["{", "[" * 100_000], ids=["cut", "nested"])
def test_a_preset_whose_configuration_cannot_be_read_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(WeightsError, match=r"config\.json cannot be read: "):
        make_recipe(f"hub:{tmp_path}")
