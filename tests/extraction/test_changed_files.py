"""Rows whose files look changed: what is read decides, and nothing goes before its successor."""

import os
import re
import shutil
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import embedder
from embedder.checks.verify import verify
from embedder.cli.app import app
from embedder.errors import RequestError, Unfinished
from embedder.extraction.changed_files import refresh_shard
from embedder.extraction.plan import make_plan
from embedder.extraction.shard import Stopped, extract_shard
from embedder.extraction.worker import Job, worker_state_of
from embedder.sources.listing import list_images
from embedder.store.schema import FAILURES
from tests.cli.test_app import run
from tests.extraction.test_extract import SMALL, assert_same, counts, vectors_by_id
from tests.sources.faults import failing, moved
from tests.support import WebServer, body, make_archive, status


@pytest.fixture
def manifest(archive: Path, tmp_path: Path) -> Path:
    """A list of the images on a disk that can be missing."""
    archive.rename(tmp_path / "disk")
    paths = sorted(path.relative_to(tmp_path) for path in (tmp_path / "disk").rglob("*.*"))
    manifest = tmp_path / "list.csv"
    lines = [f"{path},{number}" for number, path in enumerate(paths)]
    manifest.write_text("\n".join(["path,label", *lines, ""]))
    return manifest


def touch_all(folder: Path) -> None:
    """Give every file another time of change."""
    for path in folder.rglob("*.*"):
        os.utime(path, (1e9, 1e9))


def test_a_disk_that_is_missing_drops_no_row(manifest: Path, tmp_path: Path) -> None:
    store = embedder.extract(manifest, tmp_path / "out", **SMALL)
    before = vectors_by_id(store)
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    with pytest.raises(Unfinished, match=r"20 of 20 images failed.*20 x read: .*No such file"):
        embedder.extract(manifest, tmp_path / "out", **SMALL)
    assert vectors_by_id(store).keys() == before.keys()
    assert counts(store)["unreadable"] == 20
    assert counts(store)["dropped"] == store.failures().num_rows == 0
    (tmp_path / "elsewhere").rename(tmp_path / "disk")
    embedder.extract(manifest, tmp_path / "out", **SMALL)
    assert counts(store)["unreadable"] == counts(store)["embedded"] == counts(store)["updated"] == 0
    for image_id, vector in vectors_by_id(store).items():
        np.testing.assert_array_equal(vector, before[image_id])


def test_a_few_images_that_cannot_be_read_keep_their_rows_and_are_counted(
    manifest: Path, tmp_path: Path
) -> None:
    store = embedder.extract(manifest, tmp_path / "out", **SMALL)
    next((tmp_path / "disk").rglob("*.png")).unlink()
    embedder.extract(manifest, tmp_path / "out", **SMALL)
    assert (len(store), store.failures().num_rows, counts(store)["unreadable"]) == (20, 0, 1)


def test_an_image_that_becomes_unreadable_while_it_is_embedded_keeps_its_row(
    archive: Path, tmp_path: Path
) -> None:
    """Its bytes are others than those of its row, and then cannot be read again."""
    store = embedder.extract(archive, tmp_path / "out", **SMALL)
    before = vectors_by_id(store)
    (old,) = store.shards()
    shutil.rmtree(archive)
    make_archive(archive, 20, first_seed=100)
    refs = list_images(archive).refs
    (archive / "cats" / "002.jpg").unlink()
    state = worker_state_of(Job(store.recipe, str(store.path), "openvino", 4), 2)
    sha256 = dict(zip(store.ids(), store.sha256(), strict=True))
    job = Job(store.recipe, str(store.path), "openvino", 4)
    never = lambda: False  # noqa: E731
    (receipt,) = extract_shard([job], [state], refs, lambda *_: None, never, [sha256])
    assert receipt.shard != old.name  # which would have been written over, with that row in it
    assert receipt.unreadable.total() == 1
    assert sorted(receipt.settled) == sorted(before.keys() - {"cats/002.jpg"})
    assert store.failures().num_rows == 0
    embedder.extract(archive, tmp_path / "out", **SMALL)
    after = vectors_by_id(store)
    assert after.keys() == before.keys()
    assert [i for i in after if np.array_equal(after[i], before[i])] == ["cats/002.jpg"]


