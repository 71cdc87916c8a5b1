"""Runs of parts: together they make what one run makes, and each keeps to its own images."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

import embedder
from embedder.checks.verify import verify
from embedder.errors import RequestError, StoreBusy, Unfinished
from embedder.extraction.extract import run_extraction
from embedder.extraction.options import RunOptions
from embedder.files import temporary_beside
from embedder.store.lease import lease
from embedder.store.parts import part_numbers
from embedder.store.store import Store
from tests.cli.test_app import run
from tests.extraction.test_extract import SMALL, assert_same, counts, start, wait_for_shards
from tests.extraction.test_several_stores import recipes_in
from tests.support import make_archive, picture

PARTS = ("1/3", "2/3", "3/3")


def ids_of(part: str, store: Store) -> list[str]:
    """Which images of a store are in a part."""
    ids = store.index()["image_id"]
    number, count = map(int, part.split("/"))
    in_part = part_numbers(ids, count) == number
    return [image_id for image_id, mine in zip(ids.to_pylist(), in_part, strict=True) if mine]


@pytest.fixture
def undisturbed(archive: Path, tmp_path: Path) -> Store:
    return embedder.extract(archive, tmp_path / "undisturbed", **SMALL)


@pytest.fixture
def together(archive: Path, tmp_path: Path) -> Store:
    """Made by runs of three parts, one after the other."""
    for part in PARTS:
        embedder.extract(archive, tmp_path / "together", part=part, **SMALL)
    return Store(tmp_path / "together")


def checks(store: Store, source: Path) -> dict[str, str]:
    """What failed, by the check's name."""
    return {check.name: check.detail for check in verify(store, str(source)) if not check.passed}


# Together. -----------------------------------------------------------------------------------


def test_parts_at_the_same_time_make_what_one_run_makes(tmp_path: Path) -> None:
    """Over a store of one shard, with images of all parts, many of whose files have changed."""
    archive, store = make_archive(tmp_path / "photos", 160), tmp_path / "out"
    embedder.extract(archive, store, limit=120, **SMALL)
    for path in list(archive.rglob("*.*"))[::2]:  # the same content, at another time
        os.utime(path, (0, 0))
    for path in sorted(archive.rglob("cats/*.jpg"))[::2]:
        Image.fromarray(picture(1000 + int(path.stem))).save(path)
    parts = [f"{number}/4" for number in range(1, 5)]
    runs = {part: start(archive, store, "--part", part, "--shard-size", "5") for part in parts}
    wait_for_shards(store, 3)
    with pytest.raises(StoreBusy, match="Process .* part ./4, "), lease(store, patience=0.0):
        pass
    runs["2/4"].kill()
    runs["2/4"].communicate()
    runs["2/4"] = start(archive, store, "--part", "2/4", "--shard-size", "5")
    for part, process in runs.items():
        output, _ = process.communicate()
        assert process.returncode == 0, output
        assert f"{part}, with " in output
    made = Store(store)
    assert checks(made, archive) == {}
    assert any("4 of 4 parts whole" in check.detail for check in verify(made, str(archive)))
    assert_same(made, embedder.extract(archive, tmp_path / "undisturbed", **SMALL))
    embedder.extract(archive, store, **SMALL)
    last = counts(made)
    assert (last["done_before"], last["embedded"], last["updated"], last["dropped"]) == (
        160,
        0,
        0,
        0,
    )


def test_parts_one_after_the_other_make_what_one_run_makes(
    archive: Path, undisturbed: Store, together: Store
) -> None:
    assert_same(together, undisturbed)
    assert checks(together, archive) == {}
    assert [record["options"]["part"] for record in together.runs()] == list(PARTS)
    sizes = [len(ids_of(part, together)) for part in PARTS]
    assert [record["counts"]["inputs"] for record in together.runs()] == sizes
    assert [record["counts"]["embedded"] for record in together.runs()] == sizes
    assert [record["counts"]["deleted"] for record in together.runs()] == [0, 0, 0]
    assert together.recipe == undisturbed.recipe


def test_verify_and_inspect_say_which_parts_are_not_whole(archive: Path, tmp_path: Path) -> None:
    store = tmp_path / "out"
    for part in ("1/3", "3/3"):
        embedder.extract(archive, store, part=part, **SMALL)
    num_missing = 20 - len(Store(store))
    assert 0 < num_missing < 20
    said = f"2/3 lacks {num_missing} of {num_missing} images"
    done = run("verify", store, "--source", archive)
    assert done.returncode == 1
    assert f"2 of 3 parts whole: {said}. " in done.stdout
    assert "2 of 3 parts done; 2/3 never run" in run("inspect", store).stdout
    embedder.extract(archive, tmp_path / "many", part="1/90", **SMALL)
    assert "; 21/90 never run; and 69 more\n" in run("inspect", tmp_path / "many").stdout
    (archive / "cats" / "002.jpg").write_bytes(b"no image")
    embedder.extract(archive, store, **SMALL)
    assert checks(Store(store), archive) == {}


