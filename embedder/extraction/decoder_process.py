"""A decoder process: reads images, decodes them, and puts their pixels into shared memory.

It may crash, hang or run out of memory with an image: `decoders` starts another one. It loads
neither Dask, Keras nor an engine, and is given no more than numbers and texts, in msgpack; nor does
it give more back.

    to it     open  KEY PIXELS NUM_BATCHES BATCH_SIZE SECONDS NUM_READERS ALLOW_PRIVATE, then a file
              close KEY
              load  KEY IN_THREADS IS_ALONE MAX_PIXELS PATHS SLOTS
    from it   ready
              loaded OUTCOMES TIMES

An outcome is SLOT NUM_BYTES SHA256 WIDTH HEIGHT FORMAT of an image, SLOT NUM_BYTES SHA256 STAGE
ERROR IS_PASSING of a failure, or SLOT NUM_PIXELS of an image with more pixels than MAX_PIXELS.
"""

import contextlib
import ctypes
import fcntl
import gc
import itertools
import json
import math
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import msgpack

from embedder.decode import MAX_ORDINARY_PIXELS, LargeImage, prepare_decoders
from embedder.extraction.buffers import SharedBatches, shared_numbers
from embedder.extraction.images import EncodedImage, LoadedImage, decode_image, read_image
from embedder.pixels import Pixels
from embedder.sources import ByteBudget, Claim, is_local, scheme_of
from embedder.store import Failure

# What decoding one image may take beside what the process has. The largest image that is let in,
# of `decode.MAX_PIXELS`, takes 1.45 GiB (`benchmarks/decode_memory.py`).
MAX_GIB = 2
STAGES = ("read", "decode")
REST_STATUS = 100  # that it ends with by itself, to be replaced when there is work again
_IDLE_SECONDS = 60.0  # without work, after which it ends
_REMOTE_SECONDS = 180.0  # for an image that is not on a disk; `sources` gives up before
_HELD_BYTES = 2**28  # of files that are read and not decoded yet, where many are read at once
_SEND_SECONDS = 0.02  # between outcomes, where images take long
_M_ARENA_MAX = -8  # of glibc's malloc.h


@dataclass(slots=True)
class Times:
    """How long images took, in seconds.

    Attributes:
        read: From asking for their bytes to having them, summed over images.
        reads: Of each image that was had, where many are read at once.
        waited: That the process had to wait for bytes.
        decode: To hash and decode.
        decode_cpu: Of that, what it took of a core.
        told: When it was told, by the monotonic clock, which all processes share.
    """

    read: float = 0.0
    reads: list[float] = field(default_factory=list)
    waited: float = 0.0
    decode: float = 0.0
    decode_cpu: float = 0.0
    told: float = 0.0


class _OtherEndGone(Exception):  # noqa: N818 - nothing is wrong
    """The process that started this one has closed the link."""


class _Place(NamedTuple):
    """Where pixels go, and how they are made."""

    pixels: Pixels
    batches: SharedBatches
    seconds: float
    allow_private: bool
    readers: ThreadPoolExecutor


class _Task(NamedTuple):
    """An image to load, and the slots of its views."""

    place: _Place
    path: bytes
    max_pixels: int
    slots: list[int]


