"""What one may ask of a recipe."""

from typing import Annotated

from pydantic import Field

from embedder.options import Name, checked
from embedder.recipe import (
    DEFAULT_BACKBONE,
    Crop,
    CropFraction,
    Decode,
    ImageSize,
    Interpolation,
    L2Normalise,
    Layers,
    Pooling,
    Precision,
    StoreDtype,
    Views,
)


@checked
class RecipeOptions:
    """What a recipe is made of; None takes the backbone's own, or the recipe's default."""

    backbone: Annotated[
        Name,
        Field(
            description="Name of a network, as `embedder backbones` lists them; capitals, - and _ "
            "make no difference. Or hub:PRESET, an image network of KerasHub with weights of its "
            "own."
        ),
    ] = DEFAULT_BACKBONE
    weights: Annotated[
        Name | None,
        Field(
            description="imagenet (the published ones, and the default), a .weights.h5, .h5 or "
            ".keras file, or random[:SEED]. A .keras file brings a network of its own, whose "
            "pixels are preprocessed as the backbone's."
        ),
    ] = None
    layers: Layers | None = None
    pooling: Pooling | None = None
    image_size: ImageSize | None = None
    crop: Crop | None = None
    crop_fraction: CropFraction | None = None
    interpolation: Interpolation | None = None
    decode: Decode | None = None
    precision: Precision | None = None
    store_dtype: StoreDtype | None = None
    l2_normalise: L2Normalise | None = None
    views: Views | None = None
