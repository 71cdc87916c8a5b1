"""Augmented views of an image: what is drawn for each of them, and which part it shows."""

import hashlib
import math
from typing import NamedTuple

import numpy as np

# A third, not a quarter: with the widest stretch, 4/3, each side of a view is then still half the
# image's, and decoding at a fraction keeps twice the network's: no view is enlarged by it.
MIN_AREA = 1 / 3
MAX_STRETCH = 4 / 3
MAX_JITTER = 0.2

Box = tuple[float, float, float, float]  # left, top, right, bottom


class Augmentation(NamedTuple):
    """What is done to one image for one view of it.

    Attributes:
        area: Share of the image's area that is shown, `MIN_AREA` to 1.
        stretch: Factor between the proportions (width by height) of the part shown and those that
            it is brought to, 1 / `MAX_STRETCH` to `MAX_STRETCH`.
        left: Where the part is: share of the room beside it that is left of it, 0 to 1.
        top: Share of the room that is above it, 0 to 1.
        is_mirrored: Whether left and right are swapped.
        brightness: Factor of all values, 1 - `MAX_JITTER` to 1 + `MAX_JITTER`.
        contrast: Factor of the distance to the part's mean grey, in the same range.
        saturation: Factor of the distance to each pixel's own grey, in the same range.
    """

    area: float
    stretch: float
    left: float
    top: float
    is_mirrored: bool
    brightness: float
    contrast: float
    saturation: float


def draw_augmentation(sha256: str, view: int) -> Augmentation:
    """Draw what is done for a view: a crop as in arXiv 1409.4842, a flip, and colours.

    The numbers are the digits of a hash, not a generator's: they are the same on every machine
    and with every version of NumPy, and no view's depend on another's.

    Args:
        sha256: Of the image's bytes, in hexadecimal digits.
        view: Number of the view, 1 or more; view 0 is not augmented.
    """
    digest = hashlib.sha256(f"{sha256}/{view}".encode()).digest()
    draws = (np.frombuffer(digest, ">u4") / 2**32).tolist()  # eight, each 0 to 1, but not 1
    area, stretch, left, top, mirror, *colours = draws
    return Augmentation(
        MIN_AREA + (1.0 - MIN_AREA) * area,
        math.exp((2.0 * stretch - 1.0) * math.log(MAX_STRETCH)),
        left,
        top,
        mirror < 0.5,
        *(1.0 + MAX_JITTER * (2.0 * colour - 1.0) for colour in colours),
    )


def part_of(box: Box, augmentation: Augmentation, proportions: float) -> Box:
    """The part of an image that a view shows.

    Args:
        box: Of the whole image, in pixels.
        augmentation: Gives `area`, `stretch`, `left` and `top`.
        proportions: Width by height that the part is to be brought to.

    Returns:
        A box within `box`. Where a part of that area and those proportions does not fit, it is the
        largest of those proportions that does: of a very long image a piece, not all, squeezed.
    """
    left, top, right, bottom = box
    box_width, box_height = right - left, bottom - top
    proportions *= augmentation.stretch
    width = math.sqrt(augmentation.area * box_width * box_height * proportions)
    width = min(width, box_width, box_height * proportions)
    height = min(width / proportions, box_height)
    part_left = left + augmentation.left * (box_width - width)
    part_top = top + augmentation.top * (box_height - height)
    # Rounding can put an edge a hair outside the image, which Pillow refuses.
    return part_left, part_top, min(right, part_left + width), min(bottom, part_top + height)
