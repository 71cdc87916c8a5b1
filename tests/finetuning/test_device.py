"""What trains: TensorFlow or JAX, by the cards; what cannot be used is refused at the start."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from embedder.engines import choice
from embedder.errors import EngineError
from embedder.finetuning import device
from embedder.finetuning.device import prepare_device, training_precision
from embedder.finetuning.finetune import finetune
from embedder.machine import Gpu

HOPPER = Gpu("GPU-1", "NVIDIA H100", (9, 0), 80 * 2**30, "580.159.04")
BLACKWELL = Gpu("GPU-2", "RTX 5090", (12, 0), 32 * 2**30, "580.159.04")
TURING = Gpu("GPU-3", "T4", (7, 5), 16 * 2**30, "580.159.04")
KEPLER = Gpu("GPU-4", "K80", (3, 7), 12 * 2**30, "470.10")
TF, JAX = "nvidia-curand-cu12", "jax-cuda13-plugin"


class Machine:
    """Says what is installed and what Keras runs on, and remembers what was taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[str] = []
        self.patch = monkeypatch
        monkeypatch.setattr(device, "_take", self.taken.append)
        monkeypatch.setattr(choice.ctypes.util, "find_library", lambda _: None)

    def has(self, *packages: str, backend: str | None = None) -> None:
        self.patch.setattr(device, "keras_backend", lambda: backend)
        there = {*packages, "nvidia-cudnn-cu12"}
        self.patch.setattr(
            choice, "installed", lambda asked: {name: "1.0" for name in asked if name in there}
        )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize(
    ("gpus", "packages", "backend", "taken"),
    [
        ([], [], None, "tensorflow"),
        ([], [], "jax", "jax"),
        ([HOPPER], [TF], None, "tensorflow"),
        ([HOPPER], [TF, JAX], None, "tensorflow"),
        ([HOPPER], [JAX], None, "jax"),
        ([HOPPER], [TF, JAX], "jax", "jax"),
        ([BLACKWELL], [TF, JAX], None, "jax"),
        ([HOPPER, BLACKWELL], [TF, JAX], None, "jax"),
    ],
)
def test_what_can_use_the_cards_is_taken(
    machine: Machine,
    gpus: list[Gpu],
    packages: list[str],
    backend: str | None,
    taken: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine.has(*packages, backend=backend)
    with caplog.at_level(logging.WARNING, "embedder"):
        prepare_device(gpus)
    assert machine.taken == [taken]
    assert caplog.messages == []


def test_jax_trains_where_there_is_no_tensorflow(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.has()
    found = device.importlib.util.find_spec
    monkeypatch.setattr(
        device.importlib.util,
        "find_spec",
        lambda name: None if name == "tensorflow" else found(name),
    )
    prepare_device([])
    assert machine.taken == ["jax"]


def test_the_cpu_is_not_taken_for_a_gpu_without_a_word(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.has()
    with caplog.at_level(logging.WARNING, "embedder"):
        prepare_device([HOPPER])
    assert machine.taken == ["tensorflow"]
    (told,) = caplog.messages
    assert told.startswith("NVIDIA H100 is not used, and the CPU trains. tensorflow: what it")
    assert "pip install 'image-embedder[gpu]'; jax:" in told
    assert told.endswith("pip install 'image-embedder[jax-cuda13]'")


@pytest.mark.parametrize(
    ("gpus", "packages", "backend", "words"),
    [
        ([BLACKWELL], [], None, r"RTX 5090. tensorflow: .* 10.0; this .* 12.0; jax: .*-cuda13\]'"),
        ([BLACKWELL], [TF], None, r"To train on the CPU, hide it: CUDA_VISIBLE_DEVICES=$"),
        ([KEPLER], [TF, JAX], None, r"K80. tensorflow: .* 6.0 on; .*; jax: .* 5.2 on; "),
        ([BLACKWELL, HOPPER], [TF], None, r"on the others, hide it: CUDA_VISIBLE_DEVICES=GPU-1$"),
        ([BLACKWELL], [TF, JAX], "tensorflow", r"; in this process Keras runs on tensorflow. To"),
    ],
)
def test_a_card_that_cannot_be_used_is_refused(
    machine: Machine, gpus: list[Gpu], packages: list[str], backend: str | None, words: str
) -> None:
    machine.has(*packages, backend=backend)
    with pytest.raises(EngineError, match=words):
        prepare_device(gpus)
    assert machine.taken == []


def test_the_precision_is_what_the_cards_compute_in(machine: Machine) -> None:
    machine.has(TF, backend="tensorflow")
    assert training_precision([]) == "float32"
    assert training_precision([HOPPER]) == "bfloat16"
    assert training_precision([HOPPER, TURING]) == "float32"
    assert training_precision([Gpu("0")]) == "float32"  # of which nothing is known
    machine.has(backend="tensorflow")  # without CUDA, on the CPU
    assert training_precision([HOPPER]) == "float32"


def test_it_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[finetune.__module__], "gpus", lambda: [KEPLER])
    with pytest.raises(EngineError, match="Fine-tuning must be able to use the GPU"):
        finetune(tmp_path / "no-model", tmp_path / "no-images", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_process_in_which_keras_runs_on_something_else_is_refused(tmp_path: Path) -> None:
    code = """
import sys
from embedder import EmbedderError, finetune
try:
    finetune(*sys.argv[1:], quiet=True)
except EmbedderError as error:
    print(error)
"""
    paths = [str(tmp_path / name) for name in ("no-model", "no-images", "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths],
        capture_output=True,
        text=True,
        env=os.environ | {"KERAS_BACKEND": "torch"},
    )
    assert "must be tensorflow. Received: a process in which it runs on torch" in done.stdout
    assert list(tmp_path.iterdir()) == []
