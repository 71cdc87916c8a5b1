"""Everything that decides the content of a feature, and its fingerprint."""

import hashlib
import json
import re
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from embedder.errors import RecipeError

EMBEDDING = "embedding"  # column of the vectors, where there is one feature
MIN_SIDE = 32  # pixels: below it the last feature map of a stride-32 network is empty
MAX_SIDE = 4096  # pixels: a batch of 32 at this side is 1.6 GB of uint8
LOGITS = "logits"  # column of what a head makes of the vectors, where there is one
VIEW = "view"  # column of the views' numbers, where there are several
MAX_VIEWS = 64  # a shard of 1,024 images then holds 65,536 vectors
_OF_PIXELS = ("image_size", "crop", "crop_fraction", "interpolation", "decode", "views")


class Recipe(BaseModel):
    """What is computed for an image: same recipe and same bytes give the same vector.

    What only changes the speed (batch size, workers, threads, shard size) is not here: it is an
    argument of the run. Use `backbones.make_recipe` to fill in a backbone's own defaults.

    Attributes:
        backbone: Name of a row of `backbones.BACKBONES`, or `hub:PRESET`.
        weights: sha256 of the weights file, 64 hexadecimal digits; or `random:SEED`.
        layers: Names of the layers whose output is taken; none for the last feature map.
        pooling: How a feature map (height, width, channels) becomes one vector: the mean or the
            largest of each channel, their generalised mean of power 3 (`gem`, arXiv 1711.02512),
            all values one after the other (`flatten`), or not at all (`none`).
        image_size: What the network sees, as (height, width), in pixels.
        crop: `center` keeps the central part of the image's own proportions, `squash` resizes the
            whole image and changes its proportions, `pad` fits the whole image in and fills the
            rest with black.
        crop_fraction: For `center`: side of the crop, as a share of the largest crop that fits.
        interpolation: Filter of the antialiased resize.
        decode: `scaled` decodes large JPEG files at 1/2, 1/4 or 1/8 of their size, but never at
            less than twice `image_size`, and resizes with vector instructions; `exact` decodes
            every pixel and resizes with Pillow.
        precision: Arithmetic of the network; vectors leave it as float32. `bfloat16` and `float16`
            need a device that has them.
        store_dtype: Data type of the stored vector.
        l2_normalise: Whether vectors are divided by their Euclidean length.
        views: Vectors of each image: view 0 is of the image as it is, every other one of a random
            part of it, perhaps mirrored, in other colours; see `decode.draw_augmentation`.
        head: sha256 of a trained head, whose logits are stored in place of the features they are
            made of; None for the features.
        version: Raised when this package changes what a recipe means.
        weights_source: Where this machine finds the weights: `imagenet`, `random:SEED` or a file's
            path. It decides nothing, so it is not in the fingerprint.
        head_source: Where this machine finds the head: its model's folder. Nor does this.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: str = Field(min_length=1)
    weights: str = Field(pattern=r"^([0-9a-f]{64}|random:[0-9]+)$")
    layers: tuple[str, ...] = ()
    pooling: Literal["avg", "max", "gem", "flatten", "none"] = "avg"
    image_size: tuple[int, int]
    crop: Literal["center", "squash", "pad"] = "center"
    crop_fraction: float = Field(default=1.0, gt=0.0, le=1.0)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    decode: Literal["exact", "scaled"] = "scaled"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    store_dtype: Literal["float32", "float16"] = "float32"
    l2_normalise: bool = False
    views: int = Field(default=1, ge=1, le=MAX_VIEWS)
    head: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    version: Literal[1] = 1
    weights_source: str = Field(default="imagenet", exclude=True)
    head_source: str = Field(default="", exclude=True)

    def __init__(self, **values: Any) -> None:
        """Check the values.

        Raises:
            RecipeError: A value is outside what the attribute allows.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise RecipeError(_explain(error)) from None

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if not all(MIN_SIDE <= side <= MAX_SIDE for side in self.image_size):
            raise ValueError(
                f"each side must be {MIN_SIDE} to {MAX_SIDE} pixels, as (height, width). "
                f"Received: image_size={self.image_size}"
            )
        return self

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
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
    def pixels(self) -> tuple[Any, ...]:
        """What decides the pixels that the network sees: equal for recipes that can share them."""
        return tuple(getattr(self, name) for name in _OF_PIXELS)

    @property
    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of the sha256 of the recipe's canonical JSON."""
        values = self.model_dump(mode="json")
        if not self.layers:  # as in stores made before there were layers
            del values["layers"]
        if self.head is None:  # as in stores made before there were heads
            del values["head"]
        if self.views == 1:  # as in stores made before there were views
            del values["views"]
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def differences_in_pixels(self, other: "Recipe") -> list[str]:
        """As `differences`, of what decides the pixels."""
        return [line for line in self.differences(other) if line.split(":")[0] in _OF_PIXELS]

    def differences(self, other: "Recipe") -> list[str]:
        """One line for each attribute in which `other` differs: `name: mine, not theirs`."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [
            f"{name}: {mine[name]}, not {theirs[name]}"
            for name in mine
            if mine[name] != theirs[name]
        ]


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"])
        if not name:
            lines.append(problem["msg"].removeprefix("Value error, "))
        else:
            received = "nothing" if problem["type"] == "missing" else f"{name}={problem['input']!r}"
            lines.append(f"`{name}`: {problem['msg']}. Received: {received}")
    return "The recipe makes no sense. " + " ".join(lines)
