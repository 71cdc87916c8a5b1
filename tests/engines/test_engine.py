"""The engines: the same vectors on each, whatever the batch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from embedder.api import extract
from embedder.backbones.graph import build, load_network
from embedder.backbones.layers import leaf_layers
from embedder.engines import Runtime, check_precision, choose, load
from embedder.engines.engine import out_of_memory
from embedder.engines.model_cache import exported_model
from embedder.errors import EngineError, OutOfMemory
from embedder.libraries import import_openvino
from embedder.machine import gpus
from embedder.recipe import Recipe

HERE = ("openvino", "tensorflow")  # in the process of the tests; test_jax.py has the third


def embed_all(
    recipe: Recipe, engine: str, batch_size: int, pixels: NDArray[np.uint8]
) -> np.ndarray:
    loaded = load(recipe, choose(engine, gpus()), batch_size, 2)
    return np.concatenate(
        [
            loaded.embed(pixels[i : i + batch_size])["embedding"]
            for i in range(0, len(pixels), batch_size)
        ]
    )


@pytest.mark.parametrize("engine", HERE)
def test_a_vector_does_not_depend_on_its_batch(
    lite0: Recipe, pixels: NDArray[np.uint8], engine: str
) -> None:
    alone = embed_all(lite0, engine, 1, pixels)
    together = embed_all(lite0, engine, 3, pixels)
    np.testing.assert_allclose(alone, together, atol=1e-5 * np.abs(alone).max())
    assert alone.shape == (6, 1280)
    assert alone.dtype == np.float32


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = one.astype(np.float64), other.astype(np.float64)
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def test_engines_agree(lite0: Recipe, pixels: NDArray[np.uint8]) -> None:
    one, other = (embed_all(lite0, name, 3, pixels) for name in HERE)
    assert cosines(one, other).min() > 0.9999
    assert np.linalg.norm(one[0] - one[1]) > 0.1 * np.linalg.norm(one[0])  # images do differ


def test_many_threads_may_embed_first(lite0: Recipe) -> None:
    """In a new process, where OpenVINO's binding has still to set itself up."""
    exported_model(lite0)
    code = """
import faulthandler, sys, threading
import numpy as np
from embedder import engines
from embedder.backbones.resolve import make_recipe
faulthandler.dump_traceback_later(60, exit=True)  # of a deadlock
sys.setswitchinterval(1e-6)
engine = engines.load(make_recipe(image_size=(64, 96)), engines.Runtime("openvino"), 1, 8)
together = threading.Barrier(8)
def embed():
    together.wait()
    engine.embed(np.zeros((1, 64, 96, 3), np.uint8))
threads = [threading.Thread(target=embed) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    for _ in range(3):  # without the care it takes, four of five such processes hang
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_openvino_telemetry_cannot_be_loaded() -> None:
    import_openvino()
    with pytest.raises(ImportError):
        __import__("openvino_telemetry")


def test_nothing_is_written_to_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)  # which JAX may have set in tests
    code = "from embedder.backbones import build, make_recipe; build(make_recipe())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def needs_precision(precision: str) -> None:
    try:
        check_precision(precision, Runtime("openvino"))
    except EngineError as error:
        pytest.skip(str(error))


def test_a_processor_says_itself_whether_it_has_bfloat16_where_openvino_is_missing() -> None:
    code = """
