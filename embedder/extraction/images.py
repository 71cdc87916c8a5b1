"""One image, read and decoded; light, as the decoder processes load no more than this."""

import hashlib
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from embedder.decode import MAX_PIXELS, DecodedImage, LargeImage, decode_rgb
from embedder.errors import DecodeError, ReadError
from embedder.sources import read_bytes
from embedder.store import Failure

if TYPE_CHECKING:  # which would load pydantic
    from embedder.pixels import Pixels
    from embedder.recipe import Recipe


class EncodedImage(NamedTuple):
    """The bytes of an image, or the failure that came instead; and how long that took."""

    content: bytes | Failure
    seconds: float


class LoadedImage(NamedTuple):
    """An image after reading and decoding, or the failure that came instead."""

    num_bytes: int | None
    sha256: str | None
    outcome: DecodedImage | Failure
    read_seconds: float
    decode_seconds: float
    decode_cpu_seconds: float


def load_image(path: bytes, recipe: "Recipe | Pixels") -> LoadedImage:
    """Read and decode one image; what goes wrong is its outcome."""
    return decode_image(read_image(path), recipe)


def read_image(path: bytes, **options: Any) -> EncodedImage:
    """Read one image; what goes wrong is its content.

    Args:
        path: That of its ref.
        **options: As `sources.read_bytes` takes them.
    """
    begin = time.perf_counter()
    try:
        content: bytes | Failure = read_bytes(path, **options)
    except ReadError as error:
        content = Failure("read", str(error), error.is_passing)
    return EncodedImage(content, time.perf_counter() - begin)


def decode_image(
    image: EncodedImage, recipe: "Recipe | Pixels", max_pixels: int = MAX_PIXELS
) -> LoadedImage:
    """Decode one image that was read; what goes wrong is its outcome.

    Args:
        image: What was read.
        recipe: What it is decoded to.
        max_pixels: As in `decode_rgb`.

    Raises:
        LargeImage: It has more pixels than that.
    """
    encoded = image.content
    if isinstance(encoded, Failure):
        return LoadedImage(None, None, encoded, image.seconds, 0.0, 0.0)
    begin, cpu = time.perf_counter(), time.thread_time()
    sha256 = hashlib.sha256(encoded).hexdigest()
    outcome: DecodedImage | Failure
    try:
        outcome = decode_rgb(encoded, recipe, max_pixels)
    except LargeImage:
        raise
    except DecodeError as error:
        outcome = Failure("decode", str(error), error.is_passing)
    end, cpu = time.perf_counter(), time.thread_time() - cpu
    return LoadedImage(len(encoded), sha256, outcome, image.seconds, end - begin, cpu)
