"""From a ref to its bytes, or the reason why not."""

import hashlib
import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from embedder.errors import ReadError
from embedder.sources import reading
from embedder.sources.reading import read_bytes, sha256_of
from tests.support import touch

Read = Callable[[bytes], bytes | str]
both = pytest.mark.parametrize("read", [read_bytes, sha256_of])


@both
@pytest.mark.parametrize(
    ("path", "rule"),
    [
        (b"/nowhere/a.jpg", "^FileNotFoundError: No such file or directory$"),
        (os.fsencode(Path(__file__).parent), "^not a regular file, but a folder$"),
        (b"/nul\0.jpg", "^ValueError: .*embedded null"),
        (b"nosuch://a.jpg", "^ValueError: Protocol not known: nosuch"),
        (b"memory://caf\xe9.jpg", "^UnicodeDecodeError: "),
        (b"memory://nowhere/a.jpg", "^FileNotFoundError: /nowhere/a.jpg$"),
    ],
)
def test_bytes_that_cannot_be_had_give_the_reason(read: Read, path: bytes, rule: str) -> None:
    with pytest.raises(ReadError, match=rule):
        read(path)


@both
def test_an_enormous_file_is_refused_before_it_is_read(read: Read, tmp_path: Path) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(2**30 + 1)  # takes no space on the disk
    with pytest.raises(ReadError, match=r"^larger than 1,073,741,824 bytes: 1,073,741,825$"):
        read(bytes(tmp_path / "a.jpg"))


def test_a_file_of_the_largest_size_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.jpg")
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", len("a.jpg"))
    assert read_bytes(bytes(tmp_path / "a.jpg")) == b"a.jpg"


@both
@pytest.mark.parametrize("kind", ["FIFO", "link to a FIFO", "device", "socket", "file URL"])
def test_only_regular_files_are_opened(read: Read, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jpg"
    if kind in ("FIFO", "file URL"):
        os.mkfifo(path)
    elif kind == "link to a FIFO":
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to(tmp_path / "fifo")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    name = bytes(path) if kind != "file URL" else b"file://" + bytes(path)
    with pytest.raises(ReadError, match="^not a regular file, but a ") as caught:
        read(name)
    assert not caught.value.is_passing


def test_a_file_that_says_it_is_empty_is_read_to_its_end() -> None:
    assert read_bytes(b"/proc/self/status").startswith(b"Name:")


@both
def test_a_file_that_grows_is_read_no_further_than_the_largest_size(
    read: Read,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 100)  # of /proc, which say that they are empty
    with pytest.raises(ReadError, match="^larger than 100 bytes"):
        read(b"/proc/self/status")


def test_a_local_file_is_hashed_without_being_whole_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(b"a" * 10)
    os.truncate(path, 64 * 2**20)
    tracemalloc.start()
    found = sha256_of(bytes(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == hashlib.sha256(path.read_bytes()).hexdigest()
    assert peak < 4 * 2**20


def test_what_is_behind_a_url_is_hashed_too(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/a.jpg", b"some bytes")
    assert sha256_of(b"memory://a.jpg") == hashlib.sha256(b"some bytes").hexdigest()
