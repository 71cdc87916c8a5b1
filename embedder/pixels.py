"""What decides the pixels that a network sees."""

from typing import NamedTuple


class Pixels(NamedTuple):
    """The part of a recipe that images are decoded by; light, as decoders have no more.

    Attributes are those of `recipe.Recipe`.
    """

    image_size: tuple[int, int]
    crop: str
    crop_fraction: float
    interpolation: str
    decode: str
    views: int
