"""Images of a shard, read and decoded ahead of the network, in the refs' order."""

import hashlib
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import NamedTuple

import pyarrow as pa

from embedder.decode import DecodedImage, decode_rgb
from embedder.errors import DecodeError, ReadError
from embedder.extraction.record import Work
from embedder.extraction.worker import WorkerState
from embedder.recipe import Recipe
from embedder.sources import read_bytes
from embedder.store import Failure

_MIN_LOOKAHEAD = 64  # images read and decoded ahead of the network, per shard


class LoadedImage(NamedTuple):
    """An image after reading and decoding, or the failure that came instead."""

    num_bytes: int | None
    sha256: str | None
    outcome: DecodedImage | Failure
    read_seconds: float
    decode_seconds: float
    decode_cpu_seconds: float


def load_image(path: bytes, recipe: Recipe) -> LoadedImage:
    """Read and decode one image; what goes wrong is its outcome."""
    begin = time.perf_counter()
    try:
        encoded = read_bytes(path)
    except ReadError as error:
        failure = Failure("read", str(error), error.is_passing)
        return LoadedImage(None, None, failure, time.perf_counter() - begin, 0.0, 0.0)
    sha256 = hashlib.sha256(encoded).hexdigest()
    read, cpu = time.perf_counter(), time.thread_time()
    outcome: DecodedImage | Failure
    try:
        outcome = decode_rgb(encoded, recipe)
    except DecodeError as error:
        outcome = Failure("decode", str(error), error.is_passing)
    end, cpu = time.perf_counter(), time.thread_time() - cpu
    return LoadedImage(len(encoded), sha256, outcome, read - begin, end - read, cpu)


def load_images(
    refs: pa.Table, recipe: Recipe, state: WorkerState, loading: Work
) -> Iterator[LoadedImage]:
    """Read and decode images by the worker's threads, ahead of need.

    Args:
        refs: Rows of a listing.
        recipe: What images are decoded to.
        state: Whose threads, and whose batches say how far ahead.
        loading: Counts what was read and decoded.

    Yields:
        Images in the refs' order.
    """
    lookahead = max(_MIN_LOOKAHEAD, 4 * state.engine.batch_size)
    # An image with several views waits with all their pixels; every thread still has one in work.
    lookahead = min(lookahead, max(lookahead // recipe.views, state.num_threads + 1))
    ahead: deque[Future[LoadedImage]] = deque()
    try:
        with state.feeding:
            loading.first_read = time.time()
            for path in refs["path"]:
                ahead.append(state.decoders.submit(load_image, path.as_py(), recipe))
                if len(ahead) == lookahead:
                    yield _take(ahead.popleft(), loading)
        while ahead:
            yield _take(ahead.popleft(), loading)
    finally:
        for future in ahead:
            future.cancel()


def _take(future: Future[LoadedImage], loading: Work) -> LoadedImage:
    loading.num_ready += future.done()
    begin = time.perf_counter()
    image = future.result()
    loading.waits["decode"] += time.perf_counter() - begin
    loading.seconds["read"] += image.read_seconds
    loading.seconds["decode"] += image.decode_seconds
    loading.decode_cpu_seconds += image.decode_cpu_seconds
    loading.num_bytes_read += image.num_bytes or 0
    return image
