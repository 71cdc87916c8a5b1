"""What fine-tuning learns from: each image's own pixels, activations, classes and weight."""

import os
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedder.decode.decode import decode_rgb
from embedder.errors import Unfinished
from embedder.finetuning.labelled_images import (
    Labelled,
    decode_pixels,
    examples_of,
    read_activations,
    read_labelled,
)
from embedder.finetuning.parameter_groups import TuneOptions
from embedder.finetuning.tuned_model import labelled_targets
from embedder.heads.model import Model
from embedder.recipe import Recipe
from embedder.store.store import Store
from embedder.training.train import train
from embedder.training.trained_head import TrainOptions
from tests.support import ANIMALS, DIM, add_rows, animal_vectors, make_archive

UNKNOWN = "0" * 64


@pytest.fixture
def model(zoo: Store, tmp_path: Path) -> Model:
    """A head on the zoo."""
    options = TrainOptions(duplicates=None, split="0.2")
    train(zoo, "parent", "centroid", options).save(tmp_path / "model")
    return Model.load(tmp_path / "model")


@pytest.fixture
def labelled(model: Model, tmp_path: Path) -> Labelled:
    """The zoo's images, in another order than the store's."""
    return read_labelled(tmp_path / "model", model, 0)


def animals_of(labelled: Labelled) -> list[str]:
    return [image.split("/")[1] for image in labelled.ids]


def test_every_class_keeps_an_image_to_learn_from(store: Store, tmp_path: Path) -> None:
    animals = ["cats", "dogs", "owls"] * 12
    ids = [f"{animal}/{i:02d}.jpg" for i, animal in enumerate(animals)]
    ids += [f"rare-{i}/{i}.jpg" for i in range(12)]  # a class each
    vectors = animal_vectors([*animals, *(["owls"] * 12)])
    add_rows(store, ids, vectors)
    train(store, "parent", "centroid", TrainOptions(duplicates=None)).save(tmp_path / "model")
    model = Model.load(tmp_path / "model")
    for seed in range(5):
        labelled = read_labelled(tmp_path / "model", model, seed)
        assert len(labelled.validation)
        left = np.unique(labelled.codes[labelled.train])
        assert set(labelled.codes[labelled.validation]) <= set(left)
        assert labelled.classes[left].tolist() == model.classes.tolist()


def test_labels_come_in_the_order_of_the_store(zoo: Store, labelled: Labelled) -> None:
    assert zoo.ids().tolist() != labelled.ids.tolist()
    targets, place_of = labelled_targets(labelled, zoo)
    ids = zoo.ids()[targets.rows]
    assert ids[place_of].tolist() == labelled.ids.tolist()
    assert targets.classes[targets.codes].tolist() == [image.split("/")[1] for image in ids]
    few = replace(labelled, **{x: getattr(labelled, x)[5:] for x in ("ids", "sha256", "codes")})
    targets, place_of = labelled_targets(few, zoo)
    assert zoo.ids()[targets.rows][place_of].tolist() == labelled.ids[5:].tolist()
    assert targets.num_unlabelled == 5


def test_features_of_other_bytes_or_without_an_image_are_refused(
    zoo: Store, labelled: Labelled
) -> None:
    image = labelled.ids[7]
    checksums = np.where(labelled.ids == image, UNKNOWN, labelled.sha256)
    with pytest.raises(Unfinished, match=f"must not change.*Received: other bytes of {image}"):
        labelled_targets(replace(labelled, sha256=checksums), zoo)
    ids = np.where(labelled.ids == image, "set-3/cats/00.jpg", labelled.ids)
    with pytest.raises(Unfinished, match="set-3/cats/00.jpg could be embedded before, and now is"):
        labelled_targets(replace(labelled, ids=ids), zoo)


def test_activations_are_each_images_own(zoo: Store, labelled: Labelled, tmp_path: Path) -> None:
    found = read_activations(zoo, labelled, tmp_path / "activations.npy")
    rows = labelled.learned
    assert found.shape == (len(rows), 1, DIM)
    vectors = {
        row["image_id"]: row["embedding"]
        for path in zoo.shards()
        for row in zoo.read_shard(path.name).to_pylist()
    }
    wanted = np.array([vectors[image] for image in labelled.ids[rows]], np.float32)
    assert np.array_equal(found[:, 0], wanted)