class DecoderProcess:
    """What a decoder process does from its first message to its last."""

    def __init__(self, link: Connection, current: Any) -> None:
        """Begin with no work.

        Args:
            link: To the process that started this one.
            current: int64 (2,), shared with it: the first slot of the image in work, plus 1, or 0
                where none is; and the number of its stage in `STAGES`.
        """
        self._link, self._current = link, current
        self._places: dict[int, _Place] = {}
        self._inline: deque[_Task] = deque()
        self._in_threads: dict[int, tuple[_Task, float]] = {}  # by number; since when it is read
        self._numbers = itertools.count()  # of images, as slots come again
        self._read: queue.SimpleQueue[tuple[int, EncodedImage, Claim]] = queue.SimpleQueue()
        self._budget = ByteBudget(_HELD_BYTES)
        self._is_limited = False
        self._at_once = 1  # outcomes that are sent together
        self._outcomes: list[list[Any]] = []
        self._times = Times()

    def serve(self) -> None:
        """Work until the other process is gone, or has had no work for a minute."""
        self._send("ready")
        while True:
            is_busy = bool(self._inline or self._in_threads)
            message = self._receive(0 if is_busy else _IDLE_SECONDS)
            if message is not None:
                self._obey(*message)
            elif not is_busy or not self._work():
                return

    def _send(self, *message: Any) -> None:
        content = msgpack.packb(message, unicode_errors="surrogatepass")
        try:
            self._link.send_bytes(content)
        except OSError:
            raise _OtherEndGone from None

    def _receive(self, seconds: float) -> list[Any] | None:
        try:
            if not self._link.poll(seconds):
                return None
            message: list[Any] = msgpack.unpackb(self._link.recv_bytes())
            return message
        except (EOFError, OSError):
            raise _OtherEndGone from None

    def _obey(self, what: str, key: int, *arguments: Any) -> None:
        if what == "open":
            pixels, num_batches, batch_size, seconds, num_readers, allow_private = arguments
            image_size, *others = pixels
            settings = Pixels(tuple(image_size), *others)
            shape = (batch_size, *settings.image_size, 3)
            batches = SharedBatches(num_batches, shape, _receive_file(self._link))
            readers = ThreadPoolExecutor(num_readers, "read")
            self._places[key] = _Place(settings, batches, seconds, allow_private, readers)
            self._is_limited = _limit_memory()
        elif what == "close":
            del self._places[key]
        else:
            in_threads, is_alone, max_pixels, paths, slots = arguments
            place = self._places[key]
            views = place.pixels.views
            self._at_once = len(paths)
            for first, path in zip(range(0, len(slots), views), paths, strict=True):
                task = _Task(place, path, max_pixels, slots[first : first + views])
                if not is_alone and (in_threads or not is_local(path)):
                    number = next(self._numbers)
                    self._in_threads[number] = task, math.inf
                    place.readers.submit(self._read_in_thread, number, task)
                else:
                    self._inline.append(task)

    def _read_in_thread(self, number: int, task: _Task) -> None:
        claim = self._budget.claim()

        def need(num_bytes: int) -> None:
            self._in_threads[number] = task, math.inf  # to wait for memory is not to hang
            claim.need(num_bytes)
            self._in_threads[number] = task, time.monotonic()

        self._in_threads[number] = task, time.monotonic()
        try:
            image = read_image(task.path, allow_private=task.place.allow_private, claim=need)
        except BaseException as error:  # noqa: BLE001 - of a library, and else nobody would hear
            failure = Failure("read", f"{type(error).__name__}: {error}", is_passing=True)
            image = EncodedImage(failure, 0.0)
        self._read.put((number, image, claim))

    def _work(self) -> bool:
        """Load images until it is time to tell; false where this process is of no more use."""
        until = time.monotonic() + _SEND_SECONDS
        is_of_use = True
        while len(self._outcomes) < self._at_once and time.monotonic() < until:
            if self._inline:
                self._load(self._inline.popleft())
            elif self._in_threads:
                is_of_use = self._load_next_read(until)
            if not is_of_use or not (self._inline or self._in_threads):
                break
        if self._outcomes:
            self._times.told = time.monotonic()
            self._send("loaded", self._outcomes, astuple(self._times))
            self._outcomes, self._times = [], Times()
        return is_of_use

    def _load(self, task: _Task) -> None:
        """Read and decode an image, with nothing beside it."""
        self._begin(task, STAGES.index("read"))
        image = read_image(task.path, allow_private=task.place.allow_private)
        self._times.waited += image.seconds
        self._decode(task, image)

    def _load_next_read(self, until: float) -> bool:
        """Decode the next image that is read; false where one never will be."""
        begin = time.monotonic()
        try:
            number, image, claim = self._read.get(timeout=max(0.0, until - begin))
        except queue.Empty:
            return self._are_reads_in_time()
        finally:
            self._times.waited += time.monotonic() - begin
        task, _ = self._in_threads.pop(number)
        if not isinstance(image.content, Failure):
            self._times.reads.append(image.seconds)
        self._decode(task, image)
        claim.release()
        return True

    def _are_reads_in_time(self) -> bool:
        """Tell of images that take too long to read: the threads that read them are lost."""
        now, is_lost = time.monotonic(), False
        for number, (task, since) in list(self._in_threads.items()):
            seconds = _seconds_to_read(task)
            if now - since > seconds:
                is_lost = True
                del self._in_threads[number]
                failure = Failure("read", too_long(seconds), is_passing=True)
                self._outcomes.append([task.slots[0], None, None, *failure])
        return not is_lost

    def _begin(self, task: _Task, stage: int) -> None:
        """Note what is in work; the system ends this process if that takes too long."""
        seconds = task.place.seconds if stage else _seconds_to_read(task)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        self._current[:] = task.slots[0] + 1, stage

    def _decode(self, task: _Task, image: EncodedImage) -> None:
        self._times.read += image.seconds
        self._begin(task, STAGES.index("decode"))
        try:
            loaded = decode_image(image, task.place.pixels, task.max_pixels)
        except LargeImage as error:
            self._outcomes.append([task.slots[0], error.num_pixels])
        else:
            self._times.decode += loaded.decode_seconds
            self._times.decode_cpu += loaded.decode_cpu_seconds
            self._outcomes.append(self._outcome_of(task, loaded))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._current[0] = 0

    def _outcome_of(self, task: _Task, image: LoadedImage) -> list[Any]:
        """Put an image into its slots, and say what is known of it."""
        outcome = image.outcome
        about = [task.slots[0], image.num_bytes, image.sha256]
        if isinstance(outcome, Failure):
            if outcome.stage == "decode" and outcome.is_passing:  # there was not enough memory
                if self._in_threads:  # but files of others that are in memory too
                    return [task.slots[0], MAX_ORDINARY_PIXELS]
                if self._is_limited:
                    outcome = Failure("decode", f"needed more than {MAX_GIB} GiB")
            return [*about, *outcome]
        for slot, pixels in zip(task.slots, (outcome.pixels, *outcome.augmented), strict=True):
            task.place.batches.slot(slot)[...] = pixels
        return [*about, outcome.width, outcome.height, outcome.format]


