"""JAX, on GPU or CPU: the same Keras model, on Keras's JAX backend."""

import hashlib
import importlib.util
import os
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder import backbones
from embedder.engines.engine import Features, out_of_memory
from embedder.errors import EngineError
from embedder.libraries import DISTRIBUTION, choose_keras_backend, import_keras, logger
from embedder.machine import cache_folder
from embedder.recipe import Recipe

_RANDOM_INITIALIZERS = (  # of Keras, each known by this name and in lower case with underscores
    *("GlorotNormal", "GlorotUniform", "HeNormal", "HeUniform", "LecunNormal", "LecunUniform"),
    *("Orthogonal", "RandomNormal", "RandomUniform", "TruncatedNormal", "VarianceScaling"),
)
_NOT_KEPT = (
    "What JAX compiles cannot be kept in %s, and the next run compiles it again. "
    "Set EMBEDDER_CACHE to a folder that can be written"
)
_IN_FLIGHT = 3  # batches on a GPU: one on its way there, one in work, one on its way back


class JaxEngine:
    """JAX: on the first GPU that the process may see, or else on CPU."""

    name = "jax"

    def __init__(
        self,
        recipe: Recipe,
        batch_size: int,
        num_threads: int,  # noqa: ARG002 - JAX takes all cores that the process has
    ) -> None:
        """Build the model, and compile it for one batch size.

        Args:
            recipe: Of the network.
            batch_size: Images of each call.
            num_threads: Not used.
        """
        jax = import_jax()
        model = _prepared.pop(recipe, None) or build_on_host(recipe)
        device = _first_device()
        variables = model.trainable_variables, model.non_trainable_variables
        arrays = [[variable.value for variable in of_kind] for of_kind in variables]
        with out_of_memory(jax.errors.JaxRuntimeError):
            self._arrays = jax.block_until_ready(jax.device_put(arrays, device))
        # In float32 a GPU would round the factors of products to 10 bits, unless told not to.
        rounding = "highest" if recipe.precision == "float32" else None

        def run(arrays: Any, pixels: Any) -> Any:
            with jax.default_matmul_precision(rounding):
                features, _ = model.stateless_call(*arrays, pixels, training=False)
            return features

        self._run = run
        self._compile(device, recipe.image_size, batch_size)

    def _compile(self, device: Any, image_size: tuple[int, int], batch_size: int) -> None:
        jax = import_jax()
        self._device, self._image_size, self.batch_size = device, image_size, batch_size
        self.device = "CPU" if device.platform == "cpu" else "GPU"
        self.num_parallel = 1 if self.device == "CPU" else _IN_FLIGHT
        # Pixels are not donated: bytes are of no use for vectors, and several networks share them.
        # Another function for each size, so that what is compiled goes with the engine.
        self._compiled = jax.jit(partial(self._run))
        # The first call compiles: better here than while others wait.
        with _kept_compilations():
            self.embed(np.zeros((batch_size, *image_size, 3), np.uint8))

    def upload(self, pixels: NDArray[np.uint8]) -> Any:
        """Bring a batch to the device, in the background; `pixels` must not change meanwhile."""
        import jax

        with out_of_memory(jax.errors.JaxRuntimeError):
            return jax.device_put(pixels, self._device)

    def embed(self, pixels: Any) -> Features:
        """Embed one batch, (batch_size, height, width, 3), or what `upload` made of it."""
        import jax

        with out_of_memory(jax.errors.JaxRuntimeError):
            features = self._compiled(self._arrays, jax.device_put(pixels, self._device))
            for array in features.values():
                array.copy_to_host_async()
            return {name: np.asarray(array) for name, array in features.items()}

    def resized(self, batch_size: int) -> "JaxEngine":
        """Compile the same model again, for another batch size."""
        engine = JaxEngine.__new__(JaxEngine)
        engine._arrays, engine._run = self._arrays, self._run
        engine._compile(self._device, self._image_size, batch_size)
        return engine


# What `prepare` has built, until an engine takes it.
_prepared: dict[Recipe, Any] = {}


def prepare_model(recipe: Recipe) -> None:
    """Build the model for the engine that this process makes next."""
    if recipe not in _prepared:
        _prepared[recipe] = build_on_host(recipe)


