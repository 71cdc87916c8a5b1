"""The decoders of a worker, and images on their way through them: from a ref to a slot of a batch.

Each decoder process has a thread here, which hands it images and hears of them; pixels never pass
through it. A process that ends with an image in work was crashed by it, or took too long: another
takes its place, and what it had in hand is done again.
"""

import itertools
import math
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from embedder.decode import MAX_ORDINARY_PIXELS, MAX_PIXELS
from embedder.errors import EngineError
from embedder.extraction import decoder_link
from embedder.extraction.buffers import SharedBatches
from embedder.extraction.decoder_link import DecoderDied, DecoderLink
from embedder.extraction.decoder_process import Times, too_long, whole_paths
from embedder.extraction.record import Work
from embedder.files import os_errors_as
from embedder.pixels import Pixels
from embedder.sources import is_local
from embedder.store import Failure

_AHEAD_SECONDS = 0.04  # of work that a decoder has in hand
_MAX_AHEAD = 64  # images that a decoder has in hand
_MAX_AHEAD_BYTES = 2**28  # of pixels, for what all decoders have in hand
_SLOW_READ_SECONDS = 0.001  # an image, from which on many files are read at once
_LOOK_SECONDS = 0.5  # without an image, after which whoever waits for one may look around
_MAX_IDLE_DEATHS = 5  # of processes that had no image in work, one after the other
_SHARDS_IN_HAND = 2  # of a worker process


@dataclass(frozen=True)
class Feeding:
    """How images are read and decoded; see `RunOptions`."""

    decoders: int | None = None
    decode_timeout: float = 60.0
    read_ahead: int = 64
    allow_private: bool = False


DEFAULT_FEEDING: Feeding = Feeding()


@dataclass(slots=True)
class Task:
    """An image on its way.

    Attributes:
        feed: That it is of.
        position: Of its ref among the feed's.
        path: Where it is.
        slots: One for each of its views, in their order.
        num_pixels: Of an image that waits until there is memory for it; else 0.
        is_suspect: Whether a decoder died with it, so that it is done again.
    """

    feed: "Feed"
    position: int
    path: bytes
    slots: list[int]
    num_pixels: int = 0
    is_suspect: bool = False

    @property
    def is_alone(self) -> bool:
        """Whether a decoder has nothing else in hand beside it."""
        return self.is_suspect or self.num_pixels > 0


@dataclass(slots=True)
class Outcome:
    """What became of an image: a failure, or what is known of it and where its pixels are.

    Attributes:
        position: Of its ref among the feed's.
        slots: Of its views; free again where it failed.
        num_bytes: Of its file; None if it was not read.
        sha256: Of its file; None if it was not read.
        found: (width, height, format), or why there are no pixels.
    """

    position: int
    slots: list[int]
    num_bytes: int | None
    sha256: str | None
    found: tuple[int, int, str] | Failure


