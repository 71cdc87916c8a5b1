"""Encoded bytes to uint8 RGB at the recipe's size, or a `DecodeError`."""

import ctypes
import hashlib
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, _imaging
from PIL.JpegImagePlugin import JpegImageFile

from embedder.decode.pixel_budget import PixelBudget
from embedder.decode.resize import augment, fit
from embedder.decode.tone import to_rgb
from embedder.decode.views import Box, draw_augmentation
from embedder.errors import DecodeError

if TYPE_CHECKING:  # which would load pydantic
    from embedder.pixels import Pixels
    from embedder.recipe import Recipe

# Pillow's own error level: half a gigabyte of RGB. No camera photo reaches it; a file of a few
# bytes that declares more is an attack or a mistake.
MAX_PIXELS = 178_956_970

# A JPEG is decoded in time with its scans times its pixels, whatever its bytes: a scan that
# changes nothing takes ten. Photos have 1 scan, progressive ones about 10 and rarely above 20; the
# second number lets the largest image have 24. The first is that of libjpeg-turbo's own fuzzers.
MAX_SCANS = 500
MAX_SCANNED_PIXELS = 2**32

# EPS would be read by running Ghostscript on the file; the others are recognised by Pillow, but
# not decoded.
_REFUSED_FORMATS = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
Image.init()
# Tried in this order; each of the first ones is known by how its files begin.
_COMMON_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
FORMATS = (
    *_COMMON_FORMATS,
    *sorted(set(Image.OPEN) - _REFUSED_FORMATS - set(_COMMON_FORMATS)),
)

# An image takes about 8 bytes a pixel while it is brought to RGB: this is 0.27 GB. Photos of a
# camera of 33 megapixels are not large, so that they do not wait on a machine of 64 cores either.
MAX_ORDINARY_PIXELS = 2**25
_budget = PixelBudget(MAX_PIXELS, MAX_ORDINARY_PIXELS)  # of all threads of this process

# Markers of a JPEG that a segment follows, and the one of its end: 0xFF before 0 is a byte of
# pixels, and before 0xFF a filling; 1 and 0xD0 to 0xD8 stand alone.
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
_NO_FRAME, _PROGRESSIVE = {0xC4, 0xC8, 0xCC}, {0xC2, 0xC6, 0xCA, 0xCE}
_END, _SCAN = 0xD9, 0xDA

# Of 1 MiB each. Without them each image's memory is new to the process, and costs page faults.
_MAX_KEPT_BLOCKS = 64


class DecodedImage(NamedTuple):
    """One image, ready for the network.

    Attributes:
        pixels: uint8 (height, width, 3) at the recipe's `image_size`, RGB order, 0 to 255. Not
            normalised: that is inside the backbone's graph.
        width: Of the original, in pixels, after EXIF rotation.
        height: Of the original, in pixels, after EXIF rotation.
        format: Pillow's name of the file format, such as `JPEG`.
        augmented: The recipe's other views of the image, each as `pixels`.
    """

    pixels: NDArray[np.uint8]
    width: int
    height: int
    format: str
    augmented: tuple[NDArray[np.uint8], ...] = ()


class LargeImage(DecodeError):  # noqa: N818 - nothing is wrong with it
    """It has more pixels than the caller wants decoded now.

    Attributes:
        num_pixels: That decoding it would hold in memory.
    """

    def __init__(self, num_pixels: int) -> None:
        """Say how many."""
        super().__init__(f"has {num_pixels:,} pixels", is_passing=True)
        self.num_pixels = num_pixels


def decode_rgb(
    encoded: bytes, recipe: "Recipe | Pixels", max_pixels: int = MAX_PIXELS
) -> DecodedImage:
    """Decode one image file and bring it to the recipe's size.

    Args:
        encoded: The whole file, in any of `FORMATS`. The first frame of an animation or the first
            page is used; EXIF rotation is applied; transparency is blended on white; samples of
            more than eight bits are stretched from the image's own range to 0..255. Colour
            profiles are not applied.
        recipe: Gives `image_size`, `crop`, `crop_fraction`, `interpolation`, `decode` and `views`.
        max_pixels: How many decoding may hold in memory.

    Raises:
        LargeImage: Decoding it would hold more than `max_pixels`.
        DecodeError: The bytes are truncated, not an image, declare more than `MAX_PIXELS` pixels,
            or are a JPEG of more scans than a photo has; or there is not enough memory, which may
            pass.
    """
    if not encoded:
        raise DecodeError("the file is empty")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            _check_size(image)
            return _decode(image, encoded, recipe, max_pixels)
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError(f"declares more than {MAX_PIXELS:,} pixels") from error
    except MemoryError as error:
        raise DecodeError("not enough memory to decode it", is_passing=True) from error
    except UnidentifiedImageError as error:
        raise DecodeError(f"not a readable image; begins with {encoded[:8]!r}") from error
    # Pillow's plugins raise OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError,
    # struct.error, NotImplementedError and ZeroDivisionError on bad files.
    except Exception as error:
        raise DecodeError(f"{type(error).__name__}: {error}") from error


