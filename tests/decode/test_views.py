"""Augmented views: of one decode, decided by the bytes alone, and kept or dropped together."""

import hashlib
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

import embedder
from embedder.backbones import resolve as backbones
from embedder.checks.check import Check
from embedder.checks.verify import verify
from embedder.cli.app import app
from embedder.decode.decode import decode_rgb
from embedder.decode.resize import augment
from embedder.decode.views import MAX_JITTER, MAX_STRETCH, MIN_AREA, draw_augmentation, part_of
from embedder.engines import Features
from embedder.errors import RecipeError, RequestError
from embedder.extraction.worker import WorkerState
from embedder.recipe import MAX_VIEWS, Recipe
from embedder.store.store import Store
from tests.decode.test_decode import CROPS, encode, make_recipe
from tests.extraction.test_shard import run
from tests.support import MeanColour, assert_same_vectors, make_archive, picture

NUM_VIEWS = 4
SMALL: dict[str, Any] = {"image_size": (64, 96)}
VIEWS: dict[str, Any] = SMALL | {"views": NUM_VIEWS}


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def many_draws(count: int = 300) -> list[Any]:
    return [draw_augmentation(sha256(str(number)), 1 + number % 9) for number in range(count)]


# What is drawn. --------------------------------------------------------------------------------


def test_the_draws_of_a_known_view_stay() -> None:
    """If these numbers change, stores hold views that no run makes again."""
    expected = (
        *(0.3594757099635899, 1.2726145161507016, 0.6083078247029334, 0.37711845501326025, True),
        *(1.0537572593428195, 0.8591968141496181, 0.9078633176162839),
    )
    np.testing.assert_allclose(draw_augmentation(sha256("known"), 3), expected, rtol=1e-12)


def test_draws_cover_their_ranges_and_no_more() -> None:
    draws = np.array(many_draws(), dtype=float)
    low, high = draws.min(axis=0), draws.max(axis=0)
    jitter = [1 - MAX_JITTER] * 3, [1 + MAX_JITTER] * 3
    smallest = np.array([MIN_AREA, 1 / MAX_STRETCH, 0, 0, 0, *jitter[0]])
    largest = np.array([1, MAX_STRETCH, 1, 1, 1, *jitter[1]])
    assert ((low >= smallest) & (high <= largest)).all()
    np.testing.assert_allclose(low, smallest, atol=0.02)
    np.testing.assert_allclose(high, largest, atol=0.02)
    assert 0.4 < draws[:, 4].mean() < 0.6


def test_no_number_of_a_view_follows_another() -> None:
    draws = np.array(many_draws(), dtype=float)
    correlations = np.corrcoef(draws.T) - np.eye(draws.shape[1])
    assert np.abs(correlations).max() < 0.2


@pytest.mark.parametrize(
    ("height", "width"), [(1, 5000), (5000, 1), (1, 1), (3, 4), (480, 640), (90, 120)]
)
@pytest.mark.parametrize("proportions", [1.0, 64 / 48, 0.1])
def test_a_part_lies_within_the_picture_in_its_proportions(
    height: int, width: int, proportions: float
) -> None:
    for augmentation in many_draws():
        left, top, right, bottom = part_of((5, 7, 5 + width, 7 + height), augmentation, proportions)
        assert 5 <= left < right <= 5 + width
        assert 7 <= top < bottom <= 7 + height
        stretch = (right - left) / (bottom - top) / proportions
        assert stretch == pytest.approx(augmentation.stretch)
        area = (right - left) * (bottom - top) / (width * height)
        is_as_large_as_fits = right - left > width * 0.999 or bottom - top > height * 0.999
        assert area == pytest.approx(augmentation.area) or is_as_large_as_fits


def test_a_view_is_never_enlarged_where_the_plain_one_is_halved() -> None:
    """Decoding at a fraction keeps twice the network's size, and not more."""
    for augmentation in many_draws():
        left, top, right, bottom = part_of((0, 0, 2 * 64, 2 * 48), augmentation, 64 / 48)
        assert right - left >= 64 - 1e-9
        assert bottom - top >= 48 - 1e-9


# What is made of it. ---------------------------------------------------------------------------


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
@pytest.mark.parametrize(("height", "width"), [(1, 5000), (5000, 1), (1, 1), (900, 700)])
def test_pictures_of_every_shape_have_all_their_views(
    crop: str, image_format: str, height: int, width: int
) -> None:
    encoded = encode(Image.new("RGB", (width, height), "red"), image_format)
    image = decode_rgb(encoded, make_recipe(crop=crop, views=9))
    assert [view.shape for view in image.augmented] == [(48, 64, 3)] * 8