class DecoderPool:
    """Decoder processes, and a fixed number of batches which they fill.

    Attributes:
        shared: The batches.
        batch_size: Images in each of them.
        num_decoders: Processes.
    """

    def __init__(
        self, pixels: Pixels, batch_size: int, num_batches: int, num_decoders: int, feeding: Feeding
    ) -> None:
        """Make the batches. Decoders are at work while there are feeds.

        Args:
            pixels: What images are decoded to.
            batch_size: Images in a batch.
            num_batches: That whoever takes them may have in hand.
            num_decoders: Processes.
            feeding: How they read and decode.

        Raises:
            EngineError: There is no memory for the batches.
        """
        self.pixels, self.batch_size = pixels, batch_size
        self.num_decoders, self.feeding = num_decoders, feeding
        height, width = pixels.image_size
        self._num_readers = math.ceil(feeding.read_ahead / num_decoders)
        ahead = _MAX_AHEAD_BYTES // (num_decoders * pixels.views * height * width * 3)
        self._max_ahead = max(2, min(max(_MAX_AHEAD, 2 * self._num_readers), ahead))
        num_slots = num_decoders * self._max_ahead * pixels.views
        num_batches += _SHARDS_IN_HAND + math.ceil(num_slots / batch_size)
        with os_errors_as(EngineError, "There is no memory for pixels"):
            self.shared = SharedBatches(num_batches, (batch_size, height, width, 3))
        self._key = next(_keys)
        # All that follows is for who holds the lock of `_changed`.
        self._changed = threading.Condition()
        self._free = list(range(num_batches))  # the last one is the next: its memory is there
        self._num_handed_over = 0
        self._is_full = False
        self._feeds: list[Feed] = []
        self._num_serving = 0
        self._num_pixels_free = MAX_PIXELS  # of large images
        self._num_idle_deaths = 0

    @property
    def num_free(self) -> int:
        """Batches that nobody has in hand."""
        return len(self._free)

    def feed(self, paths: Sequence[bytes], loading: Work) -> "Feed":
        """Begin to read and decode images; a second feed begins when the first has no more.

        Args:
            paths: Where they are.
            loading: Counts what is read and decoded.

        Returns:
            What tells of them; close it.
        """
        feed = Feed(self, paths, loading)
        with self._changed:
            for _ in range(self.num_decoders - self._num_serving):
                threading.Thread(target=self._serve, name="decoder", daemon=True).start()
                self._num_serving += 1
            self._feeds.append(feed)
            self._changed.notify_all()
        return feed

    def release(self, batch: int) -> None:
        """Take a batch back that a feed handed over."""
        with self._changed:
            self._free.append(batch)
            self._num_handed_over -= 1
            if self._may_open():
                self._changed.notify_all()

    def _may_open(self) -> bool:
        """Whether batches may be opened: once there were none, when half of them are free again.

        Decoders then work in bursts. To wake for each batch would take the cores from the network
        again and again, and what it has in their caches.
        """
        if not self._free:
            self._is_full = True
        elif len(self._free) >= len(self.shared.batches) // 2 or not self._num_handed_over:
            self._is_full = False
        return not self._is_full

    # What the thread of a decoder does. ----------------------------------------------------------

    def _serve(self) -> None:
        link: DecoderLink | None = None
        in_hand: dict[int, Task] = {}  # by first slot
        pace = _Pace(self._max_ahead, self._num_readers)
        try:
            while True:
                try:
                    link = link or decoder_link.take_idle()
                    link.wait_until_ready()
                    tasks = self._next_tasks(in_hand, pace)
                    if tasks is None:
                        break
                    in_hand |= {task.slots[0]: task for task in tasks}
                    self._hand_over(link, tasks, pace)
                    outcomes, times = link.receive()
                    pace.hear(len(outcomes), times)
                    self._hear(in_hand, outcomes, times)
                except DecoderDied as death:
                    link = None
                    self._bury(in_hand, death)
            link.close(self._key)
            decoder_link.give_back(link)
        except Exception as error:  # noqa: BLE001 - whoever waits raises it
            with self._changed:
                self._num_serving -= 1
                self._take_back(in_hand)
                for feed in self._feeds:
                    feed.heard.put(error)
            if link is not None:
                link.end()

    def _next_tasks(self, in_hand: dict[int, Task], pace: "_Pace") -> list[Task] | None:
        """Wait for work, unless there is some in hand; None where there will be no more."""
        with self._changed:
            while True:
                tasks = self._take(in_hand, pace)
                if tasks or in_hand:
                    return tasks
                if not self._feeds:
                    self._num_serving -= 1
                    return None
                starved = next((feed for feed in self._feeds if feed.num_waiting), None)
                begin = time.perf_counter()
                self._changed.wait()
                if starved is not None:
                    starved.wait_for_room(time.perf_counter() - begin)

    def _take(self, in_hand: dict[int, Task], pace: "_Pace") -> list[Task]:
        if any(task.is_alone for task in in_hand.values()):
            return []
        for feed in self._feeds:
            if (alone := feed.first_alone(self._num_pixels_free)) is not None:
                if in_hand:
                    return []
                self._num_pixels_free -= alone[0].num_pixels
                return feed.give([alone.popleft()])
            pace.is_remote = feed.is_remote
            # Towards the end less, so that all decoders have work until then.
            share = math.ceil(feed.num_waiting / self.num_decoders)
            free = self._free if self._may_open() else []
            if tasks := feed.take(min(pace.room(len(in_hand)), share), free):
                return tasks
        return []

    def _hand_over(self, link: DecoderLink, tasks: list[Task], pace: "_Pace") -> None:
        if not tasks:
            return
        link.open(
            *(self._key, self.shared.file, self.pixels, len(self.shared.batches), self.batch_size),
            *(self.feeding.decode_timeout, self._num_readers, self.feeding.allow_private),
        )
        is_alone = tasks[0].is_alone
        max_pixels = MAX_PIXELS if tasks[0].num_pixels else MAX_ORDINARY_PIXELS
        paths, slots = [task.path for task in tasks], [n for task in tasks for n in task.slots]
        link.load(self._key, pace.is_slow, is_alone, max_pixels, paths, slots)

    def _hear(self, in_hand: dict[int, Task], outcomes: list[Any], times: Times) -> None:
        """Pass on what a decoder has done."""
        with self._changed:
            self._num_idle_deaths = 0
            by_feed: dict[Feed, list[Outcome]] = {}
            for slot, *known in outcomes:
                task = in_hand.pop(slot)
                self._num_pixels_free += task.num_pixels
                of_feed = by_feed.setdefault(task.feed, [])
                if len(known) == 1:  # too large to be decoded beside others
                    task.num_pixels = min(known[0], MAX_PIXELS)
                    task.feed.take_back(task)
                    continue
                num_bytes, sha256, *found = known
                found = tuple(found) if isinstance(found[0], int) else Failure(*found)
                of_feed.append(Outcome(task.position, task.slots, num_bytes, sha256, found))
            for feed, of_feed in by_feed.items():
                feed.tell(of_feed, times)
                times = Times(told=times.told)  # they are counted once
            self._changed.notify_all()

    def _bury(self, in_hand: dict[int, Task], death: DecoderDied) -> None:
        """Have done again what a decoder had in hand, but for what it died of."""
        with self._changed:
            culprit = None if death.slot is None else in_hand.pop(death.slot, None)
            if culprit is not None:
                self._num_pixels_free += culprit.num_pixels
                self._judge(culprit, death)
            elif not death.is_rest:
                self._num_idle_deaths += len(in_hand) <= 1
                if self._num_idle_deaths > _MAX_IDLE_DEATHS:
                    raise EngineError(
                        f"Decoder processes die without an image in work: {death.reason}"
                    )
                for task in in_hand.values():  # it died in one of many threads that read
                    task.is_suspect = True
            self._take_back(in_hand)
            self._changed.notify_all()

    def _take_back(self, in_hand: dict[int, Task]) -> None:
        for task in in_hand.values():
            self._num_pixels_free += task.num_pixels
            task.feed.take_back(task)
        in_hand.clear()

    def _judge(self, task: Task, death: DecoderDied) -> None:
        """Make an image that its decoder died with a failure, or have it done again alone."""
        is_late = death.signal == signal.SIGALRM
        if not is_late and not task.is_suspect:
            task.is_suspect = True
            task.feed.take_back(task)
            return
        reason = too_long(self.feeding.decode_timeout) if is_late else death.reason
        # Others may have killed it: the system where memory is short, or somebody by hand.
        is_passing = death.stage == "read" or death.signal in (signal.SIGKILL, signal.SIGTERM)
        failure = Failure(death.stage, reason, is_passing)
        outcome = Outcome(task.position, task.slots, None, None, failure)
        task.feed.tell([outcome], Times(told=time.monotonic()))


