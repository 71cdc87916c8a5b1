"""Signals that end the command: the first leaves a record of the run, the second ends at once."""

import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STATUS = 1
# For the run to write its record; more than `cluster` waits for shards in work.
_GRACE_SECONDS = 15
# `timeout`, shells and `uv run` pass on what the terminal has sent already.
_SAME_SIGNAL_SECONDS = 0.5
_FLUSH_SECONDS = 1


class Interrupted(KeyboardInterrupt):
    """A signal asks the command to end; its text is the status in the record of the run."""


@contextmanager
def ending_the_process() -> Iterator[None]:
    """Around the whole command, and in its main thread: end the process at signals.

    The first signal raises `Interrupted`, once the main thread comes to it; after it, or where it
    does not come to it, the process is ended without waiting for any thread. So it is after a
    failure, which may leave a decoder in work. A second signal ends the process at once.
    """
    listener = _Listener()
    try:
        yield
    except SystemExit as error:
        status = error.code or 0
        if listener.is_asked_to_end or status == _STATUS:
            end(_STATUS if status else 0)
        raise
    except BaseException:
        if listener.is_asked_to_end:
            sys.excepthook(*sys.exc_info())
            end(_STATUS)
        raise
    finally:
        listener.is_over = True  # a signal while Python shuts down is as good as the second


class _Listener:
    """Hears signals, also while the main thread is in a library that does not return to Python."""

    def __init__(self) -> None:
        self.is_asked_to_end = self.is_over = False
        hears, tells = os.pipe()
        for end in (hears, tells):
            os.set_blocking(end, False)
        for number in SIGNALS:
            # What `nohup` or a shell's `&` has it ignore stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._interrupt)
        signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(hears,), daemon=True).start()

    def _interrupt(self, number: int, _: FrameType | None) -> None:
        """Runs in the main thread, when it comes to it."""
        if self.is_asked_to_end or self.is_over:
            return  # `_watch` sees to it
        self.is_asked_to_end = True
        is_ctrl_c = number == signal.SIGINT
        raise Interrupted("interrupted" if is_ctrl_c else f"ended by {signal.Signals(number).name}")

    def _watch(self, hears: int) -> None:
        """Runs in a thread of its own."""
        _wait_for_signal(hears, None)
        first = time.monotonic()
        while not self.is_over and _wait_for_signal(hears, first + _GRACE_SECONDS):
            if time.monotonic() - first > _SAME_SIGNAL_SECONDS:
                break
        end(_STATUS)


def _wait_for_signal(hears: int, deadline: float | None) -> bool:
    """Wait for one of `SIGNALS`; False if none came until then, by the monotonic clock."""
    while True:
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([hears], [], [], seconds)[0]:
            return False
        if not set(SIGNALS).isdisjoint(os.read(hears, 4096)):
            return True


def end(status: int) -> None:
    """End this process now, whatever its threads do, and the worker processes with it.

    What is written to standard output and error goes out first, unless nobody takes it.
    """
    for child in multiprocessing.active_children():
        child.kill()
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(_FLUSH_SECONDS)
    os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the terminal is gone, or the stream closed
            stream.flush()
