"""Where images come from: an Arrow table of image refs, and from a ref to its bytes.

A table of refs has the columns of `REF_SCHEMA`, then any extra columns of a manifest.
"""

import asyncio
import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import fsspec.asyn
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from fsspec.utils import glob_translate

from embedder.columns import RESERVED_COLUMNS
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
READ_SECONDS = 60  # for one remote image, from the request to its last byte
# As a file that is not there, what lasts until somebody mends it, and then shows in the listing.
_LASTING_ERRORS = {errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR}
_PASSING_STATUSES = {408, 423, 425, 429}
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
_Result = TypeVar("_Result")

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


@dataclass(frozen=True)
class Listing:
    """What a source holds.

    Attributes:
        refs: Table of refs, sorted by `image_id`, which is unique.
        skipped: Number of files that do not have the extension of an image format, by extension.
        num_repeated: Lines of a manifest that name a path again.
        source: What was listed, as it was given.
    """

    refs: pa.Table
    skipped: Counter[str] = field(default_factory=Counter)
    num_repeated: int = 0
    source: str = ""

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
    elif stat.S_ISDIR(mode := _mode_of(path)):
        listing = _list_folder(path, None)
    elif stat.S_ISREG(mode):
        listing = _list_manifest(path)
    elif any(mark in text for mark in "*?["):
        root, pattern = _split_glob(text)
        if not stat.S_ISDIR(_mode_of(root)):
            raise SourceError(f"There is no folder {root}, where the glob {text} begins")
        listing = _list_folder(root, re.compile(glob_translate(pattern)))
    else:
        why = f"is {_KINDS.get(stat.S_IFMT(mode), 'none of them')}" if mode else "does not exist"
        raise SourceError(
            f"The source must be a folder, a glob, a manifest ({', '.join(MANIFEST_EXTENSIONS)}) "
            f"or a URL. Received: {text}, which {why}"
        )
    _check_unique(listing.refs, text)
    if listing.refs.num_rows == 0:
        raise SourceError(f"The source {text} holds no image{_describe_skipped(listing.skipped)}")
    return replace(listing, source=text)


