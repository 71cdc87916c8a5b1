"""What the doctor says of a machine, with cards that are made up."""

import pytest

from embedder.checks import doctor
from embedder.engines import choice
from embedder.libraries import choose_keras_backend
from embedder.machine import Gpu

HOPPER = Gpu("GPU-1", "NVIDIA H100", (9, 0), 80 * 2**30, "580.159.04", "0000:3b:00.0")
BLACKWELL = Gpu("GPU-2", "RTX 5090", (12, 0), 32 * 2**30, "580.159.04")
UNKNOWN = Gpu("3")
CUDA_FOR_TENSORFLOW, CUDA_13 = "nvidia-curand-cu12", "jax-cuda13-plugin"


def install(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Say which of the wheels for CUDA are installed; those here have none."""
    monkeypatch.setattr(choice.ctypes.util, "find_library", lambda _: None)
    monkeypatch.setattr(
        choice,
        "installed",
        lambda asked: {name: "1.0" for name in asked if name in {*packages, "nvidia-cudnn-cu12"}},
    )


def test_without_a_gpu_engines_are_told_that_compute_on_the_cpu() -> None:
    facts = doctor.machine([])
    for name in ("openvino", "tensorflow"):
        assert facts[f"engine {name}"] == "can compute on the CPU"
    assert facts["engine auto"] == "takes openvino"
    assert not any(name.startswith("GPU") for name in facts)


@pytest.mark.parametrize("gpus", [[], [HOPPER]])
def test_an_engine_that_is_not_installed_is_told_with_what_to_install(
    gpus: list[Gpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    found = choice.importlib.util.find_spec
    monkeypatch.setattr(
        choice.importlib.util, "find_spec", lambda name: None if name == "jax" else found(name)
    )
    extra = "jax-cuda13" if gpus else "jax"
    told = doctor.machine(gpus)["engine jax"]
    assert told.endswith(f"not installed; pip install 'image-embedder[{extra}]'")


def test_each_card_is_told_and_which_engine_can_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, CUDA_FOR_TENSORFLOW, CUDA_13)
    facts = doctor.machine([HOPPER, BLACKWELL, UNKNOWN])
    assert facts["GPU 0"] == "NVIDIA H100, 80.0 GiB, compute capability 9.0, driver 580.159.04"
    assert facts["GPU 1"] == "RTX 5090, 32.0 GiB, compute capability 12.0, driver 580.159.04"
    assert facts["GPU 2"] == "GPU 3"
    assert facts["engine openvino"] == "can compute on the CPU"
    assert facts["engine jax"] == "can use GPU 0, 1, 2"
    assert facts["engine tensorflow"] == (
        "can use GPU 0, 2; cannot use GPU 1: gpu has code below compute capability 10.0; this "
        "card's is 12.0"
    )
    assert facts["engine auto"] == "takes jax"
    assert facts["precisions"] == "float32, bfloat16, float16 on jax"


def test_what_a_card_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    facts = doctor.machine([HOPPER])
    assert facts["engine jax"] == (
        "cannot use GPU 0: what it needs of CUDA is not installed; pip install "
        "'image-embedder[jax-cuda13]'"
    )
    assert facts["engine tensorflow"].endswith("pip install 'image-embedder[gpu]'")
    assert facts["engine auto"] == "takes openvino"


@pytest.mark.slow
def test_an_engine_that_cannot_use_a_card_after_all_is_a_failed_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where CUDA's parts do not fit the driver: by what is installed, JAX could use it."""
    choose_keras_backend("tensorflow")  # so that JAX has a process of its own
    install(monkeypatch, CUDA_13)
    found = doctor.self_test("mobilenet-v3-small", "random", [HOPPER])
    failed = {check.name: check.detail for check in found.checks if not check.passed}
    assert list(failed) == ["jax: computes"]
    assert failed["jax: computes"].startswith("jax must find the GPU GPU-1 that the machine has")
    assert found.feeding == {}  # not even of OpenVINO, which such a run would not take
    assert "openvino: as plain Keras" in [check.name for check in found.checks]