class Feed:
    """Images of a shard on their way through the decoders of a pool.

    Attributes:
        heard: What became of images; or what ends them all.
        is_remote: Whether they are to be had from somewhere else, as far as the first one tells.
    """

    def __init__(self, pool: DecoderPool, paths: Sequence[bytes], loading: Work) -> None:
        """Begin with all images to be done.

        Args:
            pool: Whose decoders.
            paths: Where the images are.
            loading: Counts what is read and decoded.
        """
        self.heard: queue.SimpleQueue[tuple[list[Outcome], float] | Exception] = queue.SimpleQueue()
        self.is_remote = not all(map(is_local, paths[:1]))
        self._pool, self._loading = pool, loading
        # A decoder may have been started in another folder.
        self._todo = deque(enumerate(whole_paths(paths)))
        self._num_left = len(paths)
        self._again: deque[Task] = deque()  # were in the hands of a decoder that died
        self._suspects: deque[Task] = deque()  # it may have died of
        self._large: deque[Task] = deque()  # wait until there is memory for them
        self._slots: deque[int] = deque()  # free ones of the open batches
        self._open: set[int] = set()
        self._num_out = 0  # images in decoders' hands
        self._is_closed = False

    def outcomes(self) -> Iterator[list[Outcome]]:
        """What became of the images, as it comes; and now and then nothing, after half a second.

        Raises:
            EngineError: There are no decoders.
        """
        last = -math.inf
        while self._num_left:
            try:
                found = self.heard.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                yield []
                continue
            if isinstance(found, Exception):
                raise found
            outcomes, told = found
            self._num_left -= len(outcomes)
            yield outcomes
            now = time.monotonic()
            self._loading.python_seconds += now - max(told, last)
            last = now

    def reuse(self, slots: Sequence[int]) -> None:
        """Give the slots of an image that failed to the next one."""
        with self._pool._changed:
            self._slots.extendleft(reversed(slots))
            self._pool._changed.notify_all()

    def hand_over(self, batch: int) -> None:
        """Take a batch out of the feed's hands: `DecoderPool.release` takes it back."""
        with self._pool._changed:
            self._open.remove(batch)
            self._pool._num_handed_over += 1

    def close(self) -> None:
        """End, or give up; batches are free as soon as no decoder writes into them."""
        with self._pool._changed:
            self._is_closed = True
            self._pool._feeds.remove(self)
            self._settle()
            self._pool._changed.notify_all()

    # For the pool, which holds the lock. ---------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Images that decoders can be given."""
        return len(self._todo) + len(self._again)

    def first_alone(self, num_pixels: int) -> deque[Task] | None:
        """Images of which the first is to be done alone, where memory is free for its pixels."""
        for waiting in self._suspects, self._large:
            if waiting and waiting[0].num_pixels <= num_pixels:
                return waiting
        return None

    def take(self, num_images: int, free: list[int]) -> list[Task]:
        """Images for a decoder, with slots: fewer, or none, where no batch is free."""
        tasks: list[Task] = []
        num_views, size = self._pool.pixels.views, self._pool.batch_size
        while self._again and len(tasks) < num_images:
            tasks.append(self._again.popleft())
        while self._todo and len(tasks) < num_images:
            while len(self._slots) < num_views and free:
                batch = free.pop()
                self._open.add(batch)
                self._slots.extend(range(batch * size, (batch + 1) * size))
            if len(self._slots) < num_views:
                break
            position, path = self._todo.popleft()
            slots = [self._slots.popleft() for _ in range(num_views)]
            tasks.append(Task(self, position, path, slots))
        return self.give(tasks)

    def give(self, tasks: list[Task]) -> list[Task]:
        """Count what goes to a decoder."""
        if tasks and math.isinf(self._loading.first_read):
            self._loading.first_read = time.time()
        self._num_out += len(tasks)
        return tasks

    def wait_for_room(self, seconds: float) -> None:
        """Count what a decoder waited, since no batch was free."""
        self._loading.waits["room"] += seconds

    def take_back(self, task: Task) -> None:
        """Have an image done again."""
        large_or_not = self._large if task.num_pixels else self._again
        (self._suspects if task.is_suspect else large_or_not).append(task)
        self._num_out -= 1
        self._settle()

    def tell(self, outcomes: list[Outcome], times: Times) -> None:
        """Pass on what became of images, and how long they took."""
        loading = self._loading
        loading.seconds["read"] += times.read
        loading.reads += times.reads
        loading.waits["read"] += times.waited
        loading.seconds["decode"] += times.decode
        loading.decode_cpu_seconds += times.decode_cpu
        loading.num_bytes_read += sum(outcome.num_bytes or 0 for outcome in outcomes)
        self._num_out -= len(outcomes)
        self.heard.put((outcomes, times.told))
        self._settle()

    def _settle(self) -> None:
        if self._is_closed and not self._num_out:
            self._pool._free += self._open
            self._open.clear()


