"""Export: one file from pixels to probabilities, which gives what `predict` gives, or is gone."""

import json
import logging
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import typer
from numpy.typing import NDArray
from typer.testing import CliRunner

import embedder
from embedder.backbones.table import BACKBONES
from embedder.cli import heads as cli_heads
from embedder.decode.decode import decode_rgb
from embedder.engines import call_apart
from embedder.errors import ModelError, RequestError, Unfinished
from embedder.heads.model import Model
from embedder.heads.model_folder import Record
from embedder.heads.table import make_estimator
from embedder.inference.export import export
from embedder.inference.formats import FORMATS, write_and_run
from embedder.libraries import import_keras
from embedder.recipe import Recipe
from embedder.store.store import Store
from tests.inference.in_jax import export_all
from tests.support import TESTS, make_archive, make_record

SIZE = (48, 64)  # unlike sides, so that swapped axes show
CLASSES = np.array(["cats", "do\ngs"])  # the name of a folder can hold a line break
FILES = {
    "keras": ["model.keras"],
    "saved-model": ["saved_model"],
    "onnx": ["model.onnx"],
    "openvino": ["model.bin", "model.xml"],
    "litert": ["model.tflite"],
}


def make_model(store: Store, head: str, settings: dict[str, Any], **changes: Any) -> Model:
    """A head that tells the archive's cats from its dogs, and knows where they are."""
    codes = np.array([image_id.startswith("dogs") for image_id in store.ids()]).astype(int)
    is_multilabel = "thresholds" in changes
    labels = np.stack([np.ones_like(codes), codes], axis=1) if is_multilabel else CLASSES[codes]
    labels[0] = 0 if is_multilabel else labels[0]
    estimator = make_estimator(head, settings, None, 0, is_multilabel)
    model = Model(
        estimator=estimator.fit(store.vectors(), labels),
        recipe=store.recipe,
        column="embedding",
        classes=CLASSES,
        temperature=0.5,
        thresholds=None,
        head=head,
        settings=settings,
        record=make_record(source=store.runs()[-1]["source"]),
    )
    return replace(model, **changes)


class World:
    """Twenty images, their features, and a model of them."""

    def __init__(self, folder: Path, backbone: str, **options: Any) -> None:
        self.photos = make_archive(folder / "photos", 20)
        self.store = embedder.extract(
            self.photos,
            folder / "features",
            backbone=backbone,
            weights="random:1",
            image_size=SIZE,
            **options,
        )
        self.model = folder / "model"
        make_model(self.store, "logistic", {"scaling": "standard", "C": 0.1}).save(self.model)

    def pixels(self) -> NDArray[np.uint8]:
        """All images, in the order of the store."""
        files = [self.photos / image_id for image_id in self.store.ids()]
        return np.stack([decode_rgb(x.read_bytes(), self.store.recipe).pixels for x in files])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), "efficientnet-lite0")


def described(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "export.json").read_text())
    return content


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("file_format", FORMATS)
def test_what_is_exported_gives_the_probabilities_and_embeddings_of_the_model(
    world: World, tmp_path: Path, file_format: str
) -> None:
    out = tmp_path / "out"
    exported = export(world.model, out, file_format)
    assert names_in(out) == sorted([*FILES[file_format], "export.json", "labels.txt"])
    assert names_in(tmp_path) == ["out"]
    assert exported.num_images == 16
    assert max(exported.differences.values()) < 1e-5
    # All of them in one batch, which is of another size than any of the comparison.
    outputs = FORMATS[file_format].load(out / exported.file)(world.pixels())
    assert {array.dtype for array in outputs.values()} == {np.dtype(np.float32)}
    vectors = world.store.vectors()
    scale = np.abs(vectors).max()
    np.testing.assert_allclose(outputs["embedding"] / scale, vectors / scale, rtol=0, atol=1e-5)
    expected = Model.load(world.model).probabilities(vectors)
    assert expected.max(axis=1).min() < 0.995 < expected.max()  # else rounding would not show
    np.testing.assert_allclose(outputs["probabilities"], expected, rtol=0, atol=1e-5)


