"""EfficientNet-Lite0, 1 and 2, which Keras does not have: the graph, and its port's weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedder.backbones.torch_weights import read_state_dict
from embedder.backbones.weight_files import load_hdf5
from embedder.errors import WeightsError
from embedder.libraries import import_keras

if TYPE_CHECKING:
    import keras

# (repeat, kernel, stride, expand, filters) of each stage, as in TensorFlow's EfficientNet-Lite.
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
_STAGES = (_LITE0, _LITE1, _LITE2)
_STEM_FILTERS = 32
DIM = 1280  # channels of the last feature map
_BATCH_NORM_EPSILON = 1e-3


def make_network(number: int, image_size: tuple[int, int]) -> "keras.Model":
    """Make EfficientNet-Lite0, 1 or 2 (arXiv 1905.11946, without squeeze-and-excitation).

    Args:
        number: Which.
        image_size: (height, width), in pixels.

    Returns:
        Input: float32 (batch, height, width, 3), RGB after `preprocess`. Output: the last feature
        map, (batch, height / 32, width / 32, 1280). The weights are random.
    """
    keras = import_keras()
    layers, unbiased = keras.layers, {"padding": "same", "use_bias": False}

    def convolve(x: Any, name: str, filters: int, kernel: int, stride: int = 1) -> Any:
        conv = layers.Conv2D(filters, kernel, stride, name=f"{name}_conv", **unbiased)
        return normalise(conv(x), name)

    def convolve_depthwise(x: Any, name: str, kernel: int, stride: int) -> Any:
        conv = layers.DepthwiseConv2D(kernel, stride, name=f"{name}_conv", **unbiased)
        return normalise(conv(x), name)

    def normalise(x: Any, name: str) -> Any:
        return layers.BatchNormalization(epsilon=_BATCH_NORM_EPSILON, name=f"{name}_bn")(x)

    def activate(x: Any, name: str) -> Any:
        return layers.ReLU(6.0, name=f"{name}_relu")(x)

    pixels = keras.Input((*image_size, 3))
    x = activate(convolve(pixels, "stem", _STEM_FILTERS, 3, 2), "stem")
    for stage_number, stage in enumerate(_STAGES[number], start=1):
        repeat, kernel, stride, expand, filters = stage
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
    features = activate(convolve(x, "head", DIM, 1), "head")
    return keras.Model(pixels, features, name=f"efficientnet_lite{number}")


def preprocess(pixels: Any) -> Any:
    """Bring RGB in [0, 255] to what the network was trained on; a NumPy array or a Keras tensor."""
    return (pixels - 127.0) / 128.0


def load(network: "keras.Model", path: Path) -> None:
    """Load the port's `.pth`, or an HDF5 file of a network of this package.

    Raises:
        WeightsError: The file is of another network, or damaged.
    """
    if path.suffix == ".pth":
        _load_state_dict(network, path)
    else:
        load_hdf5(network, path)


def _load_state_dict(network: "keras.Model", path: Path) -> None:
    """Fill the network from the PyTorch port's state dict, layer by layer in the graph's order."""
    remaining = (
        (key, value)
        for key, value in read_state_dict(path).items()
        if not key.startswith("_fc.") and not key.endswith("num_batches_tracked")
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
