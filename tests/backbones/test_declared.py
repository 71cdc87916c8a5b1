"""Files that declare more than they hold are refused before anything of it is made."""

import hashlib
import io
import json
import resource
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import skops.io
from sklearn.linear_model import LogisticRegression

from embedder.backbones.declared import MAX_DEPTH, check_network, parse_json
from embedder.backbones.graph import load_network
from embedder.backbones.resolve import make_recipe
from embedder.backbones.table import BACKBONES
from embedder.backbones.weight_files import load_keras_model
from embedder.errors import EmbedderError, WeightsError
from embedder.heads.keras_head import KerasHead
from embedder.heads.model import Model

SIZE = (64, 96)


def save(path: Path, layers: list[keras.Layer]) -> Path:
    network = keras.Sequential([keras.Input((*SIZE, 3)), *layers])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, within Keras
        network.save(path)
    return path


def classifier(path: Path) -> Path:
    pool = keras.layers.GlobalAveragePooling2D()
    return save(path, [keras.layers.Conv2D(4, 3), pool, keras.layers.Dense(11)])


def with_members(path: Path, compression: int, **changes: bytes) -> Path:
    """The same archive with other members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in (members | changes).items():
            archive.writestr(name, content)
    return path


def edited(path: Path, change: Callable[[str], str]) -> Path:
    with zipfile.ZipFile(path) as archive:
        config = archive.read("config.json").decode()
    assert change(config) != config
    return with_members(path, zipfile.ZIP_STORED, **{"config.json": change(config).encode()})


def many_units(path: Path) -> Path:
    return edited(classifier(path), lambda text: text.replace('"units": 11', '"units": 500000000'))


def many_layers(path: Path) -> Path:
    """Each is as large as many are, but there are many of them."""
    layers = [keras.layers.Dense(7) for _ in range(20)]
    pool = keras.layers.GlobalAveragePooling2D()

    def change(text: str) -> str:
        return text.replace('"units": 7', '"units": 20000').replace("[null, 7]", "[null, 20000]")

    return edited(save(path, [pool, *layers]), change)


def much_repeated(path: Path) -> Path:
    save(path, [keras.layers.UpSampling2D(2)])
    return edited(path, lambda text: text.replace('"size": [2, 2]', '"size": [9000, 9000]'))


def deep(path: Path) -> Path:
    nested = "[" * 500 + "]" * 500
    return edited(classifier(path), lambda text: f'{{"more": {nested}, {text[1:]}')


def deeper(path: Path) -> Path:
    return edited(classifier(path), lambda _: "[" * 200_000)


def long(path: Path) -> Path:
    content = b'{"a": "' + b"a" * 2**25 + b'"}'
    return with_members(classifier(path), zipfile.ZIP_STORED, **{"config.json": content})


def unpacked(path: Path) -> Path:
    return with_members(classifier(path), zipfile.ZIP_DEFLATED, more=bytes(2**28))


def twice(path: Path) -> Path:
    classifier(path)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")  # of zipfile: the name is there
        archive.writestr("config.json", "{}")
    return path


def declared_array(path: Path) -> Path:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("layers/dense/vars/0", (10**6, 10**6), "f4", chunks=(1, 1000))
    return with_members(
        classifier(path), zipfile.ZIP_STORED, **{"model.weights.h5": buffer.getvalue()}
    )


def without_arrays(path: Path) -> Path:
    return with_members(classifier(path), zipfile.ZIP_STORED, **{"model.weights.h5": b"none"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (many_units, "must be at most 1,048,576. Received: .* with units = 500,000,000"),
        (many_layers, r"declares 30,401,[0-9,]+ bytes \(weights\)"),
        (much_repeated, "must give at most 2,147,483,648 values for an image. .*up_sampling2d"),
        (deep, "nested more than 100 deep"),
        (deeper, "nested more than 100 deep"),
        (long, "longer than 16,777,216 bytes"),
        (unpacked, r"declares 268,[0-9,]+ bytes \(unpacked\)"),
        (twice, "has two members of one name"),
        (declared_array, r"declares 4,000,000,000,000 bytes \(arrays\)"),
        (without_arrays, "is not a whole .keras file"),
    ],
)
def test_a_network_that_declares_too_much_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    path = make(tmp_path / "bomb.keras")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError, match=message):
        load_keras_model(path)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 400 * 2**10


@pytest.mark.parametrize("name", ["mobilenet", "efficientnet-b0", "convnext-tiny", "nasnet-mobile"])
def test_a_network_declares_the_weights_that_it_has(name: str) -> None:
    network = BACKBONES[name].make(BACKBONES[name].image_size)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(network)))
    num_bytes = sum(variable.numpy().nbytes for variable in network.variables)
    check_network(config, num_bytes, Path("x.keras"))
    with pytest.raises(WeightsError, match=f"declares {num_bytes:,} bytes"):
        check_network(config, num_bytes - 1, Path("x.keras"))
    # Nothing is left that Keras would make later.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with keras.StatelessScope():
        pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 2**10


def test_values_are_nested_as_deep_as_is_allowed_and_no_deeper() -> None:
    for depth in (MAX_DEPTH, MAX_DEPTH + 1):
        text = b"[" * depth + b"1" + b"]" * depth
        if depth == MAX_DEPTH:
            parse_json(text)
        else:
            with pytest.raises(ValueError, match="nested more than 100 deep"):
                parse_json(text)


def hard_link(file: h5py.File) -> None:
    file["again"] = file["/"]


def unstored(file: h5py.File) -> None:
    file.create_dataset("more", (10**6, 10**6), "f4", chunks=(1, 1000))


def strange_names(file: h5py.File) -> None:
    file.create_dataset("strange/vars/first", data=[1.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hard_link, "again is held twice"),
        (unstored, "declares 4,0.* bytes"),
        (strange_names, "is not a whole HDF5 file of weights"),
    ],
)
def test_a_file_of_weights_that_declares_too_much_is_refused(
    tmp_path: Path, change: Callable[[h5py.File], None], message: str
) -> None:
    path = tmp_path / "a.weights.h5"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, within Keras
        load_network(make_recipe("mobilenet", "random:1", image_size=SIZE)).save_weights(path)
    load_network(make_recipe("mobilenet", str(path), image_size=SIZE))
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(WeightsError, match=message):
        load_network(make_recipe("mobilenet", str(path), image_size=SIZE))


# Heads ---------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A saved model of a logistic head."""
    features = np.eye(16, dtype=np.float32)
    labels = np.array(["cats", "dogs"])[np.arange(16) % 2]
    Model(
        estimator=LogisticRegression().fit(features, labels),
        recipe=make_recipe("mobilenet", "random:1"),
        column="embedding",
        classes=np.array(["cats", "dogs"]),
        temperature=1.0,
        thresholds=None,
        head="logistic",
        settings={},
    ).save(tmp_path / "model")
    return tmp_path / "model"


