"""Where images come from: an Arrow table of image refs, and from a ref to its bytes.

A table of refs has the columns of `REF_SCHEMA`, then any extra columns of a manifest.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from fsspec.utils import glob_translate

from embedder.errors import ReadError, SourceError

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
MANIFEST_EXTENSIONS = (".txt", ".csv", ".parquet")
MAX_FILE_BYTES = 2**30  # no image file is larger; reading one would fill the memory

MODIFIED_TYPE = pa.timestamp("us", tz="UTC")
REF_SCHEMA = pa.schema(
    [
        # POSIX path under the source's root; as written, in a manifest.
        pa.field("image_id", pa.string(), nullable=False),
        # Where the bytes are: a file path as the operating system spells it (which need not be
        # UTF-8), or a URL.
        pa.field("path", pa.binary(), nullable=False),
        pa.field("bytes", pa.int64()),  # null where unknown
        pa.field("modified", MODIFIED_TYPE),  # null where unknown
    ]
)
# Names that the store keeps for itself; a manifest cannot bring columns of these names.
RESERVED_COLUMNS = frozenset(
    (
        *("image_id", "path", "sha256", "bytes", "width", "height", "format", "modified"),
        *("embedding", "stage", "error", "shard", "same_file"),
    )
)


@dataclass(frozen=True)
class Listing:
    """What a source holds.

    Attributes:
        refs: Table of refs, sorted by `image_id`, which is unique.
        skipped: Number of files that do not have the extension of an image format, by extension.
        num_repeated: Lines of a manifest that name a path again.
    """

    refs: pa.Table
    skipped: Counter[str] = field(default_factory=Counter)
    num_repeated: int = 0

    def paths(self) -> dict[str, bytes]:
        """Where each image is, by its id."""
        return dict(
            zip(self.refs["image_id"].to_pylist(), self.refs["path"].to_pylist(), strict=True)
        )


def list_images(source: str | os.PathLike[str]) -> Listing:
    """List the images of a source, in a stable order.

    Args:
        source: A folder (recursive; files with the extension of an image format, in any case;
            links to files are followed, links to folders are not), a glob, a manifest, or the
            URL of a folder, such as `s3://bucket/photos`. A manifest is a `.txt` with one path a
            line, or a `.csv` or `.parquet` with a `path` column; its paths are relative to its
            folder, absolute, or URLs. Columns of a CSV are carried as text, as they are written.

    Raises:
        SourceError: The source is missing, holds no image, or cannot be listed.
    """
    text = os.fspath(source)
    path = Path(text)
    if "://" in text:
        listing = _list_url(text)
    elif path.is_dir():
        listing = _list_folder(path, None)
    elif path.is_file():
        listing = _list_manifest(path)
    elif any(mark in text for mark in "*?["):
        root, pattern = _split_glob(text)
        if not root.is_dir():
            raise SourceError(f"There is no folder {root}, where the glob {text} begins")
        listing = _list_folder(root, re.compile(glob_translate(pattern)))
    else:
        raise SourceError(
            f"The source must be a folder, a glob, a manifest ({', '.join(MANIFEST_EXTENSIONS)}) "
            f"or a URL. Received: {text}, which does not exist"
        )
    ids = listing.refs["image_id"]
    if pc.count_distinct(ids).as_py() < len(ids):
        raise SourceError(
            f"The source {text} has two files whose names read the same once bytes that are not "
            f"UTF-8 are written as \\xNN; rename one"
        )
    if listing.refs.num_rows == 0:
        raise SourceError(f"The source {text} holds no image{_describe_skipped(listing.skipped)}")
    return listing


def read_bytes(path: bytes) -> bytes:
    """Read one image file whole.

    Args:
        path: The `path` of a ref.

    Raises:
        ReadError: The file is missing, cannot be read, or is larger than `MAX_FILE_BYTES`.
    """
    try:
        if b"://" in path:
            return _read_url(path.decode())
        with open(path, "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes > MAX_FILE_BYTES:
                raise ReadError(f"larger than {MAX_FILE_BYTES:,} bytes: {num_bytes:,}")
            return file.read()
    except ReadError:
        raise
    except OSError as error:
        # Without the path: it is the row's image_id, and the root may differ between workers.
        raise ReadError(f"{type(error).__name__}: {error.strerror or error}") from error
    # Every remote file system has exceptions of its own; a name with a NUL is a ValueError.
    except Exception as error:
        raise ReadError(f"{type(error).__name__}: {error}") from error


# The columns of `REF_SCHEMA`; the time is in microseconds since the epoch.
_RefRow = tuple[str, bytes, int | None, int | None]


def _read_url(url: str) -> bytes:
    # Not `fsspec.open`, which takes a `::` in a name for a chain of file systems.
    filesystem = fsspec.filesystem(url.split("://")[0])
    num_bytes = filesystem.size(url)
    if num_bytes is not None and num_bytes > MAX_FILE_BYTES:
        raise ReadError(f"larger than {MAX_FILE_BYTES:,} bytes: {num_bytes:,}")
    content: bytes = filesystem.cat_file(url)
    return content


def _describe_skipped(skipped: Counter[str]) -> str:
    if not skipped:
        return ""
    kinds = ", ".join(f"{extension} {count:,}" for extension, count in skipped.most_common(5))
    return f" ({skipped.total():,} other files: {kinds})"


def _readable(name: str) -> str:
    """A name that is not UTF-8 keeps its odd bytes visible, each as its hexadecimal escape."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _list_folder(root: Path, pattern: re.Pattern[str] | None) -> Listing:
    rows: list[_RefRow] = []
    skipped: Counter[str] = Counter()
    prefix_length = len(os.path.join(root, ""))
    for entry in _walk(root):
        relative = entry.path[prefix_length:].replace(os.sep, "/")
        if pattern is not None and not pattern.fullmatch(relative):
            continue
        if _extension(entry.name) not in IMAGE_EXTENSIONS:
            skipped[_extension(entry.name) or "no extension"] += 1
            continue
        num_bytes, modified = _stat(entry.path)
        rows.append((_readable(relative), os.fsencode(entry.path), num_bytes, modified))
    return Listing(_make_refs(rows), skipped)


