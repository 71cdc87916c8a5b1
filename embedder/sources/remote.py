"""Images behind URLs by fsspec: what neither `web` nor `buckets` reads, and folders of the web."""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

import fsspec
import fsspec.asyn

from embedder.errors import ReadError, SourceError
from embedder.sources.reading import check_size, gather
from embedder.sources.urls import Found

_CHUNK_BYTES = 2**20
READ_SECONDS = 60  # for one image, from the request to its last byte


def list_folder(url: str) -> list[Found]:
    """Every file below a URL.

    fsspec follows the redirects of a web server, to any address: it is the user who named it.

    Raises:
        SourceError: It cannot be listed.
    """
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
        found: dict[str, dict[str, Any]] = filesystem.find(root, detail=True)
    except ImportError as error:
        raise SourceError(f"{url} needs a package that is not installed: {error}") from error
    # Every remote file system has exceptions of its own.
    except Exception as error:
        raise SourceError(f"{url} cannot be listed: {type(error).__name__}: {error}") from error
    return [
        Found(
            path.removeprefix(root).lstrip("/") or path.rpartition("/")[2],
            filesystem.unstrip_protocol(path),
            info.get("size"),
            _modified_of(info),
        )
        for path, info in found.items()
    ]


def _modified_of(info: dict[str, Any]) -> datetime | None:
    moment = info.get("LastModified") or info.get("mtime") or info.get("last_modified")
    if isinstance(moment, (int, float)):
        moment = datetime.fromtimestamp(moment, UTC)
    return moment if isinstance(moment, datetime) else None


def read_url(url: str, scheme: str, claim: Callable[[int], None]) -> bytes:
    """Read one image whole.

    What is asynchronous has `READ_SECONDS`. The rest (such as `ftp` and `sftp`) has no deadline
    here: whoever calls this must have one.

    Args:
        url: Where it is.
        scheme: Of the URL, such as `ftp`.
        claim: As in `read_bytes`.

    Raises:
        ReadError: It takes too long, or is too large.
        Exception: What else the file system of this scheme raises.
    """
    # Not `fsspec.open`, which takes a `::` in a name for a chain of file systems.
    filesystem = fsspec.filesystem(scheme)
    if filesystem.async_impl:
        info: dict[str, Any] = _within_deadline(filesystem, filesystem._info(url))
        check_size(num_bytes := info.get("size") or 0)
        claim(num_bytes)
        content: bytes = _within_deadline(filesystem, filesystem._cat_file(url))
        return content
    with filesystem.open(url, "rb") as file:
        num_bytes = getattr(file, "size", None)  # paramiko's do not tell
        return gather(iter(lambda: file.read(_CHUNK_BYTES), b""), num_bytes, claim)


def _within_deadline(filesystem: Any, reading: Coroutine[Any, Any, Any]) -> Any:
    """Wait for what a remote file system reads, but not for ever."""
    try:
        return fsspec.asyn.sync(filesystem.loop, asyncio.wait_for, reading, READ_SECONDS)
    except TimeoutError as error:
        raise ReadError(f"not read within {READ_SECONDS} seconds", is_passing=True) from error
