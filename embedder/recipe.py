"""Everything that decides the content of a feature, and its fingerprint."""

import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from embedder.columns import EMBEDDING, LOGITS, VIEW
from embedder.errors import RecipeError
from embedder.options import documented
from embedder.pixels import Pixels

DEFAULT_BACKBONE = "efficientnet-lite0"
MIN_SIDE = 32  # pixels: below it the last feature map of a stride-32 network is empty
MAX_SIDE = 4096  # pixels: a batch of 32 at this side is 1.6 GB of uint8
MAX_VIEWS = 64  # a shard of 1,024 images then holds 65,536 vectors


Layers = Annotated[
    tuple[str, ...],
    Field(description="Layers whose output is taken, a column each; the last feature map if none."),
]
Pooling = Annotated[
    Literal["avg", "max", "gem", "flatten", "none"],
    Field(
        description="How a feature map becomes one vector: the mean or the largest of each "
        "channel, their generalised mean of power 3 (gem, arXiv 1711.02512), all values one after "
        "the other (flatten), or not at all (none)."
    ),
]
ImageSize = Annotated[
    tuple[int, int], Field(description="What the network sees, as (height, width), in pixels.")
]
Crop = Annotated[
    Literal["center", "squash", "pad"],
    Field(
        description="Keep the central part in the image's own proportions (center), resize the "
        "whole image and change its proportions (squash), or fit it in and fill the rest with "
        "black (pad)."
    ),
]
CropFraction = Annotated[
    float,
    Field(
        gt=0.0,
        le=1.0,
        description="Of center: side of the crop, as a share of the largest crop that fits.",
    ),
]
Interpolation = Annotated[
    Literal["nearest", "bilinear", "bicubic", "lanczos"],
    Field(description="Filter of the antialiased resize."),
]
Decode = Annotated[
    Literal["exact", "scaled"],
    Field(
        description="Decode large JPEG files at 1/2, 1/4 or 1/8 of their size, but never at less "
        "than twice the image size, and resize with vector instructions (scaled); or decode every "
        "pixel and resize with Pillow (exact)."
    ),
]
Precision = Annotated[
    Literal["float32", "bfloat16", "float16"],
    Field(
        description="Arithmetic of the network, whose vectors leave it as float32. bfloat16 and "
        "float16 need a device that has them."
    ),
]
StoreDtype = Annotated[
    Literal["float32", "float16"], Field(description="Data type of the stored vectors.")
]
L2Normalise = Annotated[
    bool, Field(description="Whether vectors are divided by their Euclidean length.")
]
Views = Annotated[
    int,
    Field(
        ge=1,
        le=MAX_VIEWS,
        description="Vectors of each image: of the image as it is, and of random parts of it, "
        "perhaps mirrored, in other colours.",
    ),
]


@documented
class Recipe(BaseModel):
    """What is computed for an image: same recipe and same bytes give the same vector.

    What only changes the speed (batch size, workers, threads, shard size) is not here: it is an
    argument of the run. Use `backbones.make_recipe` to fill in a backbone's own defaults.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: Annotated[
        str,
        Field(min_length=1, description="Name of a row of `backbones.BACKBONES`, or `hub:PRESET`."),
    ]
    weights: Annotated[
        str,
        Field(
            pattern=r"^([0-9a-f]{64}|random:[0-9]+)$",
            description="sha256 of the weights file, 64 hexadecimal digits; or `random:SEED`.",
        ),
    ]
    layers: Layers = ()
    pooling: Pooling = "avg"
    image_size: ImageSize
    crop: Crop = "center"
    crop_fraction: CropFraction = 1.0
    interpolation: Interpolation = "bicubic"
    decode: Decode = "scaled"
    precision: Precision = "float32"
    store_dtype: StoreDtype = "float32"
    l2_normalise: L2Normalise = False
    views: Views = 1
    head: Annotated[
        str | None,
        Field(
            pattern=r"^[0-9a-f]{64}$",
            description="sha256 of a trained head, whose logits are stored in place of the "
            "features they are made of; None for the features.",
        ),
    ] = None
    version: Annotated[
        Literal[1], Field(description="Raised when this package changes what a recipe means.")
    ] = 1
    weights_source: Annotated[
        str,
        Field(
            exclude=True,
            description="Where this machine finds the weights: `imagenet`, `random:SEED` or a "
            "file's path. It decides nothing, so it is not in the fingerprint.",
        ),
    ] = "imagenet"
    head_source: Annotated[
        str,
        Field(
            exclude=True,
            description="Where this machine finds the head: its model's folder. Nor does this.",
        ),
    ] = ""

    def __init__(self, **values: Any) -> None:
        """Check the values.

        Raises:
            RecipeError: A value is outside what the attribute allows.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise RecipeError.of(error.errors(), type(self).model_fields) from None

    @model_validator(mode="after")
    def _check_sizes_and_layers(self) -> Self:
        if not all(MIN_SIDE <= side <= MAX_SIDE for side in self.image_size):
            raise ValueError(
                f"each side must be {MIN_SIDE} to {MAX_SIDE} pixels, as (height, width). "
                f"Received: image_size={self.image_size}"
            )
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"each layer must be named once. Received: layers={self.layers}")
        if self.views > 1 and VIEW in self.columns:
            raise ValueError(
                f"a layer's name is its column's, and with several views `{VIEW}` is the column of "
                f"their numbers. Received: layers={self.layers}, views={self.views}"
            )
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the features: `embedding`, or with several layers, theirs; a head's `logits`."""
        if self.head is not None:
            return (LOGITS,)
        return self.layers if len(self.layers) > 1 else (EMBEDDING,)

    def column(self, name: str | None) -> str:
        """The feature of this name, or the only one.

        Raises:
            RecipeError: There is no such feature, or several of which none is named.
        """
        if name is None and len(self.columns) == 1:
            return self.columns[0]
        if name not in self.columns:
            raise RecipeError(
                f"`column` must be one of the store's features: {', '.join(self.columns)}. "
                f"Received: {name}"
            )
        return name

    @property
    def of_features(self) -> "Recipe":
        """The recipe of the features that a head's logits are made of."""
        return self.model_copy(update={"head": None, "head_source": ""})

    @property
    def label(self) -> str:
        """The backbone's name as part of a file name."""
        return re.sub(r"[^\w.-]+", "-", self.backbone)

    @property
    def pixels(self) -> Pixels:
        """What decides the pixels that the network sees: equal for recipes that can share them."""
        return Pixels(*(getattr(self, name) for name in Pixels._fields))

    @property
    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of the sha256 of the recipe's canonical JSON."""
        values = self.model_dump(mode="json")
        for name in ("layers", "head", "views"):  # stores made before there were these have none
            if getattr(self, name) == type(self).model_fields[name].default:
                del values[name]
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def differences_in_pixels(self, other: "Recipe") -> list[str]:
        """As `differences`, of what decides the pixels."""
        return [line for line in self.differences(other) if line.split(":")[0] in Pixels._fields]

    def differences(self, other: "Recipe") -> list[str]:
        """One line for each attribute in which `other` differs: `name: mine, not theirs`."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [
            f"{name}: {mine[name]}, not {theirs[name]}"
            for name in mine
            if mine[name] != theirs[name]
        ]
