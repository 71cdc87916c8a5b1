"""Images in buckets, `s3://`, `gs://` and `az://`, by obstore: reading one, listing a folder."""

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore

from embedder.errors import ReadError, SourceError
from embedder.sources.attempts import (
    MENDABLE_STATUSES,
    PASSING_STATUSES,
    AttemptError,
    Limits,
    read_patiently,
)
from embedder.sources.reading import gather
from embedder.sources.stores import WHAT_TO_SET, has_credentials, open_store
from embedder.sources.urls import AFTER_SCHEME, BUCKET_SCHEMES, Found

_STATUS = re.compile(r"non-2xx status code: (\d{3})((?: [A-Z][\w'-]*)*)")
_ERROR_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_OTHER_REGION = re.compile(
    "redirect without LOCATION|PermanentRedirect|AuthorizationHeaderMalformed"
)
# What the user may mend by the next run: where the bucket is, credentials, the clock.
_MENDABLE = re.compile(
    rf"{_OTHER_REGION.pattern}|"
    "<Code>(ExpiredToken|InvalidToken|RequestTimeout|RequestTimeTooSkewed)</Code>"
)
_CHUNK_BYTES = 2**20
_TOO_LONG = "kind: Timeout"
_IN_FULL = re.compile(r'message: "([^"]+)"')  # an operating system's error


class Place(NamedTuple):
    """Where an object or a folder is.

    Attributes:
        kind: Of bucket: `s3`, `gs` or `abfs`.
        server: The bucket, or `container@account.host`.
        key: In the bucket, as the bucket spells it.
    """

    kind: str
    server: str
    key: str


def place_of(url: str) -> Place:
    """What a URL of a bucket names; nothing in its key is escaped."""
    scheme, _, rest = url.partition(AFTER_SCHEME)
    server, _, key = rest.partition("/")
    return Place(BUCKET_SCHEMES[scheme], server, key)


def read_object(url: str, claim: Callable[[int], None]) -> bytes:
    """Read one image whole.

    Args:
        url: Where it is.
        claim: As in `read_bytes`.

    Raises:
        ReadError: It cannot be had, or is too large.
    """
    place = place_of(url)
    if "" in place.key.split("/"):
        # obstore would leave the empty part out, and read another object.
        raise ReadError("a key with an empty part, such as `a//b.jpg`, cannot be read")
    return read_patiently(lambda limits: _get(place, claim, limits))


def _get(place: Place, claim: Callable[[int], None], limits: Limits) -> bytes:
    """One attempt, which the store's own time-outs end."""
    try:
        store = open_store(place.kind, place.server, limits[:3])
    except (BaseError, ValueError) as error:
        raise ReadError(_reason(error, place.kind), is_passing=True) from error
    started = time.monotonic()
    try:
        result = store.get(place.key)
        # In chunks: Rust ends the process where it cannot have the memory for the whole.
        content = gather(result.stream(_CHUNK_BYTES), result.meta["size"], claim)
    except (BaseError, FileNotFoundError) as error:
        if _TOO_LONG in str(error):
            raise AttemptError(_what_took_long(time.monotonic() - started, limits)) from error
        raise _trouble_of(error, place.kind) from error
    if len(content) != result.meta["size"]:
        raise AttemptError("the body is cut short")
    return content


def _what_took_long(seconds: float, limits: Limits) -> str:
    """Which of its limits an attempt was ended by, of which obstore does not tell."""
    if seconds >= limits.attempt_seconds:
        return f"not read within {limits.attempt_seconds:g} seconds"
    if seconds >= limits.idle_seconds:
        return f"no byte within {limits.idle_seconds:g} seconds"
    return f"no connection within {limits.connect_seconds:g} seconds"


def list_bucket(url: str) -> list[Found]:
    """Every object below a folder of a bucket.

    Raises:
        SourceError: It cannot be listed.
    """
    place = place_of(url)
    root = place.key.strip("/")
    prefix = f"{place.kind}{AFTER_SCHEME}{place.server}/"
    try:
        store = open_store(place.kind, place.server)
        metas = [meta for page in store.list(root or None) for meta in page]
        if not metas and root:
            metas = _only_object(store, root)
    except (BaseError, ValueError, ImportError, AttemptError) as error:
        raise SourceError(f"{url} cannot be listed: {_reason(error, place.kind)}") from error
    return [
        Found(
            meta["path"].removeprefix(root).lstrip("/") or root.rpartition("/")[2],
            prefix + meta["path"],
            meta["size"],
            meta["last_modified"],
        )
        for meta in metas
    ]


def _only_object(store: ObjectStore, key: str) -> list[Any]:
    try:
        return [obstore.head(store, key)]
    except FileNotFoundError:
        return []


def _trouble_of(error: Exception, kind: str) -> Exception:
    reason = _reason(error, kind)
    status = _STATUS.search(str(error))
    if status is None and _OTHER_REGION.search(str(error)) is None:
        return AttemptError(reason)
    code = int(status[1]) if status else 301
    if code in PASSING_STATUSES:
        return AttemptError(reason)
    is_mendable = code in MENDABLE_STATUSES or _MENDABLE.search(str(error)) is not None
    return ReadError(reason, is_passing=code >= 500 or is_mendable)


def _reason(error: Exception, kind: str) -> str:
    """What went wrong, in words that are the same for every object: obstore's have its URL."""
    text = str(error)
    if "invalid path" in text:
        return (
            f"it holds a key with an empty part, `.` or `..`, which cannot be read: "
            f"{text.splitlines()[0].partition('invalid path: ')[2]}"
        )
    if kind == "s3" and _OTHER_REGION.search(text):
        return "the bucket is in another region; set AWS_REGION to it"
    if status := _STATUS.search(text):
        code = _ERROR_CODE.search(text)
        reason = f"HTTP status {status[1]}{status[2]}{f' ({code[1]})' if code else ''}"
        if int(status[1]) in (401, 403) and not has_credentials(kind):
            reason += f"; no credentials were found: set {WHAT_TO_SET[kind]}"
        return reason
    if _TOO_LONG in text:
        return "the server takes too long"
    if "IncompleteBody" in text or "UnexpectedEof" in text:
        return "the body is cut short"
    why = _IN_FULL.search(text)
    if "kind: Connect," in text:
        return f"no connection: {why[1] if why else 'the server cannot be reached'}"
    if why or "HTTP error" in text:
        return f"the connection broke{f': {why[1]}' if why else ''}"
    reason = re.sub(r"^Generic \w+ error: ", "", text.splitlines()[0])
    if "Account must be" in reason:
        reason += "; set AZURE_STORAGE_ACCOUNT_NAME"
    return reason