def _mode_of(path: Path) -> int:
    """What is at a path, as `os.stat` has it; 0 where nothing is."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return 0
    except OSError as error:
        if error.errno in _LASTING_ERRORS:  # such as a glob, longer than a name may be
            return 0
        raise SourceError(f"The source {path} cannot be read: {error.strerror}") from error


def _check_unique(refs: pa.Table, source: str) -> None:
    counts = refs["image_id"].combine_chunks().value_counts()
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        same = refs.filter(pc.equal(refs["image_id"], repeated[0]))["path"].to_pylist()
        raise SourceError(
            f"Every image of a source must have an id of its own. Received: {source}, with files "
            f"whose names read the same once bytes that are not UTF-8 are written as \\xNN: "
            f"{' and '.join(map(repr, same))}; rename one"
        )


# From a ref to its bytes. ------------------------------------------------------------------


def read_bytes(path: bytes) -> bytes:
    """Read one image file whole.

    Args:
        path: The `path` of a ref.

    Raises:
        ReadError: The file is missing, is no regular file, cannot be read, or is larger than
            `MAX_FILE_BYTES`. It says whether that may pass.
    """
    try:
        if (url := _url_of(path)) is not None:
            return _read_url(url)
        return _read_file(path.removeprefix(b"file://"))
    except ReadError:
        raise
    except OSError as error:
        # Without the path: it is the row's image_id, and the root may differ between workers.
        reason = f"{type(error).__name__}: {error.strerror or error}"
        is_lasting = isinstance(error, FileNotFoundError) or error.errno in _LASTING_ERRORS
        raise ReadError(reason, is_passing=not is_lasting) from error
    except ValueError as error:  # a name with a NUL
        raise ReadError(f"{type(error).__name__}: {error}") from error
    except MemoryError as error:
        raise ReadError("not enough memory to read it", is_passing=True) from error
    # Every remote file system has exceptions of its own.
    except Exception as error:
        raise ReadError(f"{type(error).__name__}: {error}", is_passing=True) from error


def _url_of(path: bytes) -> str | None:
    """The URL that a ref's path is; None of a file's."""
    scheme, is_url, _ = path.partition(b"://")
    return path.decode() if is_url and scheme != b"file" else None


def _read_file(path: bytes) -> bytes:
    # Opening a FIFO waits for its writer, and opening a device can do anything.
    _check_regular(os.stat(path))
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        _check_regular(status)
        _check_size(status.st_size)
        content = file.read(status.st_size + 1)
        if len(content) > status.st_size:  # it grows, or it is a file of /proc, which say 0
            content += file.read(MAX_FILE_BYTES + 1 - len(content))
            _check_size(len(content))
    return content


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise ReadError(f"not a regular file, but {kind}")


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_FILE_BYTES:
        raise ReadError(f"larger than {MAX_FILE_BYTES:,} bytes: {num_bytes:,}")


def _read_url(url: str) -> bytes:
    # Not `fsspec.open`, which takes a `::` in a name for a chain of file systems.
    filesystem = fsspec.filesystem(url.split("://")[0])
    content: bytes
    if url.startswith(("http://", "https://")):
        content = _within_deadline(filesystem, _get(filesystem, url))
    elif filesystem.async_impl:
        info: dict[str, Any] = _within_deadline(filesystem, filesystem._info(url))
        _check_size(info.get("size") or 0)
        content = _within_deadline(filesystem, filesystem._cat_file(url))
    else:
        _check_size(filesystem.size(url) or 0)
        content = filesystem.cat_file(url)
    return content


def _within_deadline(filesystem: Any, reading: Coroutine[Any, Any, _Result]) -> _Result:
    """Wait for what a remote file system reads, but not for ever."""

    async def bounded() -> _Result:
        return await asyncio.wait_for(reading, READ_SECONDS)

    try:
        result: _Result = fsspec.asyn.sync(filesystem.loop, bounded)
    except TimeoutError as error:
        raise ReadError(f"not read within {READ_SECONDS} seconds", is_passing=True) from error
    return result


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
            _check_size(len(content))
        return bytes(content)


# The columns of `REF_SCHEMA`; the time is in microseconds since the epoch.
_RefRow = tuple[str, bytes, int | None, int | None]


# Listing. -----------------------------------------------------------------------------------


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
        if not entry.is_symlink() and not entry.is_file():
            skipped["FIFO, socket or device"] += 1
            continue
        num_bytes, modified = _stat(entry.path)
        rows.append((_readable(relative), os.fsencode(entry.path), num_bytes, modified))
    return Listing(_make_refs(rows), skipped)


def _walk(root: Path) -> Iterator[os.DirEntry[str]]:
    """Every file below a folder, however deep; folders themselves, and links to them, are not.

    FIFOs and devices are files here, as are links that lead nowhere: they are to be reported.
    """
    folders: list[str | Path] = [root]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif not entry.is_symlink() or not os.path.isdir(entry.path):
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
            refs = refs.append_column(name, _plain(table[name]))
    unique = _first_of_each(refs).sort_by("image_id")
    return Listing(unique, num_repeated=refs.num_rows - unique.num_rows)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column in the type that it has when it comes back from a store."""
    if pa.types.is_dictionary(column.type):
        return column.cast(column.type.value_type)
    if pa.types.is_string_view(column.type):
        return column.cast(pa.string())
    return column


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
            with pa.OSFile(os.fsencode(manifest)) as file:  # a text must be UTF-8
                table = pq.read_table(file)
        else:
            raise SourceError(
                f"A manifest must be one of {', '.join(MANIFEST_EXTENSIONS)}. Received: {manifest}"
            )
    except (pa.ArrowException, ValueError, OSError) as error:
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
    with pa.csv.open_csv(pa.OSFile(os.fsencode(manifest)), parse_options=parse) as reader:
        names = reader.schema.names
    convert = pa.csv.ConvertOptions(column_types={name: pa.string() for name in names})
    return pa.csv.read_csv(
        pa.OSFile(os.fsencode(manifest)), parse_options=parse, convert_options=convert
    )
