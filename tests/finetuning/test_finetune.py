"""Fine-tuning: a tuned model is a model, its test images stay unseen, and nothing else changes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

import embedder
from embedder.analysis.compare import compare
from embedder.backbones.graph import load_network
from embedder.decode.decode import decode_rgb
from embedder.errors import ModelError, RequestError, Unfinished, WeightsError
from embedder.evaluation import tested_model  # pytest would take its class for a test
from embedder.extraction.options import RunOptions
from embedder.finetuning import scratch_network as scratch
from embedder.finetuning.augmentation import Augmenter
from embedder.finetuning.finetune import Tuned, finetune
from embedder.finetuning.initial_head import (
    check_start,
    starting_model,
    with_head_features,
)
from embedder.finetuning.inputs import Examples, decode_pixels
from embedder.finetuning.labelled_images import find_paths, read_labelled, targets_of
from embedder.finetuning.network import make_trainable
from embedder.finetuning.options import TuneOptions
from embedder.finetuning.parameter_groups import num_tuned, plan_groups
from embedder.finetuning.pseudo_labels import extended
from embedder.finetuning.trainer import train as train_network
from embedder.heads.calibration import calibrate
from embedder.heads.keras_layers import as_keras_layers
from embedder.heads.model import Model
from embedder.inference.evaluate import evaluate_model
from embedder.inference.predict import predict
from embedder.libraries import import_keras
from embedder.recipe import Recipe
from embedder.sources.listing import list_images
from embedder.store.store import Store
from embedder.training.options import TrainOptions
from embedder.training.self_training import PseudoLabels
from embedder.training.semi_supervised import Unlabelled
from embedder.training.train import train
from tests.support import TESTS, make_archive, make_record, picture

SIZE = (64, 96)
NUM_IMAGES = 40
# Several shards, so that the order of a store's rows is none of the images' own.
SHARDS = RunOptions(shard_size=13)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos`, their `features`, and `model`, a logistic head on them."""
    folder = tmp_path_factory.mktemp("world")
    make_archive(folder / "photos", NUM_IMAGES)
    store = embedder.extract(
        folder / "photos", folder / "features", image_size=SIZE, shard_size=SHARDS.shard_size
    )
    assert store.ids().tolist() != sorted(store.ids())
    train(store, "folder", "logistic", TrainOptions(duplicates=None)).save(folder / "model")
    return folder


def tune(world: Path, out: Path, strategy: str, **options: Any) -> Tuned:
    values = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3} | options
    tuning = TuneOptions(strategy=strategy, **values)
    return finetune(world / "model", world / "photos", out, tuning, SHARDS)


def weights_of(model: Path) -> dict[str, list[NDArray[Any]]]:
    """Weights of a model's backbone, by layer."""
    network = load_network(Model.load(model).recipe)
    return {layer.name: layer.get_weights() for layer in network.layers if layer.weights}


def changed_layers(world: Path, out: Path) -> set[str]:
    ours, theirs = weights_of(out), weights_of(world / "model")
    return {
        name
        for name, arrays in ours.items()
        if not all(np.array_equal(a, b) for a, b in zip(arrays, theirs[name], strict=True))
    }


@pytest.fixture(scope="module")
def norm(world: Path) -> Tuned:
    """A model whose normalisations are tuned."""
    return tune(world, world / "norm", "norm", seed=1)


def test_a_tuned_model_is_a_model(world: Path, norm: Tuned, tmp_path: Path) -> None:
    assert {path.name for path in norm.path.iterdir()} == {
        *("backbone.weights.h5", "head.keras", "metrics.json", "model.json"),
        "predictions.parquet",
    }
    features = Store(world / "norm.features")
    assert len(features) == NUM_IMAGES
    assert features.recipe == Model.load(norm.path).recipe
    assert features.recipe.fingerprint != Store(world / "features").recipe.fingerprint
    predict(norm.path, features.path, tmp_path / "of-features.parquet")
    predict(norm.path, world / "photos", tmp_path / "of-photos.parquet")
    ours, theirs = (
        pq.read_table(tmp_path / name).sort_by("image_id")
        for name in ("of-photos.parquet", "of-features.parquet")
    )
    assert ours["class"].equals(theirs["class"])
    np.testing.assert_allclose(ours["probability"], theirs["probability"], atol=1e-5)
    assert not (world / "norm.tuning").exists()


