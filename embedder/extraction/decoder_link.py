"""The end of a decoder process that is in the process which started it."""

import atexit
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from typing import Any

import msgpack

from embedder.errors import EngineError
from embedder.extraction.buffers import nameless_file, shared_numbers
from embedder.extraction.decoder_process import REST_STATUS, STAGES, Times, start_code
from embedder.files import os_errors_as

_START_SECONDS = 120  # for it to be ready
_SEND_BYTES = 2**20  # that wait in the link, each way
# One thread does all; libraries that reserve memory for more would use up its limit.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class DecoderDied(Exception):  # noqa: N818 - says what happened
    """A decoder process has ended.

    Attributes:
        slot: First slot of the image that it had in work; None if it had none.
        stage: That the image was in, one of `STAGES`.
        is_rest: Whether it ended by itself, as it is to; it is replaced when there is work.
        signal: That ended it; None if it ended by itself.
        reason: Why, in words.
    """

    def __init__(self, slot: int | None, stage: str, status: int) -> None:
        """Tell what ended it.

        Args:
            slot: As the attribute.
            stage: As the attribute.
            status: That it ended with, as `subprocess` has it: of a signal, minus its number.
        """
        self.slot, self.stage = slot, stage
        self.is_rest = status == REST_STATUS
        self.signal = -status if status < 0 else None
        self.reason = f"its decoder ended with status {status}"
        if self.signal is not None:
            with suppress(ValueError):  # a signal without a name
                name = signal.Signals(self.signal).name
                self.reason = f"its decoder was killed by signal {self.signal} ({name})"
        super().__init__(self.reason)


class DecoderLink:
    """A decoder process, from the outside: see `decoder_process` for what is said."""

    def __init__(self) -> None:
        """Start one; it is ready a little later.

        Raises:
            EngineError: It cannot be started.
        """
        self._open_keys: set[int] = set()
        self._is_ready = False
        self._ended: DecoderDied | EngineError | None = None
        with (
            os_errors_as(EngineError, "Decoder processes cannot be started"),
            ExitStack() as theirs,
        ):
            self._link, link = multiprocessing.Pipe()
            theirs.enter_context(link)
            for end in self._link, link:  # or both might wait for each other to read
                with socket.socket(fileno=os.dup(end.fileno())) as channel:
                    channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
            self._current, current = shared_numbers(2)
            theirs.callback(os.close, current)
            # Closed by the system when this process ends, however that comes.
            life, self._life = os.pipe()
            theirs.callback(os.close, life)
            self._errors = os.fdopen(nameless_file(), "rb")
            files = link.fileno(), current, life
            self._process = subprocess.Popen(  # noqa: S603 - this program
                [sys.executable, "-c", start_code(sys.path), *map(str, files)],
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=files,
                process_group=0,  # Ctrl-C in a terminal is for the process that started it
                env=os.environ | _ENVIRONMENT,
            )

    def open(self, key: int, file: int, *settings: Any) -> None:
        """Tell it where pixels go, unless it knows.

        Args:
            key: That `load` names the place by.
            file: Descriptor of the memory.
            settings: Pixels, number of batches and the like.

        Raises:
            DecoderDied: It has ended.
        """
        if key in self._open_keys:
            return
        self._open_keys.add(key)
        self._send("open", key, *settings)
        with socket.socket(fileno=os.dup(self._link.fileno())) as channel:
            try:
                socket.send_fds(channel, [b"F"], [file])
            except OSError:
                raise self._death() from None

    def close(self, key: int) -> None:
        """Have it forget a place."""
        if key in self._open_keys:
            self._open_keys.remove(key)
            with suppress(DecoderDied):
                self._send("close", key)

    def load(self, *arguments: Any) -> None:
        """Hand it images.

        Raises:
            DecoderDied: It has ended.
        """
        self._send("load", *arguments)

    def _send(self, *message: Any) -> None:
        try:
            self._link.send_bytes(msgpack.packb(message))
        except OSError:
            raise self._death() from None

    def wait_until_ready(self) -> None:
        """Wait until it has loaded what it needs.

        Raises:
            DecoderDied: It has ended.
            EngineError: It has ended by itself, or takes too long.
        """
        if self._is_ready:
            return
        if not self._link.poll(_START_SECONDS):
            self.end()
            raise EngineError(f"Decoder processes do not start within {_START_SECONDS} seconds")
        self._receive()
        self._is_ready = True

    def receive(self) -> tuple[list[Any], Times]:
        """Wait for what it has to tell of images: outcomes, and how long they took.

        Raises:
            DecoderDied: It has ended.
        """
        _, outcomes, times = self._receive()
        return outcomes, Times(*times)

    def _receive(self) -> list[Any]:
        try:
            content = self._link.recv_bytes()
        except (EOFError, OSError):
            raise self._death() from None
        message: list[Any] = msgpack.unpackb(content, unicode_errors="surrogatepass")
        return message

    def _death(self) -> DecoderDied | EngineError:
        """Wait for its end, and say what that was; after that there is nothing of it here."""
        if self._ended is None:
            status = self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            self._link.close()
            os.close(self._life)
            self._errors.close()
            slot, stage = self._current.tolist()
            if not self._is_ready and status > 0:
                reason = " ".join(lines[-1:])
                self._ended = EngineError(f"Decoder processes cannot be started: {reason}")
            else:
                self._ended = DecoderDied(slot - 1 if slot else None, STAGES[stage], status)
        return self._ended

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def end(self) -> None:
        """End it, as it also ends with this process, whatever it does."""
        self._process.kill()
        self._death()


_idle: list[DecoderLink] = []
_lock = threading.Lock()


def start_ahead(count: int) -> None:
    """Start decoder processes that will be wanted soon, but for those that are idle."""
    with _lock:
        for link in [link for link in _idle if not link.is_alive()]:
            _idle.remove(link)
            link.end()
        _idle.extend(DecoderLink() for _ in range(count - len(_idle)))


def take_idle() -> DecoderLink:
    """A decoder process without work, or a new one."""
    with _lock:
        while _idle:
            link = _idle.pop()
            if link.is_alive():
                return link
            link.end()
    return DecoderLink()


def give_back(link: DecoderLink) -> None:
    """Keep a decoder process for whoever wants it next; it ends by itself where nobody does."""
    with _lock:
        _idle.append(link)


@atexit.register
def end_idle() -> None:
    """End the processes that have no work."""
    with _lock:
        while _idle:
            _idle.pop().end()
