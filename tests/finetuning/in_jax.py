"""What the tests ask of fine-tuning in a process in which Keras runs on JAX."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.errors import Unfinished
from embedder.finetuning.channels import channel_group
from embedder.finetuning.finetune import finetune
from embedder.finetuning.network import TrainableNetwork
from embedder.finetuning.options import TuneOptions
from embedder.finetuning.trainer import Epoch
from embedder.libraries import import_keras
from tests.finetuning.test_trainer import (
    PLAIN,
    groups_of,
    kernels_of,
    make_examples,
    make_tiny,
    run,
)

AUGMENT = ("flip", "mixup")


def arrays_of(tiny: TrainableNetwork) -> list[NDArray[Any]]:
    return [np.asarray(v.value) for v in [*tiny.network.variables, *tiny.head.variables]]


def trained_without_chance() -> tuple[list[float | None], list[NDArray[Any]], list[NDArray[Any]]]:
    """Losses and weights of a training without random layers, with averages and momentum; and
    the channels that matter most before it."""
    tiny = make_tiny()
    head = import_keras().Sequential([import_keras().Input((6,)), tiny.head.layers[-1]])
    tiny = replace(tiny, head=head)
    random = np.random.default_rng(0)  # backends draw first weights of their own
    for kernel in [*kernels_of(tiny), head.layers[-1].kernel]:
        kernel.assign(random.normal(scale=0.3, size=kernel.shape))
    layers = [tiny.network.get_layer(f"block{number}_conv") for number in (1, 2)]
    group = channel_group(tiny, layers, make_examples(), TuneOptions(strategy="partial"))
    masks = [mask for mask in group.masks if mask is not None]
    schedule = replace(PLAIN, epochs=3, batch_size=5, ema=0.5, optimizer="adamw", weight_decay=0.1)
    epochs = run(tiny, groups_of(tiny), schedule)
    return [epoch.loss for epoch in epochs], arrays_of(tiny), masks


def killed_and_continued(folder: Path) -> dict[str, Any]:
    """Weights and losses of a training, and of one that was killed and went on."""
    schedule = replace(PLAIN, epochs=4, batch_size=5, optimizer="adam", warmup=0.2)
    whole, first, second = make_tiny(), make_tiny(), make_tiny()
    losses = [epoch.loss for epoch in run(whole, groups_of(whole), schedule, augment=AUGMENT)]

    def kill(epoch: Epoch) -> None:
        if epoch.number == 2:
            raise KeyboardInterrupt

    more = {"augment": AUGMENT, "checkpoint": folder / "jax.npz"}
    try:
        run(first, groups_of(first), schedule, watch=kill, **more)
    except KeyboardInterrupt:
        again = run(second, groups_of(second), schedule, **more)
    try:
        run(first, groups_of(first), schedule, checkpoint=folder / "tensorflow.npz")
    except Unfinished as error:
        refused = str(error)
    return {
        "backend": sys.modules["keras"].config.backend(),
        "losses": [losses, [epoch.loss for epoch in again]],
        "weights": [arrays_of(whole), arrays_of(second)],
        "refused": refused,
    }


def tuned_metrics(model: Path, photos: Path, out: Path, strategy: str) -> dict[str, Any]:
    """Metrics of a model that is tuned on JAX."""
    options = TuneOptions(strategy=strategy, epochs=1, batch_size=8, learning_rate=1e-3)
    metrics = finetune(model, photos, out, options).metrics
    return metrics | {"backend": sys.modules["keras"].config.backend()}
