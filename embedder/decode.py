"""Encoded bytes to uint8 RGB at the recipe's size, or a `DecodeError`."""

import ctypes
import io
import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError, _imaging

from embedder.errors import DecodeError
from embedder.recipe import Recipe

# Pillow's own error level: half a gigabyte of RGB. No camera photo reaches it; a file of a few
# bytes that declares more is an attack or a mistake.
MAX_PIXELS = 178_956_970

# EPS would be read by running Ghostscript on the file; the others are recognised by Pillow, but
# not decoded.
_REFUSED_FORMATS = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
Image.init()
FORMATS = tuple(sorted(set(Image.OPEN) - _REFUSED_FORMATS))

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Modes with more than eight bits a sample: `convert("RGB")` would clip them to 0..255.
_DEEP_MODES = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}


class DecodedImage(NamedTuple):
    """One image, ready for the network.

    Attributes:
        pixels: uint8 (height, width, 3) at the recipe's `image_size`, RGB order, 0 to 255. Not
            normalised: that is inside the backbone's graph.
        width: Of the original, in pixels, after EXIF rotation.
        height: Of the original, in pixels, after EXIF rotation.
        format: Pillow's name of the file format, such as `JPEG`.
    """

    pixels: NDArray[np.uint8]
    width: int
    height: int
    format: str


def decode_rgb(encoded: bytes, recipe: Recipe) -> DecodedImage:
    """Decode one image file and bring it to the recipe's size.

    Args:
        encoded: The whole file, in any of `FORMATS`. The first frame of an animation or the first
            page is used; EXIF rotation is applied; transparency is blended on white; samples of
            more than eight bits are stretched from the picture's own range to 0..255. Colour
            profiles are not applied.
        recipe: Gives `image_size`, `crop`, `crop_fraction` and `interpolation`.

    Raises:
        DecodeError: The bytes are truncated, not an image, or declare more than `MAX_PIXELS`
            pixels.
    """
    if not encoded:
        raise DecodeError("the file is empty")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            _check_size(image)
            image_format = image.format or "unknown"
            upright = ImageOps.exif_transpose(image)
            _check_size(upright)  # the loader of a few formats changes the size
            pixels = np.asarray(_fit(_to_rgb(upright), recipe))
            return DecodedImage(pixels, upright.width, upright.height, image_format)
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError(f"declares more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise DecodeError(f"not a readable image; begins with {encoded[:8]!r}") from error
    # Pillow's plugins raise OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError,
    # struct.error, NotImplementedError and ZeroDivisionError on bad files.
    except Exception as error:
        raise DecodeError(f"{type(error).__name__}: {error}") from error


def silence_decoders() -> None:
    """Stop Pillow and libtiff from warning about images that they can read all the same.

    libtiff writes straight to standard error. Images that cannot be read still raise.
    """
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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP_MODES:
        return _stretch(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _stretch(image: Image.Image) -> Image.Image:
    """Map the samples' own range, smallest to largest, to 0..255."""
    samples = np.asarray(image, dtype=np.float64)
    finite = np.isfinite(samples)
    low, high = samples[finite].min(initial=np.inf), samples[finite].max(initial=-np.inf)
    if not high > low:  # one value everywhere, or none that is finite
        return Image.fromarray(np.zeros(samples.shape, np.uint8))
    stretched = np.where(finite, samples - low, 0.0) * (255.0 / (high - low))
    return Image.fromarray(stretched.round().astype(np.uint8))


def _fit(image: Image.Image, recipe: Recipe) -> Image.Image:
    height, width = recipe.image_size
    resample = _FILTERS[recipe.interpolation]
    # Pillow wants (width, height); every other size in this package is (height, width).
    if recipe.crop == "squash":
        return image.resize((width, height), resample)
    if recipe.crop == "pad":
        scale = min(height / image.height, width / image.width)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        canvas = Image.new("RGB", (width, height))
        canvas.paste(
            image.resize(size, resample), ((width - size[0]) // 2, (height - size[1]) // 2)
        )
        return canvas
    scale = min(image.height / height, image.width / width) * recipe.crop_fraction
    crop_width, crop_height = width * scale, height * scale
    # Rounding can put an edge a hair outside the image, which Pillow refuses.
    left, top = max(0.0, (image.width - crop_width) / 2), max(0.0, (image.height - crop_height) / 2)
    right, bottom = min(image.width, left + crop_width), min(image.height, top + crop_height)
    box = (left, top, right, bottom)
    return image.resize((width, height), resample, box=box)
