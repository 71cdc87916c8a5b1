"""From a ref to its bytes."""

import errno
import hashlib
import io
import itertools
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from embedder.errors import ReadError
from embedder.sources.urls import (
    AFTER_SCHEME,
    BUCKET_SCHEMES,
    WEB_SCHEMES,
    file_of,
    is_local,
    with_plain_scheme,
)

MAX_FILE_BYTES = 2**30  # no image file is larger; reading one would fill the memory
_CHUNK_BYTES = 2**20
_FIRST_CLAIM_BYTES = 2**24  # of a file whose size nobody tells; then twice as many each time
# What lasts until somebody mends it, and then shows in the listing.
LASTING_ERRORS = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR}
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def _unclaimed(_: int) -> None:
    """Take no account of memory."""


def read_bytes(
    path: bytes, *, allow_private: bool = False, claim: Callable[[int], None] = _unclaimed
) -> bytes:
    """Read one image file whole. Many threads may do so at once.

    Args:
        path: The `path` of a ref.
        allow_private: Whether a web server may redirect to a private, loopback or link-local
            address.
        claim: Called with the number of bytes that the file has in all, as far as that is known,
            before memory is taken for them; it may wait until there is some. It is called again
            where there are more, and where a server is asked again.

    Raises:
        ReadError: The file is missing, is no regular file, cannot be read, or is larger than
            `MAX_FILE_BYTES`. It says whether that may pass.
    """
    with _read_errors():
        if is_local(path):
            return _read_file(file_of(path), claim)
        return _read_url(with_plain_scheme(path.decode()), allow_private, claim)


def sha256_of(
    path: bytes, *, allow_private: bool = False, claim: Callable[[int], None] = _unclaimed
) -> str:
    """Hash one image file. A local one is never whole in memory; one behind a URL is.

    Args:
        path: The `path` of a ref.
        allow_private: As in `read_bytes`.
        claim: As in `read_bytes`; not called for local files.

    Returns:
        64 hexadecimal digits.

    Raises:
        ReadError: As in `read_bytes`.
    """
    with _read_errors():
        if is_local(path):
            return _sha256_of_file(file_of(path))
    content = read_bytes(path, allow_private=allow_private, claim=claim)
    return hashlib.sha256(content).hexdigest()


@contextmanager
def _read_errors() -> Iterator[None]:
    """Tell what goes wrong with one image as `ReadError`, and whether it may pass."""
    try:
        yield
    except ReadError:
        raise
    except OSError as error:
        # Without the path: it is the row's image_id, and the root may differ between workers.
        reason = f"{type(error).__name__}: {error.strerror or error}"
        is_lasting = isinstance(error, FileNotFoundError) or error.errno in LASTING_ERRORS
        raise ReadError(reason, is_passing=not is_lasting) from error
    except ValueError as error:  # a name with a NUL
        raise ReadError(f"{type(error).__name__}: {error}") from error
    except MemoryError as error:
        raise ReadError("not enough memory to read it", is_passing=True) from error
    # Every remote file system has exceptions of its own.
    except Exception as error:
        raise ReadError(f"{type(error).__name__}: {error}", is_passing=True) from error


def _read_url(url: str, allow_private: bool, claim: Callable[[int], None]) -> bytes:
    scheme = url.partition(AFTER_SCHEME)[0]
    if scheme in WEB_SCHEMES:
        from embedder.sources.web import read_web

        return read_web(url, allow_private, claim)
    if scheme in BUCKET_SCHEMES:
        from embedder.sources.buckets import read_object

        return read_object(url, claim)
    from embedder.sources.remote import read_url

    return read_url(url, scheme, claim)


def _read_file(path: bytes, claim: Callable[[int], None]) -> bytes:
    with _opened(path) as (file, num_bytes):
        claim(num_bytes)
        content = file.read(num_bytes + 1)
        if len(content) > num_bytes:  # it grows, or it is a file of /proc, which say 0
            chunks = itertools.chain([content], iter(lambda: file.read(_CHUNK_BYTES), b""))
            return gather(chunks, None, claim)
    return content


def _sha256_of_file(path: bytes) -> str:
    digest, num_bytes = hashlib.sha256(), 0
    with _opened(path) as (file, _):
        while chunk := file.read(_CHUNK_BYTES):
            num_bytes += len(chunk)
            check_size(num_bytes)
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _opened(path: bytes) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file and its size, which is not too large."""
    # Opening a FIFO waits for its writer, and opening a device can do anything.
    _check_regular(os.stat(path))
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        _check_regular(status)
        check_size(status.st_size)
        yield file, status.st_size


def gather(chunks: Iterable[bytes], num_bytes: int | None, claim: Callable[[int], None]) -> bytes:
    """Put a file together as it comes, and count it: a server can say any length.

    Args:
        chunks: Of the file, in turn.
        num_bytes: How many it has in all, or None where nobody tells.
        claim: As in `read_bytes`.

    Raises:
        ReadError: It is larger than `MAX_FILE_BYTES`.
    """
    check_size(num_bytes or 0)
    claimed = min(_FIRST_CLAIM_BYTES, MAX_FILE_BYTES) if num_bytes is None else num_bytes
    claim(claimed)
    content = io.BytesIO()  # whose value is no second copy, unlike that of `b"".join`
    for chunk in chunks:
        num_read = content.tell() + len(chunk)
        check_size(num_read)
        if num_read > claimed:
            claimed = min(max(num_read, 2 * claimed), MAX_FILE_BYTES)
            claim(claimed)
        content.write(chunk)
    return content.getvalue()


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ReadError(f"not a regular file, but {kind_of_file(status.st_mode)}")


def kind_of_file(mode: int) -> str:
    """What a file that is no regular one is called."""
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def check_size(num_bytes: int) -> None:
    """Refuse what is larger than an image.

    Raises:
        ReadError: It is.
    """
    if num_bytes > MAX_FILE_BYTES:
        raise ReadError(f"larger than {MAX_FILE_BYTES:,} bytes: {num_bytes:,}")
