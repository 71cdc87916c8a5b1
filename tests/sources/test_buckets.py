"""Buckets: real servers on the loopback, whole and in trouble."""

import re
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from embedder.errors import ReadError, SourceError
from embedder.sources import attempts, reading, stores
from embedder.sources.attempts import AttemptError, Patience
from embedder.sources.listing import list_images
from embedder.sources.reading import read_bytes
from tests.sources import faults
from tests.sources.faults import Answer, failing, in_turn
from tests.support import WebServer, body, contents, holding, ids, status

GOOD = body(b"content")
URL = b"s3://bucket/photos/a.jpg"
PATH = "/bucket/photos/a.jpg"


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No credentials and no endpoints but those that a test sets."""
    names = [name for kind in stores._CREDENTIALS.values() for name in kind]
    names += [name for kind in stores._ENDPOINTS.values() for name in kind]
    for name in [*names, "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path))
    caches = (stores._new_store, stores._boto3_session, stores._profile_endpoint, stores._region_of)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 client of a real server on the loopback, which `s3://` then reaches too."""
    server_module = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    # Every server of a process has the same buckets.
    urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    yield client
    client.close()
    server.stop()


@pytest.fixture
def bucket(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> WebServer:
    """A server that `s3://bucket` leads to, whose answers a test chooses."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", web.url)
    return web


def refusal(url: bytes = URL) -> ReadError:
    with pytest.raises(ReadError) as caught:
        read_bytes(url)
    return caught.value


def test_a_folder_is_listed_with_sizes_and_times_and_read(s3: Any) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    names = ["a & b #1.jpg", "a::b?.jpg", "cats/100%25.PNG", "cats/żółć 写真.jpg", "~[x]\\*.jpg"]
    for name in [*names, "notes.txt"]:
        s3.put_object(Bucket="bucket", Key=f"photos/{name}", Body=name.encode())
    s3.put_object(Bucket="bucket", Key="photos/", Body=b"")  # how consoles make a folder
    s3.put_object(Bucket="bucket", Key="photos-old/c.jpg", Body=b"of another folder")
    for url in ("s3://bucket/photos", "s3://bucket/photos/", "s3a://bucket/photos"):
        listing = list_images(url)
        assert contents(listing) == holding(*names)
        assert listing.skipped[".txt"] == 1
        assert listing.refs["bytes"].to_pylist() == [len(name.encode()) for name in names]
        times = listing.refs["modified"].to_pylist()
        assert all(before <= time <= datetime.now(UTC) for time in times)
        assert listing.refs["path"][0].as_py() == b"s3://bucket/photos/a & b #1.jpg"
    assert "photos-old/c.jpg" in ids(list_images("s3://bucket"))


def test_an_object_is_a_source_of_one(s3: Any) -> None:
    s3.put_object(Bucket="bucket", Key="photos/a.jpg", Body=b"a.jpg")
    assert contents(list_images("s3://bucket/photos/a.jpg")) == holding("a.jpg")


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("s3://nope/photos", r"cannot be listed: HTTP status 404 Not Found \(NoSuchBucket\)$"),
        ("s3://bucket/nope", r"holds no image$"),
    ],
)
def test_a_bucket_that_does_not_exist_is_refused(url: str, rule: str) -> None:
    with pytest.raises(SourceError, match=f"{url} {rule}"):
        list_images(url)


def test_keys_that_cannot_be_named_are_refused(s3: Any) -> None:
    s3.put_object(Bucket="bucket", Key="photos/a.jpg", Body=b"another")
    s3.put_object(Bucket="bucket", Key="photos//a.jpg", Body=b"x")
    with pytest.raises(SourceError, match="holds a key with an empty part.*photos//a.jpg"):
        list_images("s3://bucket/photos")
    for url in (b"s3://bucket/photos//a.jpg", b"s3://bucket//photos/a.jpg", b"s3://bucket/photos/"):
        assert str(refusal(url)).startswith("a key with an empty part")
    assert not refusal(b"s3://bucket/photos/./a.jpg").is_passing


def test_an_object_that_vanished_cannot_be_read(s3: Any) -> None:
    error = refusal()
    assert str(error) == "HTTP status 404 Not Found (NoSuchKey)"
    assert not error.is_passing


def test_one_request_reads_an_object_and_connections_are_kept(bucket: WebServer) -> None:
    bucket.answers[PATH] = GOOD
    for _ in range(20):
        assert read_bytes(URL) == b"content"
    assert bucket.asked == [f"GET {PATH}"] * 20
    assert bucket.num_connections < 10  # the next request may come before one is given back


def test_many_threads_get_each_what_it_asked_for(bucket: WebServer) -> None:
    names = [f"{i}.jpg" for i in range(300)]
    for name in names:
        whole = body(name.encode() * 1000)
        answer = in_turn(failing(503), whole) if name.endswith("0.jpg") else whole
        bucket.answers[f"/bucket/{name}"] = answer
    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(lambda name: read_bytes(f"s3://bucket/{name}".encode()), names))
    assert found == [name.encode() * 1000 for name in names]
    assert len(bucket.asked) == 330


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_a_status_that_passes_is_asked_again(bucket: WebServer, code: int) -> None:
    bucket.answers[PATH] = in_turn(failing(code), failing(code), GOOD)
    assert read_bytes(URL) == b"content"
    bucket.answers[PATH] = failing(code)
    error = refusal()
    assert str(error).startswith(f"HTTP status {code} ")
    assert str(error).endswith(", 3 attempts")
    assert error.is_passing
    assert len(bucket.asked) == 6


@pytest.mark.parametrize(
    ("code", "reason", "is_passing"),
    [
        (400, "HTTP status 400 Bad Request", False),
        (404, "HTTP status 404 Not Found", False),
        (410, "HTTP status 410 Gone", False),
        (407, "HTTP status 407 Proxy Authentication Required", True),
        (301, "the bucket is in another region; set AWS_REGION to it", True),
    ],
)
def test_any_other_status_is_taken_at_once(
    bucket: WebServer, code: int, reason: str, is_passing: bool
) -> None:
    bucket.answers[PATH] = failing(code)
    error = refusal()
    assert str(error) == reason
    assert error.is_passing is is_passing
    assert len(bucket.asked) == 1


@pytest.mark.parametrize(
    "code", ["ExpiredToken", "InvalidToken", "RequestTimeout", "RequestTimeTooSkewed"]
)
def test_what_is_wrong_with_whoever_asks_may_be_mended(bucket: WebServer, code: str) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        content = f"<Error><Code>{code}</Code></Error>".encode()
        failing(400, Content_Length=str(len(content)))(handler)
        handler.wfile.write(content)

    bucket.answers[PATH] = answer
    error = refusal()
    assert str(error) == f"HTTP status 400 Bad Request ({code})"
    assert error.is_passing
    assert len(bucket.asked) == 1


FAULTS = [
    (faults.short, "the body is cut short"),
    (faults.cut_after(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"), "the body is cut short"),
    (faults.reset, "the connection broke: Connection reset by peer"),
    (faults.hang, "no byte within 0.5 seconds"),
    (faults.hang_in_the_body, "no byte within 0.5 seconds"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
def test_a_body_that_does_not_come_whole_is_asked_for_again(
    bucket: WebServer,
    monkeypatch: pytest.MonkeyPatch,
    impatient: Patience,
    fault: Answer,
    reason: str,
) -> None:
    bucket.answers[PATH] = in_turn(fault, GOOD)
    assert read_bytes(URL) == b"content"
    assert len(bucket.asked) == 2
    monkeypatch.setattr(attempts, "PATIENCE", replace(impatient, num_attempts=2))
    bucket.answers[PATH] = fault
    error = refusal()
    assert str(error) == f"{reason}, 2 attempts"
    assert error.is_passing


def test_all_attempts_together_have_a_deadline(
    bucket: WebServer, monkeypatch: pytest.MonkeyPatch, impatient: Patience
) -> None:
    def late(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.6)
        failing(503)(handler)

    patience = replace(impatient, total_seconds=1, first_idle_seconds=9, longest_idle_seconds=9)
    monkeypatch.setattr(attempts, "PATIENCE", patience)
    drip = faults.dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b".")
    bucket.answers[PATH] = in_turn(late, drip)
    error = refusal()
    assert re.fullmatch(r"not read within 0\.[0-3]\d* seconds, 2 attempts", str(error))
    assert error.is_passing


def test_an_object_that_is_empty_is_read(bucket: WebServer) -> None:
    bucket.answers[PATH] = body(b"")
    assert read_bytes(URL) == b""
    assert len(bucket.asked) == 1


def test_a_port_where_nobody_listens_may_have_a_server_next_time(bucket: WebServer) -> None:
    bucket.close()
    error = refusal()
    assert str(error) == "no connection: Connection refused, 3 attempts"
    assert error.is_passing


def test_an_enormous_object_is_refused_before_it_is_read(
    bucket: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 100)
    bucket.answers[PATH] = body(bytes(101))
    error = refusal()
    assert str(error) == "larger than 100 bytes: 101"
    assert not error.is_passing


def test_every_page_of_a_listing_is_asked_for(bucket: WebServer) -> None:
    page = "/bucket?list-type=2&prefix=photos%2F"
    token = b"<NextContinuationToken>more</NextContinuationToken><IsTruncated>true</IsTruncated>"
    first = LISTED.replace(b"a.jpg", b"b.jpg").replace(b"<IsTruncated>false</IsTruncated>", token)
    bucket.answers[page] = in_turn(failing(503), body(first))
    bucket.answers[page.replace("list-type", "continuation-token=more&list-type")] = body(LISTED)
    assert ids(list_images("s3://bucket/photos")) == ["a.jpg", "b.jpg"]


# Credentials and endpoints. --------------------------------------------------------------------


@pytest.fixture
def signatures(bucket: WebServer) -> list[str | None]:
    """What each request to the bucket is signed with."""
    seen: list[str | None] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers["Authorization"])
        GOOD(handler)

    bucket.answers[PATH] = answer
    return seen


def test_a_public_bucket_needs_no_credentials(signatures: list[str | None]) -> None:
    assert read_bytes(URL) == b"content"
    assert signatures == [None]


@pytest.mark.parametrize("code", [401, 403])
def test_a_bucket_that_needs_credentials_says_what_to_set(bucket: WebServer, code: int) -> None:
    bucket.answers[PATH] = failing(code)
    error = refusal()
    assert "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET" in str(error)
    assert error.is_passing
    bucket.answers["/bucket?list-type=2&prefix=photos%2F"] = status(code)
    with pytest.raises(SourceError, match=rf"listed: HTTP status {code} .*set AWS_ACCESS_KEY_ID"):
        list_images("s3://bucket/photos")


def test_credentials_of_the_environment_sign(
    signatures: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert read_bytes(URL) == b"content"
    assert "Credential=mine/" in str(signatures)


def test_a_profile_is_read_by_boto3(
    signatures: list[str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("boto3")
    keys = "aws_access_key_id = theirs\naws_secret_access_key = secret\n"
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(f"[work]\n{keys}")
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert read_bytes(URL) == b"content"
    assert "Credential=theirs/" in str(signatures)


def test_a_bucket_of_aws_tells_its_region(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    web.answers["/bucket"] = failing(403, x_amz_bucket_region="eu-north-1")
    monkeypatch.setattr(stores, "_AWS", web.url)
    assert stores._region_for("bucket") == "eu-north-1"
    assert web.asked == ["HEAD /bucket"]
    monkeypatch.setenv("AWS_REGION", "eu-west-1")  # which obstore reads itself
    assert stores._region_for("bucket") is None


def test_a_region_that_cannot_be_found_out_now_is_asked_for_again(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = failing(403, x_amz_bucket_region="eu-north-1")
    web.answers["/bucket"] = in_turn(faults.hang_up, failing(503), found)
    monkeypatch.setattr(stores, "_AWS", web.url)
    rule = "where AWS has the bucket could not be found out; set AWS_REGION"
    with pytest.raises(SourceError, match=rule):
        list_images("s3://bucket/photos")
    with pytest.raises(AttemptError, match=rule):
        stores.open_store("s3", "bucket")
    assert stores._region_for("bucket") == "eu-north-1"
    assert stores._region_for("bucket") == "eu-north-1"
    assert len(web.asked) == 3
    web.answers["/nowhere"] = failing(404)
    assert stores._region_for("nowhere") is None  # which whoever reads it is told


def test_a_profile_may_name_its_server(
    web: WebServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("boto3")
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/config").write_text(
        "[profile work]\naws_access_key_id = theirs\naws_secret_access_key = secret\n"
        f"region = mars\nendpoint_url = {web.url}\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "work")
    web.answers[PATH] = GOOD
    assert read_bytes(URL) == b"content"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")  # says more
    stores._new_store.cache_clear()
    assert "Connection refused" in str(refusal())


@pytest.mark.parametrize(
    ("endpoint", "is_plain"), [("http://minio:9000", True), ("https://minio", False), ("", False)]
)
def test_only_an_endpoint_without_tls_is_asked_without(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, is_plain: bool
) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    names = {"s3": "AWS_ENDPOINT_URL", "gs": "GOOGLE_BASE_URL", "abfs": "AZURE_STORAGE_ENDPOINT"}
    for kind, name in names.items():
        if endpoint:
            monkeypatch.setenv(name, endpoint)
        options: Any = stores.open_store(kind, "bucket").client_options
        assert ("allow_http" in options) is is_plain


# Google's and Microsoft's servers say these always, and obstore wants them.
DATED = body(b"content", ETag='"a"', Last_Modified="Wed, 21 Oct 2015 07:28:00 GMT")
LISTED = b"""<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated><Contents>
<Key>photos/a.jpg</Key><Size>7</Size><LastModified>2015-10-21T07:28:00.123Z</LastModified>
<ETag>"a"</ETag></Contents></ListBucketResult>"""


@pytest.mark.parametrize("scheme", ["gs", "gcs"])
def test_google_buckets_are_listed_and_read(
    web: WebServer, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setenv("GOOGLE_BASE_URL", web.url)
    web.answers["/bucket/photos%2Fa%2Ejpg"] = DATED
    web.answers["/bucket?list-type=2&prefix=photos%2F"] = body(LISTED)
    listing = list_images(f"{scheme}://bucket/photos")
    assert listing.paths() == {"a.jpg": b"gs://bucket/photos/a.jpg"}
    assert listing.refs["bytes"].to_pylist() == [7]
    moment = datetime(2015, 10, 21, 7, 28, 0, 123000, UTC)
    assert listing.refs["modified"].to_pylist() == [moment]
    assert read_bytes(f"{scheme}://bucket/photos/a.jpg".encode()) == b"content"
    assert contents(listing) == {"a.jpg": b"content"}
    web.answers["/bucket/photos%2Fa%2Ejpg"] = failing(403)
    assert "set GOOGLE_APPLICATION_CREDENTIALS" in str(refusal(b"gs://bucket/photos/a.jpg"))


BLOBS = b"""<?xml version="1.0"?><EnumerationResults><Blobs><Blob><Name>photos/a.jpg</Name>
<Properties><Last-Modified>Wed, 21 Oct 2015 07:28:00 GMT</Last-Modified>
<Content-Length>7</Content-Length><Content-Type>image/jpeg</Content-Type><Etag>a</Etag>
</Properties></Blob></Blobs><NextMarker/></EnumerationResults>"""


@pytest.mark.parametrize(
    ("root", "path"),
    [
        ("az://bucket", b"abfs://bucket/photos/a.jpg"),
        ("abfs://bucket", b"abfs://bucket/photos/a.jpg"),
        (
            "abfss://bucket@account.dfs.core.windows.net",
            b"abfs://bucket@account.dfs.core.windows.net/photos/a.jpg",
        ),
    ],
)
def test_azure_containers_are_listed_and_read(
    web: WebServer, monkeypatch: pytest.MonkeyPatch, root: str, path: bytes
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", web.url)
    if "@" not in root:
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    web.answers[PATH] = DATED
    web.answers["/bucket?restype=container&comp=list&prefix=photos%2F"] = body(BLOBS)
    listing = list_images(f"{root}/photos")
    assert listing.paths() == {"a.jpg": path}
    assert contents(listing) == {"a.jpg": b"content"}
    web.answers[PATH] = failing(403)
    assert "set AZURE_STORAGE_ACCOUNT_KEY" in str(refusal(path))


def test_an_account_of_another_cloud_is_refused(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = b"abfss://bucket@account.dfs.core.chinacloudapi.cn/photos/a.jpg"
    rule = (
        "the account's host must end in core.windows.net, or AZURE_STORAGE_ENDPOINT be set. "
        "Received: account.dfs.core.chinacloudapi.cn"
    )
    assert str(refusal(url)) == rule
    with pytest.raises(SourceError, match=rule):
        list_images(url.decode())
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", web.url)
    web.answers[PATH] = DATED
    assert read_bytes(url) == b"content"


def test_a_container_without_an_account_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    error = refusal(b"az://container/a.jpg")
    assert str(error) == "Account must be specified; set AZURE_STORAGE_ACCOUNT_NAME"
    assert error.is_passing
    with pytest.raises(SourceError, match="listed: Account must be specified; set AZURE_STORAGE_A"):
        list_images("az://container/photos")
