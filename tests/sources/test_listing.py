"""Sources of any kind: which they are, and what is true of all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from embedder.errors import SourceError
from embedder.sources.listing import list_images
from tests.support import contents, ids, touch, write


def test_a_folder_may_be_given_as_text_and_by_a_relative_path(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    assert ids(list_images("photos")) == ids(list_images("./photos/")) == ids(list_images(photos))
    monkeypatch.chdir(photos)
    assert contents(list_images(".")) == contents(list_images(photos))


def test_refs_are_sorted_by_the_whole_id(tmp_path: Path) -> None:
    # Walking folder by folder would give a/b.jpg before a-c.jpg.
    expected = ["B.jpg", "a-c.jpg", "a.jpg", "a/b.jpg", "a/c.jpg", "b.jpg", "é.jpg"]
    assert ids(list_images(touch(tmp_path, *reversed(expected)))) == expected


def test_the_source_itself_may_be_a_link_to_a_folder(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(photos)
    assert contents(list_images(tmp_path / "link")) == contents(list_images(photos))


def test_a_folder_without_an_image_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt", "b.txt", "c.pdf")
    with pytest.raises(SourceError, match=r"holds no image \(3 other files: \.txt 2, \.pdf 1\)$"):
        list_images(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=rf"^The source {tmp_path} holds no image$"):
        list_images(tmp_path)


def test_a_source_that_does_not_exist_is_refused_with_what_there_can_be(tmp_path: Path) -> None:
    rule = r"a folder, a glob, a manifest \(\.txt, \.csv, \.parquet\) or a URL\. Received: .*/nope"
    with pytest.raises(SourceError, match=rule):
        list_images(tmp_path / "nope")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no FIFOs")
def test_a_source_that_is_a_fifo_is_named_as_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "photos.txt")
    with pytest.raises(SourceError, match=r"photos\.txt, which is a FIFO$"):
        list_images(tmp_path / "photos.txt")


def test_a_folder_that_exists_is_no_glob(tmp_path: Path) -> None:
    touch(tmp_path, "set [1]/a.jpg", "set 1/b.jpg")
    assert contents(list_images(tmp_path / "set [1]")) == {"a.jpg": b"set [1]/a.jpg"}


@pytest.mark.parametrize(("name", "content"), [("list.txt", "\n\n"), ("list.csv", "path,label\n")])
def test_a_manifest_without_a_line_is_refused(photos: Path, name: str, content: str) -> None:
    with pytest.raises(SourceError, match=rf"{name} holds no image$"):
        list_images(write(photos, name, content))


def test_ids_that_would_not_be_unique_are_refused(tmp_path) -> None:
    for name in (b"\xff.jpg", rb"\xff.jpg"):
        (Path(tmp_path) / os.fsdecode(name)).touch()
    with pytest.raises(SourceError, match=r"names read the same.*/\\\\xff.jpg' and b.*/\\xff.jpg'"):
        list_images(tmp_path)


def test_a_local_source_is_listed_and_read_without_fsspec(photos: Path) -> None:
    code = (
        "import sys; from embedder.sources import list_images, read_bytes;"
        "[read_bytes(path) for path in list_images(sys.argv[1]).paths().values()];"
        "print('fsspec' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, photos], capture_output=True, check=True)
    assert done.stdout == b"False\n"
