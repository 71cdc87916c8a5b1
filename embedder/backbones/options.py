"""What one may ask of a recipe."""

from typing import Annotated

from pydantic import Field

from embedder import recipe
from embedder.options import Name, checked


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
    ] = recipe.DEFAULT_BACKBONE
    weights: Annotated[
        Name | None,
        Field(
            description="imagenet (the published ones, and the default), a .weights.h5, .h5 or "
            ".keras file, or random[:SEED]. A .keras file brings a network of its own, whose "
            "pixels are preprocessed as the backbone's."
        ),
    ] = None
    layers: recipe.Layers | None = None
    pooling: recipe.Pooling | None = None
    image_size: recipe.ImageSize | None = None
    crop: recipe.Crop | None = None
    crop_fraction: recipe.CropFraction | None = None
    interpolation: recipe.Interpolation | None = None
    decode: recipe.Decode | None = None
    precision: recipe.Precision | None = None
    store_dtype: recipe.StoreDtype | None = None
    l2_normalise: recipe.L2Normalise | None = None
    views: recipe.Views | None = None