def _walk(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    """Every file below a folder; a link that leads nowhere counts as a file, to be reported."""
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir(follow_symlinks=False):
                    yield from _walk(entry.path)
                elif entry.is_symlink():
                    if not os.path.isdir(entry.path):
                        yield entry
                elif entry.is_file():
                    yield entry
    except OSError as error:
        raise SourceError(f"The folder {folder} cannot be listed: {error.strerror}") from error


def _stat(path: str) -> tuple[int | None, int | None]:
    """Size in bytes and time of change in microseconds, or None where there is no such file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None, None
    return status.st_size, status.st_mtime_ns // 1000


def _make_refs(rows: list[_RefRow]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [[]] * len(REF_SCHEMA)
    arrays = [
        pa.array(values, type_field.type)
        for values, type_field in zip(columns, REF_SCHEMA, strict=True)
    ]
    return pa.table(arrays, schema=REF_SCHEMA).sort_by("image_id")


def _split_glob(text: str) -> tuple[Path, str]:
    """Split at the first part that has a wildcard: the root of the ids, and the pattern."""
    parts = Path(text).parts
    first = next(i for i, part in enumerate(parts) if any(mark in part for mark in "*?["))
    return Path(*parts[:first]), "/".join(parts[first:])


def _list_url(url: str) -> Listing:
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
        found: dict[str, dict[str, Any]] = filesystem.find(root, detail=True)
    except ImportError as error:
        raise SourceError(f"{url} needs a package that is not installed: {error}") from error
    # Every remote file system has exceptions of its own.
    except Exception as error:
        raise SourceError(f"{url} cannot be listed: {type(error).__name__}: {error}") from error
    rows: list[_RefRow] = []
    skipped: Counter[str] = Counter()
    for path, info in found.items():
        if _extension(path) not in IMAGE_EXTENSIONS:
            skipped[_extension(path) or "no extension"] += 1
            continue
        image_id = path.removeprefix(root).lstrip("/") or path.rpartition("/")[2]
        image_id = _readable(image_id)
        full_url = os.fsencode(filesystem.unstrip_protocol(path))
        rows.append((image_id, full_url, info.get("size"), _modified_of(info)))
    return Listing(_make_refs(rows), skipped)


def _modified_of(info: dict[str, Any]) -> int | None:
    moment = info.get("LastModified") or info.get("mtime") or info.get("last_modified")
    if isinstance(moment, (int, float)):
        moment = datetime.fromtimestamp(moment, UTC)
    return int(moment.timestamp() * 1e6) if isinstance(moment, datetime) else None


def _list_manifest(manifest: Path) -> Listing:
    table = _read_manifest(manifest)
    ids = table["path"].to_pylist()
    if (empty := next((row for row, path in enumerate(ids, 1) if not path), None)) is not None:
        raise SourceError(f"Row {empty} of {manifest} has no path")
    rows: list[_RefRow] = []
    for image_id in ids:
        if "://" in image_id:
            rows.append((image_id, image_id.encode(), None, None))
        else:
            path = os.path.join(manifest.parent, image_id)
            rows.append((image_id, os.fsencode(path), *_stat(path)))
    columns = zip(*rows, strict=True) if rows else [[]] * len(REF_SCHEMA)
    refs = pa.table(
        [pa.array(v, f.type) for v, f in zip(columns, REF_SCHEMA, strict=True)], schema=REF_SCHEMA
    )
    for name in table.column_names:
        if name != "path":
            refs = refs.append_column(table.schema.field(name), table[name])
    unique = _first_of_each(refs).sort_by("image_id")
    return Listing(unique, num_repeated=refs.num_rows - unique.num_rows)


def _first_of_each(refs: pa.Table) -> pa.Table:
    if pc.count_distinct(refs["image_id"]).as_py() == refs.num_rows:
        return refs
    numbered = refs.select(["image_id"]).append_column("row", pa.array(range(refs.num_rows)))
    first = numbered.group_by("image_id").aggregate([("row", "min")])
    return refs.take(first["row_min"])


def _read_manifest(manifest: Path) -> pa.Table:
    kind = manifest.suffix.lower()
    try:
        if kind == ".txt":
            paths = manifest.read_text(encoding="utf-8-sig").split("\n")
            table = pa.table({"path": pa.array([path for path in paths if path], pa.string())})
        elif kind == ".csv":
            table = _read_csv(manifest)
        elif kind == ".parquet":
            table = pq.read_table(manifest)
        else:
            raise SourceError(
                f"A manifest must be one of {', '.join(MANIFEST_EXTENSIONS)}. Received: {manifest}"
            )
    except (pa.ArrowInvalid, UnicodeDecodeError, OSError) as error:
        raise SourceError(f"The manifest {manifest} cannot be read: {error}") from error
    if "path" not in table.column_names:
        raise SourceError(
            f"A manifest must have a `path` column. "
            f"Received: {manifest} with {', '.join(table.column_names)}"
        )
    if taken := sorted(RESERVED_COLUMNS & set(table.column_names) - {"path"}):
        raise SourceError(
            f"A manifest must not have columns that the store has itself. "
            f"Received: {', '.join(taken)} in {manifest}; rename them"
        )
    if len(set(table.column_names)) != table.num_columns:
        raise SourceError(f"{manifest} has two columns of one name")
    try:
        paths = table["path"].cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise SourceError(f"The column `path` of {manifest} must be text: {error}") from error
    return table.set_column(table.column_names.index("path"), "path", paths)


def _read_csv(manifest: Path) -> pa.Table:
    # Text as written: guessed types would turn the label 007 into 7.
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    with pa.csv.open_csv(manifest, parse_options=parse) as reader:
        names = reader.schema.names
    convert = pa.csv.ConvertOptions(column_types={name: pa.string() for name in names})
    return pa.csv.read_csv(manifest, parse_options=parse, convert_options=convert)