def test_an_image_that_changes_to_rubbish_becomes_a_failure(archive: Path, tmp_path: Path) -> None:
    store = embedder.extract(archive, tmp_path / "out", **SMALL)
    (archive / "cats" / "002.jpg").write_bytes(b"no image any more")
    embedder.extract(archive, tmp_path / "out", **SMALL)
    assert len(store) == 19
    assert store.failures()["image_id"].to_pylist() == ["cats/002.jpg"]
    assert all(check.passed for check in verify(store, str(archive)))


def test_changed_images_whose_old_rows_are_still_there_are_settled_by_the_listing(
    archive: Path, tmp_path: Path
) -> None:
    """What a kill leaves between writing new rows and dropping old ones."""
    store = embedder.extract(archive, tmp_path / "out", **SMALL)
    (old,) = store.shards()
    kept = shutil.copy(old, tmp_path / "kept.parquet")
    for name in ("002.jpg", "004.jpg"):
        shutil.copy(archive / "cats" / "008.jpg", archive / "cats" / name)
    (archive / "cats" / "010.jpg").write_bytes(b"no image")
    embedder.extract(archive, tmp_path / "out", **SMALL)
    for name in ("!first.parquet", "zlast.parquet"):  # in the order of reading
        shutil.copy(kept, old.with_name(name))
    embedder.extract(archive, tmp_path / "out", **SMALL)
    assert all(check.passed for check in verify(store, str(archive), audit=20))
    assert_same(store, embedder.extract(archive, tmp_path / "undisturbed", **SMALL))
    assert store.failures()["image_id"].to_pylist() == ["cats/010.jpg"]


def test_pruning_more_than_a_tenth_must_be_said(archive: Path, tmp_path: Path) -> None:
    store = embedder.extract(archive, tmp_path / "out", **SMALL)
    for number in (0, 2, 4):
        next((archive / "cats").glob(f"{number:03d}.*")).unlink()
    with pytest.raises(RequestError, match=r"share of 0\.1.*no longer has 3 of 20.*prune-share"):
        embedder.extract(archive, tmp_path / "out", prune=True, **SMALL)
    assert len(store) == 20
    embedder.extract(archive, tmp_path / "out", prune=True, prune_share=0.2, **SMALL)
    assert len(store) == 17


# Failures that may pass. ---------------------------------------------------------------------


@pytest.fixture
def urls(web: WebServer, archive: Path, tmp_path: Path) -> Path:
    """A list of the images on a server."""
    names = sorted(path.relative_to(archive).as_posix() for path in archive.rglob("*.*"))
    for name in names:
        web.answers[f"/{name}"] = body((archive / name).read_bytes())
    manifest = tmp_path / "urls.txt"
    manifest.write_text("\n".join(f"{web.url}/{name}" for name in names))
    return manifest


@pytest.mark.parametrize(
    ("code", "reason", "is_passing"),
    [
        (503, "Service Unavailable", True),
        (429, "Too Many Requests", True),
        (404, "Not Found", False),
    ],
)
def test_only_what_may_have_passed_is_tried_again_by_the_next_run(
    web: WebServer, urls: Path, tmp_path: Path, code: int, reason: str, is_passing: bool
) -> None:
    healthy = web.answers["/cats/002.jpg"]
    web.answers["/cats/002.jpg"] = failing(code, Retry_After="0")
    store = embedder.extract(urls, tmp_path / "out", **SMALL)
    (failure,) = store.failures().to_pylist()
    attempts = ", 6 attempts" if is_passing else ""
    assert failure["error"] == f"HTTP status {code} {reason}{attempts}"
    assert failure["passing"] is is_passing
    web.answers["/cats/002.jpg"] = healthy
    embedder.extract(urls, tmp_path / "out", **SMALL)
    assert len(store) == (20 if is_passing else 19)
    assert store.failures().num_rows == (0 if is_passing else 1)
    assert all(check.passed for check in verify(store))