@pytest.mark.parametrize("crop", CROPS)
def test_the_plain_view_is_not_touched(crop: str) -> None:
    encoded = encode(picture(0))
    plain, viewed = (decode_rgb(encoded, make_recipe(crop=crop, views=n)) for n in (1, 4))
    np.testing.assert_array_equal(viewed.pixels, plain.pixels)
    assert plain.augmented == ()
    different = {view.tobytes() for view in (viewed.pixels, *viewed.augmented)}
    assert len(different) == 4


def test_a_views_number_decides_it_however_many_there_are() -> None:
    encoded, box = encode(picture(3)), (0.0, 0.0, 120.0, 90.0)
    few, many = (decode_rgb(encoded, make_recipe(views=n)).augmented for n in (3, 9))
    for one, other in zip(few, many, strict=False):
        np.testing.assert_array_equal(one, other)
    drawn = draw_augmentation(hashlib.sha256(encoded).hexdigest(), 8)
    eighth = augment(Image.fromarray(picture(3)), box, drawn, make_recipe())
    np.testing.assert_array_equal(many[-1], np.asarray(eighth))


def test_a_mirrored_view_is_the_mirror_of_the_other() -> None:
    image, box = Image.fromarray(picture(1)), (0.0, 0.0, 120.0, 90.0)
    drawn = draw_augmentation(sha256("any"), 1)
    views = {
        is_mirrored: np.asarray(
            augment(image, box, drawn._replace(is_mirrored=is_mirrored), make_recipe())
        )
        for is_mirrored in (False, True)
    }
    np.testing.assert_array_equal(views[True], views[False][:, ::-1])
    assert (views[True] != views[False]).any()


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        ("brightness", [(120, 60, 24), (60, 60, 60)]),  # 1.2 times each value
        ("contrast", [(109, 49, 13), (49, 49, 49)]),  # further from the mean grey, 56
        ("saturation", [(108, 48, 12), (50, 50, 50)]),  # further from each one's own, 62 and 50
    ],
)
def test_colours_change_as_drawn(factor: str, expected: list[tuple[int, ...]]) -> None:
    pixels = np.full((90, 120, 3), 50, np.uint8)
    pixels[:, :60] = 100, 50, 20
    whole = {"area": 1.0, "stretch": 1.0, "left": 0.0, "top": 0.0, "is_mirrored": False}
    neutral = dict.fromkeys(("brightness", "contrast", "saturation"), 1.0)
    drawn = draw_augmentation(sha256("any"), 1)._replace(**whole, **(neutral | {factor: 1.2}))
    view = augment(Image.fromarray(pixels), (0.0, 0.0, 120.0, 90.0), drawn, make_recipe())
    np.testing.assert_allclose(np.asarray(view)[20, [5, -5]], expected, atol=1)


def test_black_borders_stay_black_in_every_view() -> None:
    white = encode(np.full((50, 500, 3), 255, np.uint8))
    for view in decode_rgb(white, make_recipe(crop="pad", views=9)).augmented:
        assert (view[:10] == 0).all()
        assert view.max() > 150


