"""Image networks of KerasHub: small ones with random weights, since presets must be downloaded."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedder import extract
from embedder.backbones.graph import build, load_network
from embedder.backbones.resolve import find_backbone, make_recipe
from embedder.checks.conformance import check_input_stage
from embedder.checks.verify import verify
from embedder.engines import call_apart
from embedder.errors import RecipeError, RecipeMismatch, WeightsError
from embedder.extraction.extract import run_extraction
from embedder.extraction.options import RunOptions
from embedder.store import Store
from tests.engines.each_network import Embedded, embed_each, pictures
from tests.engines.test_engine import cosines, needs_precision
from tests.engines.test_jax import run_without_tensorflow
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


def dinov3() -> Any:
    return keras_hub.models.DINOV3Backbone(patch_size=16, image_shape=(64, 64, 3), **TOWER)


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


FAMILIES = {vit: 16, dinov2: 16, dinov3: 16, clip: 12, siglip: 16, resnet: 32}


@pytest.fixture(scope="module")
def presets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A backbone's name for each family."""
    folder = tmp_path_factory.mktemp("presets")
    options = {"scale": [0.0175, 0.0172, 0.017], "offset": [-2.1, -2.0, -1.8]}
    return {
        make.__name__: save_preset(make(), folder / make.__name__, **options) for make in FAMILIES
    }


@pytest.fixture(scope="module")
def on_jax(presets: dict[str, str]) -> Embedded:
    networks = {family: {"backbone": name} for family, name in presets.items()}
    rounded = networks["vit"] | {"precision": "bfloat16"}
    needs_precision("bfloat16")
    return call_apart("jax", embed_each, "jax", networks | {"bfloat16": rounded})


@pytest.mark.parametrize(("make", "dim"), FAMILIES.items())
def test_a_network_gets_its_own_pixels_on_each_engine(
    make: Any, dim: int, presets: dict[str, str], on_jax: Embedded
) -> None:
    name, family = presets[make.__name__], make.__name__
    recipe, row = make_recipe(name), find_backbone(name)[1]
    assert row.dim == dim
    assert recipe.image_size == (64, 64)
    assert check_input_stage(recipe).passed
    found = {"jax": on_jax[family]}
    for engine in ("openvino", "tensorflow"):
        found |= {engine: embed_each(engine, {family: {"backbone": name}})[family]}
    pixels = row.preprocess(pictures(recipe.image_size).astype(np.float32))
    maps = load_network(recipe).predict(pixels, verbose=0)
    plain = maps.reshape(len(maps), -1, dim).mean(axis=1)
    for engine, (same_recipe, vectors) in found.items():
        assert same_recipe.fingerprint == recipe.fingerprint, engine
        assert cosines(vectors, plain).min() >= 0.9999, engine
        assert cosines(vectors[:1] - vectors[1:], plain[:1] - plain[1:]).min() >= 0.999, engine


def test_bfloat16_on_jax_is_close_to_float32_and_not_the_same(on_jax: Embedded) -> None:
    (_, exact), (_, rounded) = on_jax["vit"], on_jax["bfloat16"]
    assert cosines(exact, rounded).min() > 0.99
    assert np.abs(exact - rounded).max() > 1e-4 * np.abs(exact).max()


def test_a_preset_is_extracted_on_jax_where_there_is_no_tensorflow(
    presets: dict[str, str], archive: Path, tmp_path: Path
) -> None:
    command = ["extract", archive, tmp_path / "s", "--backbone", presets["dinov3"]]
    done = run_without_tensorflow(*command, "--engine", "jax")
    assert done.returncode == 0, done.stderr
    assert "20 in the store, 20 new" in done.stdout
    (run,) = Store(str(tmp_path / "s")).runs()
    assert run["engine"] == "jax on CPU"


def test_a_preset_is_opened_on_what_computes_whatever_keras_backend_says(
    presets: dict[str, str], archive: Path, tmp_path: Path
) -> None:
    command = ["extract", archive, tmp_path / "s", "--backbone", presets["vit"], "--engine", "jax"]
    done = subprocess.run(
        [sys.executable, "-m", "embedder", *map(str, command)],
        capture_output=True,
        text=True,
        env=os.environ | {"KERAS_BACKEND": "torch"},
    )
    assert done.returncode == 0, done.stderr
    assert "20 in the store, 20 new" in done.stdout
    assert "a process of its own" not in done.stderr  # as where Keras runs on something else
    assert "absl" not in done.stderr  # nor what TensorFlow says, which KerasHub imports


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
