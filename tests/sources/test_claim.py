"""Memory is asked for before it is taken, wherever an image comes from."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from embedder.errors import ReadError
from embedder.sources import reading
from embedder.sources.reading import read_bytes
from tests.sources.faults import Answer, chunked
from tests.support import WebServer, body

CONTENT = bytes(range(250)) * 100
WHOLE = body(CONTENT, ETag='"a"', Last_Modified="Wed, 21 Oct 2015 07:28:00 GMT")


def claims(path: bytes) -> list[int]:
    """What is claimed while an image is read, which must be `CONTENT`."""
    found: list[int] = []
    assert read_bytes(path, claim=found.append) == CONTENT
    return found


def test_the_size_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(CONTENT)
    assert claims(bytes(tmp_path / "a.jpg")) == [len(CONTENT)]


def test_more_where_a_file_is_larger_than_it_says() -> None:
    found: list[int] = []
    assert read_bytes(b"/proc/self/status", claim=found.append).startswith(b"Name:")
    assert found == [0, 2**24]


def test_the_length_that_a_web_server_tells(web: WebServer) -> None:
    web.answers["/a.jpg"] = WHOLE
    assert claims(f"{web.url}/a.jpg".encode()) == [len(CONTENT)]


def test_more_and_more_where_a_web_server_tells_no_length(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.answers["/a.jpg"] = chunked(*(CONTENT[i : i + 1000] for i in range(0, 25_000, 1000)))
    assert claims(f"{web.url}/a.jpg".encode()) == [2**24]
    monkeypatch.setattr(reading, "_FIRST_CLAIM_BYTES", 10_000)
    assert claims(f"{web.url}/a.jpg".encode()) == [10_000, 20_000, 40_000]


def test_the_size_of_an_object(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", web.url)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    web.answers["/claimed/a.jpg"] = WHOLE
    assert claims(b"s3://claimed/a.jpg") == [len(CONTENT)]


def test_the_size_that_fsspec_tells(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/p/a.jpg", CONTENT)
    assert claims(b"memory://p/a.jpg") == [len(CONTENT)]


@pytest.fixture
def many_times(web: WebServer) -> Iterator[None]:
    """Every byte that Python allocates is counted."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("many_times")
@pytest.mark.parametrize("answer", [body(bytes(2**25)), chunked(*[bytes(2**20)] * 32)])
def test_a_body_is_in_memory_once(web: WebServer, answer: Answer) -> None:
    web.answers["/a.jpg"] = answer
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    assert len(read_bytes(f"{web.url}/a.jpg".encode())) == 2**25
    assert tracemalloc.get_traced_memory()[1] - before < 1.5 * 2**25


def test_what_is_too_large_is_refused_before_it_is_claimed(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 100)
    web.answers["/a.jpg"] = WHOLE
    claimed: list[int] = []
    with pytest.raises(ReadError, match="larger than 100 bytes"):
        read_bytes(f"{web.url}/a.jpg".encode(), claim=claimed.append)
    assert claimed == []
