"""One image behind `http://` or `https://`: one GET, redirects that are watched.

urllib3, not obstore: obstore follows redirects by itself, to private addresses too, and cannot be
kept from it.
"""

import contextlib
import http.client
import ssl
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote, urljoin

import urllib3
from urllib3 import exceptions
from urllib3.connection import port_by_scheme
from urllib3.util import Url

from embedder.errors import ReadError
from embedder.libraries import DISTRIBUTION
from embedder.sources.attempts import (
    MENDABLE_STATUSES,
    PASSING_STATUSES,
    AttemptError,
    Limits,
    read_patiently,
)
from embedder.sources.connections import attempt, pools_of
from embedder.sources.reading import gather
from embedder.sources.urls import WEB_SCHEMES

MAX_REDIRECTS = 10
_CHUNK_BYTES = 2**20
_FINISH_SECONDS = 1  # for a body that nobody wants
# An image is compressed already; a body packed once more would be unpacked for nothing.
_HEADERS = {"User-Agent": DISTRIBUTION, "Accept-Encoding": "identity"}
_PACKINGS = {"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd"}


def read_web(url: str, allow_private: bool, claim: Callable[[int], None]) -> bytes:
    """Read one image whole.

    Args:
        url: Where it is.
        allow_private: Whether a redirect may lead to a private, loopback or link-local address.
            The server that the URL names may have any address, and may redirect to itself.
        claim: As in `read_bytes`.

    Raises:
        ReadError: It cannot be had, or is too large.
    """
    return read_patiently(lambda limits: _get(url, allow_private, claim, limits))


def _get(url: str, allow_private: bool, claim: Callable[[int], None], limits: Limits) -> bytes:
    """One attempt, with all its redirects."""
    named = target = _parsed(url, "the URL cannot be understood")
    for _ in range(MAX_REDIRECTS + 1):
        pools = pools_of(is_checked=not (allow_private or target.host == named.host))
        auth = named.auth if _origin(target) == _origin(named) else None
        response = _ask(pools, target, auth, limits)
        try:
            location = response.get_redirect_location()
            if not location:
                return _body(response, claim, limits)
            _finish(response)
        finally:
            response.close()  # does nothing once the body is read and its connection given back
        target = _target(target, location)
    raise ReadError(f"more than {MAX_REDIRECTS} redirects")


def _parsed(url: str, reason: str) -> Url:
    """A URL as urllib3 takes it apart, which connects: other parsers may find other servers."""
    try:
        return urllib3.util.parse_url(url)
    except exceptions.LocationValueError as error:
        raise ReadError(reason) from error


def _origin(url: Url) -> tuple[str | None, str | None, int | None]:
    return url.scheme, url.host, url.port or port_by_scheme.get(str(url.scheme))


def _ask(pools: urllib3.PoolManager, url: Url, auth: str | None, limits: Limits) -> Any:
    """Send a request, with the user and password that are written before the server's name."""
    headers = _HEADERS
    if auth is not None:
        headers = headers | urllib3.make_headers(basic_auth=unquote(auth))
    attempt.limits = limits
    connect_seconds = min(limits.connect_seconds, limits.remaining_seconds())
    timeout = urllib3.Timeout(connect=connect_seconds, read=limits.idle_seconds)
    try:
        pool = pools.connection_from_host(url.host, url.port, url.scheme)
        return pool.urlopen(
            "GET",
            url.request_uri,
            headers=headers,
            redirect=False,
            assert_same_host=False,
            retries=False,
            preload_content=False,
            timeout=timeout,
        )
    except exceptions.LocationValueError as error:
        raise ReadError("the URL cannot be understood") from error
    except exceptions.HTTPError as error:
        raise _trouble_of(error, limits) from error


