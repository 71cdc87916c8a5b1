"""Weights from files: matched by layer name, or refused, and no code of a file is run."""

import json
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from embedder.api import extract
from embedder.backbones.graph import build, load_network
from embedder.backbones.resolve import make_recipe
from embedder.checks.verify import verify
from embedder.errors import RecipeError, WeightsError
from embedder.machine import cache_folder
from tests.backbones.test_table import save_legacy
from tests.support import assert_same_vectors

SIZE = (64, 96)


def mobilenet_with_another_head() -> keras.Model:
    """MobileNet as users have it: a classifier of their own classes, on random weights."""
    network = load_network(make_recipe("mobilenet", "random:7", image_size=SIZE))
    pooled = keras.layers.GlobalAveragePooling2D()(network.output)
    return keras.Model(network.input, keras.layers.Dense(5, name="my_classes")(pooled))


def save(network: keras.Model, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Keras, on its legacy format; of NumPy, within Keras
        if path.name.endswith(".weights.h5"):
            network.save_weights(path)
        else:
            network.save(path)


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)


def expected_features(network: keras.Model) -> np.ndarray:
    """What the network's last feature map is on average, computed plainly."""
    tensor = next(layer for layer in network.layers if layer.name == "conv_pw_13_relu").output
    maps = keras.Model(network.input, tensor)(pixels().astype(np.float32) / 127.5 - 1)
    return np.asarray(maps).mean(axis=(1, 2))


