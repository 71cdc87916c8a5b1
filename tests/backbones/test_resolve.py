"""From names to recipes: those that are known, and those that are refused."""

import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from embedder.backbones.resolve import find_backbone, make_recipe, weights_file
from embedder.backbones.table import BACKBONES, Backbone
from embedder.backbones.weights import PackagedWeights
from embedder.errors import RecipeError, RequestError, WeightsError


def test_an_unknown_backbone_is_refused_with_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"efficientnet-lite0.*Received: backbone='resnet51'"):
        make_recipe("resnet51")


def test_an_unknown_option_is_refused_with_those_there_are() -> None:
    with pytest.raises(RequestError, match="option: colour. There are: backbone, weights"):
        make_recipe(colour="red")


def test_a_backbones_own_values_are_the_defaults() -> None:
    recipe = make_recipe("efficientnet-lite2")
    assert recipe.image_size == (260, 260)
    assert recipe.crop_fraction == pytest.approx(260 / 292)
    assert recipe.interpolation == "bicubic"
    assert make_recipe(crop="squash").crop_fraction == 1.0


def test_the_default_recipe_of_every_network_is_what_it_was() -> None:
    """Stores are known by it. Another network at the end of the table changes the sum too."""
    recipes = [make_recipe(name, "random:0").fingerprint for name in BACKBONES]
    assert sha256("".join(recipes).encode()).hexdigest()[:16] == "9f85b063cdeec89d"


@pytest.fixture
def weights_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Lite0's weights as a copy that a test may damage; the folder is a package of its own."""
    row = BACKBONES["efficientnet-lite0"]
    package = tmp_path / "copied_weights"
    target = package / row.weights.file
    target.parent.mkdir(parents=True)
    shutil.copyfile(weights_file("efficientnet-lite0"), target)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    weights = PackagedWeights(
        "copied_weights", row.weights.file, row.weights.sha256, "image-embedder"
    )
    changed = Backbone(**{**vars(row), "weights": weights})
    monkeypatch.setitem(BACKBONES, "efficientnet-lite0", changed)
    return target


def test_corrupt_weights_are_refused(weights_in: Path) -> None:
    content = bytearray(weights_in.read_bytes())
    content[len(content) // 2] ^= 1
    weights_in.write_bytes(content)
    with pytest.raises(WeightsError, match=r"is corrupt: its sha256 must be 57934424.*Received"):
        make_recipe()


def test_missing_weights_say_what_to_install(weights_in: Path) -> None:
    weights_in.unlink()
    with pytest.raises(WeightsError, match="pip install 'image-embedder'"):
        make_recipe()


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").touch()
    with pytest.raises(WeightsError, match=r"must end in .weights.h5, .h5 or .keras"):
        make_recipe("mobilenet", str(tmp_path / "weights.pt"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.h5", "must be imagenet, random, random:SEED or a file"),
        ("random:much", "wants a whole number. Received: random:much"),
    ],
)
def test_weights_that_cannot_be_had_are_refused(source: str, message: str) -> None:
    with pytest.raises((WeightsError, RecipeError), match=message):
        make_recipe("mobilenet", source)


@pytest.mark.parametrize("spelling", ["mobilenet-v2", "MobileNetV2", "mobilenet_v2"])
def test_a_name_is_found_as_keras_spells_it(spelling: str) -> None:
    assert find_backbone(spelling)[0] == "mobilenet-v2"


def test_a_network_that_needs_more_pixels_says_so() -> None:
    with pytest.raises(RecipeError, match=r"inception-v3 must be at least 75x75.*\(64, 96\)"):
        make_recipe("inception-v3", "random", image_size=(64, 96))
