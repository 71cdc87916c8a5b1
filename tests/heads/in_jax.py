"""What the tests ask of Keras heads in a process in which Keras runs on JAX."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.heads.keras_head import KerasHead


def fit_and_save(
    settings: dict[str, Any], features: NDArray[np.float32], labels: NDArray[Any], path: Path
) -> tuple[Any, NDArray[np.float32]]:
    """Fit a head and write it; its description, and its logits."""
    head = KerasHead(**settings).fit(features, labels)
    assert sys.modules["keras"].config.backend() == "jax"
    head.save(path)
    return head.to_json(), head.decision_function(features)


def logits_of(path: Path, description: Any, features: NDArray[np.float32]) -> NDArray[np.float32]:
    """The logits of a head that was written in another process."""
    head = KerasHead.load(path, description)
    assert sys.modules["keras"].config.backend() == "jax"
    return head.decision_function(features)
