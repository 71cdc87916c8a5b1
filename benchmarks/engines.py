"""Images per second of the network alone: every engine and precision, several networks.

Networks have random weights and their classifier cut off; batches are in memory. Beside each
figure stands its share of the peak of this machine, measured in the same run and precision by
OpenVINO: the better of a matrix multiplication (GEMM, 2048x2048x2048) and of a chain of 3x3
convolutions (256 channels, 14x14), on a stream per core. The convolution is the faster here, as
it uses each value nine times: a network of such convolutions exceeds the GEMM alone.

    python benchmarks/engines.py --seconds 3 --rounds 3
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from speed import images_per_second_on_jax, per_second

from embedder import engines
from embedder.backbones import build, make_recipe
from embedder.engines.openvino import openvino_settings
from embedder.errors import EngineError
from embedder.libraries import import_openvino, versions
from embedder.machine import num_cores
from embedder.recipe import DEFAULT_BACKBONE

GEMM_SIDE = 2048
BATCH_SIZES = {"openvino": 4, "tensorflow": 32, "jax": 32}
# Multiplications and additions of one image at 224x224, as the networks' papers give them, times
# two: Tan and Le 2019 (Lite: its release notes), Sandler 2018, He 2015, Simonyan 2014.
NETWORKS = {
    "efficientnet-lite0": 2 * 0.39e9,
    "mobilenet-v2": 2 * 0.30e9,
    "resnet50": 2 * 3.86e9,
    "vgg16": 2 * 15.3e9,
}


def openvino_call(model: Any, inputs: list[Any], precision: str) -> Callable[[], Any]:
    """A function that runs one inference on a stream of its own."""
    openvino = import_openvino()
    settings = openvino_settings(precision, num_cores())
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    requests = [compiled.create_infer_request() for _ in range(num_cores())]
    requests[0].infer(inputs)

    def call() -> None:
        request = requests.pop()
        request.infer(inputs, share_inputs=True)
        requests.append(request)

    return call


def gemm_call(precision: str) -> tuple[Callable[[], Any], float]:
    """A function that multiplies two matrices, and its number of operations."""
    openvino = import_openvino()
    from openvino import opset13 as ops

    generator = np.random.default_rng(0)
    left = ops.parameter([GEMM_SIDE, GEMM_SIDE], np.float32, "left")
    right = ops.constant(generator.random((GEMM_SIDE, GEMM_SIDE), np.float32))
    model = openvino.Model([ops.matmul(left, right, False, False)], [left])
    values = generator.random((GEMM_SIDE, GEMM_SIDE), np.float32)
    return openvino_call(model, [values], precision), 2 * GEMM_SIDE**3


def convolution_call(precision: str) -> tuple[Callable[[], Any], float]:
    """A function that runs a chain of 3x3 convolutions, and its number of operations."""
    openvino = import_openvino()
    from openvino import opset13 as ops

    number, batch, channels, side = 4, 8, 256, 14
    generator = np.random.default_rng(0)
    maps = ops.parameter([batch, channels, side, side], np.float32, "maps")
    output = maps
    for _ in range(number):
        kernel = ops.constant(generator.random((channels, channels, 3, 3), np.float32))
        output = ops.convolution(output, kernel, [1, 1], [1, 1], [1, 1], [1, 1])
    model = openvino.Model([output], [maps])
    values = generator.random((batch, channels, side, side), np.float32)
    operations = number * batch * 2 * channels * channels * 9 * side * side
    return openvino_call(model, [values], precision), operations


def network_calls(name: str, precisions: list[str]) -> dict[tuple[str, str], Callable[[], Any]]:
    """A function that runs one batch, by engine and precision: of one network, exported once."""
    # The speed does not depend on the values; only Lite0's weights come with the installation.
    network = build(make_recipe(name, None if name == DEFAULT_BACKBONE else "random"))
    generator = np.random.default_rng(0)
    pixels = {
        engine: generator.integers(0, 256, (size, 224, 224, 3), dtype=np.uint8)
        for engine, size in BATCH_SIZES.items()
    }
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.xml"
        network.export(str(path), format="openvino", verbose=False)
        model = import_openvino().Core().read_model(path)
    model.reshape(list(pixels["openvino"].shape))
    inputs = [pixels["openvino"]]
    calls = {("openvino", p): openvino_call(model, inputs, p) for p in precisions}

    import tensorflow as tf

    run = tf.function(lambda batch: network(batch, training=False), jit_compile=False)
    run(tf.constant(pixels["tensorflow"]))
    calls["tensorflow", "float32"] = lambda: run(tf.constant(pixels["tensorflow"]))[
        "embedding"
    ].numpy()
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    options = parser.parse_args()
    precisions = ["float32"]
    try:
        engines.check_precision("bfloat16", engines.Runtime("openvino"))
        precisions.append("bfloat16")
    except EngineError as error:
        print(f"bfloat16: left out. {error}")
    print(f"{num_cores()} cores, " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    products = {
        (precision, name): make(precision)
        for precision in precisions
        for name, make in (("GEMM", gemm_call), ("convolution", convolution_call))
    }
    rates: dict[tuple[str, str], list[float]] = {key: [] for key in products}
    speeds: dict[tuple[str, str, str], list[float]] = {}
    for name in options.networks:
        calls = network_calls(name, precisions)
        for _ in range(options.rounds):
            for key, (call, operations) in products.items():
                rates[key].append(per_second(call, num_cores(), options.seconds) * operations)
            for (engine, precision), call in calls.items():
                num_parallel = num_cores() if engine == "openvino" else 1
                rate = per_second(call, num_parallel, options.seconds)
                speeds.setdefault((name, engine, precision), []).append(rate * BATCH_SIZES[engine])
            rate = engines.call_apart(
                "jax", images_per_second_on_jax, name, BATCH_SIZES["jax"], options.seconds
            )
            speeds.setdefault((name, "jax", "float32"), []).append(rate)
    peaks = dict.fromkeys(precisions, 0.0)
    for (precision, name), values in rates.items():
        median = statistics.median(values)
        peaks[precision] = max(peaks[precision], median)
        print(
            f"{name:<19} openvino   {precision:<8} {median / 1e9:7.0f} GFLOP/s "
            f"({min(values) / 1e9:.0f} to {max(values) / 1e9:.0f})"
        )
    for (name, engine, precision), values in speeds.items():
        median = statistics.median(values)
        print(
            f"{name:<19} {engine:<10} {precision:<8} {median:7.1f} images/s "
            f"({min(values):.1f} to {max(values):.1f}), "
            f"{median * NETWORKS[name] / 1e9:6.0f} GFLOP/s, "
            f"{median * NETWORKS[name] / peaks[precision]:.0%} of the peak"
        )


if __name__ == "__main__":
    main()