def test_of_failures_that_older_versions_wrote_those_to_read_are_tried_again(
    web: WebServer, urls: Path, tmp_path: Path
) -> None:
    healthy = web.answers["/cats/002.jpg"]
    web.answers["/cats/002.jpg"] = status(404)
    web.answers["/cats/004.jpg"] = body(b"no image")
    store = embedder.extract(urls, tmp_path / "out", **SMALL)
    web.answers["/cats/002.jpg"] = healthy
    (path,) = store.shards(FAILURES)
    pq.write_table(pq.read_table(path, partitioning=None).drop_columns("passing"), path)
    embedder.extract(urls, tmp_path / "out", **SMALL)
    assert len(store) == 19
    assert store.failures()["stage"].to_pylist() == ["decode"]


# Verifying. ----------------------------------------------------------------------------------


def test_an_image_that_cannot_be_read_now_is_not_called_wrong_by_an_audit(
    web: WebServer, urls: Path, tmp_path: Path
) -> None:
    store = embedder.extract(urls, tmp_path / "out", **SMALL)
    web.answers["/cats/002.jpg"] = status(403)
    web.answers["/cats/004.jpg"] = web.answers["/cats/008.jpg"]
    lines = urls.read_text().splitlines()
    urls.write_text("\n".join(line for line in lines if not line.endswith("cats/000.png")))
    check = verify(store, str(urls), audit=20)[-1]
    assert not check.passed
    assert check.detail.startswith("17 of 20 images embedded again, lowest cosine 1.0")
    assert re.search(r"; 1 wrong or changed: \S*/cats/004.jpg;", check.detail)
    assert re.search(r"; 1 cannot be read now: \S*/002.jpg \(HTTP status 403 F\w+\);", check.detail)
    assert re.search(r"; 1 no longer in the source: \S*/cats/000.png$", check.detail)


def test_a_store_of_private_addresses_is_verified_if_that_is_allowed(
    web: WebServer, urls: Path, tmp_path: Path
) -> None:
    images = dict(web.answers)
    for name, answer in images.items():
        web.answers[f"/moved{name}"] = answer
        web.answers[name] = moved(f"{web.url.replace('127.0.0.1', 'localhost')}/moved{name}")
    out = tmp_path / "out"
    embedder.extract(urls, out, allow_private=True, **SMALL)
    refused = embedder.verify(out, str(urls), audit=2)[-1]
    assert not refused.passed
    assert "2 cannot be read now" in refused.detail
    assert "wrong" not in refused.detail
    assert all(check.passed for check in embedder.verify(out, audit=2, allow_private=True))
    done = CliRunner().invoke(app, ["verify", str(out), "--audit", "1", "--allow-private"])
    assert (done.exit_code, "1 of 1 images embedded again" in done.output) == (0, True)


# Reading what looks changed. -------------------------------------------------------------------


def test_large_local_files_are_compared_without_being_in_memory(
    archive: Path, tmp_path: Path
) -> None:
    store = embedder.extract(archive, tmp_path / "out", **SMALL)
    for path in archive.rglob("*.*"):
        os.truncate(path, 16 * 2**20)
    (name,) = store.shard_names()
    stale = make_plan(list_images(archive).refs, store).stale
    tracemalloc.start()
    found = refresh_shard(store, name, stale, lambda: False, num_threads=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.replaced) == 20
    assert peak < 12 * 2**20


def test_a_run_that_is_stopped_does_not_wait_for_what_a_server_holds_back(
    web: WebServer, urls: Path, tmp_path: Path
) -> None:
    store = embedder.extract(urls, tmp_path / "out", **SMALL)
    (name,) = store.shard_names()
    refs = list_images(urls).refs
    stale = refs.append_column("shard", pa.array([name] * 20))
    stale = stale.append_column("same_file", pa.array([False] * 20))
    asked, is_over, answered = threading.Event(), threading.Event(), []

    def hold_back(handler: BaseHTTPRequestHandler) -> None:
        asked.set()
        is_over.wait(timeout=60)
        answered.append(handler.path)
        status(404)(handler)

    web.answers = dict.fromkeys(web.answers, hold_back)
    try:
        with pytest.raises(Stopped):
            refresh_shard(store, name, stale, asked.is_set, num_threads=2)
        assert not answered
    finally:
        is_over.set()


