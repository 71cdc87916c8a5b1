"""Files and folders that are there whole, or not at all.

What is written has a temporary name beside its place until it is whole; then it is renamed. A
process that is killed leaves the older file or folder as it was, and something with a temporary
name, which the next one that writes there removes.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from embedder.errors import EmbedderError

_HOST = re.escape(socket.gethostname())
# The second form is that of stores written by 0.1.0 before this module was.
_TEMPORARY = re.compile(rf"\.embedder-{_HOST}-(\d+)-[0-9a-f]{{8}}\.tmp|\..+\.{_HOST}\.(\d+)\.tmp")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and fs.h


def temporary_beside(path: Path) -> Path:
    """A new name in the same folder, hidden, which says whose it is; see `remove_abandoned`."""
    token = secrets.token_hex(4)
    return path.with_name(f".embedder-{socket.gethostname()}-{os.getpid()}-{token}.tmp")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that is there whole or not at all, over an older one if there is one.

    Raises:
        OSError: It cannot be written; what was there is as it was.
    """
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # such as a disk that is gone, which is what to tell
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of what is at `path`, if anything is.

    An older folder is there until the new one is whole, and then gone.

    Raises:
        OSError: It cannot be written; what was there is as it was.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent)
    if not path.exists() and _older_of(path).is_dir():
        _older_of(path).rename(path)
    temporary = temporary_beside(path)
    try:
        temporary.mkdir()
        yield temporary
        _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(new: Path, path: Path) -> None:
    """Rename a folder; what is at `path` takes its name, to be deleted."""
    if not path.exists():
        new.rename(path)
    elif path.samefile(Path.cwd()) or path.is_mount() or path.is_symlink():
        # None of these can be renamed without surprise: whoever stands in it would stand nowhere.
        _move_files(new, path)
    elif not _exchange(new, path):
        shutil.rmtree(_older_of(path), ignore_errors=True)
        path.rename(_older_of(path))
        new.rename(path)
        shutil.rmtree(_older_of(path), ignore_errors=True)


def _older_of(path: Path) -> Path:
    """Where an older folder is for a moment, on file systems that cannot swap two names."""
    return path.with_name(f".{path.name}.older")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once; false where the system or its file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not Linux, or a C library older than 2.28
        return False
    names = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), os.fspath(other))


def _move_files(new: Path, path: Path) -> None:
    names = {entry.name for entry in new.iterdir()}
    for name in names:
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        (new / name).replace(path / name)
    for older in path.iterdir():
        if older.name not in names:
            shutil.rmtree(older) if older.is_dir() else older.unlink()


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path of this machine's file systems.

    Raises:
        EmbedderError: It is a URL, which would become a folder of that name.
    """
    text = os.fspath(path)
    if "://" in text:
        raise EmbedderError(
            f"What is written must be on a file system; buckets cannot be written to. "
            f"Received: {text}"
        )
    return Path(text)


def is_temporary(path: Path) -> bool:
    """Whether a name is of what is not whole yet, of whichever machine."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def remove_abandoned(folder: Path) -> None:
    """Remove temporary files and folders of processes of this machine that are no more."""
    for path in folder.glob(".*.tmp"):
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or _is_alive(int(found[1] or found[2])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; or no number of a process
        return True
    return True
