"""Which engine computes: the one that is asked for, or one that can use the GPUs there are."""

import ctypes.util
import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

from embedder.engines.engine import ENGINES, Runtime
from embedder.engines.own_process import runs_here
from embedder.errors import EngineError
from embedder.libraries import DISTRIBUTION, installed, logger
from embedder.machine import Gpu

Capability = tuple[int, int]  # what NVIDIA calls compute capability: (9, 0) of an H100


class _Wheels(NamedTuple):
    """NVIDIA cards that the published wheels of a framework have code for.

    Attributes:
        packages: By which they are known to be installed.
        extra: Of this package, that installs them.
        lowest: Compute capability of the oldest card.
        below: Compute capability of the first card that is too new; None if none is known.
        driver: Major version of the oldest driver.
        without: Compute capabilities in between that they have no code for.
    """

    packages: tuple[str, ...]
    extra: str
    lowest: Capability
    below: Capability | None
    driver: int
    without: tuple[Capability, ...] = ()


# As of TensorFlow 2.21 and JAX 0.10, by their pages on installation and NVIDIA's on CUDA 12 and 13.
# TensorFlow fails on Blackwell cards: tensorflow#89272 and #111958. JAX ends the process on a card
# that CUDA 12 does not know: openxla/xla#47982.
_WHEELS = {
    "tensorflow": [
        _Wheels(("nvidia-cudnn-cu12", "nvidia-curand-cu12"), "gpu", (6, 0), (10, 0), 525)
    ],
    "jax": [
        _Wheels(("jax-cuda13-plugin",), "jax-cuda13", (7, 5), None, 580),
        _Wheels(("jax-cuda12-plugin",), "jax-cuda12", (5, 2), None, 525, without=((10, 7),)),
    ],
}


def choose(name: str, gpus: Sequence[Gpu], is_here: bool = False) -> Runtime:
    """Resolve `auto`: JAX or TensorFlow where one of them can use all GPUs, OpenVINO elsewhere.

    It is told without importing them; see `why_not`.

    Args:
        name: One of `ENGINES`, or `auto`.
        gpus: Those there are, such as `machine.gpus` finds.
        is_here: Whether `auto` must be able to run in this process.

    Returns:
        The engine, with the GPUs if it computes on them.

    Raises:
        EngineError: The name is not `auto` and not one of `ENGINES`; or the engine computes on
            GPUs, and cannot use these.
    """
    if name not in (*ENGINES, "auto"):
        raise EngineError(f"`engine` must be auto or one of {', '.join(ENGINES)}. Received: {name}")
    ids = tuple(gpu.id for gpu in gpus)
    if name == "openvino":
        return Runtime(name)
    if name == "auto" and not gpus:
        return _on_cpu(is_here)
    if name != "auto":
        for gpu in gpus:
            if reason := why_not(name, gpu):
                raise EngineError(
                    f"`engine` {name} cannot use {gpu}: {reason}. To compute on the CPU instead, "
                    f"hide the GPU from the run: CUDA_VISIBLE_DEVICES="
                )
        return Runtime(name, ids)
    usable = usable_engines(gpus)
    if is_here:
        usable = [name for name in usable if runs_here(name)]
        return Runtime(usable[0], ids) if usable else _on_cpu(is_here)
    if usable:
        return Runtime(usable[0], ids)
    reasons = "; ".join(f"{name}: {why_not(name, gpus[0])}" for name in _WHEELS)
    logger.warning("%s is not used, and the CPU computes. %s", gpus[0], reasons)
    return _on_cpu(is_here)


def _on_cpu(is_here: bool) -> Runtime:
    """OpenVINO; JAX where there is no TensorFlow, by which networks are exported for OpenVINO."""
    has_both = all(map(importlib.util.find_spec, ("openvino", "tensorflow")))
    takes_jax = not has_both and importlib.util.find_spec("jax") is not None
    return Runtime("jax" if takes_jax and (not is_here or runs_here("jax")) else "openvino")


def available_engines(gpus: Sequence[Gpu]) -> list[str]:
    """Engines that are installed and can use these GPUs, or the CPU where there are none."""
    installed_ones = [name for name in ENGINES if importlib.util.find_spec(name) is not None]
    usable = usable_engines(gpus) if gpus else installed_ones
    return [name for name in installed_ones if name == "openvino" or name in usable]


def usable_engines(gpus: Sequence[Gpu]) -> list[str]:
    """Engines that can use all of these GPUs; the one to take if nothing else is known first."""
    return [name for name in ("jax", "tensorflow") if not any(why_not(name, gpu) for gpu in gpus)]


def why_not(engine: str, gpu: Gpu) -> str | None:
    """Why an engine cannot use a GPU, and what would help.

    Args:
        engine: One of `ENGINES`.
        gpu: The card; of what is not known of it, nothing is said.

    Returns:
        A reason; None if it can, as far as can be told without importing it.
    """
    if engine not in _WHEELS:
        return "it computes on the CPU"
    wheels = _WHEELS[engine]
    reasons = {which.extra: _does_not_fit(which, gpu) for which in wheels}
    fitting = [which for which in wheels if reasons[which.extra] is None]
    if not fitting:
        return "; ".join(filter(None, reasons.values()))
    advice = f"pip install '{DISTRIBUTION}[{fitting[0].extra}]'"
    if importlib.util.find_spec(engine) is None:
        return f"it is not installed; {advice}"
    if any(_is_installed(which) for which in fitting):
        return None
    for which in wheels:
        if _is_installed(which):
            return f"{reasons[which.extra]}; {advice}"
    return f"what it needs of CUDA is not installed; {advice}"


def supports(engine: str, gpu: Gpu) -> bool:
    """Whether the published wheels of an engine have code for a GPU, installed or not.

    Args:
        engine: One of `ENGINES`.
        gpu: The card; what is not known of it counts as fitting.
    """
    return any(_does_not_fit(which, gpu) is None for which in _WHEELS.get(engine, []))


def _does_not_fit(wheels: _Wheels, gpu: Gpu) -> str | None:
    capability = gpu.compute_capability
    if capability is not None:
        found = f"this card's is {capability[0]}.{capability[1]}"
        low, high = wheels.lowest, wheels.below
        if capability in wheels.without:
            return f"{wheels.extra} has no code for this card's compute capability"
        if capability < low:
            return f"{wheels.extra} has code from compute capability {low[0]}.{low[1]} on; {found}"
        if high is not None and capability >= high:
            return f"{wheels.extra} has code below compute capability {high[0]}.{high[1]}; {found}"
    major = gpu.driver.partition(".")[0]
    if major.isdecimal() and int(major) < wheels.driver:
        return f"{wheels.extra} needs driver {wheels.driver} or later; this one is {gpu.driver}"
    return None


def _is_installed(wheels: _Wheels) -> bool:
    if len(installed(wheels.packages)) == len(wheels.packages):
        return True
    # TensorFlow also takes the system's CUDA.
    return wheels is _WHEELS["tensorflow"][0] and ctypes.util.find_library("cudnn") is not None