def test_it_is_tested_on_the_images_that_the_head_was_tested_on(world: Path, norm: Tuned) -> None:
    ours, theirs = (
        pq.read_table(path / "predictions.parquet").sort_by("image_id").to_pydict()
        for path in (norm.path, world / "model")
    )
    for column in ("image_id", "sha256", "label", "group"):
        assert ours[column] == theirs[column]
    was = np.array(theirs["part"])
    parts = np.array(ours["part"])
    assert ((parts == "test") == (was == "test")).all()
    assert (parts[was == "train"] == "validation").sum() > 0
    test = evaluate_model(norm.path, Store(world / "norm.features"), "folder")
    assert test.metrics["test"]["num_images"] == (was == "test").sum()
    assert test.metrics["test"]["accuracy"] == norm.metrics["test"]["accuracy"]
    before = tested_model.TestedModel.read(world / "model").is_right.mean()
    assert norm.metrics["tuning"]["accuracy_before"] == before
    rows = compare([world / "model", norm.path])
    assert [tested.kind for tested, _ in rows] == ["frozen + logistic", "norm"]
    assert rows[1][1] is not None
    assert rows[1][1].verdict == norm.metrics["tuning"]["verdict"]


def test_the_head_it_starts_from_has_not_seen_what_training_is_stopped_by(
    world: Path, tmp_path: Path
) -> None:
    model = Model.load(world / "model")
    labelled = read_labelled(world / "model", model, 0)
    photos = list_images(world / "photos")
    images = with_head_features(model, labelled, photos, tmp_path, RunOptions())
    held = images.split.validation
    features, codes = images.unaugmented[held], images.codes[held]
    start = starting_model(model, images)
    # The images have nothing in common: a head that is right of all of them knows them by heart.
    assert (model.logits(features).argmax(axis=1) == codes).all()
    assert not (start.logits(features).argmax(axis=1) == codes).all()
    train = images.split.train
    logits = start.logits(images.unaugmented[train])
    assert (logits.argmax(axis=1) == images.codes[train]).all()


@pytest.mark.parametrize("where", ["gone", "norm.features", "others"])
def test_features_that_are_gone_or_of_other_weights_or_images_are_made_again(
    world: Path, norm: Tuned, tmp_path: Path, where: str
) -> None:
    if where == "others":
        others = make_archive(tmp_path / "photos", 4, first_seed=900)
        embedder.extract(others, norm.path.parent / where, image_size=SIZE)
    model = Model.load(world / "model")
    labelled = read_labelled(world / "model", model, 0)
    photos = list_images(world / "photos")
    there = with_head_features(model, labelled, photos, tmp_path, SHARDS)
    assert not (tmp_path / "features").exists()
    model = replace(model, record=make_record(store=str(norm.path.parent / where)))
    again = with_head_features(model, labelled, photos, tmp_path, SHARDS)
    assert (tmp_path / "features").exists()
    assert np.array_equal(again.in_memory, there.in_memory)
    assert np.array_equal(again.codes, there.codes)


def test_a_network_that_does_not_predict_what_the_head_does_is_refused(world: Path) -> None:
    model = Model.load(world / "model")
    images = sorted((world / "photos").rglob("*.*g"))[:4]
    pixels = np.stack([decode_rgb(image.read_bytes(), model.recipe).pixels for image in images])
    tunable = replace(make_trainable(model.recipe, "embedding"), head=as_keras_layers(model))
    check_start(tunable, pixels, model)
    kernel, _ = tunable.head.trainable_variables
    kernel.assign(kernel * 0.5)
    with pytest.raises(Unfinished, match="Before the first step.*probabilities that differ by"):
        check_start(tunable, pixels, model)


def test_a_training_begins_where_the_head_has_not_seen_what_it_is_stopped_by(norm: Tuned) -> None:
    # The images have nothing in common: see above.
    assert norm.metrics["tuning"]["epochs"][0]["validation_accuracy"] < 1