def test_the_description_has_all_that_is_needed_to_use_it(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(world.model, out, "keras")
    content = described(out)
    assert (out / "labels.txt").read_text() == "cats\ndo gs\n"
    assert content["classes"] == ["cats", "do\ngs"]
    assert content["input"]["name"] == "pixels"
    assert content["input"]["shape"] == [None, 48, 64, 3]
    assert content["outputs"]["probabilities"] == {"dtype": "float32", "shape": [None, 2]}
    assert content["outputs"]["embedding"]["shape"] == [None, 1280]
    assert Recipe(**content["recipe"]).fingerprint == world.store.recipe.fingerprint
    assert content["fingerprint"] == world.store.recipe.fingerprint
    assert content["head"]["sha256"] == Model.load(world.model).head_sha256
    assert content["parity"]["num_images"] == 16
    assert {"keras", "tensorflow"} <= set(content["versions"])


LOAD = """
import sys
sys.modules["embedder"] = None  # importing it is an error
import keras, numpy
network = keras.saving.load_model(sys.argv[1], safe_mode=True)
outputs = network.predict(numpy.load(sys.argv[2]), verbose=0)
numpy.savez(sys.argv[3], **outputs)
"""


def test_the_keras_file_needs_nothing_but_keras_even_where_channels_are_swapped(
    tmp_path: Path,
) -> None:
    caffe = World(tmp_path / "caffe", "vgg16")  # blue first, and means subtracted
    exported = export(caffe.model, tmp_path / "out", "keras")
    np.save(tmp_path / "pixels.npy", caffe.pixels())
    files = exported.path / exported.file, tmp_path / "pixels.npy", tmp_path / "outputs.npz"
    subprocess.run([sys.executable, "-c", LOAD, *files], check=True, capture_output=True)
    received = np.load(tmp_path / "outputs.npz")["embedding"]
    expected = caffe.store.vectors()
    assert np.abs(received - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_pixels_are_the_only_input_of_onnx_even_where_a_mean_is_subtracted(
    tmp_path: Path,
) -> None:
    keras = import_keras()
    pixels = keras.Input((*SIZE, 3), dtype="uint8", name="pixels")
    preprocessed = BACKBONES["vgg16"].preprocess(keras.ops.cast(pixels, "float32"))
    values = keras.layers.Flatten()(keras.layers.Conv2D(4, 9, strides=9)(preprocessed))
    network = keras.Model(pixels, {"probabilities": values, "embedding": values})
    image = np.random.default_rng(0).integers(0, 256, (1, *SIZE, 3), np.uint8)
    received = write_and_run(network, FORMATS["onnx"], tmp_path / "model.onnx", image)
    expected = np.asarray(network(image)["embedding"])
    assert np.abs(received["embedding"] - expected).max() < 1e-5 * np.abs(expected).max()
    inputs = onnx.load(tmp_path / "model.onnx").graph.input
    assert [tensor.name for tensor in inputs] == ["pixels"]


def test_several_labels_have_a_probability_each_and_thresholds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path / "world", "mobilenet-v3-small", l2_normalise=True, pooling="gem")
    rounded = {"precision": "bfloat16", "store_dtype": "float16", "views": 2}
    recipe = world.store.recipe.model_copy(update=rounded)
    thresholds = np.array([0.25, 0.75])
    model = make_model(world.store, "ridge", {}, thresholds=thresholds, recipe=recipe)
    model.save(tmp_path / "model")
    with caplog.at_level(logging.WARNING, "embedder"):
        exported = export(tmp_path / "model", tmp_path / "out", "keras")
    assert "computes in bfloat16, and what is exported in float32" in caplog.text
    assert max(exported.differences.values()) < 1e-5
    content = described(tmp_path / "out")
    assert content["thresholds"] == [0.25, 0.75]
    assert content["recipe"]["precision"] == "float32"
    outputs = FORMATS["keras"].load(tmp_path / "out" / "model.keras")(world.pixels())
    assert np.abs(outputs["probabilities"].sum(axis=1) - 1).min() > 0.01
    np.testing.assert_allclose(np.linalg.norm(outputs["embedding"], axis=1), 1, atol=1e-5)


def test_what_differs_is_refused_and_leaves_all_as_it_was(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(world.model, out, "keras")
    before = {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]}
    with pytest.raises(Unfinished, match=r"by 1e-12 at most\. Received: .* of probabilities, "):
        export(world.model, out, "keras", tolerance=1e-12)
    assert {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]} == before
    with pytest.raises(Unfinished, match="Nothing was kept"):
        export(world.model, tmp_path / "new", "keras", tolerance=1e-12)
    assert names_in(tmp_path) == ["out"]


