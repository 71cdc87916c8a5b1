"""How many pixels of large images the threads of a process may have in work at once."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class PixelBudget:
    """So many pixels of large images may be in work at once, whatever the number of threads.

    The first that waits is the next: smaller ones do not overtake it, or it might wait for ever.
    """

    def __init__(self, num_pixels: int, num_ordinary: int) -> None:
        """Nothing is in work yet.

        Args:
            num_pixels: Of all large images in work. An image of more takes them all.
            num_ordinary: An image of so many pixels or fewer is not large, and never waits.
        """
        self.num_pixels, self.num_ordinary = num_pixels, num_ordinary
        self.num_free = num_pixels
        self.turn = threading.Lock()  # of the one that waits; others wait for it
        self._freed = threading.Condition()

    @contextmanager
    def taken(self, num_pixels: int) -> Iterator[None]:
        """Wait until an image of so many pixels may be in work, which it is inside the block.

        Its memory must be free at the end of the block: the next image then takes as much.
        """
        if num_pixels <= self.num_ordinary:
            yield
            return
        num_pixels = min(num_pixels, self.num_pixels)
        with self.turn, self._freed:
            self._freed.wait_for(lambda: self.num_free >= num_pixels)
            self.num_free -= num_pixels
        try:
            yield
        finally:
            _return_memory()
            with self._freed:
                self.num_free += num_pixels
                self._freed.notify()


def _return_memory() -> None:
    """Give the system what this process has freed: glibc keeps it, for each thread its own."""
    with suppress(OSError, AttributeError, TypeError):  # another C library, or Windows
        ctypes.CDLL(None).malloc_trim(0)
