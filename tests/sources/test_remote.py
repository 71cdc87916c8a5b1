"""URLs that fsspec reads: folders, and what is neither on the web nor in a bucket."""

from pathlib import Path
from typing import BinaryIO

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from embedder.errors import ReadError, SourceError
from embedder.sources import reading
from embedder.sources.listing import list_images
from embedder.sources.reading import read_bytes
from embedder.sources.refs import REF_SCHEMA
from tests.support import contents, holding


def test_a_folder_behind_a_url_is_listed_and_read(memory: fsspec.AbstractFileSystem) -> None:
    for name in ("b.JPG", "cats/a.png", "notes.txt", "README"):
        memory.pipe(f"/bucket/photos/{name}", name.encode())
    memory.pipe("/bucket/photos-old/c.jpg", b"of another folder")
    listing = list_images("memory://bucket/photos")
    assert contents(listing) == holding("b.JPG", "cats/a.png")
    assert listing.refs["bytes"].to_pylist() == [5, 10]
    assert listing.skipped == {".txt": 1, "no extension": 1}
    assert listing.refs.schema == REF_SCHEMA
    assert contents(list_images("memory://bucket/photos/")) == contents(listing)


def test_a_local_folder_may_be_given_as_a_url(odd: Path) -> None:
    by_url, by_path = list_images(f"file://{odd}/names"), list_images(odd / "names")
    assert contents(by_url) == contents(by_path)
    assert by_url.refs["bytes"].equals(by_path.refs["bytes"])
    assert all(by_url.refs["modified"].to_pylist())


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("nosuch://bucket/photos", "nosuch://bucket/photos cannot be listed: ValueError: .*nosuch"),
        ("memory://nowhere/photos", "memory://nowhere/photos holds no image$"),
    ],
)
def test_a_url_that_cannot_be_listed_is_refused(url: str, rule: str) -> None:
    with pytest.raises(SourceError, match=rule):
        list_images(url)


def test_a_url_whose_file_system_is_not_installed_is_refused_with_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = {"class": "absent_package.AbsentFileSystem", "err": "Install absent-package"}
    monkeypatch.setitem(known_implementations, "absent", entry)
    rule = r"absent://x needs a package that is not installed: Install absent-package"
    with pytest.raises(SourceError, match=rule):
        list_images("absent://x")


def test_an_enormous_object_is_refused_too(monkeypatch) -> None:
    fsspec.filesystem("memory").pipe("/p/a.jpg", b"x" * 100)
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 10)
    with pytest.raises(ReadError):
        read_bytes(b"memory://p/a.jpg")


class Unmeasured(MemoryFileSystem):
    """Files whose size nobody tells, and that do not end."""

    protocol = "unmeasured"

    def size(self, path: str) -> None:
        pass

    def cat_file(self, *_: object, **__: object) -> bytes:
        return bytes(2**20)

    def open(self, *_: object, **__: object) -> BinaryIO:
        return Path("/dev/zero").open("rb")


def test_what_does_not_end_is_read_no_further_than_the_largest_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 10)
    monkeypatch.setitem(known_implementations, "unmeasured", {"class": f"{__name__}.Unmeasured"})
    with pytest.raises(ReadError, match="larger than 10 bytes"):
        read_bytes(b"unmeasured://p/a.jpg")


def test_a_key_with_two_colons_can_be_read() -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe("/p/a::b.jpg", b"x")
    assert contents(list_images("memory://p")) == {"a::b.jpg": b"x"}
