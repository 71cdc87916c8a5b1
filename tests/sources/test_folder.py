"""Folders and globs."""

import csv
import os
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest

from embedder.errors import ReadError, SourceError
from embedder.sources.listing import list_images
from embedder.sources.reading import read_bytes
from embedder.sources.refs import REF_SCHEMA
from tests.support import contents, holding, ids, touch

MOMENT = datetime(2024, 2, 29, 12, 30, 15, 123456, UTC)


def test_a_folder_is_listed_with_its_folders(photos: Path) -> None:
    listing = list_images(photos)
    assert contents(listing) == holding("a.jpg", "cats/b.jpg", "cats/c.png", "cats/old/d.jpg")
    assert listing.refs.schema == REF_SCHEMA
    assert listing.skipped == {}
    assert listing.num_repeated == 0


def test_extensions_count_in_any_case_and_other_files_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "A.JPG", "b.Jpeg", "c.tIFF", "d.webp")
    touch(tmp_path, "notes.txt", "deep/more.TXT", "Makefile", "jpg", ".jpg", "a.jpg.bak")
    listing = list_images(tmp_path)
    assert ids(listing) == ["A.JPG", "b.Jpeg", "c.tIFF", "d.webp"]
    assert listing.skipped == {".txt": 2, "no extension": 3, ".bak": 1}


def test_size_and_time_of_change_are_those_of_the_file(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    nanoseconds = int(MOMENT.timestamp()) * 10**9 + 123_456_789
    os.utime(tmp_path / "a.jpg", ns=(0, nanoseconds))
    (ref,) = list_images(tmp_path).refs.to_pylist()
    assert ref["bytes"] == len("a.jpg")
    assert ref["modified"] == MOMENT


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/much longer name.jpg")
    folder = touch(tmp_path / "photos", "a.jpg")
    (folder / "link.jpg").symlink_to(tmp_path / "elsewhere/much longer name.jpg")
    listing = list_images(folder)
    assert contents(listing) == {
        "a.jpg": b"a.jpg",
        "link.jpg": b"elsewhere/much longer name.jpg",
    }
    assert listing.refs["bytes"].to_pylist() == [5, 30]


def test_a_link_to_a_folder_is_not_followed(photos: Path) -> None:
    (photos / "again").symlink_to(photos / "cats")
    (photos / "round").symlink_to(photos)
    (photos / "looks-like.jpg").symlink_to(photos / "cats")
    listing = list_images(photos)
    assert ids(listing) == ["a.jpg", "cats/b.jpg", "cats/c.png", "cats/old/d.jpg"]
    assert listing.skipped == {}


def test_a_link_that_leads_nowhere_is_listed_and_fails_when_read(photos: Path) -> None:
    (photos / "gone.jpg").symlink_to(photos / "no such file")
    (photos / "gone.txt").symlink_to(photos / "no such file")
    listing = list_images(photos)
    ref = next(ref for ref in listing.refs.to_pylist() if ref["image_id"] == "gone.jpg")
    assert (ref["bytes"], ref["modified"]) == (None, None)
    assert listing.skipped == {".txt": 1}
    with pytest.raises(ReadError, match="FileNotFoundError: No such file or directory"):
        read_bytes(ref["path"])


def test_a_folder_named_like_an_image_is_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "folder.jpg/inside.jpg", "empty.jpg/notes.txt")
    assert ids(list_images(tmp_path)) == ["folder.jpg/inside.jpg"]


def test_what_is_neither_file_nor_folder_is_left_out(photos: Path) -> None:
    os.mkfifo(photos / "pipe.jpg")  # reading it would wait for ever
    listing = list_images(photos)
    assert "pipe.jpg" not in ids(listing)
    assert listing.skipped["FIFO, socket or device"] == 1


def test_names_that_are_not_utf8_are_readable_and_can_be_read(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "photos")
    for name in (b"caf\xe9/\xff\xfe.jpg", "café/né.jpg".encode()):
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path))  # noqa: PTH103, PTH120 - not UTF-8
        Path(os.fsdecode(path)).write_bytes(name)
    listing = list_images(tmp_path / "photos")
    assert contents(listing) == {
        r"caf\xe9/\xff\xfe.jpg": b"caf\xe9/\xff\xfe.jpg",
        "café/né.jpg": "café/né.jpg".encode(),
    }


