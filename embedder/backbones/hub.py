"""Image networks of KerasHub, by the name of their preset: an optional extra."""

import functools
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embedder.backbones.declared import read_json
from embedder.backbones.table import Backbone
from embedder.backbones.weight_files import check_configuration
from embedder.errors import RecipeError, WeightsError
from embedder.libraries import DISTRIBUTION, import_keras, silent_standard_error

if TYPE_CHECKING:
    import keras

PREFIX = "hub:"
# Made from other arrays when a network is loaded, with the rounding of whatever makes them.
_DERIVED = {"interpolated_position_embeddings"}  # of DINOv2


def is_preset(backbone: str) -> bool:
    """Whether a backbone is a preset of KerasHub, `hub:NAME`."""
    return backbone.startswith(PREFIX)


@dataclass(frozen=True, eq=False)
class Preset:
    """An image network of KerasHub with its weights, and how it wants its pixels.

    Attributes:
        network: Input: float32 (batch, height, width, 3), preprocessed. Output: a feature map,
            tokens (batch, tokens, channels), or for CLIP and SigLIP the image's embedding
            (batch, channels).
        converter: KerasHub's own preprocessing: gives size, crop, filter, scale and offset.
        sha256: Of all arrays that are not made from others.
    """

    network: "keras.Model"
    converter: Any
    sha256: str

    def preprocess(self, pixels: Any) -> Any:
        """RGB in [0, 255] as the network wants it; the converter itself, for a NumPy array."""
        if isinstance(pixels, np.ndarray):
            return np.asarray(self.converter(pixels))
        scale, offset = self.converter.scale, self.converter.offset
        if scale is not None:
            pixels = pixels * np.asarray(scale, np.float32)
        if offset is not None:
            pixels = pixels + np.asarray(offset, np.float32)
        return pixels


@functools.lru_cache(maxsize=2)
def open_preset(name: str, dtype_policy: str = "float32") -> Preset:
    """Load a preset: downloaded, or from a folder.

    Args:
        name: As KerasHub's `from_preset` takes it: a name, a `kaggle://` or `hf://` handle, or a
            folder.
        dtype_policy: Keras's name of what the network computes in.

    Raises:
        RecipeError: KerasHub is not installed, or the preset is not of an image network.
        WeightsError: The preset cannot be had, is damaged, or could run code.
    """
    if importlib.util.find_spec("keras_hub") is None:
        raise RecipeError(
            f"`backbone` {PREFIX}{name} needs KerasHub. Install it with: "
            f"pip install '{DISTRIBUTION}[hub]'"
        )
    if Path(name).is_dir():
        _check_folder(Path(name))
    import_keras()
    # It imports TensorFlow where there is one, whatever Keras runs on.
    with silent_standard_error():
        import keras_hub

    try:
        backbone = keras_hub.models.Backbone.from_preset(name, dtype=dtype_policy)
        converter = keras_hub.layers.ImageConverter.from_preset(name)
    except Exception as error:  # KerasHub raises what its many parts raise
        raise WeightsError(
            f"The preset {name} cannot be loaded: {error}. Where there is no network, give a "
            f"folder that `save_to_preset` wrote: {PREFIX}FOLDER"
        ) from error
    network = _image_network(backbone, name)
    if converter.image_size is None:
        converter.image_size = network.input_shape[1:3]
    return Preset(network, converter, _digest_of(network))


def _digest_of(network: "keras.Model") -> str:
    """Of all arrays in the network's order: the same on each of Keras's backends, and anywhere."""
    digest = hashlib.sha256()
    for variable in network.weights:
        if variable.name in _DERIVED:
            continue
        array: NDArray[Any] = np.ascontiguousarray(variable.numpy())
        if array.dtype.kind == "i":  # JAX has 32 bits where TensorFlow has 64
            array = array.astype(np.int64)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _check_folder(folder: Path) -> None:
    for file in sorted(folder.glob("*.json")):
        try:
            config = read_json(file)
        except (OSError, ValueError) as error:
            raise WeightsError(f"{file} cannot be read: {error}") from error
        check_configuration(config, file)


def _image_network(backbone: Any, name: str) -> "keras.Model":
    """The part from images to features; towers for text are left out."""
    keras = import_keras()
    inputs = backbone.input
    if isinstance(inputs, dict):  # of networks of images alone, the one input has several names
        images = next(iter(inputs.values())) if len(inputs) == 1 else inputs.get("images")
    else:
        images = inputs
    if not isinstance(images, keras.KerasTensor) or len(images.shape) != 4:
        raise RecipeError(f"`backbone` must be a network of images. Received: {PREFIX}{name}")
    if hasattr(backbone, "get_vision_embeddings"):  # CLIP, SigLIP
        return keras.Model(images, backbone.get_vision_embeddings(images), name=backbone.name)
    output = backbone.output
    if isinstance(output, dict):
        output = output.get("sequence_output", next(iter(output.values())))
    return keras.Model(images, output, name=backbone.name)


def row_of_preset(preset: str) -> Backbone:
    """A preset as a row of the table; see `open_preset`.

    Raises:
        RecipeError: KerasHub is not installed, or the preset is not of an image network.
        WeightsError: The preset cannot be had, is damaged, or could run code.
    """
    opened = open_preset(preset)  # in float32: for the facts alone
    converter = opened.converter
    height, width = converter.image_size
    uncropped = "pad" if converter.pad_to_aspect_ratio else "squash"
    return Backbone(
        make=lambda _: open_preset(preset, import_keras().config.dtype_policy().name).network,
        preprocess=opened.preprocess,
        load=lambda *_: None,
        dim=int(opened.network.output_shape[-1]),
        image_size=(int(height), int(width)),
        crop_fraction=1.0,
        crop="center" if converter.crop_to_aspect_ratio else uncropped,
        interpolation=str(converter.interpolation).replace("lanczos3", "lanczos"),
        num_parameters=opened.network.count_params(),
        licence="see the preset",
        weights=None,
    )
