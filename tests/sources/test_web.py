"""Images on the web: servers in trouble, and servers that are not to be trusted."""

import gzip
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from embedder.errors import ReadError
from embedder.sources import attempts, connections, reading, web as module
from embedder.sources.attempts import Patience
from embedder.sources.reading import read_bytes
from tests.sources import faults
from tests.sources.faults import Answer, failing, in_turn, moved
from tests.support import WebServer, body

GOOD = body(b"content")


def read(web: WebServer, path: str = "/a.jpg", *, allow_private: bool = False) -> bytes:
    return read_bytes(f"{web.url}{path}".encode(), allow_private=allow_private)


def refusal(web: WebServer, path: str = "/a.jpg") -> ReadError:
    with pytest.raises(ReadError) as caught:
        read(web, path)
    return caught.value


def test_one_request_reads_an_image_and_its_connection_is_kept(web: WebServer) -> None:
    web.answers["/a.jpg"] = GOOD
    web.answers["/moved.jpg"] = moved("/a.jpg")
    web.answers["/gone.jpg"] = failing(404)
    for _ in range(3):
        assert read(web) == b"content"
        assert read(web, "/moved.jpg") == b"content"
        refusal(web, "/gone.jpg")
    assert web.asked == ["GET /a.jpg", "GET /moved.jpg", "GET /a.jpg", "GET /gone.jpg"] * 3
    assert web.num_connections == 1


def test_many_threads_get_each_what_it_asked_for(web: WebServer) -> None:
    paths = [f"/{i}.jpg" for i in range(300)]
    for path in paths:
        whole = body(path.encode() * 1000)
        web.answers[path] = in_turn(failing(503), whole) if path.endswith("0.jpg") else whole
    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(lambda path: read(web, path), paths))
    assert found == [path.encode() * 1000 for path in paths]
    assert len(web.asked) == 330
    assert web.num_connections <= 64


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/a b.jpg", "/a%20b.jpg"),
        ("/a%20b.jpg", "/a%20b.jpg"),
        ("/żółć.jpg", "/%C5%BC%C3%B3%C5%82%C4%87.jpg"),
        ("/a.jpg?size=1&x=a/b#top", "/a.jpg?size=1&x=a/b"),
        ("/a+b::c.jpg", "/a+b::c.jpg"),
    ],
)
def test_what_a_url_may_not_hold_is_escaped_and_what_is_escaped_stays(
    web: WebServer, path: str, asked: str
) -> None:
    web.answers[asked] = GOOD
    assert read(web, path) == b"content"


