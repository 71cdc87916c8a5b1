"""Every network of the table: built, exported, on both engines, with its own pixels.

A part of the networks, another each day, is tested by default; `-m slow` tests the others, and
those that take minutes.
"""

import datetime
import gc
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras.src.legacy.saving import legacy_h5_format
from keras.src.utils import file_utils

from embedder.backbones.graph import load_network
from embedder.backbones.layers import leaf_layers
from embedder.backbones.resolve import make_recipe
from embedder.backbones.table import BACKBONES
from embedder.backbones.weights import PublishedWeights
from embedder.checks.conformance import check_input_stage
from tests.backbones.in_keras import checks_of_features

_DAYS = 21  # until every network had its turn: two of them a day
_TODAY = datetime.date.today().toordinal()
_MAX_PARAMETERS = 30e6  # of a network that is tested by default
SOME = [
    pytest.param(
        name,
        marks=()
        if number % _DAYS == _TODAY % _DAYS and row.num_parameters < _MAX_PARAMETERS
        else pytest.mark.slow,
    )
    for number, (name, row) in enumerate(BACKBONES.items())
]
# Height and width differ, so that swapped axes show; 75 is the most that a network asks for.
SIZE = (80, 112)


@pytest.fixture(autouse=True)
def _nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The networks and exported models of the whole table would be tens of gigabytes."""
    monkeypatch.setenv("EMBEDDER_CACHE", str(tmp_path / "cache"))
    yield
    shutil.rmtree(tmp_path)
    keras.backend.clear_session()
    gc.collect()


def save_legacy(network: keras.Model, file: Path) -> None:
    """Save weights as the published files are: HDF5 by layer name, of before Keras 3."""
    with h5py.File(file, "w") as handle, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy, within Keras
        legacy_h5_format.save_weights_to_hdf5_group(handle, network)


@pytest.mark.parametrize("name", SOME)
def test_a_network_is_as_the_table_says_and_gets_its_own_pixels(name: str) -> None:
    row = BACKBONES[name]
    recipe = make_recipe(name, "random", image_size=SIZE)
    network = load_network(recipe)
    assert network.count_params() == row.num_parameters
    assert network.output_shape[-1] == row.dim
    checks = checks_of_features(recipe)
    assert [check for check in checks if not check.passed] == []
    assert len(checks) == 6


@pytest.mark.parametrize("name", SOME)
def test_published_weights_are_loaded_as_keras_loads_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = BACKBONES[name]
    if not isinstance(row.weights, PublishedWeights):
        pytest.skip("these weights are not Keras's: test_graph.py has their test")
    published = load_network(make_recipe(name, "random:1", image_size=SIZE))
    for layer in leaf_layers(published):
        if "efficientnet-b" in name and isinstance(layer, keras.layers.Normalization):
            # The published files hold the standard deviation in place of the variance.
            mean, stddev = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
            layer.set_weights([mean, stddev, np.int32(0)])
    file = tmp_path / row.weights.file
    save_legacy(published, file)
    asked_for: list[tuple[str, str, str | None]] = []

    def get_file(fname: str, origin: str, **options: Any) -> str:
        asked_for.append((fname, origin, options.get("file_hash")))
        return str(file)

    monkeypatch.setattr(file_utils, "get_file", get_file)
    constructor = row.make.args[0]  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the size is not 224
        theirs = getattr(keras.applications, constructor)(
            include_top=False, input_shape=(*SIZE, 3), weights="imagenet"
        )
    assert asked_for == [(row.weights.file, row.weights.url, row.weights.digest or None)]
    ours = row.make(SIZE)
    row.load(ours, file)
    pixels = np.random.default_rng(0).uniform(0, 255, (1, *SIZE, 3)).astype(np.float32)
    inputs = row.preprocess(pixels)
    expected = theirs.predict(inputs, verbose=0)
    received = ours.predict(inputs, verbose=0)
    np.testing.assert_allclose(received, expected, atol=1e-4 * np.abs(expected).max())


def test_a_wrong_preprocessing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the checks above are for: other pixels in the graph than the network's own."""
    row = BACKBONES["resnet50"]
    recipe = make_recipe("resnet50", "random", image_size=SIZE)
    own = row.preprocess

    def without_the_order_of_channels(pixels: Any) -> Any:
        return own(pixels if isinstance(pixels, np.ndarray) else pixels[..., ::-1])

    changed = type(row)(**{**vars(row), "preprocess": without_the_order_of_channels})
    monkeypatch.setitem(BACKBONES, "resnet50", changed)
    assert not check_input_stage(recipe).passed
    _, *others = checks_of_features(recipe)
    failed = [check.name for check in others if not check.passed]
    assert failed == ["openvino: as plain Keras", "tensorflow: as plain Keras"]
