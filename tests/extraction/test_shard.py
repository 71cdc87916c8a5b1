"""One shard: every image a row or a failure, every vector with its own row."""

import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image

from embedder.decode.decode import decode_rgb
from embedder.engines import Features
from embedder.errors import EngineError, OutOfMemory, StoreError
from embedder.extraction import decoders, shard
from embedder.extraction.record import Receipt
from embedder.extraction.shard import Stopped, extract_shard
from embedder.extraction.worker import Job, WorkerState
from embedder.recipe import Recipe
from embedder.sources.listing import list_images
from embedder.store.store import Store
from tests.support import MeanColour, make_archive, picture, wait_until


def run(
    recipe: Recipe,
    source: Path | pa.Table,
    store: Path,
    tools: MeanColour | WorkerState | None = None,
    report: Callable[[int, int], None] = lambda *_: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> tuple[Store, Receipt]:
    """Extract a folder, or refs, as one shard: with an engine, or with a state."""
    opened = Store.open_or_create(store, recipe, {})
    if not isinstance(tools, WorkerState):
        tools = WorkerState(recipe, tools or MeanColour(), num_threads=3)
    job = Job(recipe, str(store), "mean-colour", None)
    refs = list_images(source).refs if isinstance(source, Path) else source
    (receipt,) = extract_shard([job], [tools], refs, report, is_stopped)
    return opened, receipt


def assert_all_batches_come_back(state: WorkerState) -> None:
    """Those of a shard that was given up do when decoders have let go of them."""
    wait_until(lambda: state.decoders.num_free == len(state.decoders.shared.batches))


def expected_colours(recipe: Recipe, folder: Path) -> dict[str, NDArray[np.float32]]:
    """Each image's mean colour, decoded by itself."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): decode_rgb(path.read_bytes(), recipe).pixels.mean(
            axis=(0, 1), dtype=np.float32
        )
        for path in paths
    }


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_features_do_not_depend_on_batch_size(
    archive: Path, tmp_path: Path, mean_colour_recipe: Recipe, batch_size: int
) -> None:
    store, _ = run(mean_colour_recipe, archive, tmp_path / "out", MeanColour(batch_size))
    expected = expected_colours(mean_colour_recipe, archive)
    assert sorted(store.ids()) == sorted(expected)
    for image_id, vector in zip(store.ids(), store.vectors(), strict=True):
        np.testing.assert_allclose(vector, expected[image_id], atol=1e-4)


def test_bad_files_among_good_ones_shift_nothing(
    tmp_path: Path, mean_colour_recipe: Recipe
) -> None:
    folder = make_archive(tmp_path / "photos", 80)  # more than are read ahead
    expected = expected_colours(mean_colour_recipe, folder)
    bad = [f"cats/{number:03d}x.jpg" for number in range(0, 80, 4)] + ["aaa.png", "zzz.png"]
    for name in bad:
        (folder / name).write_bytes(b"no image")
    store, receipt = run(mean_colour_recipe, folder, tmp_path / "out")
    assert receipt.num_embedded == 80
    assert receipt.failures.total() == len(bad)
    for image_id, vector in zip(store.ids(), store.vectors(), strict=True):
        np.testing.assert_allclose(vector, expected[image_id], atol=1e-4)
    failures = store.failures()
    assert sorted(failures["image_id"].to_pylist()) == sorted(bad)
    assert set(failures["stage"].to_pylist()) == {"decode"}


def test_batches_that_come_back_out_of_order_find_their_rows(
    archive: Path, tmp_path: Path, mean_colour_recipe: Recipe
) -> None:
    second_is_done = threading.Event()
    calls = []

    def delay_the_first(_: NDArray[np.uint8]) -> None:
        calls.append(1)
        if len(calls) == 1:
            assert second_is_done.wait(timeout=30)
        else:
            second_is_done.set()

    engine = MeanColour(batch_size=4, num_parallel=2, before=delay_the_first)
    store, _ = run(mean_colour_recipe, archive, tmp_path / "out", engine)
    expected = expected_colours(mean_colour_recipe, archive)
    assert list(store.ids()) == sorted(expected)
    for image_id, vector in zip(store.ids(), store.vectors(), strict=True):
        np.testing.assert_allclose(vector, expected[image_id], atol=1e-4)


def test_rows_say_what_the_file_was(tmp_path: Path, mean_colour_recipe: Recipe) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    Image.fromarray(picture(0, height=90, width=120)).save(folder / "a.jpg", exif=exif)
    store, _ = run(mean_colour_recipe, folder, tmp_path / "out")
    row = store.table().to_pylist()[0]
    status = (folder / "a.jpg").stat()
    assert (row["width"], row["height"], row["format"]) == (90, 120, "JPEG")
    assert row["bytes"] == status.st_size
    assert int(row["modified"].timestamp() * 1e6) == pytest.approx(
        status.st_mtime_ns // 1000, abs=1
    )
    assert row["sha256"] == hashlib.sha256((folder / "a.jpg").read_bytes()).hexdigest()


def test_a_missing_file_is_a_failure_to_read(tmp_path: Path, mean_colour_recipe: Recipe) -> None:
    folder = make_archive(tmp_path / "photos", 3)
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    store, _ = run(mean_colour_recipe, folder, tmp_path / "out")
    (failure,) = store.failures().to_pylist()
    assert (failure["image_id"], failure["stage"], failure["sha256"]) == ("gone.jpg", "read", None)
    assert failure["error"] == "FileNotFoundError: No such file or directory"


def test_failures_say_how_large_the_file_was(tmp_path: Path, mean_colour_recipe: Recipe) -> None:
    folder = make_archive(tmp_path / "photos", 3)
    (folder / "bad.jpg").write_bytes(b"no image")
    refs = list_images(folder).refs
    gone = folder / "cats" / "002.jpg"
    size_as_listed = gone.stat().st_size
    gone.unlink()
    (folder / "bad.jpg").write_bytes(b"longer by now, and still no image")
    store, _ = run(mean_colour_recipe, refs, tmp_path / "out")
    sizes = {row["image_id"]: row["bytes"] for row in store.failures().to_pylist()}
    assert sizes == {"bad.jpg": 33, "cats/002.jpg": size_as_listed}


def test_a_vector_that_is_not_finite_is_a_failure_to_embed(
    archive: Path, tmp_path: Path, mean_colour_recipe: Recipe
) -> None:
    class Overflowing(MeanColour):
        def embed(self, pixels: NDArray[np.uint8]) -> Features:
            features = super().embed(pixels)
            features["embedding"][0, 1] = 1e6  # more than float16 holds
            return features

    recipe = mean_colour_recipe.model_copy(update={"store_dtype": "float16"})
    (archive / "zzz.png").write_bytes(b"no image")  # known before the last batch is back
    store, receipt = run(recipe, archive, tmp_path / "out", Overflowing(batch_size=4))
    assert (receipt.num_embedded, receipt.failures.total()) == (15, 6)
    failures = store.failures()
    assert failures["stage"].to_pylist() == ["embed"] * 5 + ["decode"]
    assert failures["image_id"].to_pylist() == sorted(failures["image_id"].to_pylist())
    assert np.isfinite(store.vectors()).all()


def test_a_shard_of_failures_alone_has_no_rows(tmp_path: Path, mean_colour_recipe: Recipe) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    store, receipt = run(mean_colour_recipe, tmp_path / "photos", tmp_path / "out")
    assert (len(store), receipt.num_embedded, store.failures().num_rows) == (0, 0, 1)


def test_manifest_columns_travel_with_their_rows(
    tmp_path: Path, mean_colour_recipe: Recipe
) -> None:
    folder = make_archive(tmp_path / "photos", 6)
    paths = [path.relative_to(tmp_path) for path in sorted(folder.rglob("*.*"))]
    manifest = tmp_path / "list.csv"
    manifest.write_text("label,path\n" + "".join(f"{path.stem},{path}\n" for path in paths))
    store, _ = run(mean_colour_recipe, manifest, tmp_path / "out")
    table = store.table(["image_id", "label"])
    assert [Path(i).stem for i in table["image_id"].to_pylist()] == table["label"].to_pylist()
    assert store.table().column_names[-2:] == ["label", "embedding"]


def test_a_stopped_shard_writes_nothing(
    archive: Path, tmp_path: Path, mean_colour_recipe: Recipe
) -> None:
    answers = iter([False] * 5)
    with pytest.raises(Stopped):
        run(mean_colour_recipe, archive, tmp_path / "out", is_stopped=lambda: next(answers, True))
    assert Store(tmp_path / "out").shards() == []


def test_an_engine_that_breaks_is_not_taken_for_bad_images(
    archive: Path, tmp_path: Path, mean_colour_recipe: Recipe
) -> None:
    def break_down(_: NDArray[np.uint8]) -> None:
        raise MemoryError("no memory for the batch")

    state = WorkerState(mean_colour_recipe, MeanColour(before=break_down), 2)
    with pytest.raises(MemoryError, match="no memory for the batch"):
        run(mean_colour_recipe, archive, tmp_path / "out", state)
    assert Store(tmp_path / "out").failures().num_rows == 0
    assert_all_batches_come_back(state)


@pytest.mark.parametrize("often", [True, False])
def test_progress_is_told_as_it_goes_and_adds_up(
    archive: Path,
    tmp_path: Path,
    mean_colour_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    often: bool,
) -> None:
    monkeypatch.setattr(shard, "_REPORT_SECONDS", -1.0 if often else 1000.0)
    (archive / "bad.jpg").touch()
    told: list[tuple[int, int]] = []
    run(mean_colour_recipe, archive, tmp_path / "out", report=lambda *n: told.append(n))
    assert tuple(map(sum, zip(*told, strict=True))) == (21, 1)
    assert (len(told) > 2) == often


def test_a_receipt_tells_what_the_shard_took(
    archive: Path, tmp_path: Path, mean_colour_recipe: Recipe
) -> None:
    before = time.time()
    engine = MeanColour(before=lambda _: time.sleep(0.02))  # in each of five batches
    _, receipt = run(mean_colour_recipe, archive, tmp_path / "out", engine)
    (shard,) = (tmp_path / "out" / "embeddings").iterdir()
    assert receipt.shard == shard.name
    assert receipt.num_bytes == shard.stat().st_size
    assert receipt.num_bytes_read == sum(p.stat().st_size for p in archive.rglob("*.*"))
    assert before <= receipt.first_read <= receipt.last_written <= time.time()
    assert receipt.seconds["embed"] >= 5 * 0.02
    assert receipt.decode_cpu_seconds > 0
    assert (receipt.engine, receipt.batch_size) == ("mean-colour on CPU", 4)
    assert (receipt.num_decoders, receipt.num_parallel) == (3, 2)


def test_a_vanished_store_is_told(tmp_path: Path, mean_colour_recipe: Recipe) -> None:
    job = Job(mean_colour_recipe, str(tmp_path / "nowhere"), "mean-colour", None)
    state = WorkerState(mean_colour_recipe, MeanColour(), 1)
    refs = pa.table({"image_id": ["a"], "path": [b"a"]})
    with pytest.raises(StoreError, match="not a feature store"):
        extract_shard([job], [state], refs, lambda *_: None, lambda: False)


class OnDevice(MeanColour):
    """Embeds only what it, or another of its name, has uploaded."""

    def upload(self, pixels: NDArray[np.uint8]) -> Any:
        return [super().upload(pixels)]

    def embed(self, pixels: Any) -> Features:
        (on_device,) = pixels
        return super().embed(on_device)

    def resized(self, batch_size: int) -> "OnDevice":
        return OnDevice(batch_size)


def test_several_networks_share_one_upload(
    archive: Path, tmp_path: Path, mean_colour_recipe: Recipe
) -> None:
    engines = [OnDevice(4), OnDevice(16), OnDevice(4)]
    engines[2].name = "another"  # which has its own device
    stores = [tmp_path / name for name in "abc"]
    states = [WorkerState(mean_colour_recipe, engine, 2) for engine in engines]
    for store in stores:
        Store.open_or_create(store, mean_colour_recipe, {})
    jobs = [Job(mean_colour_recipe, str(store), "any", None) for store in stores]
    refs = list_images(archive).refs
    extract_shard(jobs, states, refs, lambda *_: None, lambda: False)
    expected = expected_colours(mean_colour_recipe, archive)
    for store in map(Store, stores):
        for image_id, vector in zip(store.ids(), store.vectors(), strict=True):
            np.testing.assert_allclose(vector, expected[image_id], atol=1e-4)
    assert states[1].engine.batch_size == 4  # it would compute padding, as decoders fill fours
    uploads = [state.engine.num_uploads for state in states]  # of 20 images
    assert uploads == [5, 0, 5]


class SmallMemory(MeanColour):
    """Holds so many images and no more; keeps the batch sizes it was asked for."""

    def __init__(self, batch_size: int, num_images: int, asked: list[int]) -> None:
        super().__init__(batch_size)
        self._num_images, self._asked = num_images, asked

    def embed(self, pixels: NDArray[np.uint8]) -> Features:
        self._asked.append(len(pixels))
        if len(pixels) > self._num_images:
            raise OutOfMemory(f"{len(pixels)} images do not fit")
        return super().embed(pixels)

    def resized(self, batch_size: int) -> "SmallMemory":
        return SmallMemory(batch_size, self._num_images, self._asked)


@pytest.mark.parametrize(
    ("sizes", "fits"), [([16, 8, 4], 4), ([11, 5, 2], 2), ([7, 3], 3), ([8, 4, 2, 1], 1)]
)
def test_out_of_memory_halves_the_batch_and_loses_no_row(
    archive: Path, tmp_path: Path, mean_colour_recipe: Recipe, sizes: list[int], fits: int
) -> None:
    asked: list[int] = []
    engine = SmallMemory(sizes[0], fits, asked)
    store, receipt = run(mean_colour_recipe, archive, tmp_path / "out", engine)
    expected = expected_colours(mean_colour_recipe, archive)
    assert sorted(store.ids()) == sorted(expected)
    for image_id, vector in zip(store.ids(), store.vectors(), strict=True):
        np.testing.assert_allclose(vector, expected[image_id], atol=1e-4)
    assert receipt.failures.total() == 0
    assert sorted(set(asked), reverse=True) == sizes
    assert receipt.batch_size == sizes[-1]
    # Once small enough it stays so; only a batch that was in work already may come late.
    first_that_fits = next(i for i, size in enumerate(asked) if size <= fits)
    assert sum(size > fits for size in asked[first_that_fits:]) <= engine.num_parallel


def test_an_image_that_does_not_fit_alone_ends_the_run(
    archive: Path, tmp_path: Path, mean_colour_recipe: Recipe
) -> None:
    with pytest.raises(EngineError, match="Not even one image of 48x64 pixels"):
        run(mean_colour_recipe, archive, tmp_path / "out", SmallMemory(4, 0, []))
    assert Store(tmp_path / "out").failures().num_rows == 0


def test_a_shard_that_is_given_up_returns_its_batches(
    archive: Path, tmp_path: Path, mean_colour_recipe: Recipe
) -> None:
    out = tmp_path / "out"
    slow = MeanColour(before=lambda _: time.sleep(0.05))  # has batches in work when given up
    state = WorkerState(mean_colour_recipe, slow, 2)
    for num_answers in range(6):
        answers = iter([False] * num_answers)
        with pytest.raises(Stopped):
            run(
                mean_colour_recipe,
                archive,
                out,
                state,
                is_stopped=lambda a=answers: next(a, True),
            )
        assert_all_batches_come_back(state)
    store, _ = run(mean_colour_recipe, archive, out, state)
    assert len(store) == 20
    assert_all_batches_come_back(state)


def test_decoding_waits_for_the_network_and_goes_on_in_bursts(
    tmp_path: Path, mean_colour_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "_MAX_AHEAD", 4)
    folder = make_archive(tmp_path / "photos", 80)
    calls = threading.Semaphore(0)
    engine = MeanColour(batch_size=4, before=lambda _: assert_let(calls))
    state = WorkerState(mean_colour_recipe, engine, 2, decoders.Feeding(read_ahead=1))
    pool = state.decoders
    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(run, mean_colour_recipe, folder, tmp_path / "out", state)
        try:
            wait_until(lambda: pool.num_free == 0)
            (feed,) = pool._feeds
            num_batches = len(pool.shared.batches)
            num_waiting = 80 - 4 * num_batches
            assert num_waiting > 0
            assert feed.num_waiting == num_waiting
            for number in range(1, num_batches // 2):
                calls.release()
                wait_until(lambda n=number: pool.num_free == n)
                assert feed.num_waiting == num_waiting
            calls.release()
            wait_until(lambda: feed.num_waiting < num_waiting)
        finally:
            calls.release(100)
        assert done.result()[1].num_embedded == 80


def assert_let(calls: threading.Semaphore) -> None:
    assert calls.acquire(timeout=60)


def test_the_next_shard_is_fed_while_the_last_one_drains(
    archive: Path, tmp_path: Path, mean_colour_recipe: Recipe
) -> None:
    """The first shard's last batch waits for a batch of the second: they must overlap."""
    refs = list_images(archive).refs
    second_began = threading.Event()
    num_calls = iter(range(100))

    def hold_the_last_batch(_: NDArray[np.uint8]) -> None:
        number = next(num_calls)
        if number == 4:
            assert second_began.wait(timeout=30)
        elif number > 4:
            second_began.set()

    state = WorkerState(mean_colour_recipe, MeanColour(before=hold_the_last_batch), 2)
    Store.open_or_create(tmp_path / "out", mean_colour_recipe, {})

    def num_rows(part: pa.Table) -> int:
        return run(mean_colour_recipe, part, tmp_path / "out", state)[1].num_embedded

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(num_rows, [refs.slice(0, 17), refs.slice(17)])) == [17, 3]
