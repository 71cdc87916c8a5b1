"""Which runs write a store: locks that the system takes back from a run that is killed."""

import json
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from embedder.errors import StoreBusy, StoreError
from embedder.files import local_path, os_errors_as
from embedder.libraries import logger
from embedder.store.parts import Part

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"  # names of all locks begin so
REWRITING_FILE = f"{LOCK_FILE}-rewriting"
_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 10.0  # without --wait: for a run that is just ending


@contextmanager
def lease(
    place: str | os.PathLike[str],
    *,
    part: Part | None = None,
    wait: bool = False,
    patience: float = _PATIENCE_SECONDS,
) -> Iterator[None]:
    """Hold a store for one run; a second one is told whose it is.

    Runs of different parts, of the same number of parts, hold it together; a run of the whole
    source holds it alone. The locks are `flock`'s on STORE/.lock, which runs of parts share, and
    on a file for each part: the system takes them back when the process ends, however that comes,
    so that nothing has to be deleted by hand. On file systems that cannot lock, runs are not kept
    apart, which is told. Some lock for each host alone, such as NFS mounted with `local_lock` and
    Lustre with `localflock`: there runs of different hosts are not kept apart, and nothing tells.

    Args:
        place: Of the store; made if it does not exist.
        part: Of the images, which is all that the run touches; None for all.
        wait: Whether to wait for another run's end, however long that takes.
        patience: Seconds to wait for it otherwise.

    Raises:
        StoreBusy: Another run holds the store, and goes on.
        StoreError: The folder cannot be written.
    """
    folder = local_path(place)
    deadline = math.inf if wait else time.monotonic() + patience
    is_told = False
    while True:
        with ExitStack() as files:
            others = _take(folder, part, files)
            if not others:
                yield
                return
        if time.monotonic() > deadline:
            rule = "one run at a time"
            if part is not None:
                rule = f"one run of each part at a time, all of them of {part.count} parts"
            end = "that one ends" if others.endswith(" is") else "they end"
            raise StoreBusy(
                f"The store {folder} can be written by {rule}. {others} writing it. With --wait "
                f"this run begins when {end}"
            )
        if not is_told:
            logger.info("%s writing the store %s: waiting for it", others, folder)
            is_told = True
        time.sleep(_POLL_SECONDS)


def _take(folder: Path, part: Part | None, files: ExitStack) -> str:
    """Take the locks of a run.

    Returns:
        Nothing, if they are taken; or else who "is" or "are" in the way. What was locked till then
        goes with the files.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        whole = files.enter_context((folder / LOCK_FILE).open("a+b"))
        if part is None:
            if not _is_locked(whole, folder):
                held = [file for path in _part_files(folder) if (file := _held(path, files))]
                return _describe(held or [whole])
            for path in _part_files(folder):  # which nobody opens now
                path.unlink(missing_ok=True)
            _sign(whole, None)
            return ""
        if not _is_locked(whole, folder, is_shared=True):
            return _describe([whole])
        own = files.enter_context((folder / _part_file(part)).open("a+b"))
        if not _is_locked(own, folder):
            return _describe([own])
        _sign(own, part)
        # Each run of a part has its own lock by now: of two that exclude each other one sees the
        # other, or both do, and both try again.
        others = [path for path in _part_files(folder) if not path.name.endswith(f"-{part.count}")]
        held = [file for path in others if (file := _held(path, files))]
        return _describe(held) if held else ""
    except OSError as error:
        # It is the lock that is in the way, where it is no file.
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        raise StoreError(
            f"The store {folder} cannot be written: {where}{error.strerror or error}"
        ) from error


def _part_file(part: Part) -> str:
    return f"{LOCK_FILE}-part-{part.number}-of-{part.count}"


def _part_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{LOCK_FILE}-part-*-of-*"))


def _held(path: Path, files: ExitStack) -> BinaryIO | None:
    """A lock's file, opened, if another run holds it."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    if _is_locked(file, path.parent, is_shared=True):
        file.close()  # and with it goes the lock: else a later run would take it for one of a run
        return None
    return files.enter_context(file)


def _is_locked(file: BinaryIO, folder: Path, is_shared: bool = False) -> bool:
    """Try to lock; true also where there is nothing to lock with."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning(
            "the file system of %s cannot lock (%s): see to it that one run at a time writes it, "
            "or one of each part",
            *(folder, error.strerror),
        )
    return True


def _sign(file: BinaryIO, part: Part | None) -> None:
    """Say whose the lock is, for those who find it taken."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    whose = {"host": socket.gethostname(), "process": os.getpid(), "since": since}
    if part is not None:
        whose["part"] = str(part)
    file.truncate(0)
    file.write(json.dumps(whose).encode())
    file.flush()


def _describe(held: list[BinaryIO]) -> str:
    """Who holds locks, and "is" or "are"."""
    file, *others = held
    file.seek(0)
    try:
        whose = json.loads(file.read())
        name = f"Process {whose['process']} on {whose['host']}, since {whose['since']},"
        if part := whose.get("part"):
            name += f" part {part},"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        name = "Another run"  # it is signing just now
    return f"{name} and {len(others):,} more are" if others else f"{name} is"


@contextmanager
def rewriting(folder: Path) -> Iterator[None]:
    """Change a shard that is there: to read it, and to write what is left of it.

    A shard that an earlier run made can hold images of several parts. Of two runs that each drop
    their own images of it at the same time, the second would write those of the first again.

    Args:
        folder: Of the store.

    Raises:
        StoreError: The folder cannot be written.
    """
    with os_errors_as(StoreError, f"The store {folder} cannot be written"):
        file = (folder / REWRITING_FILE).open("a+b")
    with file:
        if fcntl is not None:
            with suppress(OSError):  # a file system that cannot lock, which the lease has told
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