@pytest.mark.parametrize("orientation", [1, 6])
def test_views_show_the_same_part_however_it_is_decoded(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(picture(2, 901, 1203), "JPEG", quality=95, exif=exif)
    exact, scaled = (
        decode_rgb(encoded, make_recipe(decode=d, views=6)) for d in ("exact", "scaled")
    )
    for one, other in zip(exact.augmented, scaled.augmented, strict=True):
        assert np.abs(one.astype(int) - other).mean() < 1


# The recipe. -----------------------------------------------------------------------------------


def test_recipes_without_views_keep_the_fingerprint_they_had() -> None:
    assert backbones.make_recipe("efficientnet-lite0").fingerprint == "432e8c05bf90fa24"
    assert make_recipe(views=1).fingerprint == make_recipe().fingerprint
    assert len({make_recipe(views=views).fingerprint for views in (1, 2, 3)}) == 3


def test_recipes_of_other_views_do_not_share_pixels() -> None:
    assert make_recipe(views=2).pixels != make_recipe(views=3).pixels
    assert make_recipe().differences_in_pixels(make_recipe(views=3)) == ["views: 1, not 3"]


@pytest.mark.parametrize("views", [0, MAX_VIEWS + 1, 2.5])
def test_a_number_of_views_that_makes_no_sense_is_refused(views: Any) -> None:
    with pytest.raises(RecipeError, match=rf"`views`.* Received: views={views}"):
        make_recipe(views=views)


def test_a_layer_cannot_be_named_as_the_column_of_views() -> None:
    with pytest.raises(RecipeError, match=r"`view` is the column of their numbers.*views=2"):
        make_recipe(layers=("view", "other"), views=2)
    assert make_recipe(layers=("view", "other")).columns == ("view", "other")


# One shard. ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 7, 128])
def test_every_vector_is_with_its_image_and_view(
    archive: Path, tmp_path: Path, mean_colour_recipe: Recipe, batch_size: int
) -> None:
    recipe = mean_colour_recipe.model_copy(update={"views": NUM_VIEWS})
    (archive / "bad.jpg").write_bytes(b"no image")
    store, receipt = run(recipe, archive, tmp_path / "out", MeanColour(batch_size))
    assert (receipt.num_embedded, receipt.failures.total()) == (20, 1)
    rows = store.table(["image_id", "view", "embedding"]).to_pylist()
    assert len(rows) == 20 * NUM_VIEWS
    for row in rows:
        image = decode_rgb((archive / row["image_id"]).read_bytes(), recipe)
        pixels = (image.pixels, *image.augmented)[row["view"]]
        np.testing.assert_allclose(row["embedding"], pixels.mean(axis=(0, 1)), atol=1e-3)


@pytest.mark.parametrize(("batch_size", "num_bad"), [(7, 12), (3, 20)])
def test_one_view_that_is_not_finite_makes_its_image_one_failure(
    archive: Path, tmp_path: Path, mean_colour_recipe: Recipe, batch_size: int, num_bad: int
) -> None:
    class Overflowing(MeanColour):
        def embed(self, pixels: NDArray[np.uint8]) -> Features:
            features = super().embed(pixels)
            features["embedding"][0, 1] = np.inf  # in every 7th row, or in every 3rd
            return features

    recipe = mean_colour_recipe.model_copy(update={"views": NUM_VIEWS})
    store, receipt = run(recipe, archive, tmp_path / "out", Overflowing(batch_size))
    assert (receipt.num_embedded, receipt.failures.total()) == (20 - num_bad, num_bad)
    assert len(set(store.failures()["image_id"].to_pylist())) == num_bad
    assert set(Counter(store.ids(view=None)).values()) <= {NUM_VIEWS}
    assert (len(store), len(store.ids(view=None))) == (20 - num_bad, (20 - num_bad) * NUM_VIEWS)
    assert all(check.passed for check in verify(store))


def test_feature_maps_that_are_not_pooled_have_views(
    archive: Path, tmp_path: Path, mean_colour_recipe: Recipe
) -> None:
    class Map(MeanColour):
        def embed(self, pixels: NDArray[np.uint8]) -> Features:
            means = super().embed(pixels)["embedding"]
            return {"embedding": np.stack([means, means + 1000], axis=1)[:, None]}

    recipe = mean_colour_recipe.model_copy(update={"views": 2, "pooling": "none"})
    store, _ = run(recipe, archive, tmp_path / "out", Map())
    assert store.vectors().shape == (20, 1, 2, 3)
    assert store.vectors(view=None).shape == (40, 1, 2, 3)
    np.testing.assert_array_equal(store.vectors(view=None)[1::2], store.vectors(view=1))


@pytest.mark.parametrize(
    ("num_views", "side", "num_decoders", "num_ahead"),
    [(1, 64, 2, 64), (8, 64, 2, 64), (64, 512, 4, 2), (1, 4096, 3, 2), (8, 128, 16, 42)],
)
def test_so_many_images_are_decoded_ahead_as_fit_into_memory_unless_decoders_would_idle(
    mean_colour_recipe: Recipe, num_views: int, side: int, num_decoders: int, num_ahead: int
) -> None:
    recipe = mean_colour_recipe.model_copy(update={"views": num_views, "image_size": (side, side)})
    state = WorkerState(recipe, MeanColour(batch_size=4, num_parallel=2), num_decoders)
    # In and before the network, and one that each of two shards fills.
    num_batches = len(state.decoders.shared.batches) - 2 * 2 - 2
    assert num_batches == math.ceil(num_decoders * num_ahead * num_views / 4)


# The store. ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_archive(tmp_path_factory.mktemp("views") / "photos", 8)


@pytest.fixture(scope="module")
def made(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with views, which no test changes."""
    return embedder.extract(photos, tmp_path_factory.mktemp("made") / "store", **VIEWS)


@pytest.fixture
def source(photos: Path, tmp_path: Path) -> Path:
    """A copy of the photos, with their times of change."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


@pytest.fixture
def store(made: Store, tmp_path: Path) -> Store:
    """A copy of the store."""
    return Store(shutil.copytree(made.path, tmp_path / "store"))


def rows_by_hash(store: Store) -> dict[tuple[str, int], NDArray[np.float32]]:
    """Vectors by what should decide them: the image's bytes and the view."""
    hashes = store.table(["sha256"])["sha256"].to_pylist()
    return dict(zip(zip(hashes, store.views(), strict=True), store.vectors(view=None), strict=True))


def counts(store: Store) -> dict[str, int]:
    last: dict[str, int] = store.runs()[-1]["counts"]
    return last


def test_view_0_is_what_a_store_without_views_holds(
    photos: Path, made: Store, tmp_path: Path
) -> None:
    plain = embedder.extract(photos, tmp_path / "plain", **SMALL)
    np.testing.assert_array_equal(made.ids(), plain.ids())
    assert_same_vectors(made.vectors(), plain.vectors())
    assert "view" not in plain.column_names()
    np.testing.assert_array_equal(plain.views(), np.zeros(8))
    np.testing.assert_array_equal(plain.vectors(view=None), plain.vectors())


def test_views_are_read_one_by_one_or_all(made: Store) -> None:
    everything = made.vectors(view=None).reshape(8, NUM_VIEWS, -1)
    assert len(made) == len(made.ids()) == 8
    np.testing.assert_array_equal(made.views(), np.tile(np.arange(NUM_VIEWS), 8))
    np.testing.assert_array_equal(made.ids(view=None), np.repeat(made.ids(), NUM_VIEWS))
    for view in range(NUM_VIEWS):
        np.testing.assert_array_equal(made.vectors(view=view), everything[:, view])
        np.testing.assert_array_equal(made.ids(view=view), made.ids())
    assert made.table().schema.field("view").type == pa.int16()
    distances = np.abs(everything[:, :, None] - everything[:, None, :]).max(axis=-1)
    assert (distances[:, ~np.eye(NUM_VIEWS, dtype=bool)] > 0.01).all()


@pytest.mark.parametrize("view", [-1, NUM_VIEWS])
def test_a_view_that_the_store_does_not_have_is_refused(made: Store, view: int) -> None:
    with pytest.raises(RequestError, match=rf"0 to 3, or None for all. Received: view={view}"):
        made.vectors(view=view)


@pytest.mark.parametrize(
    "options", [{"batch_size": 3, "shard_size": 5}, {"shard_size": 3, "workers": 2}], ids=str
)
def test_views_are_decided_by_the_bytes_alone(
    photos: Path, made: Store, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Not by a file's name or place, nor by the images that it is embedded with."""
    for number, path in enumerate(sorted(photos.rglob("*.*"), reverse=True)):
        (tmp_path / "other").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "other" / f"{number}{path.suffix}")
    received = rows_by_hash(
        embedder.extract(tmp_path / "other", tmp_path / "out", **options, **VIEWS)
    )
    expected = rows_by_hash(made)
    assert received.keys() == expected.keys()
    assert len(expected) == 8 * NUM_VIEWS
    for key, vector in expected.items():
        assert_same_vectors(received[key], vector)


def test_a_second_run_has_nothing_to_do(source: Path, store: Store) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.shards()}
    embedder.extract(source, store.path, **VIEWS)
    assert (counts(store)["embedded"], counts(store)["done_before"]) == (0, 8)
    assert counts(store)["rows"] == 8
    assert {path: path.stat().st_mtime_ns for path in store.shards()} == before


def test_a_changed_image_is_replaced_with_all_its_views(source: Path, store: Store) -> None:
    old = rows_by_hash(store)
    Image.fromarray(picture(100)).save(source / "dogs" / "001.jpg")
    os.utime(source / "cats" / "002.jpg", (1, 1))  # another time, the same content
    (source / "bad.jpg").write_bytes(b"no image")
    embedder.extract(source, store.path, **VIEWS, max_failures=1)
    now = counts(store)
    assert (now["embedded"], now["failed"], now["changed"], now["updated"]) == (1, 1, 1, 1)
    new = rows_by_hash(store)
    assert len(new.keys() - old.keys()) == len(old.keys() - new.keys()) == NUM_VIEWS
    for key in new.keys() & old.keys():
        np.testing.assert_array_equal(new[key], old[key])
    assert store.failures()["image_id"].to_pylist() == ["bad.jpg"]
    assert (len(store), counts(store)["rows"]) == (8, 8)
    assert all(check.passed for check in verify(store, str(source), audit=9))
    embedder.extract(source, store.path, **VIEWS, max_failures=1)
    assert counts(store) | {"embedded": 0, "failed": 0, "updated": 0} == counts(store)


def test_pruning_drops_all_views(source: Path, store: Store) -> None:
    (source / "dogs" / "001.jpg").unlink()
    embedder.extract(source, store.path, **VIEWS, prune=True)
    assert counts(store)["dropped"] == 1
    assert "dogs/001.jpg" not in store.ids(view=None)
    assert (len(store), len(store.ids(view=None))) == (7, 7 * NUM_VIEWS)


def test_an_image_in_two_shards_is_dropped_from_one_with_all_its_views(
    source: Path, store: Store
) -> None:
    (name,) = (path.name for path in store.shards())
    store.replace_shard("zzz.parquet", store.read_shard(name).slice(0, 2 * NUM_VIEWS))
    embedder.extract(source, store.path, **VIEWS)
    assert counts(store)["dropped"] == 2
    assert len(store.ids(view=None)) == 8 * NUM_VIEWS
    assert all(check.passed for check in verify(store))


def test_manifest_columns_reach_every_view(source: Path, store: Store) -> None:
    manifest = source / "list.csv"
    lines = [f"{image_id},{image_id[0]}" for image_id in store.ids()]
    manifest.write_text("\n".join(["path,label", *lines]))
    embedder.extract(manifest, store.path, **VIEWS)
    assert (counts(store)["embedded"], counts(store)["updated"]) == (0, 8)
    table = store.table(["image_id", "view", "label"]).to_pylist()
    assert len(table) == 8 * NUM_VIEWS
    assert all(row["label"] == row["image_id"][0] for row in table)
    assert store.column_names()[:2] == ["image_id", "view"]


def test_a_manifest_may_have_a_column_named_view_only_where_the_store_has_none(
    source: Path, tmp_path: Path
) -> None:
    manifest = source / "list.csv"
    manifest.write_text("path,view\ncats/000.png,front\n")
    with pytest.raises(RequestError, match="`view` is the column of their numbers"):
        embedder.extract(manifest, tmp_path / "out", **VIEWS)
    plain = embedder.extract(manifest, tmp_path / "out", **SMALL)
    assert plain.table(["view"])["view"].to_pylist() == ["front"]


# Verifying. ------------------------------------------------------------------------------------


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.passed]


