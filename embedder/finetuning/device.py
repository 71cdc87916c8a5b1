"""What trains: TensorFlow or JAX, on the GPUs of this machine or on its CPU."""

import importlib.util
from collections.abc import Sequence

from embedder.engines import import_jax, supports, why_not
from embedder.errors import EngineError
from embedder.libraries import choose_keras_backend, keras_backend, logger
from embedder.machine import Gpu

_BACKENDS = ("tensorflow", "jax")  # the one to take if it can first
_BFLOAT16 = (8, 0)  # compute capability of the first cards that compute in it


def prepare_device(gpus: Sequence[Gpu]) -> None:
    """Choose what Keras runs on in this process, if it is not chosen yet: what can use the GPUs.

    Where parts for CUDA are all that is missing, the CPU trains, and a warning says so.

    Args:
        gpus: Those there are, such as `machine.gpus` finds.

    Raises:
        EngineError: Nothing has code for one of the GPUs, or nothing that trains is installed, or
            Keras runs on something that does not.
    """
    now = keras_backend()
    names = [name for name in _BACKENDS if importlib.util.find_spec(name) is not None]
    if now is not None or not names:
        names = [now or _BACKENDS[0]]
    for name in names:
        if not any(why_not(name, gpu) for gpu in gpus):
            _take(name)
            return
    reasons = {gpu: _reasons(gpu, now) for gpu in gpus}
    unknown = [gpu for gpu in gpus if not supports(names[0], gpu)]
    if unknown:
        others = ",".join(gpu.id for gpu in gpus if gpu not in unknown)
        where = "the others" if others else "the CPU"
        raise EngineError(
            f"Fine-tuning must be able to use the GPU. Received: {unknown[0]}. "
            f"{reasons[unknown[0]]}. To train on {where}, hide it: CUDA_VISIBLE_DEVICES={others}"
        )
    _take(names[0])
    gpu = next(gpu for gpu in gpus if why_not(names[0], gpu))
    logger.warning("%s is not used, and the CPU trains. %s", gpu, reasons[gpu])


def _reasons(gpu: Gpu, now: str | None) -> str:
    told = [f"{name}: {why_not(name, gpu)}" for name in _BACKENDS if why_not(name, gpu)]
    if now is not None and len(told) < len(_BACKENDS):
        told.append(f"in this process Keras runs on {now}")
    return "; ".join(told)


def _take(name: str) -> None:
    if name == "jax":
        import_jax()
        logger.info("training on JAX")
    else:
        choose_keras_backend("tensorflow")  # which refuses a process in which Keras has a third


def training_precision(gpus: Sequence[Gpu]) -> str:
    """What networks are trained in on this device: bfloat16 on GPUs that compute in it.

    On a CPU TensorFlow trains in bfloat16 at half the speed of float32.

    Args:
        gpus: Those there are, such as `machine.gpus` finds.
    """
    backend = keras_backend() or ""
    have_it = [
        gpu.compute_capability is not None
        and gpu.compute_capability >= _BFLOAT16
        and why_not(backend, gpu) is None
        for gpu in gpus
    ]
    return "bfloat16" if have_it and all(have_it) else "float32"
