"""What trains: a GPU that TensorFlow has no code for is refused before anything is read."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from embedder.engines import choice
from embedder.errors import EngineError
from embedder.finetuning.device import prepare_device
from embedder.finetuning.finetune import finetune
from embedder.machine import Gpu

HOPPER = Gpu("GPU-1", "NVIDIA H100", (9, 0), 80 * 2**30, "580.159.04")
BLACKWELL = Gpu("GPU-2", "RTX 5090", (12, 0), 32 * 2**30, "580.159.04")
OLD_DRIVER = Gpu("GPU-3", "RTX 3090", (8, 6), 24 * 2**30, "470.10")
CUDA_FOR_TENSORFLOW = "nvidia-cudnn-cu12"


@pytest.fixture(params=[True, False], ids=["cuda", "no-cuda"])
def has_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether TensorFlow's parts for CUDA are installed."""
    packages = {CUDA_FOR_TENSORFLOW: "1.0"} if request.param else {}
    monkeypatch.setattr(choice.ctypes.util, "find_library", lambda _: None)
    monkeypatch.setattr(
        choice, "installed", lambda asked: {x: packages[x] for x in asked if x in packages}
    )
    return bool(request.param)


@pytest.mark.parametrize("gpus", [[], [HOPPER], [HOPPER, Gpu("1")]])
def test_the_cpu_is_not_taken_for_a_gpu_without_a_word(
    gpus: list[Gpu], has_cuda: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "embedder"):
        prepare_device(gpus)
    expected = [
        "NVIDIA H100 is not used, and the CPU trains. tensorflow: what it needs of CUDA is not "
        "installed; pip install 'image-embedder[gpu]'"
    ]
    assert caplog.messages == (expected if gpus and not has_cuda else [])


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        ([BLACKWELL], r"RTX 5090: .* 10.0; this card's is 12.0. .* on the CPU: \w*_DEVICES=$"),
        ([OLD_DRIVER], r"RTX 3090: gpu needs driver 525 or later; this one is 470.10. Hide"),
        ([BLACKWELL, HOPPER], r"Received: RTX 5090: .* the others: CUDA_VISIBLE_DEVICES=GPU-1$"),
    ],
)
def test_a_card_that_tensorflow_has_no_code_for_is_refused(
    gpus: list[Gpu], words: str, has_cuda: bool
) -> None:
    with pytest.raises(EngineError, match=words):
        prepare_device(gpus)


def test_it_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[finetune.__module__], "gpus", lambda: [BLACKWELL])
    with pytest.raises(EngineError, match="Fine-tuning runs on TensorFlow"):
        finetune(tmp_path / "no-model", tmp_path / "no-images", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def run_finetune(folder: Path, before: str, **environment: str) -> str:
    """What `embedder finetune` says, of a model and images that do not exist."""
    code = f"import sys\n{before}\nfrom embedder.cli import main\nmain()"
    paths = [str(folder / name) for name in ("no-model", "no-images", "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, "finetune", *paths],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 2
    assert list(folder.iterdir()) == []
    return " ".join(done.stderr.split())


def test_a_process_in_which_keras_runs_on_jax_is_refused(tmp_path: Path) -> None:
    told = run_finetune(tmp_path, "", KERAS_BACKEND="jax")
    assert re.search(r"needs tensorflow. Received: a process in which it runs on jax", told)


def test_a_machine_without_tensorflow_is_refused(tmp_path: Path) -> None:
    told = run_finetune(tmp_path, "sys.modules['tensorflow'] = None")
    assert "This needs tensorflow, which is not installed: pip install tensorflow" in told
