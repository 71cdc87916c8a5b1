"""Engines against plain Keras: those two that the process of the tests can run."""

from embedder.checks.check import Check
from embedder.checks.conformance import check_features, check_input_stage
from embedder.checks.trial import try_engine
from embedder.engines import choose
from embedder.machine import gpus
from embedder.recipe import Recipe


def checks_of_features(recipe: Recipe) -> list[Check]:
    """That a network gets its own pixels on each engine, and that engines agree."""
    runtimes = [choose(name, gpus()) for name in ("openvino", "tensorflow")]
    trials = [try_engine(recipe, runtime) for runtime in runtimes]
    return [check_input_stage(recipe), *check_features(recipe, trials)]