def _body(response: Any, claim: Callable[[int], None], limits: Limits) -> bytes:
    """What a response holds."""
    if response.status not in (200, 203):
        raise _status_error(response)
    packing = response.headers.get("Content-Encoding", "")
    if _PACKINGS & set(packing.lower().replace(" ", "").split(",")):
        raise ReadError(f"the body is packed, which was not asked for: {packing}")
    num_bytes = response.length_remaining
    try:
        content = gather(_chunks(response), num_bytes, claim)
    except exceptions.HTTPError as error:
        raise _trouble_of(error, limits) from error
    if not content and num_bytes is None and not response.chunked:
        # Nothing says that it ends here; the head may be cut short.
        raise AttemptError("the body is empty")
    return content


def _chunks(response: Any) -> Iterator[bytes]:
    while chunk := response.read1(_CHUNK_BYTES, decode_content=False):
        yield chunk


def _finish(response: Any) -> None:
    """Read a short body that nobody wants, so that its connection can be used again."""
    deadline = min(attempt.limits.deadline, time.monotonic() + _FINISH_SECONDS)
    attempt.limits = attempt.limits._replace(deadline=deadline)
    # What was wanted is in the headers.
    with contextlib.suppress(exceptions.HTTPError, AttemptError):
        # A body of unknown length ends with a second, empty read.
        _ = response.read1(_CHUNK_BYTES) and response.read1(_CHUNK_BYTES)


def _status_error(response: Any) -> Exception:
    status = response.status
    try:
        name = http.HTTPStatus(status).phrase
    except ValueError:  # a status of the server's own
        name = ""
    reason = f"HTTP status {status} {name}".rstrip()
    wait_seconds = _retry_after(response.headers.get("Retry-After"))
    _finish(response)
    if status in PASSING_STATUSES:
        return AttemptError(reason, wait_seconds)
    # Not asked again in this run, but in the next.
    return ReadError(reason, is_passing=status >= 500 or status in MENDABLE_STATUSES)


def _retry_after(text: str | None) -> float | None:
    """Seconds that a `Retry-After` asks for, given as such or as a date; None if unreadable."""
    if text is None:
        return None
    try:
        seconds = float(text) if text.strip().isdecimal() else _until(text)
    except ValueError:
        return None
    return max(seconds, 0)


def _until(date: str) -> float:
    return parsedate_to_datetime(date).timestamp() - time.time()


def _target(url: Url, location: str) -> Url:
    """Where a redirect leads, which must be the web."""
    reason = "redirected to what is no URL"
    # Headers are read as Latin-1; browsers and servers write UTF-8.
    location = location.encode("latin-1").decode("utf-8", "replace")
    try:
        target = _parsed(urljoin(url.url, location), reason)
    except ValueError as error:
        raise ReadError(reason) from error
    if target.scheme not in WEB_SCHEMES:
        raise ReadError(
            f"redirected to a {target.scheme}: address; only http: and https: are followed"
        )
    if not target.host:
        raise ReadError(reason)
    return target


def _trouble_of(error: exceptions.HTTPError, limits: Limits) -> Exception:
    """What went wrong, in words that are the same for every image."""
    if time.monotonic() >= limits.deadline:
        return limits.too_late()
    cause = error.__cause__ or next((arg for arg in error.args if isinstance(arg, OSError)), None)
    why = getattr(cause, "strerror", None) or type(cause or error).__name__
    if isinstance(cause, ssl.SSLCertVerificationError):
        # No certificate changes from one second to the next.
        return ReadError(f"no secure connection: {cause.verify_message}", is_passing=True)
    if isinstance(error, exceptions.NameResolutionError):
        return AttemptError("no connection: the server's name cannot be resolved")
    if isinstance(error, exceptions.NewConnectionError):
        return AttemptError(f"no connection: {why}")
    if isinstance(error, exceptions.ConnectTimeoutError):
        return AttemptError(f"no connection within {limits.connect_seconds:g} seconds")
    if isinstance(error, exceptions.ReadTimeoutError):
        return AttemptError(f"no byte within {limits.idle_seconds:g} seconds")
    if isinstance(cause, http.client.IncompleteRead):
        return AttemptError("the body is cut short")
    if isinstance(cause, http.client.RemoteDisconnected):
        return AttemptError("the server hung up without an answer")
    return AttemptError(f"the connection broke: {why}")
