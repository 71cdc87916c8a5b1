"""The JAX engine, on the CPU: the same vectors as the others, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from embedder.engines import Runtime, call_apart, load
from embedder.errors import EngineError, WeightsError
from embedder.recipe import Recipe
from embedder.store import Store
from tests.engines import in_jax
from tests.engines.test_engine import cosines, embed_all, needs_precision
from tests.support import wait_until


@pytest.fixture(scope="module")
def facts(lite0: Recipe, pixels: NDArray[np.uint8]) -> dict[str, Any]:
    needs_precision("bfloat16")
    return call_apart("jax", in_jax.facts, lite0, pixels)


def test_its_vectors_are_those_of_the_other_engines(
    facts: dict[str, Any], lite0: Recipe, pixels: NDArray[np.uint8]
) -> None:
    for other in ("openvino", "tensorflow"):
        assert cosines(facts["whole"], embed_all(lite0, other, 3, pixels)).min() > 0.9999
    assert facts["whole"].shape == (6, 1280)
    assert facts["whole"].dtype == np.float32


def test_a_vector_does_not_depend_on_its_batch(facts: dict[str, Any]) -> None:
    tolerance = 1e-5 * np.abs(facts["whole"]).max()
    np.testing.assert_allclose(facts["halves"], facts["whole"], atol=tolerance)
    for way in ("again", "uploaded"):
        np.testing.assert_array_equal(facts[way], facts["whole"])
    assert facts["sizes"] == [6, 3]
    assert facts["is_unchanged"]


def test_nothing_on_its_way_imports_tensorflow(facts: dict[str, Any]) -> None:
    assert (facts["backend"], facts["device"]) == ("jax", "CPU")
    assert not facts["has_tensorflow"]


def test_bfloat16_is_close_to_float32_and_not_the_same(facts: dict[str, Any]) -> None:
    exact, rounded = facts["whole"], facts["bfloat16"]
    assert rounded.dtype == np.float32
    assert cosines(exact, rounded).min() > 0.99
    assert np.abs(exact - rounded).max() > 1e-4 * np.abs(exact).max()


def test_what_was_compiled_is_kept_for_the_next_process(
    facts: dict[str, Any], lite0: Recipe, pixels: NDArray[np.uint8]
) -> None:
    again = call_apart("jax", in_jax.facts, lite0, pixels)
    assert again["num_misses"] == 0
    assert again["num_hits"] > 0
    np.testing.assert_array_equal(again["whole"], facts["whole"])


def test_a_batch_that_does_not_fit_into_memory_is_told(lite0: Recipe) -> None:
    # Much too large: JAX on a CPU ends the process where only a little is missing.
    reason, vector = call_apart("jax", in_jax.embed_in, lite0, 4, 2**14)
    assert reason.startswith("The batch does not fit into memory: RESOURCE_EXHAUSTED")
    pixels = np.full((1, *lite0.image_size, 3), 200, np.uint8)
    expected = load(lite0, Runtime("openvino"), 1, 1).embed(pixels)["embedding"]
    assert cosines(vector, expected).min() > 0.9999


def test_a_process_in_which_keras_runs_on_another_backend_is_refused(
    lite0: Recipe, pixels: NDArray[np.uint8]
) -> None:
    embed_all(lite0, "tensorflow", 3, pixels)
    with pytest.raises(EngineError, match=r"must be jax. Received: .* runs on tensorflow. Start"):
        load(lite0, Runtime("jax"), 1, 1)


def test_what_goes_wrong_in_a_process_apart_is_raised_here(lite0: Recipe) -> None:
    other = lite0.model_copy(update={"weights": "0" * 64})
    with pytest.raises(WeightsError, match="The recipe was made with weights 000"):
        call_apart("jax", in_jax.facts, other, None)


def test_a_process_apart_that_dies_is_told() -> None:
    with pytest.raises(EngineError, match="in which Keras runs on jax died, with status 3"):
        call_apart("jax", os._exit, 3)
    assert os.environ.get("KERAS_BACKEND") != "jax"


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_process_apart_ends_with_the_one_that_asks(tmp_path: Path) -> None:
    """Also where that one is killed while it waits."""
    code = """
import sys
from embedder.engines import call_apart
from tests.engines import in_jax
call_apart("jax", in_jax.sleep, sys.argv[1])
"""
    file = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", code, str(file)]) as process:
        wait_until(lambda: file.is_file() and file.read_text() != "")
        process.kill()
    pid = int(file.read_text())
    wait_until(lambda: not is_running(pid))


def test_a_damaged_compilation_cache_is_made_again(
    lite0: Recipe,
    pixels: NDArray[np.uint8],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EMBEDDER_CACHE", str(tmp_path))
    sizes, vectors = call_apart("jax", in_jax.with_damaged_cache, lite0, pixels, tmp_path)
    assert min(sizes) > 100
    for again in vectors[1:]:
        np.testing.assert_array_equal(again, vectors[0])
    assert capfd.readouterr().err == ""


def test_a_compilation_cache_that_cannot_be_written_is_told(
    lite0: Recipe,
    pixels: NDArray[np.uint8],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EMBEDDER_CACHE", str(tmp_path / "file"))
    assert call_apart("jax", in_jax.vectors, lite0, pixels).shape == (6, 1280)
    told = capfd.readouterr().err
    assert "What JAX compiles cannot be kept in" in told
    assert "UserWarning" not in told


def run_without_tensorflow(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command where TensorFlow cannot be imported, in this process or in its children."""
    code = """
import sys
sys.modules["tensorflow"] = sys.modules["tensorflow_text"] = None
from embedder.cli import main
sys.argv = ["embedder", *sys.argv[1:]]
main()
"""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_it_runs_where_there_is_no_tensorflow(archive: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    arguments = ["extract", archive, store, "--image-size", "64x92"]  # which nothing has exported
    done = run_without_tensorflow(*arguments, "--engine", "openvino")
    assert "needs TensorFlow to export efficientnet-lite0" in done.stderr
    assert done.returncode == 2
    assert not store.exists()
    done = run_without_tensorflow(*arguments, "--engine", "jax")
    assert done.returncode == 0, done.stderr
    assert "20 in the store, 20 new" in done.stdout
    assert "arning" not in done.stderr
    (run,) = Store(str(store)).runs()
    assert run["engine"] == "jax on CPU"
