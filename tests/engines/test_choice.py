"""Which engine is taken, by what the cards are and what is installed."""

import logging
import os
import re
import subprocess
import sys

import pytest

from embedder.engines import Runtime, choice, choose, why_not
from embedder.errors import EngineError
from embedder.machine import Gpu

HOPPER = Gpu("GPU-1", "NVIDIA H100", (9, 0), 80 * 2**30, "580.159.04")
BLACKWELL = Gpu("GPU-2", "RTX 5090", (12, 0), 32 * 2**30, "580.159.04")
RUBIN = Gpu("GPU-5", "Rubin", (10, 7), 288 * 2**30, "590.10")
VOLTA = Gpu("GPU-3", "V100", (7, 0), 16 * 2**30, "535.10")
KEPLER = Gpu("GPU-4", "K80", (3, 7), 12 * 2**30, "470.10")
UNKNOWN = Gpu("0")

CUDA_FOR_TENSORFLOW = "nvidia-curand-cu12"  # which nothing else needs
CUDA_12, CUDA_13 = "jax-cuda12-plugin", "jax-cuda13-plugin"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Says which of the wheels for CUDA are installed; those here have none."""
    monkeypatch.setattr(choice.ctypes.util, "find_library", lambda _: None)
    return monkeypatch


def only(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    there = {*packages, "nvidia-cudnn-cu12"}  # which JAX for CUDA 12 needs too
    monkeypatch.setattr(
        choice, "installed", lambda asked: {name: "1.0" for name in asked if name in there}
    )


def test_without_a_gpu_openvino_computes() -> None:
    assert choose("auto", []) == Runtime("openvino")
    assert choose("openvino", [HOPPER]) == Runtime("openvino")  # it computes on the CPU
    assert choose("tensorflow", []) == Runtime("tensorflow")
    assert choose("jax", []) == Runtime("jax")


@pytest.mark.parametrize("missing", ["tensorflow", "openvino"])
def test_without_tensorflow_or_openvino_jax_computes(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    found = choice.importlib.util.find_spec
    monkeypatch.setattr(
        choice.importlib.util, "find_spec", lambda name: None if name == missing else found(name)
    )
    assert choose("auto", []) == Runtime("jax")


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(EngineError, match=r"one of openvino, tensorflow, jax. Received: torch"):
        choose("torch", [])


@pytest.mark.parametrize(
    ("packages", "gpu", "engine"),
    [
        ([CUDA_FOR_TENSORFLOW], HOPPER, "tensorflow"),
        ([CUDA_FOR_TENSORFLOW], VOLTA, "tensorflow"),
        ([CUDA_FOR_TENSORFLOW], BLACKWELL, None),
        ([CUDA_FOR_TENSORFLOW], KEPLER, None),
        ([CUDA_12], HOPPER, "jax"),
        ([CUDA_12], VOLTA, "jax"),
        ([CUDA_12], BLACKWELL, "jax"),
        ([CUDA_13], BLACKWELL, "jax"),
        ([CUDA_12], RUBIN, None),
        ([CUDA_13], RUBIN, "jax"),
        ([CUDA_13], VOLTA, None),
        ([CUDA_12], KEPLER, None),
        ([CUDA_FOR_TENSORFLOW, CUDA_13], HOPPER, "jax"),
        ([CUDA_FOR_TENSORFLOW, CUDA_13], BLACKWELL, "jax"),
        ([CUDA_FOR_TENSORFLOW, CUDA_13], VOLTA, "tensorflow"),
        ([CUDA_13], UNKNOWN, "jax"),
        ([], HOPPER, None),
    ],
)
def test_auto_takes_an_engine_that_knows_the_card(
    install: pytest.MonkeyPatch,
    packages: list[str],
    gpu: Gpu,
    engine: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    only(install, *packages)
    with caplog.at_level(logging.WARNING, "embedder"):
        found = choose("auto", [gpu])
    assert found == (Runtime(engine, (gpu.id,)) if engine else Runtime("openvino"))
    assert (f"{gpu} is not used, and the CPU computes" in caplog.text) == (engine is None)


def test_all_cards_must_be_known(install: pytest.MonkeyPatch) -> None:
    only(install, CUDA_FOR_TENSORFLOW)
    assert choose("auto", [HOPPER, VOLTA]) == Runtime("tensorflow", ("GPU-1", "GPU-3"))
    assert choose("auto", [HOPPER, BLACKWELL]) == Runtime("openvino")


def test_in_a_process_in_which_keras_runs_on_tensorflow_auto_is_not_jax(
    install: pytest.MonkeyPatch,
) -> None:
    install.setattr(choice, "runs_here", lambda engine: engine != "jax")
    only(install, CUDA_FOR_TENSORFLOW, CUDA_13)
    assert choose("auto", [HOPPER], is_here=True) == Runtime("tensorflow", ("GPU-1",))
    assert choose("auto", [BLACKWELL], is_here=True) == Runtime("openvino")


@pytest.mark.parametrize(
    ("engine", "packages", "gpu", "words"),
    [
        ("openvino", [], HOPPER, "computes on the CPU"),
        ("tensorflow", [CUDA_FOR_TENSORFLOW], BLACKWELL, r"below .* 10.0; this card's is 12.0"),
        ("tensorflow", [], HOPPER, r"of CUDA is not installed; pip install '.*\[gpu\]'"),
        ("jax", [], HOPPER, r"of CUDA is not installed; pip install '.*\[jax-cuda13\]'"),
        ("jax", [], VOLTA, r"of CUDA is not installed; pip install '.*\[jax-cuda12\]'"),
        ("jax", [CUDA_13], VOLTA, r"from compute capability 7.5 on; this .* 7.0; .*jax-cuda12\]'"),
        ("jax", [CUDA_12], KEPLER, r"jax-cuda12 has code from compute capability 5.2 on"),
        (
            "jax",
            [CUDA_13],
            Gpu("0", "RTX 4090", (8, 9), 0, "550.1"),
            r"jax-cuda13 needs driver 580 or later; this one is 550.1; pip .*jax-cuda12\]'",
        ),
    ],
)
def test_why_an_engine_cannot_use_a_card_is_told_with_what_helps(
    install: pytest.MonkeyPatch, engine: str, packages: list[str], gpu: Gpu, words: str
) -> None:
    only(install, *packages)
    assert re.search(words, why_not(engine, gpu) or "")
    if engine != "openvino":
        with pytest.raises(EngineError, match=f"cannot use {gpu.name}: .*{words}.*_DEVICES=$"):
            choose(engine, [gpu])


def test_what_is_not_installed_is_told(install: pytest.MonkeyPatch) -> None:
    only(install, CUDA_12)
    install.setattr(choice.importlib.util, "find_spec", lambda _: None)
    reason = why_not("jax", VOLTA)
    assert reason is not None
    assert reason.startswith("it is not installed; pip install 'image-embedder[jax-cuda12]'")


def test_keras_gets_ready_for_jax_only_where_a_preset_is_embedded_by_it() -> None:
    """In a process of its own, as Keras has one backend in a process."""
    code = """
from embedder.engines import choice, ready_keras
from embedder.libraries import keras_backend
from embedder.machine import Gpu
gpu = Gpu("GPU-1", "NVIDIA H100", (9, 0), 80 * 2**30, "580.159.04")
wheels = ["nvidia-cudnn-cu12"]
choice.installed = lambda asked: {name: "1.0" for name in asked if name in wheels}
ready_keras("jax", "resnet50", lambda: [])
ready_keras("openvino", "hub:a", lambda: [gpu])
ready_keras("auto", "hub:a", lambda: [])
ready_keras("auto", "hub:a", lambda: [gpu])
print(keras_backend())
wheels = ["jax-cuda12-plugin"]
ready_keras("auto", "hub:a", lambda: [gpu])
print(keras_backend())
"""
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["None", "jax"]
