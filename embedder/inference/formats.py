"""The formats that a network is exported to, as rows of a table, each with its own runtime."""

import errno
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from embedder.backbones import load_keras_model, save_network
from embedder.errors import RequestError, Unfinished
from embedder.libraries import DISTRIBUTION, choose_keras_backend, import_openvino

if TYPE_CHECKING:
    import keras

PIXELS, PROBABILITIES, EMBEDDING = "pixels", "probabilities", "embedding"
_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}  # not a matter of the format
_BATCH_SIZE = 3  # small, so that large images fit into memory

Outputs = dict[str, NDArray[np.float32]]  # `probabilities` (n, n_classes), `embedding` (n, dim)
Run = Callable[[NDArray[np.uint8]], Outputs]  # from pixels (n, height, width, 3)


@dataclass(frozen=True)
class Format:
    """One way to write a network.

    Attributes:
        file: Its name in the export's folder.
        keras_name: What `keras.Model.export` calls the format; None for Keras's own.
        load: Opens it with its own runtime.
        packages: Import names of what it needs beyond this package's own requirements.
        postprocess: What is done to the file that Keras wrote, if anything.
    """

    file: str
    keras_name: str | None
    load: Callable[[Path], Run]
    packages: tuple[str, ...] = ()
    postprocess: Callable[[Path], None] = lambda _: None


def _load_keras(path: Path) -> Run:
    network = load_keras_model(path)  # in safe mode, and of Keras's own layers only
    return lambda pixels: {name: np.asarray(x) for name, x in network(pixels).items()}


def _load_saved_model(path: Path) -> Run:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))

    def run(pixels: NDArray[np.uint8]) -> Outputs:
        outputs = loaded.signatures["serving_default"](**{PIXELS: tf.constant(pixels)})
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    return run


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [PROBABILITIES, EMBEDDING]
    return lambda pixels: dict(zip(names, session.run(names, {PIXELS: pixels}), strict=True))


def _drop_unused_inputs(path: Path) -> None:
    """Leave the pixels as the only input of an ONNX file.

    tf2onnx takes a constant that was made outside the graph, such as the mean colour of VGG16, for
    an input; then it folds the constant into others, and the input stays, which runtimes ask for.
    """
    import onnx

    model = onnx.load(path)
    used = {name for node in model.graph.node for name in node.input}
    inputs = [tensor for tensor in model.graph.input if tensor.name in used]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    onnx.save(model, path)


def _load_openvino(path: Path) -> Run:
    settings = {"INFERENCE_PRECISION_HINT": "f32"}  # else what the device is fastest at
    compiled = import_openvino().Core().compile_model(path, "CPU", settings)

    def run(pixels: NDArray[np.uint8]) -> Outputs:
        outputs = compiled({PIXELS: pixels})
        return {name: outputs[name] for name in (PROBABILITIES, EMBEDDING)}

    return run


def _load_litert(path: Path) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    run = interpreter.get_signature_runner()
    return lambda pixels: run(**{PIXELS: pixels})


FORMATS = {
    "keras": Format("model.keras", None, _load_keras),
    "saved-model": Format("saved_model", "tf_saved_model", _load_saved_model),
    "onnx": Format(
        "model.onnx",
        "onnx",
        _load_onnx,
        packages=("onnx", "onnxruntime", "tf2onnx"),
        postprocess=_drop_unused_inputs,
    ),
    "openvino": Format("model.xml", "openvino", _load_openvino),
    "litert": Format("model.tflite", "litert", _load_litert, ("ai_edge_litert",)),
}


def find_format(name: str) -> Format:
    """The row of `FORMATS` by its name; for all but Keras's own, Keras runs on TensorFlow.

    Raises:
        RequestError: There is none, or a package that it needs is not installed.
        EngineError: TensorFlow is not installed, or Keras runs on something else in this process.
    """
    if name not in FORMATS:
        raise RequestError(f"The format must be one of {', '.join(FORMATS)}. Received: {name}")
    row = FORMATS[name]
    if absent := [package for package in row.packages if not importlib.util.find_spec(package)]:
        raise RequestError(
            f"The format {name} needs {' and '.join(absent)}. Install with: "
            f"pip install '{DISTRIBUTION}[{name}]'"
        )
    if row.keras_name is not None:
        # From JAX, Keras 3.15 exports a SavedModel alone, of operations that need XLA.
        choose_keras_backend("tensorflow")
    return row


def write_and_run(
    network: "keras.Model", row: Format, path: Path, pixels: NDArray[np.uint8]
) -> Outputs:
    """Write a network, load what was written with its own runtime, and run it.

    Args:
        network: From `pixels` to a dict of `probabilities` and `embedding`.
        row: The format.
        path: The file or folder to write.
        pixels: uint8 (n, height, width, 3).

    Raises:
        Unfinished: The format cannot hold the network, or cannot run it.
        OSError: The disk is full.
    """
    with warnings.catch_warnings():
        # TensorFlow's variables are older than NumPy 2, and so is what Keras mends of tf2onnx.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        warnings.filterwarnings("ignore", "In the future `np.object`", FutureWarning)
        try:
            network(pixels[:1])  # Keras gives ONNX no network that was never called
            if row.keras_name is None:
                save_network(network, path)
            else:
                network.export(str(path), format=row.keras_name, verbose=False)
            row.postprocess(path)
            run = row.load(path)
            starts = range(0, len(pixels), _BATCH_SIZE)
            parts = [run(pixels[start : start + _BATCH_SIZE]) for start in starts]
        except Exception as error:  # every format's tools raise what they like
            if isinstance(error, OSError) and error.errno in _FULL:
                raise
            raise Unfinished(
                f"The network cannot be exported to {path.name}, and nothing was kept; another "
                f"format may hold it: {error}"
            ) from error
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