def test_every_hostile_name_is_listed_and_readable(odd: Path) -> None:
    listing = list_images(odd / "names")
    expected = {
        path.relative_to(odd / "names").as_posix(): path.read_bytes()
        for path in (odd / "names").rglob("*")
        if path.is_file() and path.name != "no-extension"
    }
    assert len(expected) == 27
    assert contents(listing) == expected
    assert listing.skipped == {"no extension": 1}
    assert ids(listing) == sorted(expected, key=str.encode)


def test_the_odd_files_are_all_listed_but_those_of_other_extensions(odd: Path) -> None:
    listing = list_images(odd)
    with (odd / "expected.csv").open(newline="", encoding="utf-8") as lines:
        files = {row["file"] for row in csv.DictReader(lines)}
    assert listing.skipped == Counter(
        {".fuzzed": 2, ".bin": 1, ".svg": 1, ".pdf": 1, ".csv": 1, ".tar": 1, "no extension": 1}
    )
    assert files - set(ids(listing)) == {
        "broken/check.svg",
        "broken/duplicate_xref_entry.pdf",
        "broken/fli_overrun.bin",
        "fuzzed/crash-4ace288d.fuzzed",
        "fuzzed/crash-63fe39cb.fuzzed",
        "names/no-extension",
    }
    assert set(ids(listing)) < files


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("photos/*.jpg", ["a.jpg"]),
        ("photos/**/*.jpg", ["a.jpg", "cats/b.jpg", "cats/old/d.jpg"]),
        ("photos/cats/*", ["b.jpg", "c.png"]),
        ("photos/*/*.jpg", ["cats/b.jpg"]),
        ("photos/c*/**/d.jpg", ["cats/old/d.jpg"]),
        ("photos/cats/[bc].???", ["b.jpg", "c.png"]),
        ("photos/cats/[!b].*", ["c.png"]),
        ("*/a.jpg", ["photos/a.jpg"]),
    ],
)
def test_a_glob_is_rooted_where_its_first_wildcard_begins(
    photos: Path, pattern: str, expected: list[str]
) -> None:
    listing = list_images(f"{photos.parent}/{pattern}")
    assert ids(listing) == expected
    for image_id, content in contents(listing).items():
        assert content.decode().endswith(image_id.removeprefix("photos/"))


def test_a_glob_may_be_relative(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    assert contents(list_images("**/*.png")) == holding("cats/c.png")
    assert ids(list_images("cats/*.png")) == ["c.png"]


def test_only_what_a_glob_matches_is_counted_as_skipped(photos: Path) -> None:
    touch(photos, "a.txt", "cats/b.txt", "cats/b.md")
    assert list_images(f"{photos}/cats/b.*").skipped == {".txt": 1, ".md": 1}


def test_a_glob_below_no_folder_is_refused_with_the_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no folder .*/nope, where the glob .*/\*\.jpg begins"):
        list_images(f"{tmp_path}/nope/*.jpg")


def test_a_glob_that_matches_nothing_is_refused(photos: Path) -> None:
    with pytest.raises(SourceError, match=r"\*\.gif holds no image$"):
        list_images(f"{photos}/*.gif")


def test_folders_may_be_deeper_than_python_calls_functions(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("a.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    assert ids(list_images(tmp_path)) == ["d/" * 1200 + "a.jpg"]
    while (tmp_path / "d" / "d").exists():  # pytest could not remove it
        (tmp_path / "d" / "d").rename(tmp_path / "e")
        (tmp_path / "d").rmdir()
        (tmp_path / "e").rename(tmp_path / "d")


@pytest.mark.parametrize("target", ["loop.jpg", "a.jpg/beyond.jpg", "x" * 300])
def test_a_link_that_cannot_be_followed_is_listed_like_one_that_leads_nowhere(
    tmp_path, target
) -> None:
    touch(tmp_path, "a.jpg")
    (tmp_path / "loop.jpg").symlink_to(target)
    assert ids(list_images(tmp_path)) == ["a.jpg", "loop.jpg"]
