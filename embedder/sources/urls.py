"""What is a URL, and what kind. Light: every process that reads images imports it."""

import os
from datetime import datetime
from typing import NamedTuple

AFTER_SCHEME = "://"
WEB_SCHEMES = ("http", "https")
# Spellings of the three kinds of bucket, and what the paths of refs begin with.
BUCKET_SCHEMES = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gs",
    "gcs": "gs",
    "az": "abfs",
    "abfs": "abfs",
    "abfss": "abfs",
}


class Found(NamedTuple):
    """A file that a listing found behind a URL.

    Attributes:
        relative: Its path below the folder, or its name, if what was listed is the file itself.
        url: To read it by.
        num_bytes: Its size, or None.
        modified: When it was changed, or None.
    """

    relative: str
    url: str
    num_bytes: int | None
    modified: datetime | None


def scheme_of(place: str | bytes) -> str | None:
    """What kind of place a source or a ref's path is: a URL's scheme, or None of a file path.

    In lower case, whatever the case in which it is written.
    """
    scheme, is_url, _ = os.fsdecode(place).partition(AFTER_SCHEME)
    return scheme.lower() if is_url else None


def is_local(path: bytes) -> bool:
    """Whether a ref's path is that of a file, also as `file://`."""
    return scheme_of(path) in (None, "file")


def file_of(path: bytes) -> bytes:
    """The file that a ref's path names, if it is local."""
    return path if scheme_of(path) is None else path[len(b"file://") :]


def with_plain_scheme(url: str) -> str:
    """A URL whose scheme is in lower case, which the libraries want that read it."""
    scheme, between, rest = url.partition(AFTER_SCHEME)
    return f"{scheme.lower()}{between}{rest}"
