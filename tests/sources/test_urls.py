"""What is a URL, however it is written."""

from pathlib import Path

import fsspec
import pytest

from embedder.sources.listing import list_images
from embedder.sources.reading import read_bytes
from embedder.sources.urls import scheme_of
from tests.support import WebServer, body, contents, holding, ids, touch


def test_the_case_of_a_scheme_means_nothing(
    web: WebServer,
    memory: fsspec.AbstractFileSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", web.url)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    web.answers["/a.jpg"] = web.answers["/bucket/A.jpg"] = body(b"a.jpg")
    memory.pipe("/P/a.jpg", b"a.jpg")
    file = touch(tmp_path, "a.jpg") / "a.jpg"
    urls = [web.url.replace("http", "HTTP") + "/a.jpg", "S3://bucket/A.jpg", f"File://{file}"]
    (tmp_path / "urls.txt").write_text("\n".join([*urls, "MEMORY://P/a.jpg"]))
    listing = list_images(tmp_path / "urls.txt")
    assert ids(listing) == sorted([*urls, "MEMORY://P/a.jpg"])  # as they are written
    assert set(contents(listing).values()) == {b"a.jpg"}
    assert contents(list_images("Memory://P")) == holding("a.jpg")
    assert read_bytes(b"memory://P/a.jpg") == b"a.jpg"


def test_a_path_is_no_url() -> None:
    assert scheme_of("/photos/a:b//c.jpg") is None
    assert scheme_of(b"HTTPS://photos/\xff.jpg") == "https"
