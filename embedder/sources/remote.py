"""Images behind URLs by fsspec: what neither `web` nor `buckets` reads, and folders of the web."""

import asyncio
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Any

import fsspec
import fsspec.asyn

from embedder.errors import ReadError, SourceError
from embedder.sources.reading import check_size
from embedder.sources.urls import Found

READ_SECONDS = 60  # for one image, from the request to its last byte


def list_folder(url: str) -> list[Found]:
    """Every file below a URL.

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


def read_url(url: str, scheme: str) -> bytes:
    """Read one image whole.

    Args:
        url: Where it is.
        scheme: Of the URL, such as `ftp`.

    Raises:
        ReadError: It takes too long, or is too large.
        Exception: What else the file system of this scheme raises.
    """
    # Not `fsspec.open`, which takes a `::` in a name for a chain of file systems.
    filesystem = fsspec.filesystem(scheme)
    content: bytes
    if filesystem.async_impl:
        info: dict[str, Any] = _within_deadline(filesystem, filesystem._info(url))
        check_size(info.get("size") or 0)
        content = _within_deadline(filesystem, filesystem._cat_file(url))
    else:
        check_size(filesystem.size(url) or 0)
        content = filesystem.cat_file(url)
    return content


def _within_deadline(filesystem: Any, reading: Coroutine[Any, Any, Any]) -> Any:
    """Wait for what a remote file system reads, but not for ever."""
    try:
        return fsspec.asyn.sync(filesystem.loop, asyncio.wait_for, reading, READ_SECONDS)
    except TimeoutError as error:
        raise ReadError(f"not read within {READ_SECONDS} seconds", is_passing=True) from error
