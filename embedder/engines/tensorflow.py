"""TensorFlow, on GPU or CPU."""

import contextlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder import backbones
from embedder.engines.engine import Features, out_of_memory
from embedder.libraries import choose_keras_backend, import_keras
from embedder.recipe import Recipe


class TensorFlowEngine:
    """TensorFlow: on the first GPU that the process may see, or else on CPU."""

    name = "tensorflow"

    def __init__(self, recipe: Recipe, batch_size: int, num_threads: int) -> None:
        """Build the model and trace it for one batch size.

        Args:
            recipe: Of the network.
            batch_size: Images of each call.
            num_threads: CPU threads to use.
        """
        choose_keras_backend("tensorflow")
        import_keras()
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # already set, by an earlier engine
            tf.config.threading.set_intra_op_parallelism_threads(num_threads)
        _let_gpu_memory_grow()
        self._is_exact = recipe.precision == "float32"
        self._compile(backbones.build(recipe), recipe.image_size, batch_size)

    def _compile(self, model: Any, image_size: tuple[int, int], batch_size: int) -> None:
        import tensorflow as tf

        self._model, self._image_size, self.batch_size = model, image_size, batch_size
        self.device = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
        # On a GPU, one batch travels to the device while another is computed; on a CPU,
        # TensorFlow spreads one batch over the cores by itself.
        self.num_parallel = 2 if self.device == "GPU" else 1
        self._run = tf.function(
            lambda pixels: model(pixels, training=False),
            input_signature=[tf.TensorSpec((batch_size, *image_size, 3), tf.uint8)],
            # XLA is ten times slower on CPU for depthwise convolutions, so never there.
            jit_compile=self.device == "GPU",
        )
        # The first call compiles: better here than while others wait. In float32 a GPU would round
        # the factors of products to 10 bits, unless told not to; that is for the whole process.
        before = tf.config.experimental.tensor_float_32_execution_enabled()
        tf.config.experimental.enable_tensor_float_32_execution(before and not self._is_exact)
        try:
            self.embed(np.zeros((batch_size, *image_size, 3), np.uint8))
        finally:
            tf.config.experimental.enable_tensor_float_32_execution(before)

    def upload(self, pixels: NDArray[np.uint8]) -> Any:
        """Bring a batch to the device."""
        import tensorflow as tf

        with out_of_memory(tf.errors.ResourceExhaustedError), tf.device(f"/{self.device}:0"):
            return tf.convert_to_tensor(pixels)

    def embed(self, pixels: Any) -> Features:
        """Embed one batch, (batch_size, height, width, 3), or what `upload` made of it."""
        import tensorflow as tf

        with out_of_memory(tf.errors.ResourceExhaustedError), tf.device(f"/{self.device}:0"):
            features = self._run(tf.convert_to_tensor(pixels))
            return {name: array.numpy() for name, array in features.items()}

    def resized(self, batch_size: int) -> "TensorFlowEngine":
        """Trace the same model again, for another batch size."""
        engine = TensorFlowEngine.__new__(TensorFlowEngine)
        engine._is_exact = self._is_exact
        engine._compile(self._model, self._image_size, batch_size)
        return engine


def build_on_cpu(recipe: Recipe) -> None:
    """Build the model to see that it can be, without taking a GPU."""
    choose_keras_backend("tensorflow")
    import_keras()
    import tensorflow as tf

    _let_gpu_memory_grow()
    with tf.device("/CPU:0"):
        backbones.build(recipe)


def _let_gpu_memory_grow() -> None:
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # already set, by an earlier engine
        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)
