"""Small JPEG files of images, for pages to hold."""

import base64
import io
from collections.abc import Callable

from PIL import Image

from embedder.decode import decode_rgb
from embedder.errors import EmbedderError
from embedder.libraries import logger
from embedder.recipe import Recipe
from embedder.sources import Listing, list_images, read_bytes

MISTAKE_SIDE = 192  # pixels: enough to see what was mistaken for what; some 10 kB each
MAP_SIDE = 64  # pixels: some 2 kB each, of which there may be thousands
_JPEG_QUALITY = 80


def thumbnail_of(encoded: bytes, side: int) -> bytes:
    """Make a small JPEG file of an image file, within `side` x `side` pixels.

    Raises:
        DecodeError: As `decode.decode_rgb`.
    """
    recipe = Recipe(backbone="none", weights="random:0", image_size=(side, side), crop="pad")
    image = decode_rgb(encoded, recipe)
    scale = side / max(image.height, image.width)
    height, width = max(1, round(image.height * scale)), max(1, round(image.width * scale))
    top, left = (side - height) // 2, (side - width) // 2  # within it, all is padding
    jpeg = io.BytesIO()
    Image.fromarray(image.pixels[top : top + height, left : left + width]).save(
        jpeg, "JPEG", quality=_JPEG_QUALITY
    )
    return jpeg.getvalue()


def thumbnails_of(source: str | Listing | None) -> Callable[[str, int], bytes | None]:
    """From an image's id and a side in pixels to a JPEG file, or None where it cannot be had.

    Args:
        source: Where the images are, or their listing; without it, or where it is no longer
            there, none can be had.
    """
    try:
        listing = list_images(source) if source and isinstance(source, str) else source
        paths = listing.paths() if isinstance(listing, Listing) else {}
    except EmbedderError as error:
        logger.warning("The report has no pictures: %s. Name the images with --source", error)
        paths = {}

    def thumbnail(image_id: str, side: int) -> bytes | None:
        if image_id not in paths:
            return None
        try:
            return thumbnail_of(read_bytes(paths[image_id]), side)
        except EmbedderError:
            return None

    return thumbnail


class Thumbnails:
    """Thumbnails as `data:` addresses, and how many could not be had."""

    def __init__(self, thumbnail: Callable[[str, int], bytes | None]) -> None:
        """Take them from a function such as those of `thumbnails_of`."""
        self._thumbnail = thumbnail
        self.num_asked = self.num_missing = 0

    def get(self, image_id: str, side: int) -> str | None:
        """The address of an image's thumbnail; None, and counted, where there is none."""
        encoded = self._thumbnail(image_id, side)
        self.num_asked += 1
        if encoded is None:
            self.num_missing += 1
            return None
        return f"data:image/jpeg;base64,{base64.b64encode(encoded).decode()}"
