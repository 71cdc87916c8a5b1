"""The job: nothing lost, nothing repeated, only what is missing computed, whatever happens."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from csv import DictReader
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

import embedder
from embedder.checks.verify import verify
from embedder.errors import (
    RecipeMismatch,
    RequestError,
    SourceError,
    StoreError,
    Unfinished,
)
from embedder.extraction import worker
from embedder.extraction.extract import _shared_out
from embedder.store.store import Store
from tests.extraction.test_cluster import scheduler_with_workers, wait_for_workers
from tests.support import make_archive, picture

# A small input makes the real network fast; every pixel of these images still counts.
SMALL: dict[str, Any] = {"image_size": (64, 96)}


def vectors_by_id(store: Store) -> dict[str, NDArray[np.float32]]:
    return dict(zip(store.ids(), store.vectors(), strict=True))


def assert_same(store: Store, other: Store) -> None:
    """Same images, vectors equal to 1e-5 of the largest value."""
    one, two = vectors_by_id(store), vectors_by_id(other)
    assert one.keys() == two.keys()
    largest = max(float(np.abs(vector).max()) for vector in two.values())
    for image_id, vector in one.items():
        np.testing.assert_allclose(vector, two[image_id], atol=1e-5 * largest)


def counts(store: Store) -> dict[str, int]:
    last: dict[str, int] = store.runs()[-1]["counts"]
    return last


def cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.fixture
def undisturbed(archive: Path, tmp_path: Path) -> Store:
    return embedder.extract(archive, tmp_path / "undisturbed", **SMALL)


# Nothing lost. -------------------------------------------------------------------------------


def test_every_odd_file_has_the_outcome_that_is_expected(
    odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pillow's warnings are ignored when a state is made; pytest takes that back after each test.
    monkeypatch.setattr(worker, "_states", {})
    with (odd / "expected.csv").open(encoding="utf-8", newline="") as file:
        expected = {row["file"]: row["expect"] for row in DictReader(file)}
    manifest = odd / "manifest.txt"
    manifest.write_text("\n".join(expected), encoding="utf-8")
    store = embedder.extract(manifest, tmp_path / "out", max_failures=1, shard_size=50, **SMALL)
    manifest.unlink()  # other tests list this folder
    failures = store.failures()
    outcomes = dict.fromkeys(store.ids(), "ok")
    outcomes |= dict.fromkeys(failures["image_id"].to_pylist(), "fail")
    assert outcomes == expected
    assert len(store) + failures.num_rows == len(expected)
    assert set(failures["stage"].to_pylist()) == {"decode"}
    assert all(failures["error"].to_pylist())


def test_one_picture_embeds_alike_however_it_is_stored(odd: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(odd / "modes", folder / "modes")
    (folder / "orientation").mkdir()
    for path in (odd / "orientation").glob("[LP]*_?.jpg"):
        hide_the_digit(path, folder / "orientation" / path.name)
    vectors = vectors_by_id(embedder.extract(folder, tmp_path / "out"))
    for shape in ("Landscape", "Portrait"):
        turned = [vectors[f"orientation/{shape}_{number}.jpg"] for number in range(1, 9)]
        assert min(cosine(turned[0], vector) for vector in turned) > 0.98
    coloured = [vectors[f"modes/{name}"] for name in ("RGB.jpg", "P.png", "CMYK.jpg", "LAB.webp")]
    assert min(cosine(coloured[0], vector) for vector in coloured) > 0.98
    assert cosine(vectors["modes/L.png"], vectors["modes/1.png"]) > 0.98


def hide_the_digit(source: Path, target: Path) -> None:
    """Paint over the middle, where each image has its own orientation as a digit."""
    with Image.open(source) as image:
        width, height = image.size
        box = (width * 35 // 100, height * 35 // 100, width * 65 // 100, height * 65 // 100)
        exif = image.getexif()
        image.paste((128, 128, 128), box)
        image.save(target, quality=95, exif=exif)


def test_an_image_is_embedded_as_it_would_be_alone(
    archive: Path, undisturbed: Store, tmp_path: Path
) -> None:
    for number, path in enumerate(sorted(archive.rglob("*.*"))[:3]):
        single = tmp_path / f"alone-{number}"
        single.mkdir()
        shutil.copy(path, single)
        (vector,) = embedder.extract(single, tmp_path / f"out-{number}", **SMALL).vectors()
        stored = vectors_by_id(undisturbed)[path.relative_to(archive).as_posix()]
        np.testing.assert_allclose(vector, stored, atol=1e-5 * np.abs(stored).max())


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 3},
        {"shard_size": 7},
        {"shard_size": 4, "workers": 2},
        {"engine": "tensorflow", "batch_size": 5},
    ],
    ids=str,
)
def test_how_a_run_is_done_changes_no_vector(
    archive: Path, undisturbed: Store, tmp_path: Path, options: dict[str, Any]
) -> None:
    store = embedder.extract(archive, tmp_path / "out", **options, **SMALL)
    if options.get("engine") == "tensorflow":
        one, two = vectors_by_id(store), vectors_by_id(undisturbed)
        assert min(cosine(one[i], two[i]) for i in two) > 0.9999
        assert one.keys() == two.keys()
    else:
        assert_same(store, undisturbed)


def test_a_dask_cluster_elsewhere_makes_the_same_store(
    archive: Path, undisturbed: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "embedder")
    # OpenVINO uses no GPU, so it is all the same who has one.
    with scheduler_with_workers("--nthreads 1", "--nthreads 1 --resources GPU=1") as address:
        wait_for_workers(address, 2)
        options = SMALL | {"engine": "openvino", "scheduler": address, "shard_size": 5}
        store = embedder.extract(archive, tmp_path / "out", **options)
    assert_same(store, undisturbed)
    assert counts(store)["embedded"] == 20
    assert store.runs()[-1]["workers"] == 2
    assert "GPU" not in caplog.text


# Only what is missing. -----------------------------------------------------------------------


def test_a_second_run_has_nothing_to_do(archive: Path, undisturbed: Store) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.shards()}
    store = embedder.extract(archive, undisturbed.path, **SMALL)
    assert counts(store)["embedded"] == 0
    assert counts(store)["done_before"] == 20
    assert {path: path.stat().st_mtime_ns for path in store.shards()} == before


def test_only_new_and_changed_files_are_embedded(archive: Path, undisturbed: Store) -> None:
    old = vectors_by_id(undisturbed)
    Image.fromarray(picture(100)).save(archive / "cats" / "new.jpg")
    Image.fromarray(picture(101)).save(archive / "cats" / "002.jpg")  # another content
    os.utime(archive / "cats" / "004.jpg", (1, 1))  # another time, the same content
    (archive / "dogs" / "001.jpg").unlink()
    store = embedder.extract(archive, undisturbed.path, **SMALL)
    assert counts(store) | {"inputs": 20, "done_before": 17} == counts(store)
    assert counts(store)["embedded"] == 2
    assert counts(store)["changed"] == counts(store)["updated"] == 1
    assert counts(store)["deleted"] == 1
    new = vectors_by_id(store)
    assert set(new) == set(old) | {"cats/new.jpg"}  # what was deleted is told, not dropped
    assert cosine(old["cats/002.jpg"], new["cats/002.jpg"]) < 0.999
    assert (old["cats/004.jpg"] == new["cats/004.jpg"]).all()
    again = embedder.extract(archive, undisturbed.path, **SMALL)
    assert counts(again)["embedded"] == counts(again)["updated"] == 0


def test_pruning_drops_what_the_source_no_longer_has(archive: Path, undisturbed: Store) -> None:
    (archive / "dogs" / "001.jpg").unlink()
    store = embedder.extract(archive, undisturbed.path, prune=True, **SMALL)
    assert "dogs/001.jpg" not in store.ids()
    assert len(store) == 19
    assert counts(store)["dropped"] == 1


def test_failures_are_tried_again_when_asked_or_when_the_file_changed(
    archive: Path, tmp_path: Path
) -> None:
    (archive / "bad.jpg").write_bytes(b"no image")
    store = embedder.extract(archive, tmp_path / "out", **SMALL)
    assert (len(store), store.failures().num_rows) == (20, 1)
    store = embedder.extract(archive, tmp_path / "out", **SMALL)
    assert counts(store)["failed"] == 0
    store = embedder.extract(archive, tmp_path / "out", retry_failed=True, **SMALL)
    assert counts(store)["failed"] == 1
    Image.fromarray(picture(9)).save(archive / "bad.jpg")
    store = embedder.extract(archive, tmp_path / "out", **SMALL)
    assert (len(store), store.failures().num_rows) == (21, 0)


def test_new_manifest_columns_reach_rows_that_are_not_embedded_again(
    archive: Path, tmp_path: Path
) -> None:
    paths = [path.relative_to(archive).as_posix() for path in sorted(archive.rglob("*.*"))]
    manifest = archive / "list.csv"
    manifest.write_text("path\n" + "\n".join(paths))
    before = vectors_by_id(embedder.extract(manifest, tmp_path / "out", **SMALL))
    manifest.write_text("path,label\n" + "\n".join(f"{path},{path[0]}" for path in paths))
    store = embedder.extract(manifest, tmp_path / "out", **SMALL)
    assert counts(store)["embedded"] == 0
    table = store.table(["image_id", "label"]).to_pylist()
    assert all(row["label"] == row["image_id"][0] for row in table)
    for image_id, vector in vectors_by_id(store).items():
        np.testing.assert_array_equal(vector, before[image_id])


def test_a_limit_takes_the_first_images(archive: Path, tmp_path: Path) -> None:
    store = embedder.extract(archive, tmp_path / "out", limit=5, **SMALL)
    assert len(store) == 5
    assert counts(store)["deleted"] == 0
    assert len(embedder.extract(archive, tmp_path / "out", **SMALL)) == 20


# Whatever happens. ---------------------------------------------------------------------------


def start(archive: Path, store: Path, *options: str) -> "subprocess.Popen[str]":
    """Start the command in a process group of its own, with Ctrl-C as in a terminal.

    A suite that runs in the background of a shell ignores SIGINT, and so would its children.
    """
    command = [sys.executable, "-m", "embedder", "extract", str(archive), str(store)]
    command += ["--image-size", "64x96", *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_shards(store: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list((store / "embeddings").glob("*.parquet"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many images that a run can be killed in the middle."""
    return make_archive(tmp_path_factory.mktemp("large") / "photos", 600)