@pytest.mark.parametrize("url", ["http://", "http://[::1/a.jpg", "http://host:port/a.jpg"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ReadError) as caught:
        read_bytes(url.encode())
    assert not caught.value.is_passing


# Trouble that passes, and trouble that does not. -----------------------------------------------


@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
def test_a_status_that_passes_is_asked_again(web: WebServer, code: int) -> None:
    web.answers["/a.jpg"] = in_turn(failing(code), failing(code), GOOD)
    assert read(web) == b"content"
    web.answers["/a.jpg"] = failing(code)
    error = refusal(web)
    assert str(error).startswith(f"HTTP status {code} ")
    assert str(error).endswith(", 3 attempts")
    assert error.is_passing
    assert len(web.asked) == 6
    assert web.num_connections == 1


@pytest.mark.parametrize(
    ("code", "reason", "is_passing"),
    [
        (401, " Unauthorized", True),
        (403, " Forbidden", True),
        (407, " Proxy Authentication Required", True),
        (404, " Not Found", False),
        (410, " Gone", False),
        (204, " No Content", False),
        (206, " Partial Content", False),
        (302, " Found", False),  # but not where
        (423, " Locked", True),
        (501, " Not Implemented", True),
        (599, "", True),
    ],
)
def test_any_other_status_is_taken_at_once(
    web: WebServer, code: int, reason: str, is_passing: bool
) -> None:
    web.answers["/a.jpg"] = failing(code)
    error = refusal(web)
    assert str(error) == f"HTTP status {code}{reason}"
    assert error.is_passing is is_passing
    assert len(web.asked) == 1


OK = b"HTTP/1.1 200 OK\r\n"
FAULTS = [
    (faults.short, "the body is cut short"),
    (faults.cut_between_chunks, "the body is cut short"),
    (faults.cut_in_a_chunk, "the body is cut short"),
    (faults.broken_chunk, "the body is cut short"),
    (faults.reset, "the connection broke: Connection reset by peer"),
    (faults.reset_at_once, "the connection broke: Connection reset by peer"),
    (faults.hang_up, "the server hung up without an answer"),
    (faults.hang, "no byte within 0.5 seconds"),
    (faults.hang_in_the_body, "no byte within 0.5 seconds"),
    (faults.cut_after(OK + b"Content-Ty"), "the body is empty"),
    (faults.cut_after(OK + b"Content-Length: "), "the body is empty"),
    (faults.cut_after(OK + b"Content-Length: 1"), "the body is cut short"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
def test_a_body_that_does_not_come_whole_is_asked_for_again(
    web: WebServer, monkeypatch: pytest.MonkeyPatch, impatient: Patience, fault: Answer, reason: str
) -> None:
    web.answers["/a.jpg"] = in_turn(fault, GOOD)
    assert read(web) == b"content"
    assert len(web.asked) == 2
    monkeypatch.setattr(attempts, "PATIENCE", replace(impatient, num_attempts=2))
    web.answers["/a.jpg"] = fault
    error = refusal(web)
    assert str(error) == f"{reason}, 2 attempts"
    assert error.is_passing


@pytest.mark.parametrize("answer", [body(b""), faults.chunked()])
def test_a_file_that_is_empty_is_read(web: WebServer, answer: Answer) -> None:
    web.answers["/a.jpg"] = answer
    assert read(web) == b""
    assert len(web.asked) == 1


@pytest.mark.parametrize("packing", ["gzip", "br", "GZip", "identity, deflate"])
def test_a_body_that_is_packed_is_refused(web: WebServer, packing: str) -> None:
    # Whether it is cut short cannot be told from its length.
    web.answers["/a.jpg"] = body(gzip.compress(b"content")[:-9], Content_Encoding=packing)
    error = refusal(web)
    assert str(error) == f"the body is packed, which was not asked for: {packing}"
    assert not error.is_passing
    assert len(web.asked) == 1


@pytest.mark.parametrize("packing", ["identity", "aws-chunked", ""])
def test_a_body_that_is_not_packed_is_read(web: WebServer, packing: str) -> None:
    web.answers["/a.jpg"] = body(b"content", Content_Encoding=packing)
    assert read(web) == b"content"


def test_a_port_where_nobody_listens_may_have_a_server_next_time(web: WebServer) -> None:
    web.close()
    error = refusal(web)
    assert str(error) == "no connection: Connection refused, 3 attempts"
    assert error.is_passing


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_a_server_may_say_how_long_to_wait(
    web: WebServer, monkeypatch: pytest.MonkeyPatch, impatient: Patience, kind: str
) -> None:
    later = "3600" if kind == "seconds" else formatdate(time.time() + 3600, usegmt=True)
    now = "0" if kind == "seconds" else formatdate(0, usegmt=True)
    web.answers["/later.jpg"] = in_turn(failing(429, Retry_After=later), GOOD)
    web.answers["/now.jpg"] = in_turn(failing(429, Retry_After=now), GOOD)
    # Not heeded, it would be too late for a second attempt.
    monkeypatch.setattr(attempts, "PATIENCE", replace(impatient, first_wait_seconds=1e9))
    assert read(web, "/now.jpg") == b"content"
    # Longer than there is time for: it is not waited for at all.
    assert str(refusal(web, "/later.jpg")) == "HTTP status 429 Too Many Requests, 1 attempt"


@pytest.mark.parametrize("wait", ["soon", "-5"])
def test_a_wait_that_makes_no_sense_is_not_heeded(web: WebServer, wait: str) -> None:
    web.answers["/a.jpg"] = in_turn(failing(429, Retry_After=wait), GOOD)
    assert read(web) == b"content"


def test_a_slow_server_gets_more_time_with_each_attempt(
    web: WebServer, monkeypatch: pytest.MonkeyPatch, impatient: Patience
) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.3)
        GOOD(handler)

    patience = replace(impatient, num_attempts=8, first_idle_seconds=0.1, longest_idle_seconds=9)
    monkeypatch.setattr(attempts, "PATIENCE", patience)
    web.answers["/a.jpg"] = answer
    assert read(web) == b"content"
    assert len(web.asked) >= 3


IN_CHUNKS = OK + b"Transfer-Encoding: chunked\r\n\r\n"
DRIPS = {
    "the body": (OK + b"Content-Length: 1000\r\n\r\n", b"."),
    "answers before the answer": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "the status": (b"", b"H"),
    "a header": (OK + b"A: ", b"a"),
    "what is said of a chunk": (IN_CHUNKS + b"1;", b"a"),
    "headers after the body": (IN_CHUNKS + b"1\r\n.\r\n0\r\n", b"A: b\r\n"),
}


@pytest.mark.parametrize("drip", DRIPS)
def test_all_attempts_together_have_a_deadline(
    web: WebServer, monkeypatch: pytest.MonkeyPatch, impatient: Patience, drip: str
) -> None:
    monkeypatch.setattr(attempts, "PATIENCE", replace(impatient, total_seconds=0.3))
    web.answers["/a.jpg"] = faults.dripping(*DRIPS[drip])
    error = refusal(web)
    assert str(error) == "not read within 0.3 seconds, 1 attempt"
    assert error.is_passing


@pytest.mark.parametrize("rest", [b"Content-Length: 1000\r\n\r\n", IN_CHUNKS[len(OK) :] + b"1;"])
def test_a_body_that_nobody_wants_is_not_waited_for(
    web: WebServer, monkeypatch: pytest.MonkeyPatch, impatient: Patience, rest: bytes
) -> None:
    monkeypatch.setattr(attempts, "PATIENCE", replace(impatient, total_seconds=1))
    monkeypatch.setattr(module, "_FINISH_SECONDS", 0.1)
    head = b"HTTP/1.1 302 Found\r\nLocation: /b.jpg\r\n"
    web.answers["/a.jpg"] = faults.dripping(head + rest, b".")
    web.answers["/b.jpg"] = GOOD
    assert read(web) == b"content"


def test_a_connection_that_the_server_closed_meanwhile_is_replaced(web: WebServer) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        GOOD(handler)
        handler.close_connection = True  # without a word

    web.answers["/a.jpg"] = answer
    for _ in range(3):
        assert read(web) == b"content"


# Servers that are not to be trusted. -----------------------------------------------------------


def test_a_body_is_counted_as_it_comes(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    web.answers["/a.jpg"] = faults.endless
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 2**24)
    error = refusal(web)
    assert str(error).startswith("larger than 16,777,216 bytes")
    assert not error.is_passing
    assert len(web.asked) == 1


@pytest.mark.parametrize("location", ["/b.jpg", "b.jpg", "//127.0.0.1:PORT/b.jpg", "URL/b.jpg"])
def test_a_redirect_is_followed(web: WebServer, location: str) -> None:
    port = web.url.rpartition(":")[2]
    web.answers["/a.jpg"] = moved(location.replace("URL", web.url).replace("PORT", port))
    web.answers["/b.jpg"] = GOOD
    assert read(web) == b"content"


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/a.jpg", "data:,a"])
def test_a_redirect_stays_on_the_web(web: WebServer, location: str) -> None:
    web.answers["/a.jpg"] = moved(location)
    error = refusal(web)
    scheme = location.partition(":")[0]
    rule = f"redirected to a {scheme}: address; only http: and https: are followed"
    assert str(error) == rule
    assert not error.is_passing


PRIVATE = [
    "http://169.254.169.254/latest/meta-data",
    "http://10.0.0.1/",
    "http://[::1]:PORT/secret.jpg",
    "http://[::ffff:127.0.0.1]:PORT/secret.jpg",
    "http://[::ffff:100.64.0.1]/",
    "http://[fe80::1]/",
    "http://[fec0::1]/",
    "http://[64:ff9b::a9fe:a9fe]/",  # 169.254.169.254, through NAT64
    "http://[64:ff9b::127.0.0.1]/",
    "http://[64:ff9b:1::8.8.8.8]/",  # the NAT64 of a network of one's own
    "http://[2002:7f00:1::]/",  # 127.0.0.1, through 6to4
    "http://[::7f00:1]/",
    "http://[ff0e::1]/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://localhost:PORT/secret.jpg",  # a name that leads there
    "http://2130706433:PORT/secret.jpg",  # 127.0.0.1, in one number
    "http://127.1:PORT/secret.jpg",
    "http://0.0.0.0:PORT/secret.jpg",
    "https://localhost:PORT/secret.jpg",
]
REFUSED = "redirected to a private address, which --allow-private permits"


@pytest.mark.parametrize("location", PRIVATE)
def test_a_redirect_to_a_private_address_is_refused(web: WebServer, location: str) -> None:
    web.answers["/a.jpg"] = moved(location.replace("PORT", web.url.rpartition(":")[2]))
    web.answers["/secret.jpg"] = GOOD
    error = refusal(web)
    assert str(error) == REFUSED
    assert not error.is_passing
    assert web.asked == ["GET /a.jpg"]


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"]
)
def test_public_addresses_are_no_private_ones(address: str) -> None:
    connections.check_public(address)


def test_a_redirect_to_a_private_address_can_be_allowed(web: WebServer) -> None:
    port = web.url.rpartition(":")[2]
    web.answers["/a.jpg"] = moved(f"http://localhost:{port}/secret.jpg")
    web.answers["/secret.jpg"] = GOOD
    assert read(web, allow_private=True) == b"content"
    # The connection that is open now is not for those who may not have it.
    assert str(refusal(web)) == REFUSED


def test_a_name_that_leads_to_a_private_address_only_when_connecting_is_refused(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo
    asked = []

    def rebind(host, port, *args, **kwargs):
        if host != "rebinding.test":
            return resolve(host, port, *args, **kwargs)
        asked.append(host)
        return resolve("8.8.8.8" if len(asked) == 1 else "127.0.0.1", port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", rebind)
    port = web.url.rpartition(":")[2]
    web.answers["/a.jpg"] = moved(f"http://rebinding.test:{port}/secret.jpg")
    web.answers["/secret.jpg"] = GOOD
    assert str(refusal(web)) == REFUSED
    assert len(asked) == 2
    assert web.asked == ["GET /a.jpg"]


@pytest.fixture
def other() -> Iterator[WebServer]:
    """A server of another loopback address, which nobody may be redirected to."""
    server = WebServer(host="127.0.0.2")
    server.answers["/a.jpg"] = server.answers["/%5C@127.0.0.1/a.jpg"] = GOOD
    yield server
    server.close()


@pytest.mark.parametrize(
    "location",
    [
        "http://OTHER\\@127.0.0.1/a.jpg",
        "//OTHER\\@127.0.0.1/a.jpg",
        "http://127.0.0.1@OTHER/a.jpg",
        "http://127.0.0.1:80@OTHER/a.jpg",
        "http://OTHER/a.jpg",
        "HTTP://OTHER/a.jpg",
    ],
)
def test_the_server_that_is_checked_is_the_one_that_is_connected_to(
    web: WebServer, other: WebServer, location: str
) -> None:
    web.answers["/a.jpg"] = moved(location.replace("OTHER", other.url.removeprefix("http://")))
    assert str(refusal(web)) == REFUSED
    assert other.asked == []


@pytest.mark.parametrize(
    "location", ["http://[::1/a.jpg", "//[::1/a.jpg", "https://", "http://a:b/"]
)
def test_a_redirect_to_what_is_no_url_is_refused(web: WebServer, location: str) -> None:
    web.answers["/a.jpg"] = moved(location)
    error = refusal(web)
    assert str(error) == "redirected to what is no URL"
    assert not error.is_passing


def test_redirects_come_to_an_end(web: WebServer) -> None:
    web.answers["/a.jpg"] = moved("/b.jpg")
    web.answers["/b.jpg"] = moved("/a.jpg")
    error = refusal(web)
    assert str(error) == "more than 10 redirects"
    assert len(web.asked) == 11


@pytest.mark.parametrize("server", ["", "http://127.0.0.1:PORT", "HTTP://you:all@127.0.0.1:PORT"])
def test_a_password_goes_to_its_own_server_again(web: WebServer, server: str) -> None:
    seen = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers["Authorization"])
        GOOD(handler)

    port = web.url.rpartition(":")[2]
    web.answers["/a.jpg"] = moved(f"{server.replace('PORT', port)}/b.jpg")
    web.answers["/b.jpg"] = answer
    url = web.url.replace("http://", "http://me:p%40ss@")
    assert read_bytes(f"{url}/a.jpg".encode()) == b"content"
    assert seen == ["Basic bWU6cEBzcw=="]


def test_a_password_goes_to_its_own_server_only(web: WebServer) -> None:
    seen = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers["Authorization"])
        port = web.url.rpartition(":")[2]
        elsewhere = moved(f"http://localhost:{port}/b.jpg")
        (elsewhere if handler.path == "/a.jpg" else GOOD)(handler)

    web.answers["/a.jpg"] = web.answers["/b.jpg"] = answer
    url = web.url.replace("http://", "http://me:p%40ss@")
    assert read_bytes(f"{url}/a.jpg".encode(), allow_private=True) == b"content"
    assert seen == ["Basic bWU6cEBzcw==", None]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Of `localhost`, signed by itself, with its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = tmp_path / "certificate.pem"
    path.write_bytes(made.public_bytes(pem) + private)
    return path


def test_only_a_server_whose_certificate_is_trusted_is_read_from(
    web: WebServer, monkeypatch: pytest.MonkeyPatch, certificate: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    secure = WebServer(context)
    secure.answers["/b.jpg"] = GOOD
    port = secure.url.rpartition(":")[2]
    web.answers["/a.jpg"] = moved(f"https://localhost:{port}/b.jpg")
    with pytest.raises(ReadError) as caught:
        read(web, allow_private=True)
    assert str(caught.value) == "no secure connection: self-signed certificate"
    assert caught.value.is_passing
    assert len(web.asked) == 1
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert read(web, allow_private=True) == b"content"
    secure.close()