import sys
sys.modules["openvino"] = None
from embedder.engines import Runtime, check_precision
check_precision("bfloat16", Runtime("jax"))
"""
    with_openvino = True
    try:
        check_precision("bfloat16", Runtime("openvino"))
    except EngineError:
        with_openvino = False
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode == 0) == with_openvino
    assert ("needs a GPU, or a CPU with AVX-512 BF16" in done.stderr) != with_openvino


def test_bfloat16_is_close_to_float32_and_not_the_same(
    lite0: Recipe, pixels: NDArray[np.uint8]
) -> None:
    needs_precision("bfloat16")
    exact = embed_all(lite0, "openvino", 3, pixels)
    recipe = lite0.model_copy(update={"precision": "bfloat16"})
    rounded = embed_all(recipe, "openvino", 3, pixels)
    assert rounded.dtype == np.float32
    assert cosines(exact, rounded).min() > 0.99
    assert np.abs(exact - rounded).max() > 1e-4 * np.abs(exact).max()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_the_model_for_a_gpu_computes_in_its_precision(
    lite0: Recipe, pixels: NDArray[np.uint8], precision: str
) -> None:
    """Built here, where TensorFlow emulates these precisions on CPU; it runs fast on a GPU."""
    model = build(lite0.model_copy(update={"precision": precision}))
    layers = {layer.name: layer for layer in leaf_layers(model)}
    convolution = layers["stage2_block1_expand_conv"]
    assert convolution.compute_dtype == precision
    assert convolution.kernel.dtype == "float32"
    vectors = np.asarray(model(pixels)["embedding"])
    assert vectors.dtype == np.float32
    exact = embed_all(lite0, "openvino", 3, pixels)
    assert cosines(exact, vectors).min() > 0.99
    assert np.abs(exact - vectors).max() > 1e-4 * np.abs(exact).max()
    # The choice does not outlive the build.
    assert load_network(lite0).get_layer("stem_conv").compute_dtype == "float32"


def test_float16_on_a_cpu_is_refused(lite0: Recipe) -> None:
    recipe = lite0.model_copy(update={"precision": "float16"})
    with pytest.raises(EngineError, match=r"float16 needs a GPU. Received: precision=float16 on"):
        load(recipe, choose("auto", []), None, 2)


@pytest.mark.parametrize(
    "words",
    [
        "Failed to allocate memory",
        "std::bad_alloc",
        "OOM when allocating tensor",
        "RESOURCE_EXHAUSTED: Failed to load",
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(words: str) -> None:
    with pytest.raises(OutOfMemory, match=words), out_of_memory(RuntimeError):
        raise RuntimeError(f"CPU: {words}")
    with pytest.raises(OutOfMemory), out_of_memory(RuntimeError, MemoryError):
        raise MemoryError
    for other in ("shapes differ", "CUDA_ERROR: an illegal memory access was encountered"):
        with (
            pytest.raises(RuntimeError, match=f"^{other}$"),
            out_of_memory(RuntimeError, MemoryError),
        ):
            raise RuntimeError(other)


@pytest.mark.parametrize("engine", HERE)
def test_a_resized_engine_gives_the_same_vectors(
    lite0: Recipe, pixels: NDArray[np.uint8], engine: str
) -> None:
    whole = load(lite0, choose(engine, gpus()), 6, 2)
    half = whole.resized(3)
    assert (half.batch_size, half.num_parallel) == (3, whole.num_parallel)
    vectors = np.concatenate(
        [half.embed(pixels[:3])["embedding"], half.embed(pixels[3:])["embedding"]]
    )
    np.testing.assert_allclose(
        vectors, whole.embed(pixels)["embedding"], atol=1e-5 * np.abs(vectors).max()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_gpu_agrees_with_the_cpu(
    lite0: Recipe, pixels: NDArray[np.uint8], precision: str
) -> None:
    engine = load(
        lite0.model_copy(update={"precision": precision}), choose("tensorflow", gpus()), 3, 2
    )
    assert engine.device == "GPU"
    vectors = np.concatenate(
        [engine.embed(pixels[:3])["embedding"], engine.embed(pixels[3:])["embedding"]]
    )
    exact = embed_all(lite0, "openvino", 3, pixels)
    assert cosines(exact, vectors).min() > (0.9999 if precision == "float32" else 0.99)


@pytest.mark.gpu
def test_extraction_uses_every_gpu(archive: Path, tmp_path: Path) -> None:
    store = extract(archive, tmp_path / "out", shard_size=2, image_size=(64, 96))
    (run,) = store.runs()
    assert len(store) == 20
    assert run["engine"] == "tensorflow on GPU"
    assert run["workers"] == len(gpus())
