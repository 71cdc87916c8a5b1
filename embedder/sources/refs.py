"""Tables of image refs: what each image is called, and where its bytes are."""

import os
from collections import Counter
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from embedder.sources.urls import AFTER_SCHEME

# File extensions of `decode.FORMATS`, held equal by a test: listing must not import Pillow.
IMAGE_EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("apng", "avif", "avifs", "blp", "bmp", "bw", "cur", "dcx", "dds", "dib", "fit", "fits"),
        *("flc", "fli", "ftc", "ftu", "gbr", "gif", "icb", "icns", "ico", "iim", "im", "j2c"),
        *("j2k", "jfif", "jp2", "jpc", "jpe", "jpeg", "jpf", "jpg", "jpx", "mpo", "msp", "pbm"),
        *("pcd", "pcx", "pfm", "pgm", "png", "pnm", "ppm", "psd", "pxr", "qoi", "ras", "rgb"),
        *("rgba", "sgi", "tga", "tif", "tiff", "vda", "vst", "webp", "xbm", "xpm"),
    )
)
MODIFIED_TYPE = pa.timestamp("us", tz="UTC")
# Columns of every table of refs; a manifest's come after them.
REF_SCHEMA = pa.schema(
    [
        # POSIX path under the source's root; as written, in a manifest.
        pa.field("image_id", pa.string(), nullable=False),
        # Where the bytes are: a file path as the operating system spells it (which need not be
        # UTF-8), or a URL; `scheme_of` tells which.
        pa.field("path", pa.binary(), nullable=False),
        pa.field("bytes", pa.int64()),  # null where unknown
        pa.field("modified", MODIFIED_TYPE),  # null where unknown
    ]
)
# The columns of `REF_SCHEMA`; the time is in microseconds since the epoch.
RefRow = tuple[str, bytes, int | None, int | None]


def make_refs(rows: Iterable[RefRow]) -> pa.Table:
    """A table of `REF_SCHEMA`, in the rows' order."""
    columns = list(zip(*rows, strict=True)) or [()] * len(REF_SCHEMA)
    return pa.table(dict(zip(REF_SCHEMA.names, columns, strict=True)), schema=REF_SCHEMA)


def are_urls(refs: pa.Table) -> pa.ChunkedArray:
    """Of each ref, whether its path is a URL: `scheme_of`, for a whole table."""
    return pc.match_substring(refs["path"], AFTER_SCHEME)


def is_image(name: str, skipped: Counter[str]) -> bool:
    """Whether a name has the extension of an image format; other extensions are counted."""
    extension = os.path.splitext(name)[1].lower()
    if extension in IMAGE_EXTENSIONS:
        return True
    skipped[extension or "no extension"] += 1
    return False


def readable(name: str) -> str:
    """A name that is not UTF-8 keeps its odd bytes visible, each as its hexadecimal escape."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
