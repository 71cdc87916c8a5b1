"""A process of its own, for what needs Keras on another backend than it has in this one."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from embedder.errors import EngineError
from embedder.libraries import children_with, keras_backend

Result = TypeVar("Result")


def runs_here(engine: str) -> bool:
    """Whether an engine can run in this process: Keras has one backend in a process, for good."""
    return engine == "openvino" or keras_backend() in (None, engine)


def call_apart(
    backend: str, function: Callable[..., Result], *arguments: object, with_gpus: bool = False
) -> Result:
    """Call a function in a new process, in which Keras runs on a backend.

    Args:
        backend: `tensorflow` or `jax`.
        function: Importable; what it takes, returns and raises must be picklable.
        *arguments: Of the function.
        with_gpus: Whether the process may take those that this one may.

    Raises:
        EngineError: The process died.
    """
    environment = {"KERAS_BACKEND": backend} | ({} if with_gpus else {"CUDA_VISIBLE_DEVICES": ""})
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            with children_with(environment):
                result = process.submit(function, *arguments)
            return result.result()
        except BrokenProcessPool as error:
            raise EngineError(
                f"A process in which Keras runs on {backend} died: {error} A script that starts "
                f"processes needs `if __name__ == '__main__':`"
            ) from error
