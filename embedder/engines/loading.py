"""Compile a recipe's model for an engine, with a batch that fits into memory."""

from collections.abc import Callable, Sequence

from embedder.backbones import is_preset
from embedder.engines import jax, tensorflow
from embedder.engines.batch_size import (
    find_batch_size,
    remember_failure,
    remembered_batch_size,
    remembered_speed,
)
from embedder.engines.choice import choose, usable_engines
from embedder.engines.engine import Engine, Runtime, check_precision
from embedder.engines.model_cache import exported_model
from embedder.engines.openvino import OpenVinoEngine
from embedder.engines.own_process import call_apart
from embedder.errors import EngineError, OutOfMemory
from embedder.libraries import keras_backend, logger
from embedder.machine import Gpu
from embedder.recipe import Recipe

_ENGINES: dict[str, Callable[[Recipe, int, int], Engine]] = {
    "openvino": OpenVinoEngine,
    "tensorflow": tensorflow.TensorFlowEngine,
    "jax": jax.JaxEngine,
}
# On a CPU, a larger batch no longer fits the caches, which decoding uses too.
_DEFAULT_BATCH_SIZE = {"openvino": 4, "tensorflow": 32, "jax": 32}


def load(recipe: Recipe, runtime: Runtime, batch_size: int | None, num_threads: int) -> Engine:
    """Compile a recipe's model.

    Args:
        recipe: What to compute.
        runtime: As `choose` gives it.
        batch_size: Images in a batch, fewer if they do not fit into memory; None for what
            `find_batch_size` found on this machine, or else the engine's own default.
        num_threads: CPU threads to use.

    Raises:
        EngineError: The engine cannot run here, not even with a batch of one, or not in a process
            in which Keras has another backend.
        WeightsError: The weights are missing or are not those of the recipe.
    """
    check_precision(recipe.precision, runtime)
    size = batch_size or remembered_batch_size(recipe, runtime, num_threads)
    size = size or _DEFAULT_BATCH_SIZE[runtime.engine]
    while True:
        try:
            engine = _ENGINES[runtime.engine](recipe, size, num_threads)
            break
        except OutOfMemory:
            if size == 1:
                raise
            size //= 2
    if runtime.gpus and engine.device == "CPU":
        raise EngineError(
            f"{runtime.engine} must find the GPU {runtime.gpus[0]} that the machine has. Received: "
            f"none, as happens where its parts for CUDA are missing or do not fit the driver. "
            f"`--engine openvino` computes on the CPU"
        )
    return engine


def prepare(recipe: Recipe, runtime: Runtime, is_here: bool) -> None:
    """Build the model once before a run, so that what cannot be built is refused before it.

    On OpenVINO the model is exported to the cache, where the run then finds it. On JAX the engine
    that this process loads next takes it.

    Args:
        recipe: Of the network.
        runtime: What will compute.
        is_here: Whether in this process, which takes no GPU otherwise.

    Raises:
        RequestError: The network has no such layer, or does not take such images.
        WeightsError: The weights are missing, or do not fit the network.
        EngineError: The engine is not installed.
    """
    if runtime.engine == "openvino":
        exported_model(recipe)
    elif not is_here:
        call_apart(runtime.engine, _build_on_cpu, recipe, runtime.engine)
    elif runtime.engine == "jax":
        jax.prepare_model(recipe)
    else:
        tensorflow.build_on_cpu(recipe)


def _build_on_cpu(recipe: Recipe, engine: str) -> None:
    if engine == "jax":
        jax.build_on_host(recipe)
    else:
        tensorflow.build_on_cpu(recipe)


def ready_keras(engine: str, backbone: str, gpus: Callable[[], Sequence[Gpu]]) -> None:
    """Have Keras run on JAX where that will compute, before the recipe of a preset imports it.

    Keras has one backend in a process, for good: on another, the run would need a second process.
    Does nothing for networks whose recipes need no Keras, and where it has a backend already.

    Args:
        engine: One of `ENGINES`, or `auto`.
        backbone: As `backbones.make_recipe` takes it.
        gpus: Tells those there are, such as `machine.gpus`; asked only where that matters.

    Raises:
        EngineError: JAX is asked for, and not installed.
    """
    if not is_preset(backbone) or keras_backend() is not None:
        return
    found = gpus() if engine == "auto" else []
    if engine == "jax" or (found and usable_engines(found)[:1] == ["jax"]):
        jax.import_jax()


def fastest(
    recipe: Recipe, gpus: Sequence[Gpu], runtime: Runtime, num_threads: int, is_worth_it: bool
) -> Runtime:
    """What computes fastest on these GPUs, where several engines can use them.

    Each is measured once, at the batch size that suits it, in a process of its own.

    Args:
        recipe: Of the network.
        gpus: Those there are.
        runtime: What is taken otherwise.
        num_threads: CPU threads of a worker.
        is_worth_it: Whether the run is long enough to measure now what was not measured before.
    """
    runtimes = [runtime._replace(engine=name) for name in usable_engines(gpus)]
    if len(runtimes) < 2:
        return runtime
    speeds = {}
    for each in runtimes:
        speed = remembered_speed(recipe, each, num_threads)
        if speed is None and is_worth_it:
            speed = _measured_speed(recipe, each, num_threads)
        if speed is None:
            return runtime
        speeds[each] = speed
    best = max(speeds, key=lambda each: speeds[each])
    return best if speeds[best] else choose("auto", [])


def _measured_speed(recipe: Recipe, runtime: Runtime, num_threads: int) -> float:
    """Images/s of an engine at its best batch size; 0 where it cannot compute here."""
    logger.info("measuring how fast %s is here, once", runtime.engine)
    one = runtime._replace(gpus=runtime.gpus[:1])
    try:
        call_apart(one.engine, _measure, recipe, one, num_threads, gpus=one.gpus)
    except Exception as error:  # noqa: BLE001 - a framework that does not know a card may raise any
        logger.warning("%s cannot be used: %s", runtime.engine, error)
        remember_failure(recipe, runtime, num_threads)
    return remembered_speed(recipe, runtime, num_threads) or 0.0


def _measure(recipe: Recipe, runtime: Runtime, num_threads: int) -> None:
    find_batch_size(load(recipe, runtime, None, num_threads), recipe, runtime, num_threads)
