"""Folders of images, and globs."""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from embedder.errors import SourceError
from embedder.sources.reading import LASTING_ERRORS
from embedder.sources.refs import RefRow, is_image, make_refs, readable


def mode_of(path: Path) -> int:
    """What is at a path, as `os.stat` has it; 0 where nothing is.

    Raises:
        SourceError: It cannot be told.
    """
    try:
        return path.stat().st_mode
    except ValueError:  # a NUL in the name
        return 0
    except OSError as error:
        if error.errno in LASTING_ERRORS:  # such as a glob, longer than a name may be
            return 0
        raise SourceError(f"The source {path} cannot be read: {error.strerror}") from error


def list_folder(
    root: Path, pattern: re.Pattern[str] | None = None
) -> tuple[pa.Table, Counter[str]]:
    """List the images below a folder.

    Args:
        root: The folder.
        pattern: What the whole path below it must match.

    Returns:
        Table of refs, and the number of other files by extension.

    Raises:
        SourceError: A folder cannot be listed.
    """
    rows: list[RefRow] = []
    skipped: Counter[str] = Counter()
    prefix_length = len(os.path.join(root, ""))
    for entry in _walk(root):
        relative = entry.path[prefix_length:].replace(os.sep, "/")
        if pattern is not None and not pattern.fullmatch(relative):
            continue
        if not is_image(entry.name, skipped):
            continue
        if not entry.is_symlink() and not entry.is_file():
            skipped["FIFO, socket or device"] += 1
            continue
        rows.append((readable(relative), os.fsencode(entry.path), *size_and_time(entry.path)))
    return make_refs(rows), skipped


def list_glob(glob: str) -> tuple[pa.Table, Counter[str]]:
    """As `list_folder`, of what a glob matches; ids begin at its first part with a wildcard.

    Raises:
        SourceError: There is no folder where it begins.
    """
    from fsspec.utils import glob_translate

    parts = Path(glob).parts
    first = next(i for i, part in enumerate(parts) if is_glob(part))
    root = Path(*parts[:first])
    if not stat.S_ISDIR(mode_of(root)):
        raise SourceError(f"There is no folder {root}, where the glob {glob} begins")
    return list_folder(root, re.compile(glob_translate("/".join(parts[first:]))))


def is_glob(text: str) -> bool:
    """Whether a path has a wildcard."""
    return any(mark in text for mark in "*?[")


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


def size_and_time(path: str) -> tuple[int | None, int | None]:
    """Size in bytes and time of change in microseconds, or None where there is no such file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None, None
    return status.st_size, status.st_mtime_ns // 1000
