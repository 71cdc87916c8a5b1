"""Images behind URLs: listing the folder of a bucket, and reading one image."""

import asyncio
import os
from collections import Counter
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Any

import fsspec
import fsspec.asyn
import pyarrow as pa

from embedder.errors import ReadError, SourceError
from embedder.sources.reading import check_size
from embedder.sources.refs import RefRow, is_image, make_refs, readable

READ_SECONDS = 60  # for one image, from the request to its last byte
_PASSING_STATUSES = {408, 423, 425, 429}


def list_url(url: str) -> tuple[pa.Table, Counter[str]]:
    """List the images below a URL.

    Returns:
        Table of refs, and the number of other files by extension.

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
    rows: list[RefRow] = []
    skipped: Counter[str] = Counter()
    for path, info in found.items():
        if is_image(path, skipped):
            image_id = path.removeprefix(root).lstrip("/") or path.rpartition("/")[2]
            full_url = os.fsencode(filesystem.unstrip_protocol(path))
            rows.append((readable(image_id), full_url, info.get("size"), _modified_of(info)))
    return make_refs(rows), skipped


def _modified_of(info: dict[str, Any]) -> int | None:
    moment = info.get("LastModified") or info.get("mtime") or info.get("last_modified")
    if isinstance(moment, (int, float)):
        moment = datetime.fromtimestamp(moment, UTC)
    return int(moment.timestamp() * 1e6) if isinstance(moment, datetime) else None


def read_url(url: str, scheme: str) -> bytes:
    """Read one image whole.

    Args:
        url: Where it is.
        scheme: Of the URL, such as `s3`.

    Raises:
        ReadError: The server says that it cannot be had, or takes too long, or it is too large.
        Exception: What else the file system of this scheme raises.
    """
    # Not `fsspec.open`, which takes a `::` in a name for a chain of file systems.
    filesystem = fsspec.filesystem(scheme)
    content: bytes
    if scheme in ("http", "https"):
        content = _within_deadline(filesystem, _get(filesystem, url))
    elif filesystem.async_impl:
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


async def _get(filesystem: Any, url: str) -> bytes:
    """One GET. What it gives is counted as it comes, unpacked: a server can say any length."""
    session = await filesystem.set_session()
    async with session.get(filesystem.encode_url(url)) as response:
        if response.status >= 400:
            is_passing = response.status >= 500 or response.status in _PASSING_STATUSES
            reason = f"HTTP status {response.status} {response.reason or ''}".rstrip()
            raise ReadError(reason, is_passing=is_passing)
        content = bytearray()
        async for chunk in response.content.iter_chunked(2**20):
            content += chunk
            check_size(len(content))
        return bytes(content)
