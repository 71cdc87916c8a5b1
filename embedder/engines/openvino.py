"""OpenVINO, on CPU."""

import queue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.engines.engine import Features, out_of_memory
from embedder.engines.model_cache import exported_model
from embedder.libraries import import_openvino
from embedder.recipe import Recipe


class OpenVinoEngine:
    """OpenVINO on CPU: as many streams as threads, each embedding a batch of its own."""

    name = "openvino"
    device = "CPU"

    def __init__(self, recipe: Recipe, batch_size: int, num_threads: int) -> None:
        """Compile for CPU, from the cached export where there is one.

        Args:
            recipe: Of the network.
            batch_size: Images of each call.
            num_threads: CPU threads to use.
        """
        self.batch_size = batch_size
        self.num_parallel = num_threads
        self._recipe = recipe
        core = import_openvino().Core()
        model = core.read_model(exported_model(recipe))
        model.reshape([batch_size, *recipe.image_size, 3])
        with out_of_memory(RuntimeError, MemoryError):
            settings = openvino_settings(recipe.precision, num_threads)
            compiled = core.compile_model(model, self.device, settings)
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(num_threads):
            self._requests.put(compiled.create_infer_request())
        # The binding's first call sets up static data while it may lose the GIL: two threads that
        # make it together wait for each other for ever. So the first call is made here, alone.
        self.embed(np.zeros((batch_size, *recipe.image_size, 3), np.uint8))

    def upload(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The batch itself: it is where it is computed."""
        return pixels

    def embed(self, pixels: NDArray[np.uint8]) -> Features:
        """Embed one batch, (batch_size, height, width, 3)."""
        request = self._requests.get()
        try:
            with out_of_memory(RuntimeError, MemoryError):
                request.infer({"pixels": pixels}, share_inputs=True)
            return {name: request.get_tensor(name).data.copy() for name in self._recipe.columns}
        finally:
            self._requests.put(request)

    def resized(self, batch_size: int) -> "OpenVinoEngine":
        """Compile again, for another batch size."""
        return OpenVinoEngine(self._recipe, batch_size, self.num_parallel)


def openvino_settings(precision: str, num_threads: int) -> dict[str, Any]:
    """What OpenVINO compiles a model with: a stream for each thread, in a precision of `Recipe`."""
    return {
        "NUM_STREAMS": num_threads,
        "INFERENCE_NUM_THREADS": num_threads,
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
        # Decode threads share the cores: a pinned thread would wait for its own.
        "ENABLE_CPU_PINNING": False,
    }
