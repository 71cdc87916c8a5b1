"""Training: rates, masks, frozen statistics, early stopping, and going on after a kill."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax

from embedder.errors import Unfinished
from embedder.finetuning.augmentation import Augmenter
from embedder.finetuning.inputs import Examples
from embedder.finetuning.network import TrainableNetwork, thaw_normalisation
from embedder.finetuning.schedule import Group, Schedule, make_optimizer
from embedder.finetuning.trainer import Epoch, train
from embedder.libraries import import_keras

HEIGHT, WIDTH = 8, 6
NUM_IMAGES = 24
PLAIN = Schedule(epochs=1, batch_size=NUM_IMAGES, learning_rate=0.1, optimizer="sgd", warmup=0.0)


def make_tiny() -> TrainableNetwork:
    """Two convolutions with BatchNormalization, a mean, and a head with dropout."""
    keras = import_keras()
    layers, zeros = keras.layers, keras.initializers.GlorotUniform
    pixels = keras.Input((HEIGHT, WIDTH, 3))
    x = pixels
    for number, filters in enumerate((4, 6), start=1):
        x = layers.Conv2D(filters, 3, kernel_initializer=zeros(number), name=f"block{number}_conv")(
            x
        )
        x = layers.BatchNormalization(name=f"block{number}_bn", trainable=False)(x)
        x = layers.ReLU()(x)
    features = layers.GlobalAveragePooling2D()(x)
    network = keras.Model(pixels, x)
    head = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dropout(0.3, seed=5),
            layers.Dense(3, kernel_initializer=zeros(7)),
        ]
    )
    upper = keras.Model(pixels, {"features": features})
    return TrainableNetwork(network, lambda x: x / 127.5 - 1.0, None, upper, head)


def make_examples(seed: int = 0) -> Examples:
    random = np.random.default_rng(seed)
    codes = np.arange(NUM_IMAGES) % 3
    # Each class has a colour of its own, so that there is something to learn.
    pixels = random.integers(0, 128, (NUM_IMAGES, 2, HEIGHT, WIDTH, 3))
    pixels[np.arange(NUM_IMAGES), :, :, :, codes] += 100
    return Examples(
        inputs=pixels.astype(np.uint8),
        targets=np.eye(3, dtype=np.float32)[codes],
        weights=np.ones(NUM_IMAGES, np.float32),
        train=np.arange(18),
        validation=np.arange(18, NUM_IMAGES),
        are_pixels=True,
    )


def kernels_of(tiny: TrainableNetwork) -> list[Any]:
    return [tiny.network.get_layer(f"block{number}_conv").kernel for number in (1, 2)]


def groups_of(tiny: TrainableNetwork, rates: tuple[float, float] = (1.0, 1.0)) -> list[Group]:
    one, two = kernels_of(tiny)
    return [
        Group("head", list(tiny.head.trainable_variables)),
        Group("block2", [two], rates[1]),
        Group("block1", [one], rates[0]),
    ]


def run(
    tiny: TrainableNetwork, groups: list[Group], schedule: Schedule, **more: Any
) -> list[Epoch]:
    examples = more.pop("examples", make_examples())
    augmenter = Augmenter(more.pop("augment", ()), 0)
    return train(tiny, groups, examples, schedule, augmenter, **more)


def state_of(tiny: TrainableNetwork) -> list[NDArray[Any]]:
    return [v.numpy() for v in [*tiny.network.variables, *tiny.head.variables]]


def test_the_rate_of_a_group_scales_its_update() -> None:
    updates = []
    examples = replace(make_examples(), validation=np.arange(0))  # so that the last are kept
    for rates in ((1.0, 1.0), (0.25, 0.5)):
        tiny = make_tiny()
        before = [kernel.numpy() for kernel in kernels_of(tiny)]
        run(tiny, groups_of(tiny, rates), PLAIN, examples=examples)
        pairs = zip(kernels_of(tiny), before, strict=True)
        updates.append([kernel.numpy() - old for kernel, old in pairs])
    assert np.abs(updates[0][0]).max() > 1e-4
    np.testing.assert_allclose(updates[1][0], 0.25 * updates[0][0], rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(updates[1][1], 0.5 * updates[0][1], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("warmup", "rates"),
    [
        (0.1, {0: 0.0, 1: 0.1, 2: 0.2, 11: 0.1, 20: 0.0}),
        (0.0, {0: 0.2, 10: 0.1, 20: 0.0}),
    ],
)
def test_a_rate_rises_and_falls_within_the_groups_own_epochs(
    warmup: float, rates: dict[int, float]
) -> None:
    group = replace(groups_of(make_tiny())[1], rate=0.5, from_epoch=3)
    schedule = replace(PLAIN, epochs=4, learning_rate=0.4, warmup=warmup)
    optimizer = make_optimizer(group, schedule, steps_per_epoch=10)
    for step, rate in rates.items():
        optimizer.iterations.assign(step)
        assert float(optimizer.learning_rate) == pytest.approx(rate, abs=1e-7), step
    assert optimizer.momentum == 0.9


class Recorded(np.ndarray[Any, Any]):
    """Inputs that remember which of them were looked at."""

    keys: list[tuple[Any, Any]]

    def __getitem__(self, key: Any) -> Any:
        self.keys.append(key)
        return np.asarray(self)[key]


def test_each_epoch_sees_every_image_once_in_an_order_and_views_of_its_own() -> None:
    examples = make_examples()
    recorded = examples.inputs.view(Recorded)
    recorded.keys = []
    schedule = replace(PLAIN, epochs=2, batch_size=5)
    tiny = make_tiny()
    run(tiny, groups_of(tiny), schedule, examples=replace(examples, inputs=recorded))
    trained = [key for key in recorded.keys if not isinstance(key[1], int)]
    assert [len(rows) for rows, _ in trained] == 2 * [5, 5, 5, 3]
    orders, views = (
        [np.concatenate([key[part] for key in trained[n : n + 4]]).tolist() for n in (0, 4)]
        for part in (0, 1)
    )
    wanted = examples.train.tolist()
    assert all(sorted(order) == wanted for order in orders)
    assert len({tuple(order) for order in [*orders, wanted]}) == 3
    assert all(set(found) == {0, 1} for found in views)
    assert views[0] != views[1]
    judged = np.concatenate([rows for rows, view in recorded.keys if isinstance(view, int)])
    assert set(judged.tolist()) == set(examples.validation.tolist())
    assert {view for _, view in recorded.keys if isinstance(view, int)} == {0}


STILL = replace(PLAIN, batch_size=13, learning_rate=1e-9)  # hardly a weight moves


def make_sure() -> TrainableNetwork:
    """The tiny network with an auxiliary head and no dropout."""
    keras, tiny = import_keras(), make_tiny()
    features = tiny.upper.output["features"]
    outputs = {"features": features, "auxiliary": features}
    return replace(
        tiny,
        upper=keras.Model(tiny.network.inputs, outputs),
        head=keras.Sequential([keras.Input((6,)), tiny.head.layers[-1]]),
        auxiliary_head=keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)]),
    )


def entropies(tiny: TrainableNetwork, pixels: NDArray[Any], targets: NDArray[Any]) -> NDArray[Any]:
    """Cross-entropy of each image by each head: (n, n_heads)."""
    found = tiny.logits(tiny.below_the_cut(pixels.astype(np.float32)))
    losses = [-(targets * log_softmax(np.asarray(x), axis=1)).sum(axis=1) for x in found]
    return np.stack(losses, axis=1)


def test_an_epochs_loss_is_the_mean_over_its_images_of_both_heads() -> None:
    tiny, examples = make_sure(), make_examples()
    weights = np.linspace(0.5, 3.0, NUM_IMAGES, dtype=np.float32)
    examples = replace(examples, inputs=examples.inputs[:, :1], weights=weights)
    smooth = 0.9 * examples.targets[examples.train] + 0.1 / 3
    found = entropies(tiny, examples.inputs[examples.train, 0], smooth)
    wanted = (weights[examples.train] * (found @ [10.0, 2.0])).mean()
    schedule = replace(STILL, label_smoothing=0.1, loss_weights=(2.0, 10.0))
    _, epoch = run(tiny, groups_of(tiny), schedule, examples=examples)
    assert epoch.loss == pytest.approx(wanted, rel=1e-5)


class Negative(Augmenter):
    """Makes images negative, and their classes others."""

    def __call__(self, pixels: Any, targets: Any) -> tuple[Any, Any]:
        return 255.0 - pixels, import_keras().ops.roll(targets, 1, axis=1)


def test_what_is_learned_from_is_augmented_and_what_is_judged_is_not() -> None:
    tiny, examples = make_sure(), make_examples()
    examples = replace(examples, inputs=examples.inputs[:, :1])
    rows, rolled = examples.train, np.roll(examples.targets, 1, axis=1)
    wanted = entropies(tiny, 255.0 - examples.inputs[rows, 0], rolled[rows]).sum(axis=1).mean()
    start, epoch = train(tiny, groups_of(tiny), examples, STILL, Negative((), 0))
    assert epoch.loss == pytest.approx(wanted, rel=1e-5)
    assert epoch.validation_loss == pytest.approx(start.validation_loss, rel=1e-5)
    plain, _ = run(tiny, groups_of(tiny), STILL, examples=examples)
    assert start.validation_loss == plain.validation_loss


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop"])
def test_what_a_mask_keeps_is_bit_identical(optimizer: str) -> None:
    tiny = make_tiny()
    (_, kernel), before = kernels_of(tiny), state_of(tiny)
    mask = np.zeros(kernel.shape, np.float32)
    mask[..., 2] = 1.0
    old = kernel.numpy()
    groups = [Group("channels", [kernel], masks=[mask])]
    schedule = replace(
        PLAIN, epochs=3, batch_size=4, optimizer=optimizer, weight_decay=0.1, ema=0.9, warmup=0.1
    )
    run(tiny, groups, schedule, examples=replace(make_examples(), validation=np.arange(0)))
    new = kernel.numpy()
    assert (new[..., 2] != old[..., 2]).all()
    assert np.array_equal(np.delete(new, 2, axis=-1), np.delete(old, 2, axis=-1))
    changed = [
        not np.array_equal(a, b) for a, b in zip(state_of(tiny), before, strict=True) if a.ndim == 4
    ]
    assert changed == [False, True]


def test_a_weight_decay_spares_biases() -> None:
    tiny = make_tiny()
    kernel, bias = tiny.head.trainable_variables
    bias.assign(np.ones(3, np.float32))
    examples = make_examples()
    still = replace(examples, weights=np.zeros(NUM_IMAGES, np.float32), validation=np.arange(0))
    old = kernel.numpy()
    run(tiny, groups_of(tiny)[:1], replace(PLAIN, weight_decay=0.5), examples=still)
    assert (np.abs(kernel.numpy()) < np.abs(old)).all()
    assert np.array_equal(bias.numpy(), np.ones(3))


@pytest.mark.parametrize("is_thawed", [False, True])
def test_statistics_stay_unless_normalisation_is_thawed(is_thawed: bool) -> None:
    tiny = make_tiny()
    norm = tiny.network.get_layer("block1_bn")
    if is_thawed:
        thaw_normalisation([norm])
    old = norm.moving_mean.numpy()
    examples = replace(make_examples(), validation=np.arange(0))
    run(tiny, groups_of(tiny), PLAIN, examples=examples)
    assert np.array_equal(norm.moving_mean.numpy(), old) is not is_thawed


def test_a_group_is_trained_from_its_epoch_on() -> None:
    tiny = make_tiny()
    groups = groups_of(tiny)
    groups[2] = replace(groups[2], from_epoch=3)
    seen = []
    old = kernels_of(tiny)[0].numpy()
    run(
        tiny,
        groups,
        replace(PLAIN, epochs=4, learning_rate=0.01),
        watch=lambda _: seen.append(np.array_equal(kernels_of(tiny)[0].numpy(), old)),
    )
    assert seen == [True, True, True, False, False]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("ema", [None, 0.8])
def test_a_training_that_was_killed_ends_as_if_it_had_not_been(
    tmp_path: Path, ema: float | None
) -> None:
    schedule = replace(PLAIN, epochs=5, batch_size=5, optimizer="adam", ema=ema, warmup=0.2)
    augment = ("flip", "crop", "colour", "mixup")
    whole = make_tiny()
    epochs = run(whole, groups_of(whole), schedule, augment=augment)

    def kill(epoch: Epoch) -> None:
        if epoch.number == 2:
            raise KilledError

    checkpoint, first, second = tmp_path / "checkpoint.npz", make_tiny(), make_tiny()
    with pytest.raises(KilledError):
        run(first, groups_of(first), schedule, augment=augment, checkpoint=checkpoint, watch=kill)
    seen: list[int] = []
    again = run(
        second,
        groups_of(second),
        schedule,
        augment=augment,
        checkpoint=checkpoint,
        watch=lambda epoch: seen.append(epoch.number),
    )
    assert seen == [3, 4, 5]
    assert [epoch.number for epoch in again] == [0, 1, 2, 3, 4, 5]
    losses = [epoch.loss for epoch in epochs[1:]]
    np.testing.assert_allclose([epoch.loss for epoch in again[1:]], losses, rtol=1e-4)
    for ours, theirs in zip(state_of(second), state_of(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.npz"
    for num_ours, num_theirs in ((1, 3), (3, 1)):
        tiny, other = make_tiny(), make_tiny()
        checkpoint.unlink(missing_ok=True)
        run(tiny, groups_of(tiny)[:num_ours], PLAIN, checkpoint=checkpoint)
        with pytest.raises(Unfinished, match="is of another network"):
            run(other, groups_of(other)[:num_theirs], PLAIN, checkpoint=checkpoint)
    whole = checkpoint.read_bytes()
    for damaged in (b"PK nothing of the kind", b"", whole[: len(whole) // 2]):
        checkpoint.write_bytes(damaged)
        with pytest.raises(Unfinished, match="cannot be read"):
            run(other, groups_of(other)[:1], PLAIN, checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", None),
        ("epochs", "no JSON"),
        ("epochs", "[1]"),
        ("epochs", '[{"number": 1}]'),
        ("epochs", '[{"number": "1", "loss": 1, "seconds": 1}]'),
        ("best_0", None),
        ("best_0", np.zeros((99, 99))),
        ("best_0", np.array(["text"])),
        ("state_0", np.array(["text"])),
        ("state_0", None),
    ],
)
def test_a_checkpoint_that_somebody_edited_is_refused(
    tmp_path: Path, name: str, value: Any
) -> None:
    checkpoint = tmp_path / "checkpoint.npz"
    tiny = make_tiny()
    run(tiny, groups_of(tiny)[:1], PLAIN, checkpoint=checkpoint)
    with np.load(checkpoint) as file:
        arrays = dict(file)
    assert name in arrays
    arrays = {key: array for key, array in arrays.items() if key != name}
    if value is not None:
        arrays[name] = np.array(value)
    np.savez(checkpoint, **arrays)
    with pytest.raises(Unfinished, match=r"cannot be read: .*Delete it|of another network. Delete"):
        run(tiny, groups_of(tiny)[:1], PLAIN, checkpoint=checkpoint)


def test_what_is_no_better_than_the_start_is_not_kept() -> None:
    tiny = make_tiny()
    run(tiny, groups_of(tiny), replace(PLAIN, epochs=20, batch_size=6))
    trained = state_of(tiny)
    # A rate at which everything that was learned is lost in the first steps.
    epochs = run(
        tiny,
        groups_of(tiny),
        replace(PLAIN, epochs=9, learning_rate=50.0, batch_size=6, patience=2),
    )
    losses = [epoch.validation_loss or 0.0 for epoch in epochs]
    assert losses.index(min(losses)) == 0
    assert len(epochs) == losses.index(min(losses[1:])) + 1 + 2  # two of patience
    assert all(np.array_equal(a, b) for a, b in zip(state_of(tiny), trained, strict=True))


@pytest.mark.parametrize("patience", [1, 3])
def test_it_stops_when_epochs_are_no_better_than_one_before_the_start_left_out(
    patience: int,
) -> None:
    tiny = make_tiny()
    run(tiny, groups_of(tiny), replace(PLAIN, epochs=20, batch_size=6))
    schedule = replace(PLAIN, epochs=30, learning_rate=2.0, batch_size=6, patience=patience)
    epochs = run(tiny, groups_of(tiny), schedule)
    losses = [epoch.validation_loss or 0.0 for epoch in epochs[1:]]
    waited = [n - losses.index(min(losses[: n + 1])) for n in range(len(losses))]
    assert waited[-1] == patience
    assert max(waited[:-1]) == patience - 1
    assert losses[0] > (epochs[0].validation_loss or 0.0)


def test_the_average_of_the_weights_is_kept() -> None:
    tiny = make_tiny()
    examples = replace(make_examples(), validation=np.arange(0))
    seen = [kernels_of(tiny)[1].numpy()]
    run(
        tiny,
        groups_of(tiny),
        replace(PLAIN, epochs=2, ema=0.75),
        examples=examples,
        watch=lambda _: seen.append(kernels_of(tiny)[1].numpy()),
    )
    average = seen[0]
    for weights in seen[2:]:  # after each epoch, which is of one step; seen[1] is the start too
        average = average + 0.25 * (weights - average)
    np.testing.assert_allclose(kernels_of(tiny)[1].numpy(), average, atol=1e-6)
    assert not np.allclose(average, seen[-1], atol=1e-6)


def test_the_average_is_what_is_judged_and_the_weights_are_what_is_trained() -> None:
    schedule = replace(PLAIN, epochs=3, batch_size=6, learning_rate=0.05)
    losses, weights = [], []
    for ema in (None, 0.999999):  # an average that stays where it starts
        tiny = make_tiny()
        seen: list[list[NDArray[Any]]] = []
        epochs = run(
            tiny,
            groups_of(tiny),
            replace(schedule, ema=ema),
            watch=lambda _, tiny=tiny, seen=seen: seen.append(state_of(tiny)),
        )
        losses.append([epoch.validation_loss or 0.0 for epoch in epochs])
        weights.append(seen)
    assert np.ptp(losses[0]) > 0.01
    assert np.ptp(losses[1]) < 1e-4
    for plain, averaged in zip(*weights, strict=True):
        for ours, theirs in zip(averaged, plain, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_weights_of_images_are_heeded() -> None:
    tiny, examples = make_tiny(), make_examples()
    ignored = examples.targets.argmax(axis=1) == 2
    weights = np.where(ignored, 0.0, 1.0).astype(np.float32)
    schedule = replace(PLAIN, epochs=20, batch_size=6, learning_rate=0.05)
    examples = replace(examples, weights=weights, validation=np.arange(0))
    run(tiny, groups_of(tiny), schedule, examples=examples)
    logits = tiny.logits(tiny.below_the_cut(examples.inputs[:, 0].astype(np.float32)))[0]
    assert (np.asarray(logits).argmax(axis=1) != 2).all()


def test_a_training_that_diverges_says_what_to_do() -> None:
    tiny = make_tiny()
    with pytest.raises(Unfinished, match="diverged.*lower learning rate"):
        run(tiny, groups_of(tiny), replace(PLAIN, epochs=3, batch_size=6, learning_rate=1e38))


def test_several_labels_are_learned_each_for_itself() -> None:
    tiny, examples = make_tiny(), make_examples()
    targets = examples.targets.copy()
    targets[:, 0] = 1.0
    examples = replace(examples, targets=targets, is_multilabel=True)
    schedule = replace(PLAIN, epochs=30, batch_size=6, patience=30)
    epochs = run(tiny, groups_of(tiny), schedule, examples=examples)
    logits = np.asarray(tiny.logits(tiny.below_the_cut(examples.inputs[:, 0].astype("f4")))[0])
    assert (logits[:, 0] > 0).all()
    assert (epochs[-1].validation_accuracy or 0.0) > (epochs[0].validation_accuracy or 0.0)