def forget_prepared(recipe: Recipe) -> None:
    """Let go of a model that was prepared for an engine which was not loaded."""
    _prepared.pop(recipe, None)


def build_on_host(recipe: Recipe) -> Any:
    """Build the model in the host's memory, where its first weights, soon replaced, cost least."""
    jax = import_jax()
    place: AbstractContextManager[Any] = nullcontext()
    if _first_device().platform != "cpu":
        with suppress(RuntimeError):  # JAX_PLATFORMS names the GPU alone
            place = jax.default_device(jax.local_devices(backend="cpu")[0])
    with place, _no_random_values(), _kept_compilations():
        return backbones.build(recipe)


def _first_device() -> Any:
    """The device that computes.

    Raises:
        EngineError: JAX finds none.
    """
    jax = import_jax()
    try:
        return jax.local_devices()[0]
    except Exception as error:  # JAX fails in many ways, also by an assertion
        raise EngineError(
            f"JAX must find a device. Received: none, with JAX_PLATFORMS="
            f"{os.environ.get('JAX_PLATFORMS', '')} ({error or type(error).__name__})"
        ) from error


@contextmanager
def _kept_compilations() -> Iterator[None]:
    """Tell if what JAX compiles cannot be kept; what cannot be read is dropped, and made again."""
    import jax

    with warnings.catch_warnings(record=True) as caught:
        yield
    folder = _cache_of_jax()
    is_ours = str(folder) == jax.config.jax_compilation_cache_dir
    for warning in caught:
        text = str(warning.message)
        if "Error reading persistent compilation cache" in text and is_ours:
            with suppress(OSError):
                for file in folder.iterdir():  # JAX would never write over it
                    file.unlink()
        elif "Error writing persistent compilation cache" in text and is_ours:
            logger.warning(_NOT_KEPT, folder)
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def _no_random_values() -> AbstractContextManager[Any]:
    """Have layers begin with noughts, as their weights are loaded anyway.

    JAX compiles a program for random values of each shape: EfficientNetV2-S took 10 s to build.
    """
    keras = import_keras()

    class Noughts(keras.initializers.Initializer):  # type: ignore[name-defined, misc]
        def __init__(self, **_: object) -> None:
            """Take what any of them is made with."""

        def __call__(self, shape: tuple[int, ...], dtype: Any = None) -> NDArray[Any]:
            return np.zeros(shape, dtype)

    as_snake = [re.sub("(?<!^)(?=[A-Z])", "_", name).lower() for name in _RANDOM_INITIALIZERS]
    scope: AbstractContextManager[Any] = keras.utils.custom_object_scope(
        dict.fromkeys([*_RANDOM_INITIALIZERS, *as_snake], Noughts)
    )
    return scope


def import_jax() -> Any:
    """Import JAX, and have Keras run on it.

    Raises:
        EngineError: JAX is not installed, or Keras runs on something else in this process.
    """
    if importlib.util.find_spec("jax") is None:
        raise EngineError(
            f"`engine` jax needs JAX. Install it with: pip install '{DISTRIBUTION}[jax]', or for a "
            f"GPU '{DISTRIBUTION}[jax-cuda13]' or '{DISTRIBUTION}[jax-cuda12]'"
        )
    choose_keras_backend("jax")
    # Others may be at work on the card, and a batch that does not fit is halved anyway.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import jax

    _keep_compilations()
    return jax


@cache
def _keep_compilations() -> None:
    """Have JAX keep what it compiles, unless the process has chosen a folder of its own."""
    import jax

    if jax.config.jax_compilation_cache_dir is not None:
        return
    folder = _cache_of_jax()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        logger.warning(_NOT_KEPT, folder)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _cache_of_jax() -> Path:
    """Folder of what JAX has compiled, for processors that have what this one has."""
    features = platform.processor()
    try:
        with Path("/proc/cpuinfo").open() as lines:
            features = next((line for line in lines if line.startswith("flags")), features)
    except OSError:  # not Linux
        pass
    digest = hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()
    return cache_folder() / "jax" / digest[:16]