@pytest.fixture(scope="module")
def large_undisturbed(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return embedder.extract(large, tmp_path_factory.mktemp("large-out") / "store", **SMALL)


@pytest.mark.parametrize("options", [(), ("--workers", "2")], ids=str)
def test_a_killed_run_is_finished_by_the_same_command(
    large: Path, large_undisturbed: Store, tmp_path: Path, options: tuple[str, ...]
) -> None:
    store = tmp_path / "out"
    moments = random.Random(0)
    for _ in range(3):
        done = len(list((store / "embeddings").glob("*.parquet")))
        process = start(large, store, "--shard-size", "20", *options)
        wait_for_shards(store, min(done + moments.randrange(1, 6), 30))
        time.sleep(moments.random() / 10)
        orphans = [psutil.Process(worker) for worker in workers_of(process.pid)]
        process.kill()
        process.communicate()
        psutil.wait_procs(orphans, timeout=60)  # they may still write what they have in work
    embedder.extract(large, store, shard_size=20, **SMALL)
    assert_same(Store(store), large_undisturbed)
    assert all(check.passed for check in verify(Store(store), str(large)))
    assert not list(store.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("num_images", "num_workers", "shard_size", "expected"),
    [
        (5000, 1, 1024, 1024),  # one worker alone has all of it anyway
        (5000, 2, 1024, 1024),  # five shards for two workers
        (2000, 2, 1024, 500),
        (2000, 2, 300, 300),
        (130, 2, 1024, 65),  # not 33, of which there would be four
        (130, 16, 1024, 65),
        (63, 2, 1024, 63),
        (0, 2, 1024, 1024),
    ],
)
def test_shards_of_a_short_run_are_so_small_that_all_workers_have_work(
    num_images: int, num_workers: int, shard_size: int, expected: int
) -> None:
    assert _shared_out(num_images, num_workers, shard_size) == expected


def test_a_short_run_is_shared_by_its_workers(
    large: Path, large_undisturbed: Store, tmp_path: Path
) -> None:
    store = embedder.extract(large, tmp_path / "out", workers=2, limit=300, **SMALL)
    assert [store.num_rows_of(name) for name in store.shard_names()] == [75] * 4
    embedder.extract(large, tmp_path / "out", **SMALL)
    assert [store.num_rows_of(name) for name in store.shard_names()].count(75) == 4
    assert len(store.shards()) == 5
    assert_same(store, large_undisturbed)


def test_a_killed_worker_loses_nothing(
    large: Path, large_undisturbed: Store, tmp_path: Path
) -> None:
    store = tmp_path / "out"
    process = start(large, store, "--workers", "2", "--shard-size", "20")
    wait_for_shards(store, 2)
    workers = list(workers_of(process.pid))
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert_same(Store(store), large_undisturbed)


def workers_of(process_id: int) -> Iterator[int]:
    for child in psutil.Process(process_id).children(recursive=True):
        if "spawn_main" in " ".join(child.cmdline()):
            yield child.pid


@pytest.mark.parametrize("options", [(), ("--workers", "2")], ids=str)
def test_ctrl_c_keeps_what_is_done(
    large: Path, large_undisturbed: Store, tmp_path: Path, options: tuple[str, ...]
) -> None:
    store = tmp_path / "out"
    process = start(large, store, "--shard-size", "20", *options)
    wait_for_shards(store, 3)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the same command continues" in output
    assert "Traceback" not in output
    assert Store(store).runs()[-1]["status"] == "interrupted"
    assert 3 <= len(Store(store).shards()) < 30
    embedder.extract(large, store, shard_size=20, **SMALL)
    assert_same(Store(store), large_undisturbed)


def test_two_runs_at_the_same_time_do_no_harm(
    large: Path, large_undisturbed: Store, tmp_path: Path
) -> None:
    store = tmp_path / "out"
    first = start(large, store, "--shard-size", "20")
    wait_for_shards(store, 2)
    second = start(large, store, "--shard-size", "20")
    for process in (first, second):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    assert_same(Store(store), large_undisturbed)
    assert all(check.passed for check in verify(Store(store), str(large)))


def test_a_full_disk_ends_the_run_and_keeps_what_is_written(
    large: Path, large_undisturbed: Store, tmp_path: Path
) -> None:
    """A limit on the size of files stands in for a full disk: the same call fails."""
    store = tmp_path / "out"
    embedder.extract(large, store, shard_size=10, limit=50, **SMALL)
    # The memory that processes share is a file too, so it must be there before the limit is.
    code = f"""
import embedder, resource, signal, sys
embedder.extract({str(large)!r}, {str(tmp_path / "other")!r}, limit=1, image_size=(64, 96))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.argv = ["embedder", "extract", {str(large)!r}, {str(store)!r}, "--image-size", "64x96"]
from embedder.cli.app import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(Store(store)) == 50
    assert not list(store.rglob("*.tmp"))
    embedder.extract(large, store, **SMALL)
    assert_same(Store(store), large_undisturbed)


def test_too_many_failures_stop_the_run_and_keep_what_is_done(tmp_path: Path) -> None:
    folder = make_archive(tmp_path / "photos", 40)
    for number in range(30):
        (folder / f"z{number}.jpg").write_bytes(b"no image")
    with pytest.raises(Unfinished, match=r"images failed; `--max-failures` allows.*0\.1"):
        embedder.extract(folder, tmp_path / "out", shard_size=10, **SMALL)
    store = Store(tmp_path / "out")
    assert len(store) == 40
    assert store.failures().num_rows > 7
    store = embedder.extract(folder, tmp_path / "out", max_failures=0.5, **SMALL)
    assert (len(store), store.failures().num_rows) == (40, 30)
    Image.fromarray(picture(99)).save(folder / "a.jpg")
    with pytest.raises(Unfinished, match=r"0\.1\. All of them in earlier runs\. What is done"):
        embedder.extract(folder, tmp_path / "out", **SMALL)


# Requests that make no sense. ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backbone": "resnet51"}, RequestError, "`backbone` must be one of"),
        ({"crop": "round"}, RequestError, "crop"),
        ({"image_size": (8, 8)}, RequestError, "32 to 4096 pixels"),
        ({"colour": "red"}, RequestError, "Unknown option: colour"),
        ({"engine": "torch"}, RequestError, "auto, openvino, tensorflow or jax"),
        ({"batch_size": 0}, RequestError, "`batch_size` must be at least 1"),
        ({"max_failures": 2}, RequestError, "`max_failures` must be at most 1"),
    ],
    ids=str,
)
def test_bad_options_start_nothing(
    archive: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        embedder.extract(archive, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_bad_sources_start_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(SourceError):
            embedder.extract(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_store_that_cannot_be_written_is_told(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written"):
        embedder.extract(archive, tmp_path / "file" / "out", **SMALL)


def test_a_store_of_another_recipe_is_left_as_it_is(archive: Path, undisturbed: Store) -> None:
    before = sorted(undisturbed.path.rglob("*"))
    with pytest.raises(RecipeMismatch, match=r"image_size: \(64, 96\), not \(96, 64\)"):
        embedder.extract(archive, undisturbed.path, image_size=(96, 64))
    assert sorted(undisturbed.path.rglob("*")) == before