@pytest.mark.parametrize("name", ["mine.weights.h5", "mine.h5", "mine.keras"])
def test_weights_of_a_network_with_another_head_are_loaded(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = mobilenet_with_another_head()
    save(network, tmp_path / name)
    recipe = make_recipe("mobilenet", str(tmp_path / name), image_size=SIZE)
    with caplog.at_level("INFO", "embedder"):
        features = np.asarray(build(recipe)(pixels())["embedding"])
    assert_same_vectors(features, expected_features(network))
    if not name.endswith(".keras"):
        assert "54 of 54 layers of mobilenet_1.00" in caplog.text
        assert "matched by name; not used: my_classes" in caplog.text


@pytest.mark.parametrize(("backbone", "warns"), [("mobilenet", True), ("efficientnet-b0", False)])
def test_a_model_that_preprocesses_itself_is_not_preprocessed_twice_unseen(
    backbone: str, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = keras.Input((*SIZE, 3))
    scaled = keras.layers.Rescaling(1 / 255)(inputs)
    save(keras.Model(inputs, keras.layers.Conv2D(2, 3)(scaled)), tmp_path / "mine.keras")
    build(make_recipe(backbone, str(tmp_path / "mine.keras"), image_size=SIZE))
    assert ("seems to preprocess its pixels itself (rescaling" in caplog.text) == warns


def test_a_network_within_another_is_found_by_its_layers(tmp_path: Path) -> None:
    network = load_network(make_recipe("mobilenet", "random:7", image_size=SIZE))
    inputs = keras.Input((*SIZE, 3))
    outer = keras.Model(inputs, keras.layers.Dense(5)(keras.layers.Flatten()(network(inputs))))
    for name in ("outer.h5", "outer.weights.h5"):
        save(outer, tmp_path / name)
        loaded = load_network(make_recipe("mobilenet", str(tmp_path / name), image_size=SIZE))
        for mine, theirs in zip(loaded.get_weights(), network.get_weights(), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", ["published.h5", "mine.weights.h5"])
def test_names_that_keras_counts_are_matched_by_their_order(tmp_path: Path, name: str) -> None:
    """Inception's layers have no names of their own: `conv2d_7` depends on what came before."""
    network = load_network(make_recipe("inception-v3", "random:7", image_size=(75, 80)))
    if name == "published.h5":
        save_legacy(network, tmp_path / name)
    else:
        save(network, tmp_path / name)
    loaded = load_network(make_recipe("inception-v3", str(tmp_path / name), image_size=(75, 80)))
    assert [layer.name for layer in loaded.layers] != [layer.name for layer in network.layers]
    for mine, theirs in zip(loaded.get_weights(), network.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_store_goes_on_where_its_weights_are_now(tmp_path: Path, archive: Path) -> None:
    old, new = tmp_path / "old.weights.h5", tmp_path / "new.weights.h5"
    save(load_network(make_recipe("mobilenet", "random:1", image_size=SIZE)), old)
    options = {"backbone": "mobilenet", "image_size": SIZE, "layers": ("conv_pw_1_relu",)}
    extract(archive, tmp_path / "store", weights=str(old), limit=5, **options)
    old.rename(new)
    shutil.rmtree(cache_folder())  # so that the file is needed
    store = extract(archive, tmp_path / "store", weights=str(new), **options)
    assert len(store) == 20
    assert store.recipe.weights_source == str(new)
    assert [check for check in verify(store, audit=2) if not check.passed] == []


def lambda_model(path: Path) -> None:
    inputs = keras.Input((*SIZE, 3))
    keras.Model(inputs, keras.layers.Lambda(lambda x: x * 2)(inputs)).save(path)


class Doubling(keras.layers.Layer):
    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        return inputs * 2


def custom_model(path: Path) -> None:
    inputs = keras.Input((*SIZE, 3))
    keras.Model(inputs, Doubling()(inputs)).save(path)


def hidden_lambda(path: Path) -> None:
    """A Lambda inside a wrapper, in a file whose configuration was written by hand."""
    inputs = keras.Input((*SIZE, 3))
    save(keras.Model(inputs, keras.layers.Conv2D(1, 1)(inputs)), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    wrapped = {"module": "keras.layers", "class_name": "Lambda", "config": {}}
    config["config"]["layers"][1]["config"]["activation"] = wrapped
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def other_network(path: Path) -> None:
    save(load_network(make_recipe("vgg16", "random", image_size=SIZE)), path)


def wider_network(path: Path) -> None:
    """The same names, other shapes."""
    save(keras.applications.MobileNet(weights=None, alpha=0.5, include_top=False), path)


def half_a_network(path: Path) -> None:
    network = load_network(make_recipe("mobilenet", "random", image_size=SIZE))
    tensor = network.get_layer("conv_pw_6_relu").output
    save(keras.Model(network.input, tensor), path)


def truncated(path: Path) -> None:
    save(mobilenet_with_another_head(), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def not_weights(path: Path) -> None:
    path.write_text("These are no weights.")


def elsewhere(path: Path) -> None:
    """Weights whose first array is in another file of the machine."""
    save(load_network(make_recipe("mobilenet", "random", image_size=SIZE)), path)
    with h5py.File(path, "a") as file:
        group = file["model_weights"]["conv1"]
        name = group.attrs["weight_names"][0]
        del group[name]
        group[name] = h5py.ExternalLink("other.h5", "/secret")


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (other_network, "vgg.h5", r"does not fit mobilenet_1.*Received: 0 that match"),
        (other_network, "vgg.weights.h5", r"every one of its 54 layers.*Received: 0 that match"),
        (wider_network, "half.h5", r"Received: 0 that match; of another shape: conv1 has"),
        (half_a_network, "short.h5", r"Received: 26 that match; not in the file: conv_dw_7, "),
        (truncated, "cut.h5", "is not a whole HDF5 file of weights"),
        (truncated, "cut.weights.h5", "is not a whole HDF5 file of weights"),
        (truncated, "cut.keras", "is not a whole .keras file"),
        (not_weights, "text.h5", "is not a whole HDF5 file of weights"),
        (not_weights, "text.keras", "is not a whole .keras file"),
        (lambda_model, "lambda.keras", r"must hold Keras's own layers only.*with Lambda"),
        (hidden_lambda, "hidden.keras", r"must hold Keras's own layers only.*with Lambda"),
        (custom_model, "custom.keras", r"must hold Keras's own layers only.*with Doubling"),
        (elsewhere, "link.h5", "is not held by the file"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_leaves_no_store(
    make, name: str, message: str, tmp_path: Path, archive: Path
) -> None:
    make(tmp_path / name)
    with pytest.raises(WeightsError, match=message):
        extract(
            archive,
            tmp_path / "store",
            backbone="mobilenet",
            weights=str(tmp_path / name),
            image_size=SIZE,
        )
    assert not (tmp_path / "store").exists()


def test_code_of_a_model_file_does_not_run(tmp_path: Path) -> None:
    """The Lambda above, made to leave a trace: by another process, as a stranger's file is."""
    path, trace = tmp_path / "trace.keras", tmp_path / "trace"
    code = (
        "import keras; x = keras.Input((64, 96, 3));"
        f"f = lambda y: (open({str(trace)!r}, 'w').close(), y)[1];"
        f"keras.Model(x, keras.layers.Lambda(f)(x)).save({str(path)!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    trace.unlink()
    with pytest.raises(WeightsError, match="Lambda"):
        load_network(make_recipe("mobilenet", str(path), image_size=SIZE))
    assert not trace.exists()


def test_a_model_for_other_pictures_says_which(tmp_path: Path) -> None:
    save(mobilenet_with_another_head(), tmp_path / "mine.keras")
    recipe = make_recipe("mobilenet", str(tmp_path / "mine.keras"), image_size=(96, 96))
    with pytest.raises(RecipeError, match=r"takes, \(64, 96, 3\).*image_size=\(96, 96\)"):
        build(recipe)


def test_other_weights_are_another_recipe(tmp_path: Path, archive: Path) -> None:
    first = load_network(make_recipe("mobilenet", "random:1", image_size=SIZE))
    save(first, tmp_path / "a.weights.h5")
    recipe = make_recipe("mobilenet", str(tmp_path / "a.weights.h5"), image_size=SIZE)
    save(
        load_network(make_recipe("mobilenet", "random:2", image_size=SIZE)),
        tmp_path / "a.weights.h5",
    )
    again = make_recipe("mobilenet", str(tmp_path / "a.weights.h5"), image_size=SIZE)
    assert recipe.fingerprint != again.fingerprint
    with pytest.raises(WeightsError, match=f"made with weights {recipe.weights}.*{again.weights}"):
        build(recipe)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["mine.keras", "mine.weights.h5"])
def test_weights_that_are_no_numbers_are_refused_before_a_store_is_made(
    tmp_path: Path, archive: Path, name: str, value: float
) -> None:
    network = mobilenet_with_another_head()
    weight = next(weight for weight in network.weights if "conv_pw_5" in weight.path)
    array = weight.numpy()
    array.flat[-1] = value
    weight.assign(array)
    save(network, tmp_path / name)
    with pytest.raises(WeightsError, match=rf"must be finite.*{name}, in which 1 of .*conv_pw_5"):
        source = str(tmp_path / name)
        extract(archive, tmp_path / "out", backbone="mobilenet", weights=source, image_size=SIZE)
    assert not (tmp_path / "out").exists()