# Columns of a manifest. ----------------------------------------------------------------------


def test_columns_of_any_type_settle_after_one_run(manifest: Path, tmp_path: Path) -> None:
    paths = pa.array(["disk/cats/002.jpg", "disk/cats/004.jpg", "disk/dogs/001.jpg"])
    columns = {
        "half": pa.array(np.array([1, 2, np.nan], np.float16)),
        "duration": pa.array([1, 2, None], pa.duration("us")),
        "struct": pa.array([{"a": 1, "b": "x"}, {"a": 2, "b": None}, None]),
        "list": pa.array([[1, 2], None, []]),
        "nan": pa.array([float("nan"), 1.0, None]),
        "dictionary": pa.array(["a", "b", "a"]).dictionary_encode(),
        "view": pa.array(["a", None, "b"], pa.string_view()),
        "seconds": pa.array([1, 2, 3], pa.timestamp("s")),
        "map": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64())),
        "null": pa.nulls(3),
    }
    table = pa.table({"path": paths} | columns)
    pq.write_table(table, manifest.with_suffix(".parquet"))
    source = manifest.with_suffix(".parquet")
    store = embedder.extract(source, tmp_path / "out", **SMALL)
    first = store.shards()[0].read_bytes()
    embedder.extract(source, tmp_path / "out", **SMALL)
    assert (counts(store)["done_before"], counts(store)["updated"]) == (3, 0)
    assert store.shards()[0].read_bytes() == first
    changed = table.set_column(4, "list", pa.array([[1, 2], None, [7]]))
    pq.write_table(changed, source)
    embedder.extract(source, tmp_path / "out", **SMALL)
    assert (counts(store)["done_before"], counts(store)["updated"]) == (2, 1)
    rows = store.table(["image_id", "list", "struct"]).sort_by("image_id").to_pylist()
    assert [row["list"] for row in rows] == [[1, 2], None, [7]]
    assert rows[1]["struct"] == {"a": 2, "b": None}


def test_a_row_that_keeps_its_vector_takes_new_columns_but_no_new_time(
    manifest: Path, tmp_path: Path
) -> None:
    store = embedder.extract(manifest, tmp_path / "out", **SMALL)
    before = dict(zip(store.ids(), store.table(["modified"])["modified"].to_pylist(), strict=True))
    (tmp_path / "disk" / "cats" / "002.jpg").unlink()
    manifest.write_text(
        manifest.read_text().replace(",", ",class-").replace("class-label", "label")
    )
    embedder.extract(manifest, tmp_path / "out", **SMALL)
    rows = {
        row["image_id"]: row for row in store.table(["image_id", "label", "modified"]).to_pylist()
    }
    assert all(row["label"].startswith("class-") for row in rows.values())
    assert rows["disk/cats/002.jpg"]["modified"] == before["disk/cats/002.jpg"]


def test_touched_files_keep_their_vectors_and_take_the_new_time(
    archive: Path, tmp_path: Path
) -> None:
    store = embedder.extract(archive, tmp_path / "out", **SMALL)
    touch_all(archive)
    embedder.extract(archive, tmp_path / "out", **SMALL)
    assert (counts(store)["updated"], counts(store)["embedded"]) == (20, 0)
    embedder.extract(archive, tmp_path / "out", **SMALL)
    assert counts(store)["done_before"] == 20


def test_the_command_line_tells_what_cannot_be_read(manifest: Path, tmp_path: Path) -> None:
    store = tmp_path / "out"
    assert run("extract", manifest, store, "--image-size", "64x96").returncode == 0
    next((tmp_path / "disk").rglob("*.png")).unlink()
    done = run("extract", manifest, store, "--image-size", "64x96")
    assert done.returncode == 0
    assert "unreadable  1 that cannot be read now keep the rows they have" in done.stdout
    assert "1         read   FileNotFoundError: No such file or directory" in done.stdout
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    done = run("extract", manifest, store, "--image-size", "64x96")
    assert done.returncode == 1
    assert "Error: 20 of 20 images failed; `--max-failures` allows a share of 0.1" in done.stderr
    assert "so are rows of images that cannot be read now" in done.stderr
