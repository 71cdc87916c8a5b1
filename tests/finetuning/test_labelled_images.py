"""What fine-tuning learns from: each image's own pixels, activations, classes and weight."""

import os
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedder.datasets.training_set import TrainingSet
from embedder.decode.decode import decode_rgb
from embedder.errors import Unfinished
from embedder.finetuning.inputs import decode_pixels, examples_of, read_activations
from embedder.finetuning.labelled_images import in_store, read_labelled
from embedder.heads.model import Model
from embedder.recipe import Recipe
from embedder.store.schema import FAILURE_SCHEMA
from embedder.store.store import Store
from embedder.training.options import TrainOptions
from embedder.training.train import train
from tests.support import ANIMALS, DIM, add_rows, animal_vectors, make_archive, rows_of

UNKNOWN = "0" * 64


@pytest.fixture
def model(zoo: Store, tmp_path: Path) -> Model:
    """A head on the zoo."""
    options = TrainOptions(duplicates=None, split="0.2")
    train(zoo, "parent", "centroid", options).save(tmp_path / "model")
    return Model.load(tmp_path / "model")


@pytest.fixture
def labelled(model: Model, tmp_path: Path) -> TrainingSet:
    """The zoo's images, in another order than the store's."""
    return read_labelled(tmp_path / "model", model, 0)


def animals_of(labelled: TrainingSet) -> list[str]:
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
        assert len(labelled.split.validation)
        left = np.unique(labelled.codes[labelled.split.train])
        assert set(labelled.codes[labelled.split.validation]) <= set(left)
        assert labelled.classes[left].tolist() == model.classes.tolist()


def test_labels_come_in_the_order_of_the_store(zoo: Store, labelled: TrainingSet) -> None:
    assert zoo.ids().tolist() != labelled.ids.tolist()
    images = in_store(labelled, zoo)
    assert images.ids.tolist() == zoo.ids()[images.rows].tolist() == zoo.ids().tolist()
    assert images.texts().tolist() == animals_of(images)
    assert images.sha256.tolist() == zoo.sha256().tolist()
    part_of = dict(zip(labelled.ids, labelled.parts, strict=True))
    assert images.parts.tolist() == [part_of[image] for image in images.ids]
    add_rows(zoo, [f"set-0/{i}.jpg" for i in range(5)], animal_vectors(["cats"] * 5))
    images = in_store(labelled, zoo)
    assert zoo.ids()[images.rows].tolist() == images.ids.tolist()
    assert images.num_unlabelled == 5


def test_features_of_other_bytes_or_without_an_image_are_refused(
    zoo: Store, labelled: TrainingSet
) -> None:
    image = labelled.ids[7]
    checksums = np.where(labelled.ids == image, UNKNOWN, labelled.sha256)
    with pytest.raises(Unfinished, match=f"must not change.*Received: other bytes of {image}"):
        in_store(replace(labelled, sha256=checksums), zoo)
    ids = np.where(labelled.ids == image, "set-3/cats/00.jpg", labelled.ids)
    with pytest.raises(Unfinished, match="set-3/cats/00.jpg could be embedded before, and now is"):
        in_store(replace(labelled, ids=ids), zoo)


def test_activations_are_each_images_own(zoo: Store, labelled: TrainingSet, tmp_path: Path) -> None:
    found = read_activations(zoo, labelled, tmp_path / "activations.npy")
    rows = labelled.split.trained_on
    assert found.shape == (len(rows), 1, DIM)
    vectors = {
        row["image_id"]: row["embedding"]
        for path in zoo.shards()
        for row in zoo.read_shard(path.name).to_pylist()
    }
    wanted = np.array([vectors[image] for image in labelled.ids[rows]], np.float32)
    assert np.array_equal(found[:, 0], wanted)


