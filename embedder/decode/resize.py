"""Crop, resize and pad RGB images, as they are or augmented."""

import threading
from typing import TYPE_CHECKING

from PIL import Image, ImageEnhance, ImageOps

from embedder.decode.views import Augmentation, Box, part_of

if TYPE_CHECKING:  # which would load pydantic
    from embedder.pixels import Pixels
    from embedder.recipe import Recipe

try:
    import cykooz_resizer as simd
except ImportError:  # there is no wheel for this platform
    simd = None

# Pillow's antialiased convolutions in vector instructions: docs/adr/0004-scaled-by-default.md.
_SIMD_FILTERS = {"bilinear": "bilinear", "bicubic": "catmull_rom", "lanczos": "lanczos3"}
_of_thread = threading.local()  # holds a Resizer, which keeps its intermediate image


def fit(image: Image.Image, box: Box, recipe: "Recipe | Pixels") -> Image.Image:
    """Bring a part of an image to the recipe's size, as it is.

    Args:
        image: RGB.
        box: The part, in pixels; with `crop="center"`, its central part is kept.
        recipe: Gives `image_size`, `crop`, `crop_fraction`, `interpolation` and `decode`.

    Returns:
        RGB, of the recipe's size.
    """
    if recipe.crop == "center":
        box = _center(box, recipe)
    return _pad(_resize(image, _size_within(box, recipe), box, recipe), recipe)


def augment(
    image: Image.Image, box: Box, augmentation: Augmentation, recipe: "Recipe | Pixels"
) -> Image.Image:
    """Make one view, at the recipe's size, of a part of an image.

    Args:
        image: RGB.
        box: The part, in pixels, of which the view shows another part.
        augmentation: What is done to it.
        recipe: As in `fit`.
    """
    if recipe.crop == "center":
        proportions = recipe.image_size[1] / recipe.image_size[0]
    else:  # the plain view is of the whole image, whose own proportions are then the measure
        proportions = (box[2] - box[0]) / (box[3] - box[1])
    part = part_of(box, augmentation, proportions)
    view = _resize(image, _size_within(part, recipe), part, recipe)
    if augmentation.is_mirrored:
        view = ImageOps.mirror(view)
    view = ImageEnhance.Brightness(view).enhance(augmentation.brightness)
    view = ImageEnhance.Contrast(view).enhance(augmentation.contrast)
    view = ImageEnhance.Color(view).enhance(augmentation.saturation)
    return _pad(view, recipe)


def _center(box: Box, recipe: "Recipe | Pixels") -> Box:
    """The central part of a box, `crop_fraction` of the largest of the recipe's proportions."""
    height, width = recipe.image_size
    left, top, right, bottom = box
    box_width, box_height = right - left, bottom - top
    scale = min(box_height / height, box_width / width) * recipe.crop_fraction
    crop_width, crop_height = width * scale, height * scale
    # Rounding can put an edge a hair outside the image, which Pillow refuses.
    crop_left = left + max(0.0, (box_width - crop_width) / 2)
    crop_top = top + max(0.0, (box_height - crop_height) / 2)
    crop_right = min(right, crop_left + crop_width)
    crop_bottom = min(bottom, crop_top + crop_height)
    return crop_left, crop_top, crop_right, crop_bottom


def _size_within(box: Box, recipe: "Recipe | Pixels") -> tuple[int, int]:
    """What a box is resized to, as Pillow's (width, height): with `pad`, of its proportions."""
    # Pillow wants (width, height); every other size in this package is (height, width).
    height, width = recipe.image_size
    if recipe.crop != "pad":
        return width, height
    box_width, box_height = box[2] - box[0], box[3] - box[1]
    scale = min(height / box_height, width / box_width)
    return max(1, round(box_width * scale)), max(1, round(box_height * scale))


def _pad(image: Image.Image, recipe: "Recipe | Pixels") -> Image.Image:
    """Put an image in the middle of a black one of the recipe's size."""
    height, width = recipe.image_size
    if image.size == (width, height):
        return image
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


def _resize(
    image: Image.Image, size: tuple[int, int], box: Box, recipe: "Recipe | Pixels"
) -> Image.Image:
    """Resize the part of an RGB image in `box` to `size`, (width, height)."""
    simd_filter = _SIMD_FILTERS.get(recipe.interpolation)
    if simd is None or recipe.decode == "exact" or simd_filter is None:
        return image.resize(size, Image.Resampling[recipe.interpolation.upper()], box)
    if not hasattr(_of_thread, "resizer"):
        _of_thread.resizer = simd.Resizer()
    left, top, right, bottom = box
    options = simd.ResizeOptions(
        simd.ResizeAlg.convolution(getattr(simd.FilterType, simd_filter)),
        crop_box=simd.CropBox(left, top, right - left, bottom - top),
    )
    resized = Image.new("RGB", size)
    _of_thread.resizer.resize_pil(image, resized, options)
    return resized