def swap_vectors(store: Store, view: int) -> None:
    """Give each image the vector that its neighbour has for one view."""
    (name,) = (path.name for path in store.shards())
    table = store.read_shard(name)
    order = np.arange(len(table))
    order[view::NUM_VIEWS] = np.roll(order[view::NUM_VIEWS], 1)
    place = table.column_names.index("embedding")
    vectors = table["embedding"].take(pa.array(order))
    store.replace_shard(name, table.set_column(place, table.schema.field("embedding"), vectors))


def test_a_whole_store_passes_the_audit(photos: Path, made: Store) -> None:
    checks = verify(made, str(photos), audit=8)
    assert failed(checks) == []
    assert "8 images with 4 views, 0 not whole" in [check.detail for check in checks]


@pytest.mark.parametrize("view", [0, 2])
def test_the_audit_finds_vectors_of_another_image(photos: Path, store: Store, view: int) -> None:
    swap_vectors(store, view)
    (name,) = failed(verify(store, str(photos), audit=8))
    assert name.startswith("vectors are those of their images")


@pytest.mark.parametrize("change", ["lost", "added", "twice", "beyond"])
def test_an_image_without_each_of_its_views_is_found(store: Store, change: str) -> None:
    (name,) = (path.name for path in store.shards())
    table = store.read_shard(name)
    views = table["view"].to_numpy().copy()
    rows = [row for row in range(len(table)) if change != "lost" or row != 5]
    views[5] = {"twice": 2, "beyond": NUM_VIEWS}.get(change, 1)
    table = table.set_column(1, table.schema.field("view"), pa.array(views))
    store.replace_shard(name, table.take(rows + [5] * (change == "added")))
    assert failed(verify(store)) == ["every image with each of its views once"]
    (check,) = (check for check in verify(store) if not check.passed)
    assert check.detail.endswith(f"1 not whole: {pc.unique(table['image_id'])[1]}")


def test_the_command_line_makes_views(photos: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    options = ["--limit", "2", "--image-size", "64x96", "--views", "3"]
    done = CliRunner().invoke(app, ["extract", str(photos), out, *options])
    assert done.exit_code == 0, done.output
    assert Store(out).views().tolist() == [0, 1, 2] * 2
