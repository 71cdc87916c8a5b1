"""URLs: buckets, and servers that are not to be trusted."""

import gzip
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.registry import known_implementations

from embedder.errors import ReadError, SourceError
from embedder.sources import reading, remote
from embedder.sources.listing import list_images
from embedder.sources.reading import read_bytes
from embedder.sources.refs import REF_SCHEMA
from tests.support import WebServer, body, contents, holding, status


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


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 client of a real server on the loopback, which `s3://` then reaches too."""
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    boto3 = pytest.importorskip("boto3")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"endpoint_url": f"http://{host}:{port}", "key": "test", "secret": "test"}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client(
        "s3",
        region_name="us-east-1",
        endpoint_url=options["endpoint_url"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    yield client
    client.close()
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_folder_on_s3_is_listed_with_sizes_and_times_and_read(s3: Any) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    s3.create_bucket(Bucket="bucket")
    names = ["a & b #1.jpg", "cats/100%25.PNG", "cats/żółć 写真.jpg"]
    for name in [*names, "notes.txt"]:
        s3.put_object(Bucket="bucket", Key=f"photos/{name}", Body=name.encode())
    s3.put_object(Bucket="bucket", Key="photos/", Body=b"")  # how consoles make a folder
    s3.put_object(Bucket="bucket", Key="photos-old/c.jpg", Body=b"of another folder")
    listing = list_images("s3://bucket/photos")
    assert contents(listing) == holding(*names)
    assert listing.skipped[".txt"] == 1
    assert listing.refs["bytes"].to_pylist() == [len(name.encode()) for name in names]
    assert all(before <= time <= datetime.now(UTC) for time in listing.refs["modified"].to_pylist())
    assert listing.refs["path"][0].as_py() == b"s3://bucket/photos/a & b #1.jpg"


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SourceError, match=r"s3://nope/photos cannot be listed: FileNotFoundError"):
        list_images("s3://nope/photos")


def test_an_object_that_vanished_cannot_be_read(s3: Any) -> None:
    s3.create_bucket(Bucket="bucket")
    with pytest.raises(ReadError, match="FileNotFoundError"):
        read_bytes(b"s3://bucket/photos/gone.jpg")


@pytest.mark.parametrize(
    ("code", "is_passing"), [(404, False), (403, False), (408, True), (429, True), (503, True)]
)
def test_a_status_is_named_and_says_whether_it_may_pass(
    web: WebServer, code: int, is_passing: bool
) -> None:
    web.answers["/a.jpg"] = status(code)
    with pytest.raises(ReadError, match=f"^HTTP status {code} ") as caught:
        read_bytes(f"{web.url}/a.jpg".encode())
    assert caught.value.is_passing == is_passing


def test_one_request_reads_an_image(web: WebServer) -> None:
    asked = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.command)
        body(b"content")(handler)

    web.answers["/a.jpg"] = answer
    assert read_bytes(f"{web.url}/a.jpg".encode()) == b"content"
    assert asked == ["GET"]


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100_000):  # 6 GB, if nobody hangs up
        handler.wfile.write(bytes(2**16))


def bomb(handler: BaseHTTPRequestHandler) -> None:
    body(gzip.compress(bytes(2**26)), Content_Encoding="gzip")(handler)


@pytest.mark.parametrize("answer", [endless, bomb], ids=lambda answer: answer.__name__)
def test_a_body_is_counted_as_it_comes(
    web: WebServer, monkeypatch: pytest.MonkeyPatch, answer: Callable[..., None]
) -> None:
    web.answers["/a.jpg"] = answer
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 2**24)
    with pytest.raises(ReadError, match="^larger than 16,777,216 bytes") as caught:
        read_bytes(f"{web.url}/a.jpg".encode())
    assert not caught.value.is_passing


def test_a_server_that_does_not_answer_is_not_waited_for_for_ever(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    web.answers["/a.jpg"] = lambda _: released.wait(60)
    monkeypatch.setattr(remote, "READ_SECONDS", 0.2)
    with pytest.raises(ReadError, match="not read within 0.2 seconds") as caught:
        read_bytes(f"{web.url}/a.jpg".encode())
    released.set()
    assert caught.value.is_passing


@pytest.mark.parametrize("length", ["100", "7"])
def test_a_body_that_is_cut_may_be_whole_next_time(web: WebServer, length: str) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        body(b"content", Content_Length=length)(handler)

    web.answers["/a.jpg"] = answer
    if length == "7":
        assert read_bytes(f"{web.url}/a.jpg".encode()) == b"content"
        return
    with pytest.raises(ReadError, match="^ClientPayloadError: ") as caught:
        read_bytes(f"{web.url}/a.jpg".encode())
    assert caught.value.is_passing


def test_a_port_where_nobody_listens_may_have_a_server_next_time(web: WebServer) -> None:
    web.close()
    with pytest.raises(ReadError, match="^ClientConnectorError: ") as caught:
        read_bytes(f"{web.url}/a.jpg".encode())
    assert caught.value.is_passing


def test_an_enormous_object_is_refused_too(monkeypatch) -> None:
    fsspec.filesystem("memory").pipe("/p/a.jpg", b"x" * 100)
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 10)
    with pytest.raises(ReadError):
        read_bytes(b"memory://p/a.jpg")


def test_a_key_with_two_colons_can_be_read() -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe("/p/a::b.jpg", b"x")
    assert contents(list_images("memory://p")) == {"a::b.jpg": b"x"}