def _seconds_to_read(task: _Task) -> float:
    return task.place.seconds if is_local(task.path) else _REMOTE_SECONDS


def whole_paths(paths: Sequence[bytes]) -> list[bytes]:
    """Refs' paths, whatever folder the process that reads them is in."""
    if all(path.startswith(b"/") or scheme_of(path) is not None for path in paths):
        return list(paths)
    here = os.getcwdb()  # noqa: PTH109 - as bytes
    return [path if scheme_of(path) is not None else os.path.join(here, path) for path in paths]


def too_long(seconds: float) -> str:
    """Why an image that takes too long is a failure."""
    return f"took longer than {seconds:g} s"


def _receive_file(link: Connection) -> int:
    with socket.socket(fileno=os.dup(link.fileno())) as channel:
        _, (file, *_), _, _ = socket.recv_fds(channel, 1, 1)
    return file


def _limit_memory() -> bool:
    """Let this process take so much address space beside what it has now; false if it cannot be."""
    with contextlib.suppress(OSError, ValueError):  # not Linux
        with open("/proc/self/statm") as file:
            num_bytes = int(file.read().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes + MAX_GIB * 2**30, most))
        return True
    return False


def _end_with(life: int) -> None:
    """Have the system end this process, even if it is stuck, when the other end of a pipe goes."""
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, fcntl.F_SETFL, os.O_ASYNC)  # sends SIGIO, which nothing here catches


def main() -> None:
    """Serve the process whose socket is given, until it ends."""
    link, current, life = Connection(int(sys.argv[1])), *map(int, sys.argv[2:])
    _end_with(life)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # Of each thread: by default 8 MiB of address space, and 64 MiB for what it allocates.
    threading.stack_size(2**20)
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)
    prepare_decoders()
    gc.freeze()
    with contextlib.suppress(_OtherEndGone):
        DecoderProcess(link, shared_numbers(2, current)[0]).serve()
    os._exit(REST_STATUS)  # a thread that reads may never end


def start_code(path: list[str]) -> str:
    """Python code that runs `main`, with the import path of the process that starts it."""
    known = json.dumps([place for place in path if isinstance(place, str)])
    return f"import sys; sys.path[:] = {known}; from {__name__} import main; main()"
