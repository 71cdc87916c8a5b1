"""Batches of pixels in memory that processes share."""

import mmap
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray


class SharedBatches:
    """A fixed number of batches of pixels, in a file without a name.

    The system takes it back with the last process that holds it, however that one ends.

    Attributes:
        file: Descriptor of the file; another process makes the same object of it.
        batches: uint8 (batch_size, height, width, 3) each, each on pages of its own.
    """

    def __init__(self, num_batches: int, shape: Sequence[int], file: int | None = None) -> None:
        """Make them, or find those of another process.

        Args:
            num_batches: How many.
            shape: Of each: (batch_size, height, width, 3).
            file: Descriptor of what another process made, which is this object's from now on.
        """
        num_bytes = int(np.prod(shape))
        stride = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if file is None:
            file = nameless_file()
            os.ftruncate(file, num_batches * stride)  # pages are there once they are written
        self.file = file
        memory = mmap.mmap(file, num_batches * stride)
        self.batches: list[NDArray[np.uint8]] = [
            np.ndarray(shape, np.uint8, memory, number * stride) for number in range(num_batches)
        ]

    def slot(self, number: int) -> NDArray[np.uint8]:
        """Room for one image, (height, width, 3); slots are numbered through all batches."""
        batch, place = divmod(number, len(self.batches[0]))
        slot: NDArray[np.uint8] = self.batches[batch][place]
        return slot

    def __del__(self) -> None:
        """Close the file; the memory goes with the last array of it."""
        with suppress(AttributeError):  # it could not be made
            os.close(self.file)


def shared_numbers(count: int, file: int | None = None) -> tuple[NDArray[np.int64], int]:
    """A few numbers that processes share: int64 (count,), and the descriptor of their file."""
    if file is None:
        file = nameless_file()
        os.ftruncate(file, mmap.PAGESIZE)
    return np.ndarray((count,), np.int64, mmap.mmap(file, mmap.PAGESIZE)), file


def nameless_file() -> int:
    """Descriptor of a new file that has no name, in memory; on the disk where there is no Linux."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("embedder", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # not Linux
        return os.dup(file.fileno())
