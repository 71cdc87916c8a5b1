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
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from embedder.errors import EmbedderError

_HOST = re.escape(socket.gethostname())
# The second form is that of stores written by 0.1.0 before this module was.
_TEMPORARY = re.compile(rf"\.embedder-{_HOST}-(\d+)-[0-9a-f]{{8}}\.tmp|\..+\.{_HOST}\.(\d+)\.tmp")
_DEVICES = {Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd")}  # not what is in /dev/shm
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and fs.h


def temporary_beside(path: Path) -> Path:
    """A new name in the same folder, hidden, which says whose it is; see `remove_abandoned`."""
    token = secrets.token_hex(4)
    return path.with_name(f".embedder-{socket.gethostname()}-{os.getpid()}-{token}.tmp")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that is there whole or not at all, over an older one if there is one.

    What is no file, such as `/dev/stdout`, is written to as it is.

    Raises:
        OSError: It cannot be written; what was there is as it was.
    """
    if path.parent in _DEVICES or (path.exists() and not path.is_file()):
        with path.open("wb") as file:
            yield file
        return
    path = Path(os.path.realpath(path))  # a link stays one
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


def create_once(path: Path, content: bytes) -> bool:
    """Make a file, whole, unless there is one: of several processes at once, one makes it.

    Returns:
        Whether it was made.

    Raises:
        OSError: It cannot be written.
    """
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links, on which the last of several makes it
            if path.exists():
                return False
            temporary.replace(path)
        return True
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of what is at `path`, if anything is.

    An older folder is there until the new one is whole, and then gone. One that is to keep its
    own place, such as the working folder, is emptied and filled instead, file by file.

    Raises:
        OSError: It cannot be written; what was there is as it was.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    _give_back_name(path)
    place = path if _keeps_its_place(path) else path.parent
    remove_abandoned(place)
    temporary = temporary_beside(place / path.name)
    try:
        temporary.mkdir()
        yield temporary
        replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new: Path, path: Path) -> None:
    """Rename a folder; what is at `path`, if anything is, takes its name, to be deleted."""
    path = path.absolute()
    _give_back_name(path)
    if not path.exists():
        new.rename(path)
    elif _keeps_its_place(path):
        _move_files(new, path)
    elif not _exchange(new, path):
        shutil.rmtree(_older_of(path), ignore_errors=True)
        path.rename(_older_of(path))
        new.rename(path)
        shutil.rmtree(_older_of(path), ignore_errors=True)


def _keeps_its_place(path: Path) -> bool:
    """Whether a folder cannot be renamed, or whoever stands in it would then stand nowhere."""
    if not path.is_dir():
        return False
    is_fixed = path.is_mount() or path.is_symlink() or not os.access(path.parent, os.W_OK)
    return is_fixed or path.samefile(Path.cwd())


def remove_folder(path: Path) -> None:
    """Delete a folder, of which a kill leaves all or something with a temporary name."""
    temporary = temporary_beside(path.absolute())
    path.rename(temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def _older_of(path: Path) -> Path:
    """Where an older folder is for a moment, on file systems that cannot swap two names."""
    return path.with_name(f".{path.name}.older")


def _give_back_name(path: Path) -> None:
    if not path.exists() and _older_of(path).is_dir():
        _older_of(path).rename(path)


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
        shutil.move(new / name, path / name)
    for older in path.iterdir():
        if older.name not in names and older != new:
            shutil.rmtree(older) if older.is_dir() else older.unlink()


@contextmanager
def os_errors_as(kind: type[EmbedderError], trouble: str) -> Iterator[None]:
    """Tell what the system refuses inside the block as the package's own error.

    Raises:
        EmbedderError: Of this kind, with the trouble and the system's reason.
    """
    try:
        yield
    except OSError as error:
        # Of the number: Arrow's text says also what it was doing.
        reason = os.strerror(error.errno) if error.errno else error
        raise kind(f"{trouble}: {reason}") from error


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path of this machine's file systems.

    Raises:
        EmbedderError: It is a URL, which would become a folder of that name, or no path at all.
    """
    text = os.fspath(path)
    if "\0" in text:  # from a job file
        raise EmbedderError(f"A path cannot have a NUL. Received: {text!r}")
    if "://" in text:
        raise EmbedderError(
            f"Stores, models and what else is written must be on a file system, not behind a URL. "
            f"Received: {text}"
        )
    try:
        os.lstat(text)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise EmbedderError(f"{error.strerror}: {text[:80]}...") from error
    return Path(text)


def regular(path: Path) -> Path:
    """The same path, of which it is known that opening it does not wait for another process.

    Raises:
        OSError: There is no such file, or it is a FIFO, a socket or a device.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return path


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
