"""A process of its own, for what needs Keras on another backend than it has in this one."""

import os
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from embedder.errors import EngineError
from embedder.libraries import claim_keras_backend, keras_backend

Result = TypeVar("Result")


def runs_here(engine: str) -> bool:
    """Whether an engine can run in this process: Keras has one backend in a process, for good."""
    return engine == "openvino" or keras_backend() in (None, engine)


def claim_process(engine: str) -> bool:
    """Whether an engine runs in this process; if so, Keras has its backend from now on."""
    return engine == "openvino" or claim_keras_backend(engine)


def call_apart(
    backend: str, function: Callable[..., Result], *arguments: object, gpus: Sequence[str] = ()
) -> Result:
    """Call a function in a new process, in which Keras runs on a backend.

    The process imports nothing of the user's script, and ends with this one. (One of
    `multiprocessing` would run the script again, and a Dask worker may not start any.)

    Args:
        backend: `tensorflow` or `jax`.
        function: Importable; what it takes, returns and raises must be picklable.
        *arguments: Of the function.
        gpus: Those that the process may take, by their ids; none for the CPU.

    Raises:
        EngineError: The process died.
    """
    environment = {"KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    if not gpus:
        environment["JAX_PLATFORMS"] = "cpu"
    life, ours = os.pipe()  # the system closes ours when this process ends, however that comes
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve({life})"
    process = subprocess.Popen(  # noqa: S603 - this program
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[life],
        process_group=0,  # Ctrl-C in a terminal is for this process, which ends the other
        env=os.environ | environment,
    )
    try:
        answer, _ = process.communicate(pickle.dumps((function, arguments)))
    finally:
        process.kill()
        process.wait()
        os.close(life)
        os.close(ours)
    if not answer:
        raise EngineError(
            f"A process in which Keras runs on {backend} died, with status {process.returncode}"
        )
    is_well, result = pickle.loads(answer)  # noqa: S301 - of this program
    if not is_well:
        raise result
    return cast(Result, result)


def serve(life: int) -> None:
    """Do what `call_apart` asks: in its process.

    Args:
        life: Pipe that is closed when the process that asks ends.
    """
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is not the answer
    found: tuple[bool, Any]
    try:
        function, arguments = pickle.load(sys.stdin.buffer)  # noqa: S301 - of this program
        found = True, function(*arguments)
    except Exception as error:  # noqa: BLE001 - whoever asks raises it
        error.add_note("".join(traceback.format_exception(error)))
        found = False, error
    try:
        content = pickle.dumps(found)
    except Exception as error:  # noqa: BLE001 - what libraries raise may not be picklable
        content = pickle.dumps((False, EngineError(f"{error}: {found[1]!r}")))
    with answer:
        answer.write(content)


def _end_with(life: int) -> None:
    os.read(life, 1)
    os._exit(1)
