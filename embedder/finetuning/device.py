"""What trains: TensorFlow, on the GPUs of this machine or on its CPU."""

from collections.abc import Sequence

from embedder.engines import supports, why_not
from embedder.errors import EngineError
from embedder.libraries import choose_keras_backend, logger
from embedder.machine import Gpu


def prepare_device(gpus: Sequence[Gpu]) -> None:
    """Have Keras run on TensorFlow in this process, and see that it can use the GPUs.

    Where all that it lacks is its parts for CUDA, the CPU trains, and a warning says so.

    Args:
        gpus: Those there are, such as `machine.gpus` finds.

    Raises:
        EngineError: TensorFlow has no code for one of them, is not installed, or Keras runs on
            something else in this process.
    """
    choose_keras_backend("tensorflow")
    unknown = [gpu for gpu in gpus if not supports("tensorflow", gpu)]
    if unknown:
        others = ",".join(gpu.id for gpu in gpus if gpu not in unknown)
        what = "Hide it, to train on the others" if others else "Hide it, to train on the CPU"
        raise EngineError(
            f"Fine-tuning runs on TensorFlow, which must have code for the GPU. Received: "
            f"{unknown[0]}: {why_not('tensorflow', unknown[0])}. {what}: "
            f"CUDA_VISIBLE_DEVICES={others}"
        )
    for gpu in gpus:
        if reason := why_not("tensorflow", gpu):
            logger.warning("%s is not used, and the CPU trains. tensorflow: %s", gpu, reason)
            return