def _decode(
    image: Image.Image, encoded: bytes, recipe: "Recipe | Pixels", max_pixels: int
) -> DecodedImage:
    """Decode an image whose header alone was read, when the budget of pixels has room for it."""
    num_pixels = image.width * image.height
    num_scans = _count_scans(encoded) if isinstance(image, JpegImageFile) else 1  # MPO is one too
    _check_scans(image, num_scans)
    draft = _draft(image, recipe) if recipe.decode == "scaled" else None
    if num_scans == 1:  # else the coefficients of the whole are kept from scan to scan
        num_pixels = image.width * image.height
    if num_pixels > max_pixels:
        raise LargeImage(num_pixels)
    with _budget.taken(num_pixels), closing(image):
        return _load(image, draft, encoded, recipe)


def _load(
    image: Image.Image,
    draft: tuple[tuple[int, int], Box] | None,
    encoded: bytes,
    recipe: "Recipe | Pixels",
) -> DecodedImage:
    """Decode the pixels and bring them to the recipe's size; `draft` is that of `_draft`."""
    image_format = image.format or "unknown"
    # In place: a copy of a whole photo would cost time and memory.
    ImageOps.exif_transpose(image, in_place=True)
    image.load()
    upright = image if image.im.size == image.size else image.copy()  # IPTC's loader
    _check_size(upright)
    size, box = draft or (upright.size, (0, 0, *upright.size))
    rgb = to_rgb(upright)
    pixels = np.asarray(fit(rgb, box, recipe))
    augmented = tuple(_augmented(rgb, box, encoded, recipe)) if recipe.views > 1 else ()
    return DecodedImage(pixels, *size, image_format, augmented)


def prepare_decoders() -> None:
    """Set up Pillow, for the whole process, to decode many images.

    Pillow and libtiff no longer warn about images that they can read all the same (libtiff would
    write straight to standard error); images that cannot be read still raise. Memory of decoded
    images is kept for the next ones, up to 64 MiB.
    """
    _imaging.set_block_size(2**20)
    _imaging.set_blocks_max(_MAX_KEPT_BLOCKS)
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        libtiff = ctypes.CDLL(_imaging.__file__)
        libtiff.TIFFSetWarningHandler(None)
        libtiff.TIFFSetErrorHandler(None)
    except (OSError, AttributeError):
        pass  # a Pillow built without libtiff, or with one that hides its names


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise DecodeError(
            f"declares more than {MAX_PIXELS:,} pixels: {image.width} x {image.height}"
        )


def _count_scans(encoded: bytes) -> int:
    """Scans that libjpeg would decode of a JPEG: 1 if the first one holds the whole image.

    What is inside other segments, such as a preview in the EXIF, and behind the end is not counted.
    """
    position = num_scans = 0
    is_progressive, num_components = False, b""
    while marker := _MARKER.search(encoded, position):
        position = marker.end()
        code, content = encoded[position - 1], encoded[position + 2 : position + 10]
        if code == _END:
            break
        if code == _SCAN:
            num_scans += 1
            if not is_progressive and content[:1] >= num_components:
                break
        elif code <= 0xCF and code not in _NO_FRAME:
            is_progressive, num_components = code in _PROGRESSIVE, content[5:6]
        position += int.from_bytes(encoded[position : position + 2], "big")
    return num_scans


def _check_scans(image: Image.Image, num_scans: int) -> None:
    limit = min(MAX_SCANS, MAX_SCANNED_PIXELS // (image.width * image.height))
    if num_scans > limit:
        raise DecodeError(
            f"has {num_scans:,} scans; a JPEG of {image.width} x {image.height} pixels may have "
            f"up to {limit}"
        )


def _draft(image: Image.Image, recipe: "Recipe | Pixels") -> tuple[tuple[int, int], Box] | None:
    """Have a large JPEG decoded at 1/2, 1/4 or 1/8 of its size, yet twice the recipe's or more.

    Returns:
        (width, height) of the original, and the box that it takes in what will be decoded, both
        after EXIF rotation. None if the image is decoded at its own size.
    """
    if not isinstance(image, JpegImageFile):  # MPO is one too
        return None
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    sideways = orientation in (5, 6, 7, 8)
    width, height = original = image.size[::-1] if sideways else image.size
    share = recipe.crop_fraction if recipe.crop == "center" else 1.0
    ratio = min(height * share / recipe.image_size[0], width * share / recipe.image_size[1])
    # Pillow takes the largest of 8, 4 and 2 that is not above this.
    divisor = int(ratio / 2)
    if divisor < 2:
        return None
    drafted = image.draft(None, (image.width // divisor, image.height // divisor))
    if drafted is None:
        return None
    # JPEG rounds the size up. What is over is at the right and bottom before the rotation.
    box_width, box_height = drafted[1][2:]
    left = image.width - box_width if orientation in (2, 3, 7, 8) else 0.0
    top = image.height - box_height if orientation in (3, 4, 6, 7) else 0.0
    box = (left, top, left + box_width, top + box_height)
    return original, (box[1], box[0], box[3], box[2]) if sideways else box


def _augmented(
    image: Image.Image, box: Box, encoded: bytes, recipe: "Recipe | Pixels"
) -> Iterator[NDArray[np.uint8]]:
    """All views but the first, of the part of an image in `box`; `encoded` decides them."""
    sha256 = hashlib.sha256(encoded).hexdigest()
    for view in range(1, recipe.views):
        augmentation = draw_augmentation(sha256, view)
        yield np.asarray(augment(image, box, augmentation, recipe))