def put_head(model: Path, content: bytes) -> None:
    """Put another head into a model, as somebody would who knows of its checksum."""
    (model / "head.skops").write_bytes(content)
    description = json.loads((model / "model.json").read_text())
    description["head"]["sha256"] = hashlib.sha256(content).hexdigest()
    description.pop("checksum", None)
    (model / "model.json").write_text(json.dumps(description))


def changed_head(model: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> bytes:
    with zipfile.ZipFile(model / "head.skops") as archive:
        members = change({name: archive.read(name) for name in archive.namelist()})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def an_array(members: dict[str, bytes]) -> str:
    return next(name for name in members if name.endswith(".npy"))


def declared_rows(members: dict[str, bytes]) -> dict[str, bytes]:
    buffer = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (10**7, 10**6)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return members | {an_array(members): buffer.getvalue()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (declared_rows, "declares 80,000,000,000,000 bytes"),
        (lambda m: m | {"0.npy": bytes(2**28)}, "declares 268,.* bytes"),
        (lambda m: m | {an_array(m): b"none"}, "is not a whole file of a head"),
        (lambda m: m | {"schema.json": b"[" * 10**6}, "nested more than 100 deep"),
        (lambda m: m | {"schema.json": b"{}"}, "head.skops cannot be read: TypeError"),
        (lambda m: m | {"more.npz": b"x"}, "must hold arrays only, and more.npz is none"),
        (lambda m: {an_array(m): m[an_array(m)]}, "is not a whole file of a head"),
    ],
)
def test_a_head_that_declares_too_much_or_is_damaged_is_refused(
    model: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]], message: str
) -> None:
    put_head(model, changed_head(model, change))
    with pytest.raises(EmbedderError, match=message):
        Model.load(model)


def test_a_head_of_keras_is_looked_at_before_it_is_made(tmp_path: Path) -> None:
    description: dict[str, Any] = {
        "parameters": KerasHead().get_params() | {"hidden": []},
        "classes": ["a", "b"],
        "is_multilabel": False,
    }
    with pytest.raises(WeightsError, match="with units = 500,000,000"):
        KerasHead.load(many_units(tmp_path / "head.keras"), description)


def test_a_head_that_is_no_archive_is_refused(model: Path) -> None:
    put_head(model, b"no archive")
    with pytest.raises(EmbedderError, match="is not a whole file of a head"):
        Model.load(model)


def test_a_head_that_gives_other_classes_is_refused(model: Path) -> None:
    three = LogisticRegression().fit(np.eye(3), ["a", "b", "c"])
    put_head(model, skops.io.dumps(three))
    with pytest.raises(EmbedderError, match="must give 2 values for an image"):
        Model.load(model)


_MEASURED = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_the_command_refuses_a_bomb_in_little_memory(tmp_path: Path) -> None:
    """As a stranger's file is met: by a process of its own, which ends with status 2."""
    path, photos = many_layers(tmp_path / "bomb.keras"), tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(b"no picture")
    command = ["extract", photos, tmp_path / "out", "--backbone", "mobilenet", "--weights", path]
    arguments = [sys.executable, "-m", "embedder", *command, "--image-size", "64x96"]
    # By way of a small process: the peak of a child counts what its parent has in memory.
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *arguments], capture_output=True, text=True, check=True
    )
    status, peak_kib = map(int, done.stdout.split())
    assert "must hold what it declares" in done.stderr
    assert status == 2
    assert peak_kib < 2 * 2**20
