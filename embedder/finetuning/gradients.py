"""What TensorFlow and JAX do each its own way: compiled functions, gradients and steps of training.

TensorFlow's graphs read and write variables. JAX's functions have no state: they take the values of
variables, and give what these become.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from embedder.engines import import_jax
from embedder.libraries import import_keras, keras_backend

if TYPE_CHECKING:
    import keras


def compiled(function: Callable[..., Any], variables: "list[keras.Variable]") -> Any:
    """One graph for arrays of any shape.

    Args:
        function: Of arrays, and of variables, which it does not change.
        variables: All that it reads.
    """
    if keras_backend() != "jax":
        return _tensorflow_graph(function)
    pure = _without_state(function, variables)
    run = import_jax().jit(lambda values, *arrays: pure(values, *arrays)[0])
    return lambda *arrays: run([variable.value for variable in variables], *arrays)


def gradients_of(
    loss_of: Callable[..., Any],
    variables: "list[keras.Variable]",
    others: "Iterable[keras.Variable]",
) -> Any:
    """A function of a batch that gives the gradients of its loss, 0 where there is none.

    Args:
        loss_of: Of a batch.
        variables: By which gradients are taken.
        others: What the loss depends on besides; what is among `variables` is left out.
    """
    if keras_backend() != "jax":
        return _tensorflow_graph(lambda *batch: _tensorflow_gradients(loss_of, variables, batch)[1])
    jax, every = import_jax(), _joined(variables, others)

    def gradients(chosen: list[Any], rest: list[Any], *batch: Any) -> Any:
        def loss(chosen: list[Any]) -> Any:
            return _without_state(loss_of, every)([*chosen, *rest], *batch)[0]

        return jax.grad(loss)(chosen)

    run = jax.jit(gradients)
    rest = every[len(variables) :]
    return lambda *batch: run([v.value for v in variables], [v.value for v in rest], *batch)


def training_step(
    loss_of: Callable[..., Any],
    update: Callable[[list[Any]], None],
    variables: "list[keras.Variable]",
    state: "Iterable[keras.Variable]",
    frozen: "Iterable[keras.Variable]",
) -> Any:
    """A function of a batch that gives its loss, and changes variables by its gradients.

    Args:
        loss_of: Of a batch; may change some of `state`, such as statistics.
        update: What is done with the gradients; may change all of `variables` and of `state`.
        variables: By which gradients are taken. What is not among them costs nothing on the way
            back; scales of frozen normalisations, which Keras counts as not trainable, can be.
        state: All else that changes; what is among `variables` is left out.
        frozen: What does not; what is among the others is left out.
    """
    if keras_backend() != "jax":

        def step(*batch: Any) -> Any:
            loss, gradients = _tensorflow_gradients(loss_of, variables, batch)
            update(gradients)
            return loss

        return _tensorflow_graph(step)
    jax, changing, number = import_jax(), _joined(variables, state), len(variables)
    every = _joined(changing, frozen)

    def pure(values: list[Any], constants: list[Any], *batch: Any) -> Any:
        def loss(chosen: list[Any]) -> Any:
            whole = [*chosen, *values[number:], *constants]
            found, after = _without_state(loss_of, every)(whole, *batch)
            return found, after[number : len(values)]

        (found, rest), gradients = jax.value_and_grad(loss, has_aux=True)(values[:number])
        _, after = _without_state(update, changing)([*values[:number], *rest], gradients)
        return found, after

    run = jax.jit(pure, donate_argnums=0)

    def step_of_jax(*batch: Any) -> Any:
        constants = [variable.value for variable in every[len(changing) :]]
        with warnings.catch_warnings():
            # Keras's MixUp asks for int64, which JAX has as int32.
            warnings.filterwarnings("ignore", "Explicitly requested dtype int64", UserWarning)
            found, values = run([variable.value for variable in changing], constants, *batch)
        for variable, value in zip(changing, values, strict=True):
            variable.assign(value)
        return found

    return step_of_jax


def _joined(first: "Iterable[keras.Variable]", *more: "Iterable[keras.Variable]") -> Any:
    """All variables once, in their order."""
    found = {id(variable): variable for part in (first, *more) for variable in part}
    return list(found.values())


def _without_state(function: Callable[..., Any], variables: "list[keras.Variable]") -> Any:
    """The function with values of variables before its arguments, and those after it as well."""

    def pure(values: list[Any], *arguments: Any) -> Any:
        mapping = list(zip(variables, values, strict=True))
        with import_keras().StatelessScope(state_mapping=mapping) as scope:
            result = function(*arguments)
        return result, [scope.get_current_value(variable) for variable in variables]

    return pure


def _tensorflow_gradients(
    loss_of: Callable[..., Any], variables: "list[keras.Variable]", batch: Any
) -> tuple[Any, Any]:
    import tensorflow as tf

    values = [variable.value for variable in variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        loss = loss_of(*batch)
    none = tf.UnconnectedGradients.ZERO
    return loss, tape.gradient(loss, values, unconnected_gradients=none)


def _tensorflow_graph(function: Callable[..., Any]) -> Any:
    """One graph for batches of any size; Keras's layers need no rewriting of Python for it."""
    import tensorflow as tf

    # XLA is ten times slower on CPU for depthwise convolutions.
    return tf.function(function, reduce_retracing=True, jit_compile=False, autograph=False)
