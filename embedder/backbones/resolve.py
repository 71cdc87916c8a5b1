"""From the name of a network and of its weights to a recipe."""

import difflib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from embedder.backbones import hub
from embedder.backbones.options import RecipeOptions
from embedder.backbones.table import BACKBONES, Backbone
from embedder.backbones.weights import IMAGENET, RANDOM, PackagedWeights, digest_of, seed_of
from embedder.columns import EMBEDDING, RESERVED_COLUMNS
from embedder.errors import RecipeError, WeightsError
from embedder.libraries import logger
from embedder.recipe import DEFAULT_BACKBONE, Recipe


def make_recipe(
    backbone: str = DEFAULT_BACKBONE, weights: str | None = None, **options: Any
) -> Recipe:
    """Make a recipe, with the backbone's own size, crop, interpolation and weights as defaults.

    Args:
        backbone: Name of a row of `BACKBONES`; capitals, `-` and `_` make no difference. Or
            `hub:PRESET`, an image network of KerasHub with weights of its own.
        weights: `imagenet` (the published ones), a `.weights.h5`, `.h5` or `.keras` file, or
            `random` or `random:SEED`. A `.keras` file brings a network of its own, whose pixels
            are preprocessed as the backbone's.
        **options: Further attributes of `RecipeOptions`.

    Raises:
        RecipeError: The backbone is unknown or an option makes no sense.
        WeightsError: The weights are not at hand, or their file is not the published one.
    """
    checked = asdict(RecipeOptions(backbone=backbone, weights=weights, **options))
    given = {name: value for name, value in checked.items() if value is not None}
    name, row, digest, source = _find(backbone, weights or IMAGENET)
    crop = given.get("crop", row.crop)
    defaults = {
        "image_size": row.image_size,
        "crop": crop,
        "crop_fraction": row.crop_fraction if crop == "center" else 1.0,
        "interpolation": row.interpolation,
    }
    values = defaults | given | {"backbone": name, "weights": digest, "weights_source": source}
    recipe = Recipe(**values)
    if min(recipe.image_size) < row.min_side:
        raise RecipeError(
            f"`image_size` of {name} must be at least {row.min_side}x{row.min_side} pixels. "
            f"Received: image_size={recipe.image_size}"
        )
    if taken := RESERVED_COLUMNS.intersection(recipe.columns) - {EMBEDDING}:
        raise RecipeError(
            f"A layer's name is its column's in the store, which has columns of its own. "
            f"Received: layers={', '.join(sorted(taken))}"
        )
    return recipe


def _find(backbone: str, source: str) -> tuple[str, Backbone, str, str]:
    """A network's name and row, what a recipe says of its weights, and where they are."""
    if hub.is_preset(backbone):
        if source != IMAGENET:
            raise RecipeError(f"A preset brings its own weights. Received: weights={source}")
        preset = backbone.removeprefix(hub.PREFIX)
        row, digest = hub.row_of_preset(preset), hub.open_preset(preset).sha256
        if Path(preset).is_dir():  # where it is makes no other recipe
            path = Path(preset).resolve()
            return f"{hub.PREFIX}{path.name}", row, digest, str(path)
        return backbone, row, digest, preset
    name, row = find_backbone(backbone)
    if (seed := seed_of(source)) is not None:
        source = digest = f"{RANDOM}:{seed}"
        logger.warning("%s has random weights: its vectors are for tests only", name)
        return name, row, digest, source
    path = weights_file(name, source)
    if source != IMAGENET:
        return name, row, digest_of(path), str(path)
    if isinstance(row.weights, PackagedWeights):  # finding it has compared its hash
        return name, row, row.weights.sha256, source
    return name, row, digest_of(path), source


def row_of(recipe: Recipe) -> Backbone:
    """The network of a recipe, as a row of the table."""
    if hub.is_preset(recipe.backbone):
        return hub.row_of_preset(recipe.weights_source)
    return find_backbone(recipe.backbone)[1]


def find_backbone(name: str) -> tuple[str, Backbone]:
    """Find a network by name; capitals, `-` and `_` make no difference.

    Returns:
        Its name in `BACKBONES`, and its row; for `hub:PRESET`, a row made from the preset.

    Raises:
        RecipeError: There is none of this name.
    """
    if hub.is_preset(name):
        return name, hub.row_of_preset(name.removeprefix(hub.PREFIX))
    wanted = _plain(name)
    for known, row in BACKBONES.items():
        if _plain(known) == wanted:
            return known, row
    near = difflib.get_close_matches(name.lower(), BACKBONES, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise RecipeError(
        f"`backbone` must be one of: {', '.join(BACKBONES)}. Received: backbone={name!r}.{hint}"
    )


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def weights_file(backbone: str, source: str = IMAGENET) -> Path:
    """Locate a weights file; the published one is checked, and downloaded where Keras does so.

    Args:
        backbone: Name of a row of `BACKBONES`.
        source: `imagenet`, or a file.

    Raises:
        WeightsError: It is not at hand, or its hash is not the published one.
    """
    _, row = find_backbone(backbone)
    if source == IMAGENET and row.weights:
        try:
            return row.weights.find()
        except WeightsError as error:
            raise WeightsError(f"{backbone}: {error}") from error
    path = Path(source).absolute()
    if not path.is_file():
        raise WeightsError(
            f"`weights` must be imagenet, random, random:SEED or a file. "
            f"Received: {source}, which is not there"
        )
    if path.suffix not in (".h5", ".keras"):
        raise WeightsError(
            f"A weights file must end in .weights.h5, .h5 or .keras. Received: {source}"
        )
    return path