def test_a_killed_export_leaves_the_older_one_and_the_next_one_removes_its_rest(
    world: World, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(world.model, out, "openvino", num_images=1)
    command = ["export", str(world.model), str(out), "--format", "keras", "--images", "1"]
    killing = TESTS / "killing.py"
    done = subprocess.run([sys.executable, killing, "labels.txt", "1", *command])
    assert done.returncode == -signal.SIGKILL
    assert names_in(out) == ["export.json", "labels.txt", "model.bin", "model.xml"]
    assert len(names_in(tmp_path)) == 2
    export(world.model, out, "keras", num_images=1)
    assert names_in(out) == ["export.json", "labels.txt", "model.keras"]
    assert names_in(tmp_path) == ["out"]


def test_a_format_takes_the_place_of_another(world: World, tmp_path: Path) -> None:
    export(world.model, tmp_path, "keras", num_images=1)
    assert export(world.model, tmp_path, "openvino", num_images=1).path == tmp_path
    assert names_in(tmp_path) == ["export.json", "labels.txt", "model.bin", "model.xml"]


@pytest.mark.parametrize("name", ["notes.txt", "model.keras"])
def test_a_folder_that_holds_something_else_is_refused(
    world: World, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ModelError, match="to an empty folder, over an older export"):
        export(world.model, tmp_path, "keras")
    assert names_in(tmp_path) == [name]


def test_the_images_are_spread_over_the_source_and_those_that_cannot_be_read_left_out(
    world: World, tmp_path: Path
) -> None:
    photos = make_archive(tmp_path / "photos", 10)
    for number in range(10):
        (photos / "cats" / f"_broken-{number}.jpg").write_bytes(b"no picture")
    exported = export(world.model, tmp_path / "out", "keras", source=photos, num_images=4)
    assert exported.num_images < 4
    (tmp_path / "list.txt").write_text("photos/cats/_broken-1.jpg")
    with pytest.raises(RequestError, match=r"None of the images .* Name images with --source"):
        export(world.model, tmp_path / "new", "keras", source=tmp_path / "list.txt")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "does not say where its images are"),
        (make_record(source=None), "does not say where its images are"),
        (make_record(source="no/such/folder"), "no/such/folder, which does not exist"),
    ],
)
def test_a_model_whose_images_are_not_at_hand_asks_for_a_source(
    world: World, tmp_path: Path, record: Record | None, reason: str
) -> None:
    replace(Model.load(world.model), record=record).save(tmp_path / "model")
    with pytest.raises(RequestError, match=rf"{reason}\. Name images with --source"):
        export(tmp_path / "model", tmp_path / "out", "keras")
    assert names_in(tmp_path) == ["model"]


def test_a_request_that_makes_no_sense_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match=r"keras, saved-model, onnx.*\. Received: coreml"):
        export(world.model, tmp_path, "coreml")
    with pytest.raises(RequestError, match=r"at least 1\. Received: num_images=0"):
        export(world.model, tmp_path, "keras", num_images=0)
    monkeypatch.setitem(sys.modules, "tf2onnx", None)  # as if it were not installed
    with pytest.raises(
        RequestError, match=r"needs tf2onnx\. .*pip install 'image-embedder\[onnx\]'"
    ):
        export(world.model, tmp_path, "onnx")
    make_model(world.store, "knn", {"n_neighbors": 3}).save(tmp_path / "model")
    with pytest.raises(RequestError, match="The head must be linear or a network"):
        export(tmp_path / "model", tmp_path / "out", "keras")
    assert names_in(tmp_path) == ["model"]


def test_the_command_tells_what_it_wrote_and_how_much_it_differs(
    world: World, tmp_path: Path
) -> None:
    app = typer.Typer()
    app.command()(cli_heads.export)
    arguments = [str(world.model), str(tmp_path / "out"), "--format", "keras"]
    result = CliRunner().invoke(app, [*arguments, "--images", "3", "--source", str(world.photos)])
    assert result.exit_code == 0, result.output
    facts = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    assert facts["exported"].strip() == str(tmp_path / "out" / "model.keras")
    assert facts["compared on"].strip() == "3 images, as `predict` has them"
    assert "of probabilities" in facts["differences"]
    assert CliRunner().invoke(app, [*arguments, "--quiet"]).stdout == ""
    refused = CliRunner().invoke(app, [*arguments[:-1], "coreml"])
    assert refused.exit_code == 2
    assert "Received: coreml" in refused.stderr


@pytest.mark.slow
def test_from_jax_only_the_format_of_keras_can_be_written(world: World, tmp_path: Path) -> None:
    found = call_apart("jax", export_all, world.model, tmp_path)
    differences = found.pop("keras")
    assert isinstance(differences, dict)
    assert max(differences.values()) < 1e-5
    assert names_in(tmp_path) == ["keras"]
    assert len(found) == len(FORMATS) - 1
    for refused in found.values():
        assert "must be tensorflow. Received: a process in which it runs on jax" in str(refused)