def test_activations_of_several_views_stay_together(
    labelled: TrainingSet, mean_colour_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = mean_colour_recipe.model_copy(update={"views": 2})
    store, images = Store.open_or_create(tmp_path / "views", recipe, {}), labelled.ids[::-1]
    values = np.stack([np.arange(len(images)), np.zeros(len(images))], axis=1)  # place and view
    for name, part in enumerate(np.split(np.arange(len(images)), [7, 20])):
        vectors = np.repeat(values[part], 2, axis=0)
        vectors[1::2, 1] = 1
        rows = rows_of(mean_colour_recipe, np.repeat(images[part], 2).tolist(), vectors)
        rows = rows.replace_schema_metadata()  # they are of another recipe, which the store refuses
        rows = rows.add_column(1, "view", [np.tile(np.arange(2, dtype=np.int16), len(part))])
        store.write_shard(rows, FAILURE_SCHEMA.empty_table(), f"{name}.parquet")
    found = read_activations(store, labelled, tmp_path / "activations.npy")
    places = len(images) - 1 - labelled.split.trained_on
    assert found[:, 0].tolist() == [[place, 0] for place in places]
    assert found[:, 1].tolist() == [[place, 1] for place in places]


def test_activations_of_other_bytes_or_without_an_image_are_refused(
    zoo: Store, labelled: TrainingSet, tmp_path: Path
) -> None:
    image, file = labelled.ids[labelled.split.trained_on[3]], tmp_path / "activations.npy"
    checksums = np.where(labelled.ids == image, UNKNOWN, labelled.sha256)
    with pytest.raises(Unfinished, match=f"must not change.*Received: other bytes of {image}"):
        read_activations(zoo, replace(labelled, sha256=checksums), file)
    ids = np.where(labelled.ids == image, "set-3/cats/00.jpg", labelled.ids)
    with pytest.raises(Unfinished, match="set-3/cats/00.jpg could be embedded before, and now is"):
        read_activations(zoo, replace(labelled, ids=ids), file)
    strange = np.array([f"elsewhere/{image}" for image in labelled.ids], dtype=object)
    with pytest.raises(Unfinished, match="elsewhere/.* could be embedded before, and now is not"):
        read_activations(zoo, replace(labelled, ids=strange), file)


def with_pictures(labelled: TrainingSet, folder: Path) -> tuple[TrainingSet, list[Path]]:
    """The zoo's images as pictures on disk."""
    make_archive(folder, len(labelled.ids))
    paths = sorted(folder.rglob("*.*g"))
    checksums = np.array([sha256(path.read_bytes()).hexdigest() for path in paths], dtype=object)
    return replace(labelled, sha256=checksums), paths


def test_pixels_are_each_images_own(
    labelled: TrainingSet, mean_colour_recipe: Recipe, tmp_path: Path
) -> None:
    labelled, paths = with_pictures(labelled, tmp_path / "photos")
    encoded = [os.fsencode(path) for path in paths]
    recipe = mean_colour_recipe.model_copy(update={"views": 3})  # of which tuning takes the first
    found = decode_pixels(encoded, labelled, recipe, tmp_path / "pixels.npy")
    assert found.shape == (len(labelled.split.trained_on), 1, *recipe.image_size, 3)
    for place, row in enumerate(labelled.split.trained_on):
        pixels = decode_rgb(paths[row].read_bytes(), mean_colour_recipe).pixels
        assert np.array_equal(found[place, 0], pixels)


def test_an_image_that_is_broken_or_another_since_is_refused(
    labelled: TrainingSet, mean_colour_recipe: Recipe, tmp_path: Path
) -> None:
    labelled, paths = with_pictures(labelled, tmp_path / "photos")
    encoded, row = [os.fsencode(path) for path in paths], labelled.split.trained_on[5]
    image, path = labelled.ids[row], paths[row]
    Image.new("RGB", (30, 20)).save(path)
    with pytest.raises(Unfinished, match=f"{image} must be the image that the model was trained"):
        decode_pixels(encoded, labelled, mean_colour_recipe, tmp_path / "pixels.npy")
    path.write_bytes(b"no picture")
    with pytest.raises(Unfinished, match=f"{image} could be embedded before, and now cannot: "):
        decode_pixels(encoded, labelled, mean_colour_recipe, tmp_path / "pixels.npy")


def test_examples_have_each_images_class_and_weight(labelled: TrainingSet, model: Model) -> None:
    # Owls are rare among those that are learned from.
    split, animals = labelled.split, np.array(animals_of(labelled))
    owls = split.train[animals[split.train] == "owls"]
    learned_from = np.setdiff1d(split.trained_on, owls[:-2])
    split = replace(split, folds=[(learned_from, split.tested_on)])
    labelled = replace(labelled, split=split)
    inputs = np.zeros((len(learned_from), 1, 4), np.float32)
    examples = examples_of(labelled, model, inputs, are_pixels=False, class_weight="balanced")
    learned = animals[learned_from]
    assert np.array(ANIMALS)[examples.targets.argmax(axis=1)].tolist() == learned.tolist()
    assert (examples.targets.sum(axis=1) == 1).all()
    assert learned_from[examples.train].tolist() == split.train.tolist()
    assert learned_from[examples.validation].tolist() == split.validation.tolist()
    assert not examples.are_pixels
    sums = [examples.weights[examples.train][learned[examples.train] == x].sum() for x in ANIMALS]
    np.testing.assert_allclose(sums, len(split.train) / 3, rtol=1e-6)
    unweighted = examples_of(labelled, model, inputs, are_pixels=True)
    assert (unweighted.weights == 1).all()
    assert unweighted.are_pixels