class _Pace:
    """How many images a decoder has in hand: as many as it loads in a short while.

    Attributes:
        is_remote: Whether images are to be had from somewhere else.
    """

    def __init__(self, max_ahead: int, num_readers: int) -> None:
        self.is_remote = False
        self._reads_slowly = False
        self._max_ahead, self._num_readers = max_ahead, num_readers
        self._seconds = _AHEAD_SECONDS / 4  # an image; of the first nothing is known

    def hear(self, num_images: int, times: Times) -> None:
        """Learn from what a decoder has done."""
        if num_images:
            self._seconds = (self._seconds + (times.waited + times.decode) / num_images) / 2
            self._reads_slowly = times.read / num_images > _SLOW_READ_SECONDS

    @property
    def is_slow(self) -> bool:
        """Whether images come slowly enough for many to be read at once."""
        return self.is_remote or self._reads_slowly

    def room(self, num_in_hand: int) -> int:
        """How many more it takes: none, unless they are worth a message."""
        ahead = _AHEAD_SECONDS / max(self._seconds, 1e-6)
        if self.is_slow:
            ahead = max(ahead, 2 * self._num_readers)
        ahead = max(2, min(int(ahead), self._max_ahead))
        room = ahead - num_in_hand
        return room if 2 * room >= ahead else 0


_keys = itertools.count()
