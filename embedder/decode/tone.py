"""Images of any mode to 8-bit RGB."""

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

# Modes with more than eight bits a sample: `convert("RGB")` would clip them to 0..255.
_DEEP_MODES = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}

# Pixels of an image that are brought to RGB at a time, where that takes several copies of them: a
# few MB, which fit the processor's cache.
_STRIP_PIXELS = 2**18


def to_rgb(image: Image.Image) -> Image.Image:
    """Bring an image to 8-bit RGB.

    Samples of more than eight bits are stretched from the image's own range to 0..255, and
    transparency is blended on white.
    """
    if image.mode in _DEEP_MODES:
        return _stretch(image)
    if image.has_transparency_data:
        return _in_strips(image, _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA"))


def _stretch(image: Image.Image) -> Image.Image:
    """Map the samples' own range, smallest to largest, to 0..255."""
    low, high = _finite_range(image)
    if not high > low:  # one value everywhere, or none that is finite
        return Image.new("RGB", image.size)

    def stretch(strip: Image.Image) -> Image.Image:
        samples = np.array(strip, dtype=np.float64)  # which has every integer of 32 bits
        samples[~np.isfinite(samples)] = low
        samples -= low
        samples *= 255.0 / (high - low)
        return Image.fromarray(np.rint(samples, out=samples).astype(np.uint8))

    return _in_strips(image, stretch)


def _finite_range(image: Image.Image) -> tuple[float, float]:
    """Smallest and largest sample that is a number."""
    low, high = np.inf, -np.inf
    for box in _strips(image):
        samples = np.asarray(image.crop(box))
        if samples.dtype.kind == "f":
            samples = samples[np.isfinite(samples)]
        if samples.size:
            low, high = min(low, float(samples.min())), max(high, float(samples.max()))
    return low, high


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The RGB of what becomes of each strip: copies are of a strip, never of the whole image."""
    rgb = Image.new("RGB", image.size)
    for box in _strips(image):
        rgb.paste(convert(image.crop(box)).convert("RGB"), box)
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of up to `_STRIP_PIXELS` that cover an image: some rows, or a part of a long one."""
    width = min(image.width, _STRIP_PIXELS)
    height = _STRIP_PIXELS // width
    for top in range(0, image.height, height):
        for left in range(0, image.width, width):
            yield left, top, min(left + width, image.width), min(top + height, image.height)
