"""Compile a recipe's model for an engine, with a batch that fits into memory."""

from embedder.engines.batch_size import remembered_batch_size
from embedder.engines.engine import Engine, Runtime, check_precision
from embedder.engines.model_cache import exported_model
from embedder.engines.openvino import OpenVinoEngine
from embedder.engines.tensorflow import TensorFlowEngine, build_on_cpu
from embedder.errors import OutOfMemory
from embedder.recipe import Recipe

# On a CPU, a larger batch no longer fits the caches, which decoding uses too.
_DEFAULT_BATCH_SIZE = {"openvino": 4, "tensorflow": 32}


def load(recipe: Recipe, runtime: Runtime, batch_size: int | None, num_threads: int) -> Engine:
    """Compile a recipe's model.

    Args:
        recipe: What to compute.
        runtime: As `choose` gives it.
        batch_size: Images in a batch, fewer if they do not fit into memory; None for what
            `find_batch_size` found on this machine, or else the engine's own default.
        num_threads: CPU threads to use.

    Raises:
        EngineError: The engine cannot run here, not even with a batch of one.
        WeightsError: The weights are missing or are not those of the recipe.
    """
    check_precision(recipe.precision, runtime)
    engine = OpenVinoEngine if runtime.engine == "openvino" else TensorFlowEngine
    size = batch_size or remembered_batch_size(recipe, runtime, num_threads)
    size = size or _DEFAULT_BATCH_SIZE[runtime.engine]
    while True:
        try:
            return engine(recipe, size, num_threads)
        except OutOfMemory:
            if size == 1:
                raise
            size //= 2


def prepare(recipe: Recipe, runtime: Runtime) -> None:
    """Build the model once before a run, so that what cannot be built is refused before it.

    On OpenVINO the model is exported to the cache, where the run then finds it.

    Raises:
        RequestError: The network has no such layer, or does not take such images.
        WeightsError: The weights are missing, or do not fit the network.
    """
    if runtime.engine == "openvino":
        exported_model(recipe)
    else:
        build_on_cpu(recipe)  # the GPUs are the workers'