# Its own images only. ------------------------------------------------------------------------


def test_pruning_drops_images_of_the_part_only(archive: Path, undisturbed: Store) -> None:
    everything = set(undisturbed.ids())
    mine = ids_of("1/3", undisturbed)
    others = ids_of("2/3", undisturbed)
    for image_id in (*mine[:2], *others[:2]):
        (archive / image_id).unlink()
    with pytest.raises(RequestError, match=rf"no longer has 2 of {len(mine)} images"):
        embedder.extract(archive, undisturbed.path, part="1/3", prune=True, **SMALL)
    embedder.extract(archive, undisturbed.path, part="1/3", prune=True, prune_share=1, **SMALL)
    assert set(undisturbed.ids()) == everything - set(mine[:2])
    assert counts(undisturbed)["dropped"] == counts(undisturbed)["deleted"] == 2


def test_repeated_rows_are_dropped_of_the_part_only(archive: Path, undisturbed: Store) -> None:
    (name,) = undisturbed.shards()
    shutil.copy(name, name.with_name("zlast.parquet"))
    embedder.extract(archive, undisturbed.path, part="1/3", **SMALL)
    kept = undisturbed.index()["image_id"].to_pylist()
    mine = set(ids_of("1/3", undisturbed))
    assert all(kept.count(image_id) == (1 if image_id in mine else 2) for image_id in kept)
    assert counts(undisturbed)["dropped"] == len(mine)


def test_what_others_are_writing_is_left_alone(archive: Path, together: Store) -> None:
    """Another machine can have the same name, where none of its processes can be seen."""
    dead = temporary_beside(together.path / "embeddings" / "a.parquet")
    dead = dead.with_name(dead.name.replace(f"-{os.getpid()}-", "-4194305-"))
    dead.touch()
    (archive / "cats" / "new").mkdir()
    shutil.copytree(archive / "dogs", archive / "cats" / "new" / "dogs")
    embedder.extract(archive, together.path, part="2/3", **SMALL)
    assert counts(together)["embedded"] > 0
    assert dead.exists()
    embedder.extract(archive, together.path, **SMALL)
    assert not dead.exists()


def test_too_many_failures_are_counted_within_the_part(archive: Path, undisturbed: Store) -> None:
    mine = ids_of("1/3", undisturbed)
    for image_id in mine[:2]:
        (archive / image_id).write_bytes(b"no image")
    store = undisturbed.path.with_name("out")
    embedder.extract(archive, store, part="2/3", **SMALL)
    rule = rf"2 of {len(mine)} images failed"
    with pytest.raises(Unfinished, match=rule):
        embedder.extract(archive, store, part="1/3", max_failures=1 / len(mine), **SMALL)
    embedder.extract(archive, store, part="1/3", max_failures=2 / len(mine), **SMALL)


def test_a_limit_is_of_the_part(archive: Path, undisturbed: Store, tmp_path: Path) -> None:
    store = embedder.extract(archive, tmp_path / "out", part="2/3", limit=2, **SMALL)
    assert sorted(store.ids()) == sorted(ids_of("2/3", undisturbed))[:2]


def test_a_repair_is_of_the_whole_source(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"`repair` must be .*whole source.*part=1/3"):
        embedder.extract(archive, tmp_path / "out", part="1/3", repair=True, **SMALL)
    assert not (tmp_path / "out").exists()


# As it is given. -----------------------------------------------------------------------------


def test_a_part_of_no_images_is_done_at_once_and_says_so(archive: Path, tmp_path: Path) -> None:
    (number,) = part_numbers(pa.chunked_array([["002.jpg"]]), 2)
    source = tmp_path / "one"
    source.mkdir()
    shutil.copy(archive / "cats" / "002.jpg", source)
    job = tmp_path / "job.toml"
    job.write_text(
        f'''[[steps]]
        command = "extract"
        arguments = ["{source}", "{tmp_path}/out"]
        image-size = "64x96"
        part = "{3 - number}/2"'''
    )
    done = run("run", job)
    assert done.returncode == 0, done.stderr
    assert f"{3 - number}/2, with none of the source's images" in done.stdout
    store = Store(tmp_path / "out")
    assert (len(store), counts(store)["inputs"], store.runs()[-1]["status"]) == (0, 0, "done")
    assert "1 of 2 parts whole" in "".join(checks(store, source).values())


def test_several_networks_share_their_parts(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"must be I/N.*Received: part='4/3'"):
        RunOptions(part="4/3")
    for part in PARTS:
        run_extraction(archive, recipes_in(tmp_path, vgg16=(64, 96)), RunOptions(part=part))
        both = recipes_in(tmp_path, mobilenet=(64, 96), vgg16=(64, 96))
        run_extraction(archive, both, RunOptions(part=part))
    for path in both:
        assert checks(Store(path), archive) == {}
        assert Store(path).runs()[-1]["options"]["part"] == "3/3"