def test_the_head_knows_classes_that_have_validation_images_alone(
    world: Path, tmp_path: Path
) -> None:
    model = Model.load(world / "model")
    labelled = read_labelled(world / "model", model, 0)
    split = labelled.split
    cats = split.train[labelled.codes[split.train] == 0]
    split = replace(split, validation=np.sort(np.concatenate([split.validation, cats])))
    labelled, photos = replace(labelled, split=split), list_images(world / "photos")
    images = with_head_features(model, labelled, photos, tmp_path, SHARDS)
    start = starting_model(model, images)
    assert start.classes.tolist() == ["cats", "dogs"]
    held = images.split.validation
    logits = start.logits(images.unaugmented[held[images.codes[held] == 1]])
    assert (logits.argmax(axis=1) == 0).any()  # it has not seen them


def test_a_tuned_model_is_tuned_further_from_where_it_was(
    world: Path, norm: Tuned, tmp_path: Path
) -> None:
    options = TuneOptions(strategy="bias", epochs=1, batch_size=8, seed=1)
    first = tmp_path / "first"
    shutil.copytree(norm.path, first)
    row = {"image_id": "a.jpg", "sha256": "0" * 64, "label": "cats", "confidence": 1.0, "round": 1}
    pq.write_table(pa.Table.from_pylist([row]), first / "pseudo_labels.parquet")
    again = finetune(first, world / "photos", tmp_path / "out", options, SHARDS)
    # Its weights have learned from them.
    assert pq.read_table(tmp_path / "out" / "pseudo_labels.parquet").to_pylist() == [row]
    start = again.metrics["tuning"]["epochs"][0]["validation_loss"]
    best = min(epoch["validation_loss"] for epoch in norm.metrics["tuning"]["epochs"])
    assert start == pytest.approx(best, abs=1e-4)


def test_a_tuned_model_is_calibrated_by_its_validation_images(world: Path, norm: Tuned) -> None:
    model, features = Model.load(norm.path), Store(world / "norm.features")
    table = pq.read_table(norm.path / "predictions.parquet").to_pylist()
    label_of = {row["image_id"]: row["label"] for row in table if row["part"] == "validation"}
    rows = [row for row, image in enumerate(features.ids()) if image in label_of]
    codes = np.searchsorted(model.classes, [label_of[image] for image in features.ids()[rows]])
    calibration = calibrate(model.logits(features.vectors()[rows]), codes)
    assert calibration.temperature == pytest.approx(model.temperature, rel=1e-4)
    assert model.temperature != pytest.approx(1.0, abs=0.01)


