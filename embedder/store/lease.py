"""One run at a time on a store: a lock that the system takes back from a run that is killed."""

import json
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from embedder.errors import StoreBusy, StoreError
from embedder.files import local_path
from embedder.libraries import logger

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 10.0  # without --wait: for a run that is just ending


@contextmanager
def lease(
    place: str | os.PathLike[str], *, wait: bool = False, patience: float = _PATIENCE_SECONDS
) -> Iterator[None]:
    """Hold a store for one run; a second one is told whose it is.

    The lock is `flock`'s on STORE/.lock: the system takes it back when its process ends, however
    that comes, so that nothing has to be deleted by hand. On file systems that cannot lock, runs
    are not kept apart, which is told.

    Args:
        place: Of the store; made if it does not exist.
        wait: Whether to wait for another run's end, however long that takes.
        patience: Seconds to wait for it otherwise.

    Raises:
        StoreBusy: Another run holds the store, and goes on.
        StoreError: The folder cannot be written.
    """
    folder = local_path(place)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("a+b")
    except OSError as error:
        # It is the lock that is in the way, where it is no file.
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        raise StoreError(
            f"The store {folder} cannot be written: {where}{error.strerror or error}"
        ) from error
    with file:
        if not _is_locked(file, folder):
            logger.info("%s is writing the store %s: waiting for it", _describe(file), folder)
            deadline = math.inf if wait else time.monotonic() + patience
            while not _is_locked(file, folder):
                if time.monotonic() > deadline:
                    raise StoreBusy(
                        f"The store {folder} can be written by one run at a time. "
                        f"{_describe(file)} is writing it. With --wait this run begins when that "
                        f"one ends"
                    )
                time.sleep(_POLL_SECONDS)
        _sign(file)
        yield


def _is_locked(file: BinaryIO, folder: Path) -> bool:
    """Try to lock; true also where there is nothing to lock with."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning(
            "the file system of %s cannot lock (%s): see to it that one run at a time writes it",
            *(folder, error.strerror),
        )
    return True


def _sign(file: BinaryIO) -> None:
    """Say whose the lock is, for those who find it taken."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    whose = {"host": socket.gethostname(), "process": os.getpid(), "since": since}
    file.truncate(0)
    file.write(json.dumps(whose).encode())
    file.flush()


def _describe(file: BinaryIO) -> str:
    file.seek(0)
    try:
        whose = json.loads(file.read())
        return f"Process {whose['process']} on {whose['host']}, since {whose['since']},"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # it is signing just now
        return "Another run"