def test_activations_of_other_bytes_or_without_an_image_are_refused(
    zoo: Store, labelled: Labelled, tmp_path: Path
) -> None:
    image, file = labelled.ids[labelled.learned[3]], tmp_path / "activations.npy"
    checksums = np.where(labelled.ids == image, UNKNOWN, labelled.sha256)
    with pytest.raises(Unfinished, match=f"{image} must be the image that the model was trained"):
        read_activations(zoo, replace(labelled, sha256=checksums), file)
    ids = np.where(labelled.ids == image, "set-3/cats/00.jpg", labelled.ids)
    with pytest.raises(Unfinished, match="set-3/cats/00.jpg could be embedded before, and now is"):
        read_activations(zoo, replace(labelled, ids=ids), file)
    strange = np.array([f"elsewhere/{image}" for image in labelled.ids], dtype=object)
    with pytest.raises(Unfinished, match="elsewhere/.* could be embedded before, and now is not"):
        read_activations(zoo, replace(labelled, ids=strange), file)


def with_pictures(labelled: Labelled, folder: Path) -> tuple[Labelled, list[Path]]:
    """The zoo's images as pictures on disk."""
    make_archive(folder, len(labelled.ids))
    paths = sorted(folder.rglob("*.*g"))
    checksums = np.array([sha256(path.read_bytes()).hexdigest() for path in paths], dtype=object)
    return replace(labelled, sha256=checksums), paths


def test_pixels_are_each_images_own(
    labelled: Labelled, mean_colour_recipe: Recipe, tmp_path: Path
) -> None:
    labelled, paths = with_pictures(labelled, tmp_path / "photos")
    encoded = [os.fsencode(path) for path in paths]
    recipe = mean_colour_recipe.model_copy(update={"views": 3})  # of which tuning takes the first
    found = decode_pixels(encoded, labelled, recipe, tmp_path / "pixels.npy")
    assert found.shape == (len(labelled.learned), 1, *recipe.image_size, 3)
    for place, row in enumerate(labelled.learned):
        pixels = decode_rgb(paths[row].read_bytes(), mean_colour_recipe).pixels
        assert np.array_equal(found[place, 0], pixels)


def test_an_image_that_is_broken_or_another_since_is_refused(
    labelled: Labelled, mean_colour_recipe: Recipe, tmp_path: Path
) -> None:
    labelled, paths = with_pictures(labelled, tmp_path / "photos")
    encoded, row = [os.fsencode(path) for path in paths], labelled.learned[5]
    image, path = labelled.ids[row], paths[row]
    Image.new("RGB", (30, 20)).save(path)
    with pytest.raises(Unfinished, match=f"{image} must be the image that the model was trained"):
        decode_pixels(encoded, labelled, mean_colour_recipe, tmp_path / "pixels.npy")
    path.write_bytes(b"no picture")
    with pytest.raises(Unfinished, match=f"{image} could be embedded before, and now cannot: "):
        decode_pixels(encoded, labelled, mean_colour_recipe, tmp_path / "pixels.npy")


def test_examples_have_each_images_class_and_weight(labelled: Labelled, model: Model) -> None:
    # Owls are rare among those that are learned from.
    animals = np.array(animals_of(labelled))
    owls = labelled.train[animals[labelled.train] == "owls"]
    labelled = replace(labelled, train=np.setdiff1d(labelled.train, owls[:-2]))
    inputs = np.zeros((len(labelled.learned), 1, 4), np.float32)
    options = TuneOptions(strategy="cut", class_weight="balanced")
    examples = examples_of(labelled, model, inputs, options)
    learned = animals[labelled.learned]
    assert np.array(ANIMALS)[examples.targets.argmax(axis=1)].tolist() == learned.tolist()
    assert (examples.targets.sum(axis=1) == 1).all()
    assert labelled.learned[examples.train].tolist() == labelled.train.tolist()
    assert labelled.learned[examples.validation].tolist() == labelled.validation.tolist()
    assert not examples.are_pixels
    sums = [examples.weights[examples.train][learned[examples.train] == x].sum() for x in ANIMALS]
    np.testing.assert_allclose(sums, len(labelled.train) / 3, rtol=1e-6)
    plain = examples_of(labelled, model, inputs, TuneOptions(strategy="gradual"))
    assert (plain.weights == 1).all()
    assert plain.are_pixels
