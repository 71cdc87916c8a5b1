"""Run a recipe's model fast on this device.

Every engine runs the same Keras model, from uint8 pixels to float32 vectors, at a fixed batch
size: a new shape would cost a compilation, so a smaller last batch is padded by the caller.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from embedder.errors import EngineError, OutOfMemory
from embedder.libraries import import_openvino

ENGINES = ("openvino", "tensorflow", "jax")

Features = dict[str, NDArray[np.float32]]  # by column of the recipe


class Engine(Protocol):
    """A compiled model.

    Attributes:
        name: One of `ENGINES`.
        device: Such as `CPU`.
        batch_size: Images in a call of `embed`.
        num_parallel: Calls of `embed` that may run at the same time, each in its own thread.
    """

    name: str
    device: str
    batch_size: int
    num_parallel: int

    def upload(self, pixels: NDArray[np.uint8]) -> Any:
        """Bring one batch to the device, for engines of this name; on a CPU nothing is to be done.

        Args:
            pixels: uint8 (batch_size, height, width, 3), which must not change until they are
                embedded.

        Raises:
            OutOfMemory: The batch is too large for the device.
        """
        ...

    def embed(self, pixels: Any) -> Features:
        """Embed one batch, uint8 (batch_size, height, width, 3), or what `upload` made of it.

        Returns:
            By column, float32 (batch_size, dim), or (batch_size, height, width, channels) where
            the recipe does not pool.

        Raises:
            OutOfMemory: The batch is too large for the device.
        """
        ...

    def resized(self, batch_size: int) -> Self:
        """The same model at another batch size."""
        ...


class Runtime(NamedTuple):
    """What computes: an engine, one of `ENGINES`, and the GPUs it may take; none for the CPU."""

    engine: str
    gpus: tuple[str, ...] = ()


def check_precision(precision: str, runtime: Runtime) -> None:
    """Check that a precision, as in `Recipe`, is computed in hardware.

    Raises:
        EngineError: It is not.
    """
    if precision == "float32" or runtime.gpus:
        return
    if precision == "float16":
        raise EngineError(
            "`precision` float16 needs a GPU. Received: precision=float16 on CPU; "
            "use float32, or bfloat16 where the CPU has it"
        )
    if not _cpu_has_bfloat16():
        raise EngineError(
            "`precision` bfloat16 needs a GPU, or a CPU with AVX-512 BF16 or AMX. "
            "Received: precision=bfloat16 on a CPU with neither; use float32"
        )


def _cpu_has_bfloat16() -> bool:
    if importlib.util.find_spec("openvino") is None:
        with contextlib.suppress(OSError):  # not Linux
            return not {"avx512_bf16", "amx_bf16"}.isdisjoint(
                Path("/proc/cpuinfo").read_text().split()
            )
        return False
    capabilities = import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "BF16" in capabilities


@contextlib.contextmanager
def out_of_memory(*kinds: type[Exception]) -> Iterator[None]:
    """Tell a batch that does not fit into memory from other errors of these kinds.

    Raises:
        OutOfMemory: It does not fit.
    """
    try:
        yield
    except kinds as error:
        text = str(error).lower()
        words = "memory", "bad_alloc", "oom when allocating", "resource_exhausted"
        is_memory = isinstance(error, MemoryError) or any(word in text for word in words)
        is_memory &= "illegal memory access" not in text  # a fault of a card
        if not is_memory:
            raise
        raise OutOfMemory(f"The batch does not fit into memory: {error}") from error