def test_the_same_again_does_nothing(world: Path, norm: Tuned) -> None:
    before = {path: path.stat().st_mtime_ns for path in norm.path.iterdir()}
    work = world / "norm.tuning"  # as if it had been killed at its very end
    work.mkdir()
    request = Model.load(norm.path).recorded().tuning.request
    (work / "request.json").write_text(json.dumps(request))
    again = tune(world, world / "norm", "norm", seed=1)
    assert not work.exists()
    assert again.head is None
    assert again.metrics == json.loads((norm.path / "metrics.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in norm.path.iterdir()} == before


def test_another_request_for_the_same_folder_is_done_anew(
    world: Path, norm: Tuned, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(norm.path, out)
    shutil.copytree(world / "norm.features", tmp_path / "out.features")
    (out / "pseudo_labels.parquet").write_bytes(b"of an older fine-tuning")
    work = tmp_path / "out.tuning"  # of a third one, that was killed
    work.mkdir()
    (work / "request.json").write_text("{}")
    (work / "checkpoint.npz").write_bytes(b"of other weights")
    second = tune(world, out, "scratch", epochs=2)
    assert second.head is not None
    assert len(second.metrics["tuning"]["epochs"]) == 3
    recipe = Model.load(out).recipe
    assert Store(tmp_path / "out.features").recipe == recipe
    assert {path.name for path in out.iterdir()} == {
        *("backbone.keras", "head.keras", "metrics.json", "model.json", "predictions.parquet")
    }
    assert not work.exists()


def test_a_model_can_move_with_its_backbone(world: Path, norm: Tuned, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(norm.path, moved)
    assert Model.load(moved).recipe.weights_source == str(moved / "backbone.weights.h5")
    with h5py.File(moved / "backbone.weights.h5", "a") as file:
        file.attrs["changed"] = 1
    with pytest.raises(WeightsError, match="The recipe was made with weights"):
        load_network(Model.load(moved).recipe)


def test_partial_changes_a_few_channels_and_nothing_else(world: Path) -> None:
    recipe = Model.load(world / "model").recipe
    tunable = make_trainable(recipe, "embedding")
    keras = import_keras()
    head = keras.Sequential([keras.Input((1280,)), keras.layers.Dense(2)])
    tunable = replace(tunable, head=head)
    random = np.random.default_rng(0)
    examples = Examples(
        inputs=random.integers(0, 256, (8, 1, *SIZE, 3), dtype=np.uint8),
        targets=np.eye(2, dtype=np.float32)[np.arange(8) % 2],
        weights=np.ones(8, np.float32),
        train=np.arange(8),
        validation=np.arange(0),
        are_pixels=True,
    )
    options = TuneOptions(strategy="partial", blocks=("stage6_block2",), fraction=0.05, epochs=1)
    groups = plan_groups(tunable, examples, options)
    schedule = options.schedule()
    train_network(tunable, groups, examples, schedule, Augmenter((), 0))
    before = load_network(recipe)
    num_changed = 0
    for ours, theirs in zip(tunable.network.layers, before.layers, strict=True):
        pairs = zip(ours.get_weights(), theirs.get_weights(), strict=True)
        differences = [new != old for new, old in pairs]
        if not (ours.name.startswith("stage6_block2") and ours.name.endswith("_conv")):
            assert not any(difference.any() for difference in differences), ours.name
            continue
        (difference,) = differences
        channels = difference.any(axis=(0, 1, 3) if "depthwise" in ours.name else (0, 1, 2))
        assert channels.sum() == max(1, round(0.05 * len(channels)))
        num_changed += int(difference.sum())
    # One step leaves weights alone whose input is never above 0.
    assert 0.5 * num_tuned(groups[1:]) < num_changed <= num_tuned(groups[1:])


@pytest.mark.parametrize("strategy", ["cut", pytest.param("head", marks=pytest.mark.slow)])
def test_from_activations_it_is_as_from_pixels(world: Path, tmp_path: Path, strategy: str) -> None:
    same: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 1e-2, "hidden": 8, "dropout": 0.5}
    cached = tune(world, tmp_path / "cached", strategy, views=1, **same)
    pixels = tune(world, tmp_path / "pixels", strategy, from_pixels=True, augment=(), **same)
    ours, theirs = weights_of(cached.path), weights_of(pixels.path)
    assert changed_layers(world, cached.path) == changed_layers(world, pixels.path)
    for name in ours:
        for a, b in zip(ours[name], theirs[name], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    heads = [Model.load(tuned.path).estimator.network_.get_weights() for tuned in (cached, pixels)]
    for a, b in zip(*heads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_what_is_above_a_cut_is_trained_with_two_outputs(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "cut"
    tuned = tune(
        world,
        out,
        "cut",
        cut="stage7",
        auxiliary="stage7_block1_project_bn",
        views=2,
        epochs=4,
        learning_rate=1e-2,
        pooling="flatten",
    )
    changed = changed_layers(world, out)
    assert all(name.startswith(("stage7", "head")) for name in changed)
    model = Model.load(out)
    assert model.recipe.pooling == "flatten"
    assert model.estimator.hidden == (128,)
    assert model.estimator.n_features_in_ == 2 * 3 * 1280
    assert tuned.metrics["tuning"]["options"]["loss_weights"] == (1.0, 10.0)


def make_shades(
    folder: Path, num_images: int, contrasts: tuple[float, ...], first_seed: int = 0
) -> Path:
    """Dark `cats` and bright `dogs`: random colours, and more or less of the class's own."""
    for number in range(num_images):
        animal, shade = (("cats", 0), ("dogs", 255))[number % 2]
        contrast = contrasts[number // 2 % len(contrasts)]
        pixels = (1 - contrast) * picture(first_seed + number) + contrast * shade
        (folder / animal).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / animal / f"{number:03d}.png")
    return folder


def train_head(folder: Path) -> None:
    """Features of a folder's `photos`, and a `model` on them."""
    store = embedder.extract(folder / "photos", folder / "features", image_size=SIZE)
    train(store, "folder", "logistic", TrainOptions(duplicates=None)).save(folder / "model")


def test_scratch_is_a_network_of_its_own(tmp_path: Path) -> None:
    photos = make_shades(tmp_path / "photos", NUM_IMAGES, contrasts=(0.5,))
    train_head(tmp_path)
    tuned = tune(tmp_path, tmp_path / "scratch", "scratch", class_weight="balanced", epochs=3)
    model = Model.load(tuned.path)
    assert model.recipe.weights_source.endswith("backbone.keras")
    assert [layer.name for layer in load_network(model.recipe).layers if layer.weights] == [
        "block1_conv",
        "block2_conv",
        "block3_conv",
    ]
    losses = [epoch["validation_loss"] for epoch in tuned.metrics["tuning"]["epochs"]]
    assert losses.index(min(losses)) > 0  # so that what was trained is kept
    trained = load_network(model.recipe).get_weights()
    untrained = scratch.make_network(model.recipe.image_size, 0).get_weights()
    assert not any(np.array_equal(a, b) for a, b in zip(trained, untrained, strict=True))
    predict(tuned.path, photos, tmp_path / "p.parquet")
    assert pq.read_metadata(tmp_path / "p.parquet").num_rows == NUM_IMAGES
    half = TuneOptions(strategy="full", precision="bfloat16")
    with pytest.raises(RequestError, match="in the precision that it was saved in"):
        finetune(tuned.path, photos, tmp_path / "half", half)


def test_after_a_kill_it_goes_on_with_the_same_epoch(world: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "embedder", "finetune", str(world / "model")]
    command += [str(world / "photos"), str(tmp_path / "out"), "--strategy", "scratch"]
    command += ["--epochs", "5", "--batch-size", "1", "--no-report"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch 2:"):  # so the third is under way
                os.kill(process.pid, signal.SIGKILL)
                break
    assert not (tmp_path / "out").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    numbers = [int(n) for n in re.findall(r"^epoch (\d+):", again.stderr, re.MULTILINE)]
    assert numbers[0] == 3
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [epoch["number"] for epoch in metrics["tuning"]["epochs"]] == [0, 1, 2, *numbers]
    assert "verdict" in again.stdout


def killed(command: list[str], part: str, number: int) -> None:
    """Run a command of the package until just before it changes a path; see `killing`."""
    killing = TESTS / "killing.py"
    done = subprocess.run([sys.executable, str(killing), part, str(number), *command])
    assert done.returncode == -signal.SIGKILL


def test_a_kill_leaves_the_older_model_and_its_features_until_the_newer_are_whole(
    world: Path, norm: Tuned, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(norm.path, out)
    shutil.copytree(world / "norm.features", tmp_path / "out.features")
    command = ["finetune", str(world / "model"), str(world / "photos"), str(out)]
    command += ["--strategy", "scratch", "--epochs", "1", "--batch-size", "8", "--quiet"]
    older = Model.load(out)
    # Its weights are about to be written; its features are; all that is the model is.
    for part, number in (("half-backbone", 2), ("tuned-features/runs/", 1), ("report.html", 1)):
        killed(command, part, number)
        assert Model.load(out).head_sha256 == older.head_sha256
        load_network(Model.load(out).recipe)
        assert Store(tmp_path / "out.features").recipe.fingerprint == older.recipe.fingerprint
    killed(command, "no such path", 2)  # at the second swap: the model is in its place
    newer = Model.load(out)
    assert newer.head_sha256 != older.head_sha256
    load_network(newer.recipe)
    assert (out / "report.html").exists()
    assert len(Store(tmp_path / "out.features")) == NUM_IMAGES
    done = subprocess.run([sys.executable, "-m", "embedder", *command], check=True)
    assert done.returncode == 0
    assert Model.load(out).head_sha256 == newer.head_sha256
    features = Store(tmp_path / "out.features")
    assert features.recipe == newer.recipe
    assert features.recipe.weights_source == str(out / "backbone.keras")
    assert newer.recorded().provenance.store == str(features.path)
    (tmp_path / "out.tuning").mkdir()  # as if it had been killed while this was deleted
    request = newer.recorded().tuning.request
    (tmp_path / "out.tuning" / "request.json").write_text(json.dumps(request))
    killed(command, "request.json", 1)
    subprocess.run([sys.executable, "-m", "embedder", *command], check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.features"}


def test_what_makes_no_sense_is_refused_and_nothing_started(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = make_archive(tmp_path / "few", 4)
    with pytest.raises(RequestError, match="SOURCE must hold the images.*lacks 36 of 40"):
        finetune(world / "model", few, out)
    store = Store(world / "features")
    options = TrainOptions(duplicates=None, split="kfold:2")
    train(store, "folder", "logistic", options).save(tmp_path / "kfold")
    with pytest.raises(RequestError, match="tested on images of its own"):
        finetune(tmp_path / "kfold", world / "photos", out)
    train(store, "folder", "knn", TrainOptions(duplicates=None)).save(tmp_path / "knn")
    with pytest.raises(RequestError, match="knn"):
        finetune(tmp_path / "knn", world / "photos", out)
    with pytest.raises(RequestError, match="OUT must be another folder than MODEL"):
        finetune(world / "model", world / "photos", world / "model")
    with pytest.raises(RequestError, match="name of a Keras optimizer.*optimizer=adm"):
        finetune(world / "model", world / "photos", out, TuneOptions(optimizer="adm"))
    assert {path.name for path in tmp_path.iterdir()} == {"few", "kfold", "knn"}
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    with pytest.raises(ModelError, match="holds something else"):
        finetune(world / "model", world / "photos", out)
    assert (out / "diary.txt").read_text() == "mine"
    partial = TuneOptions(strategy="partial", blocks=("stage99",))
    with pytest.raises(RequestError, match="Received: stage99"):
        finetune(world / "model", world / "photos", tmp_path / "new", partial)
    assert not (tmp_path / "new.tuning").exists()
    shutil.copytree(world / "features", tmp_path / "new.features")
    with pytest.raises(RequestError, match="OUT.features is written over, and must be of an older"):
        finetune(world / "model", world / "photos", tmp_path / "new")
    train(Store(tmp_path / "new.features"), "folder").save(tmp_path / "own")
    with pytest.raises(RequestError, match="must not hold the weights or the features.*new.feat"):
        finetune(tmp_path / "own", world / "photos", tmp_path / "new")
    assert len(Store(tmp_path / "new.features")) == NUM_IMAGES
    shutil.rmtree(tmp_path / "new.features")
    work = tmp_path / "new.tuning"
    work.mkdir()
    (work / "diary.txt").write_text("mine")
    with pytest.raises(RequestError, match="must be of embedder.*holds something else"):
        finetune(world / "model", world / "photos", tmp_path / "new")
    assert (work / "diary.txt").read_text() == "mine"


def test_out_must_not_hold_the_weights_that_the_model_is_made_from(
    world: Path, norm: Tuned, tmp_path: Path
) -> None:
    shutil.copytree(world / "norm.features", tmp_path / "features")
    train(Store(tmp_path / "features"), "folder").save(tmp_path / "model")
    with pytest.raises(RequestError, match=f"must not hold the weights.*Received: {norm.path}$"):
        finetune(tmp_path / "model", world / "photos", norm.path)
    load_network(Model.load(norm.path).recipe)  # as it was


def test_images_that_cannot_be_embedded_are_in_nobodys_way(tmp_path: Path) -> None:
    make_shades(tmp_path / "photos", 20, contrasts=(0.5,))
    for number in range(8):
        (tmp_path / "photos" / "cats" / f"broken-{number}.png").write_bytes(b"no picture")
    store = embedder.extract(
        tmp_path / "photos", tmp_path / "features", image_size=SIZE, max_failures=0.5
    )
    train(store, "folder", "logistic", TrainOptions(duplicates=None)).save(tmp_path / "model")
    tune(tmp_path, tmp_path / "out", "scratch")
    features = Store(tmp_path / "out.features")
    assert (len(features), features.failures().num_rows) == (20, 8)


def test_from_another_folder_with_coarse_labels_into_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_shades(tmp_path / "photos", 20, contrasts=(0.5,))
    for animal in ("owls", "rats"):
        shutil.copytree(photos / "cats", photos / animal)
    monkeypatch.chdir(tmp_path)
    store = embedder.extract("photos", "features", image_size=SIZE)
    kinds = {"owls": "birds"}
    lines = [f"{i},{kinds.get(i.split('/')[0], 'mammals')}" for i in store.ids()]
    Path("coarse.csv").write_text("\n".join(["path,coarse", *lines]))
    options = TrainOptions(duplicates=None, coarse="coarse.csv:coarse")
    train(store, "folder", "logistic", options).save("model")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = TuneOptions(strategy="scratch", epochs=1)
    tuned = finetune("../model", "../photos", ".", options)
    assert 0 <= tuned.metrics["test"]["coarse_accuracy"] <= 1
    assert tuned.metrics["test"]["coarse_accuracy"] >= tuned.metrics["test"]["accuracy"]
    assert len(Store(tmp_path / "here.features")) == 40
    assert Path("model.json").exists()
    assert not (tmp_path / "here.tuning").exists()


def test_other_bytes_than_the_head_was_trained_on_are_refused(world: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(world / "photos", photos)
    table = pq.read_table(world / "model" / "predictions.parquet").to_pydict()
    image = next(i for i, p in zip(table["image_id"], table["part"], strict=True) if p == "train")
    other = next(i for i in table["image_id"] if i != image and i[-3:] == image[-3:])
    shutil.copyfile(photos / other, photos / image)
    with pytest.raises(Unfinished, match="must be the image that the model was trained on"):
        finetune(world / "model", photos, tmp_path / "out", TuneOptions(epochs=1))
    assert not (tmp_path / "out").exists()


def go_the_whole_way(folder: Path, backbone: str, options: TuneOptions) -> tuple[Recipe, Tuned]:
    """Features, a head, its fine-tuning, and predictions; the recipe that it began with."""
    make_archive(folder / "photos", 16)
    store = embedder.extract(
        folder / "photos", folder / "features", backbone=backbone, weights="random"
    )
    train(store, "folder", "logistic", TrainOptions(duplicates=None)).save(folder / "model")
    tuned = finetune(folder / "model", folder / "photos", folder / "out", options)
    predict(tuned.path, folder / "photos", folder / "p.parquet")
    assert pq.read_metadata(folder / "p.parquet").num_rows == 16
    return store.recipe, tuned


@pytest.mark.slow
def test_vgg16_with_flatten_and_a_dense_layer_goes_the_whole_way(tmp_path: Path) -> None:
    options = TuneOptions(strategy="head", pooling="flatten", views=2, epochs=2)
    _, tuned = go_the_whole_way(tmp_path, "vgg16", options)
    assert tuned.metrics["tuning"]["num_tuned"] == 7 * 7 * 512 * 2 + 2
    assert tuned.metrics["tuning"]["options"]["optimizer"] is None  # RMSprop is usual


@pytest.mark.slow
def test_resnet50_cut_at_conv5_with_two_outputs_goes_the_whole_way(tmp_path: Path) -> None:
    options = TuneOptions(
        strategy="cut", cut="conv5", auxiliary="conv5_block1_out", views=2, epochs=2
    )
    recipe, tuned = go_the_whole_way(tmp_path, "resnet50", options)
    network, before = load_network(Model.load(tuned.path).recipe), load_network(recipe)
    for ours, theirs in zip(network.layers, before.layers, strict=True):
        if not ours.name.startswith("conv5"):
            for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
                assert np.array_equal(a, b), ours.name
    assert Model.load(tuned.path).estimator.hidden == (128,)


def test_several_labels_an_image_are_tuned_in_half_precision(world: Path, tmp_path: Path) -> None:
    names = [path.relative_to(world / "photos") for path in (world / "photos").rglob("*.*g")]
    lines = [f"{name},{'dark;' if i % 3 else ''}{name.parent}" for i, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,labels", *lines]))
    options = TrainOptions(duplicates=None, separator=";")
    labels = f"{tmp_path}/labels.csv:labels"
    train(Store(world / "features"), labels, "logistic", options).save(tmp_path / "model")
    balanced = TuneOptions(strategy="scratch", class_weight="balanced")
    with pytest.raises(RequestError, match="Class weights need images of one label each"):
        finetune(tmp_path / "model", world / "photos", tmp_path / "out", balanced)
    tuning = TuneOptions(strategy="scratch", epochs=1, precision="bfloat16")
    tuned = finetune(tmp_path / "model", world / "photos", tmp_path / "out", tuning)
    model = Model.load(tuned.path)
    assert model.classes.tolist() == ["cats", "dark", "dogs"]
    assert model.is_multilabel
    assert 0 < tuned.metrics["test"]["mean_average_precision"] <= 1
    network = load_network(model.recipe)
    assert {layer.dtype_policy.name for layer in network.layers} == {"float32"}


def test_unlabelled_images_get_pseudo_labels_if_they_help(tmp_path: Path) -> None:
    # The classes are plain in all images without labels, and in a third of those with labels.
    photos = make_shades(tmp_path / "photos", 96, contrasts=(0.05, 0.3, 0.6))
    more = make_shades(tmp_path / "more", 300, contrasts=(0.6,), first_seed=1000)
    shutil.copy(photos / "cats" / "000.png", more / "known.png")
    train_head(tmp_path)
    tuned = tune(tmp_path, tmp_path / "out", "scratch", unlabelled=str(more))
    found = tuned.metrics["tuning"]["pseudo_labels"]
    assert found["num_images"] == 300  # not the one that has a label
    assert "kept round" in found["verdict"]
    pseudo = pq.read_table(tuned.path / "pseudo_labels.parquet")
    assert pseudo.num_rows == found["num_pseudo_labels"] > 100
    assert set(pseudo["label"].to_pylist()) <= {"cats", "dogs"}
    is_right = [
        i.startswith(x)
        for i, x in zip(*(pseudo[c].to_pylist() for c in ("image_id", "label")), strict=True)
    ]
    assert np.mean(is_right) > 0.9
    plain = tune(tmp_path, tmp_path / "plain", "scratch")
    ours, theirs = (x.metrics["tuning"]["epochs"][1]["loss"] for x in (tuned, plain))
    assert ours != pytest.approx(theirs, rel=1e-3)


def test_pseudo_labels_that_do_not_help_are_not_learned_from(world: Path, tmp_path: Path) -> None:
    more = make_archive(tmp_path / "more", 12, first_seed=500)
    tuned = tune(world, tmp_path / "out", "scratch", unlabelled=str(more))
    assert tuned.metrics["tuning"]["pseudo_labels"]["num_pseudo_labels"] == 0
    plain = tune(world, tmp_path / "plain", "scratch")
    ours, theirs = (x.metrics["tuning"]["epochs"][1]["loss"] for x in (tuned, plain))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_pseudo_labels_are_learned_from_beside_the_labels(world: Path, tmp_path: Path) -> None:
    model = Model.load(world / "model")
    labelled = read_labelled(world / "model", model, 0)
    more = make_archive(tmp_path / "more", 6, first_seed=500)
    paths = sorted(more.rglob("*.*g"))
    ids = np.array([str(path.relative_to(more)) for path in paths], dtype=object)
    checksums = np.array([sha256(path.read_bytes()).hexdigest() for path in paths], dtype=object)
    images = Unlabelled(ids, checksums, np.zeros((6, 1280), np.float32))
    rows = np.array([1, 4])
    pseudo = PseudoLabels(rows, np.array(["dogs", "cats"]), np.ones(2), np.ones(2, np.int64))
    longer = extended(labelled, images, pseudo)
    train = labelled.split.train.tolist()
    assert longer.split.train.tolist() == [*train, NUM_IMAGES, NUM_IMAGES + 1]
    assert longer.split.tested_on.tolist() == labelled.split.tested_on.tolist()
    assert longer.codes[-2:].tolist() == [1, 0]
    where = find_paths(list_images(world / "photos"), labelled) + [
        os.fsencode(paths[row]) for row in rows
    ]
    pixels = decode_pixels(where, longer, model.recipe, tmp_path / "pixels.npy")
    expected = decode_rgb(paths[4].read_bytes(), model.recipe).pixels
    assert np.array_equal(pixels[-1, 0], expected)
    assert targets_of(longer, model)[-1].tolist() == [1.0, 0.0]
