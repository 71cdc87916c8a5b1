"""Heads: trained on some images, judged by others, and what they say can be believed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from scipy.special import expit, softmax

from embedder.datasets.splits import Split
from embedder.datasets.training_set import TrainingSet
from embedder.errors import EmbedderError, ModelError, RequestError, StoreError
from embedder.evaluation.evaluation import Evaluation, expand_logits
from embedder.heads.calibration import fit_temperature, log_loss, probabilities_of
from embedder.heads.model import Model, logits_of
from embedder.heads.table import HEADS, make_estimator
from embedder.inference.evaluate import evaluate_model
from embedder.recipe import Recipe
from embedder.store.store import Store
from embedder.training.cross_validation import refit
from embedder.training.fitting import Fitted, HeadSpec, fit, fit_head
from embedder.training.options import TrainOptions
from embedder.training.train import train
from tests.support import ANIMALS, DIM, add_rows, animal_vectors, training_set

ALONE = TrainOptions(duplicates=None)
KERAS = ("linear", "mlp")  # which need more than a few dozen images to be as good as the others


def animal_of(image_id: str) -> str:
    return image_id.split("/")[1]


@pytest.mark.parametrize("head", HEADS)
def test_every_head_knows_clusters_that_are_apart(zoo: Store, tmp_path: Path, head: str) -> None:
    trained = train(zoo, "parent", head, ALONE)
    assert trained.evaluate()["accuracy"]["value"] >= (0.9 if head in KERAS else 1.0)
    assert trained.model.classes.tolist() == list(ANIMALS)
    new = animal_vectors(["dogs", "owls", "cats", "cats"], seed=9)
    probabilities = trained.model.probabilities(new)
    assert probabilities.shape == (4, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
    assert probabilities.argmax(axis=1).tolist() == [1, 2, 0, 0]
    assert np.asarray(trained.estimator.predict(new)).tolist() == ["dogs", "owls", "cats", "cats"]
    trained.save(tmp_path / "model")
    loaded = Model.load(tmp_path / "model")
    np.testing.assert_allclose(loaded.probabilities(new), probabilities, atol=1e-6)
    assert not list((tmp_path / "model").glob("*.pkl"))


@pytest.mark.parametrize("head", ["logistic", "knn", "linear"])
def test_two_classes_have_two_probabilities(store: Store, head: str) -> None:
    animals = ["cats", "dogs"] * 20
    add_rows(store, [f"{a}/{i}.jpg" for i, a in enumerate(animals)], animal_vectors(animals))
    model = train(store, "folder", head, ALONE).model
    probabilities = model.probabilities(animal_vectors(["dogs", "cats"], seed=3))
    assert probabilities.argmax(axis=1).tolist() == [1, 0]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)


def test_every_label_stays_with_its_own_vector(zoo: Store, tmp_path: Path) -> None:
    ids = zoo.ids().tolist()
    lines = [f"{image_id},{animal_of(image_id)}" for image_id in reversed(ids[1::2])]
    (tmp_path / "labels.csv").write_text("\n".join(["path,animal", *lines, "nowhere.jpg,cats"]))
    head = train(zoo, f"{tmp_path}/labels.csv:animal", "centroid", ALONE)
    assert head.model.recorded().provenance.num_unlabelled == 30
    assert head.images.ids.tolist() == ids[1::2]
    np.testing.assert_array_equal(head.images.unaugmented, zoo.vectors()[1::2])
    assert head.images.texts().tolist() == [animal_of(image_id) for image_id in head.images.ids]
    assert head.predictions()["sha256"].to_pylist() == zoo.sha256()[1::2].tolist()


def noise(store: Store, num_images: int = 60, dim: int = 80) -> Store:
    """Of more components than images: a head learns any labels by heart, and knows nothing."""
    animals = ["cats", "dogs"] * (num_images // 2)
    vectors = np.random.default_rng(7).normal(size=(num_images, dim))
    add_rows(store, [f"{animal}/{i}.jpg" for i, animal in enumerate(animals)], vectors)
    return store


@pytest.mark.parametrize("split", ["0.3", "kfold:4"])
def test_images_are_scored_by_a_head_that_has_not_seen_them(store: Store, split: str) -> None:
    head = train(noise(store), options=TrainOptions(duplicates=None, split=split))
    assert head.evaluate()["accuracy"]["value"] < 0.75
    own = head.images.split.trained_on if split == "0.3" else np.arange(60)
    learned = head.images.classes[head.images.codes[own]]
    assert head.estimator.score(head.images.unaugmented[own], learned) > 0.85


def test_a_head_without_knowledge_is_not_sure_after_calibration(store: Store) -> None:
    head = train(noise(store), head="knn", options=TrainOptions(duplicates=None, split="kfold:4"))
    before, after = head.test.scores_before_calibration, head.evaluate()
    assert after["log_loss"]["value"] < before["log_loss"]["value"]
    assert after["log_loss"]["value"] == pytest.approx(np.log(2), abs=0.1)
    assert after["ece"]["value"] < before["ece"]["value"]


def test_settings_are_chosen_without_the_test_rows(store: Store, tmp_path: Path) -> None:
    noise(store)
    ids = store.ids()
    rows = "\n".join(f"{i},{'train' if n < 40 else 'test'}" for n, i in enumerate(ids))
    (tmp_path / "s.csv").write_text(f"path,part\n{rows}\n")
    options = TrainOptions(duplicates=None, split=f"{tmp_path}/s.csv:part")
    first = train(store, options=options)
    # Other vectors for the test rows: nothing that was learned may change.
    changed = Store.open_or_create(tmp_path / "changed", store.recipe, {})
    vectors = np.array(store.vectors())
    vectors[40:] = np.random.default_rng(99).normal(size=(20, 80))
    add_rows(changed, ids.tolist(), vectors)
    second = train(changed, options=options)
    assert second.fitted.trials == first.fitted.trials
    assert second.model.temperature == first.model.temperature
    new = np.random.default_rng(5).normal(size=(4, 80)).astype(np.float32)
    np.testing.assert_array_equal(second.model.logits(new), first.model.logits(new))


def cats_and_dogs(features: NDArray[Any], copies: int = 1) -> TrainingSet:
    """Images of cats and dogs in turn; with `copies`, each so many are near-duplicates."""
    groups = np.arange(len(features)) // copies
    return training_set(groups % 2, ("cats", "dogs"), features, groups)


RIDGE, KNN = HeadSpec("ridge"), HeadSpec("knn")

NOBODY = np.zeros(0, np.int64)  # no validation rows


def fitted_on(
    spec: HeadSpec, images: TrainingSet, rows: NDArray[Any], validation: NDArray[Any] = NOBODY
) -> Fitted:
    """A head that is fitted on some of the rows."""
    return fit_head(spec, replace(images, split=Split("", [(rows, NOBODY)], validation)))


def test_validation_rows_choose_and_calibrate_a_head_that_has_not_seen_them() -> None:
    task = cats_and_dogs(np.random.default_rng(7).normal(size=(60, 80)))
    rows, validation = np.arange(50), np.arange(30, 50)
    fitted = fitted_on(RIDGE, task, rows, validation)
    held, labels = task.codes[30:50], task.classes[task.codes]
    for trial in fitted.trials:
        other = make_estimator("ridge", trial["settings"], None, 0, False)
        logits = logits_of(other.fit(task.unaugmented[:30], labels[:30]), task.unaugmented[30:50])
        temperature = fit_temperature(logits, held)
        assert trial["accuracy"] == pytest.approx((logits.argmax(axis=1) == held).mean())
        assert trial["log_loss"] == pytest.approx(log_loss(logits / temperature, held), rel=1e-4)
        if trial["settings"] == fitted.settings:
            assert fitted.temperature == pytest.approx(temperature, rel=1e-3)
    assert max(trial["accuracy"] for trial in fitted.trials) < 0.7
    assert (
        fitted.estimator.score(task.unaugmented[30:50], labels[30:50]) > 0.8
    )  # it saw all at last


def test_near_duplicates_do_not_choose_settings() -> None:
    random = np.random.default_rng(3)
    copies = np.repeat(random.normal(size=(40, 40)), 3, axis=0) + 0.01 * random.normal(
        size=(120, 40)
    )
    everyone = np.arange(120)
    images = cats_and_dogs(copies, copies=3)
    fitted = fitted_on(KNN, images, everyone)
    assert max(trial["accuracy"] for trial in fitted.trials) < 0.75
    alone = fitted_on(KNN, replace(images, groups=everyone), everyone)
    assert max(trial["accuracy"] for trial in alone.trials) > 0.9


def test_settings_are_chosen_by_the_unaugmented_views() -> None:
    random = np.random.default_rng(4)
    views = random.normal(size=(60, 3, 40))
    views[:, 0, 0] += 20.0 * (np.arange(60) % 2) - 10.0  # the other views show nothing
    fitted = fitted_on(RIDGE, cats_and_dogs(views), np.arange(60))
    assert max(trial["accuracy"] for trial in fitted.trials) == 1.0


def test_each_view_is_learned_with_its_own_images_label() -> None:
    random = np.random.default_rng(4)
    views = 0.1 * random.normal(size=(60, 3, 40))
    views[:, :, 0] += (10.0 * (np.arange(60) % 2) - 5.0)[:, None]
    images = cats_and_dogs(views)
    estimator = fit(KNN, KNN.estimator({"n_neighbors": 1}), images, np.arange(60))
    for view in range(3):
        assert estimator.score(images.in_memory[:, view], images.texts()) == 1.0


def test_each_round_is_calibrated_without_the_rows_it_is_tested_on(store: Store) -> None:
    options = TrainOptions(duplicates=None, split="kfold:3")
    head = train(noise(store), head="ridge", options=options)
    start = 0
    for train_rows, test_rows in head.images.split.folds:
        own = fitted_on(head.spec, head.images, train_rows)
        part = head.test.rows(np.arange(start, start + len(test_rows)))
        expected = probabilities_of(part.logits, own.temperature, False)
        np.testing.assert_allclose(part.calibrated, expected, rtol=1e-5)
        np.testing.assert_array_equal(
            head.images.split.tested_on[start : start + len(test_rows)], test_rows
        )
        start += len(test_rows)


def test_thresholds_are_those_of_the_held_out_rows() -> None:
    random = np.random.default_rng(5)
    codes = (random.random((90, 2)) < [0.2, 0.35]).astype(np.uint8)
    features = random.normal(size=(90, 20)).astype(np.float32)
    images = training_set(codes, ("cats", "dogs"), features)
    thresholds = fitted_on(RIDGE, images, np.arange(90)).thresholds
    assert thresholds is not None
    assert (thresholds < 0.45).all()  # who knows nothing has the best F1 by giving every label


def test_half_precision_features_are_trained_on_in_single(
    tmp_path: Path, mean_colour_recipe: Recipe
) -> None:
    recipe = Recipe(**(mean_colour_recipe.model_dump() | {"store_dtype": "float16"}))
    store = Store.open_or_create(tmp_path / "half", recipe, {})
    animals = ["cats", "dogs"] * 10
    add_rows(store, [f"{a}/{i}.jpg" for i, a in enumerate(animals)], animal_vectors(animals))
    head = train(store, options=ALONE)
    assert head.images.in_memory.dtype == np.float32
    assert head.evaluate()["accuracy"]["value"] == 1.0


def test_balanced_class_weights_help_the_rare_class(store: Store) -> None:
    random = np.random.default_rng(0)
    animals = ["cats"] * 180 + ["dogs"] * 20
    vectors = animal_vectors(animals, noise=0.6)
    order = random.permutation(200)
    add_rows(store, [f"{animals[i]}/{i:03d}.jpg" for i in sorted(order)], vectors[sorted(order)])

    def recall_of_dogs(class_weight: str | None) -> float:
        options = TrainOptions(split="kfold:4", duplicates=None, class_weight=class_weight)
        rows = train(store, "folder", "logistic", options).test.per_class()
        return float(next(row["recall"] for row in rows if row["class"] == "dogs"))

    assert recall_of_dogs("balanced") > recall_of_dogs(None)


def planted(store: Store) -> Store:
    """Noise of which every image is there three times, nearly: names tell it, features do not."""
    random = np.random.default_rng(3)
    originals = random.normal(size=(60, 40))
    copies = np.repeat(originals, 3, axis=0) + 0.01 * random.normal(size=(180, 40))
    animals = np.repeat(random.choice(["cats", "dogs"], 60), 3)
    add_rows(store, [f"{animal}/{i:03d}.jpg" for i, animal in enumerate(animals)], copies)
    return store


def test_near_duplicates_across_a_split_inflate_the_score_but_not_ours(store: Store) -> None:
    head = train(planted(store), head="knn", options=TrainOptions(split="0.25"))
    leak = head.leak()
    assert leak["num_groups"] == 60
    assert leak["largest"] == 3
    assert leak["naive"]["value"] > 0.95
    assert head.evaluate()["accuracy"]["value"] < 0.75
    careless = train(store, head="knn", options=TrainOptions(split="0.25", duplicates=None))
    assert careless.evaluate()["accuracy"]["value"] > 0.9


def test_an_official_split_is_kept_and_its_near_duplicates_are_counted(
    store: Store, tmp_path: Path
) -> None:
    ids = planted(store).ids()
    # The first 60 images are on both sides: one of three to test on.
    parts = ["test" if (n < 60 and n % 3 == 0) or n >= 150 else "train" for n in range(180)]
    rows = "\n".join(
        f"{i},{part}" for i, part in zip(sorted(ids, key=by_number), parts, strict=True)
    )
    (tmp_path / "s.csv").write_text(f"path,part\n{rows}\n")
    head = train(store, head="knn", options=TrainOptions(split=f"{tmp_path}/s.csv:part"))
    assert len(head.images.split.tested_on) == 20 + 30
    assert head.leak()["num_straddling"] == 20
    assert head.leak()["without_them"]["value"] < head.evaluate()["accuracy"]["value"]


def by_number(image_id: str) -> int:
    return int(Path(image_id).stem)


def test_a_class_that_is_only_tested_on_counts_as_wrong(zoo: Store, tmp_path: Path) -> None:
    ids = zoo.ids()
    rows = "\n".join(
        f"{i},{'test' if animal_of(i) == 'owls' or n % 4 == 0 else 'train'}"
        for n, i in enumerate(ids)
    )
    (tmp_path / "s.csv").write_text(f"path,part\n{rows}\n")
    options = TrainOptions(duplicates=None, split=f"{tmp_path}/s.csv:part")
    head = train(zoo, "parent", options=options)
    assert head.model.classes.tolist() == ["cats", "dogs"]
    tested = [animal_of(i) for i in head.images.ids[head.images.split.tested_on]]
    assert head.evaluate()["accuracy"]["value"] == pytest.approx(
        np.mean([animal != "owls" for animal in tested])
    )
    assert np.isfinite(head.evaluate()["log_loss"]["value"])


def test_a_class_the_head_does_not_know_is_below_all_it_knows() -> None:
    logits = np.array([[-3.0, -7.0], [8.0, 6.0]], np.float32)
    expected = [[-12.0, -3.0, -12.0, -7.0], [1.0, 8.0, 1.0, 6.0]]
    assert expand_logits(logits, np.array([1, 3]), 4).tolist() == expected
    assert expand_logits(logits, np.array([0, 1]), 2).tolist() == logits.tolist()


def test_several_labels_an_image(store: Store, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    has = random.random((90, 3)) < [0.5, 0.3, 0.15]
    vectors = np.zeros((90, DIM))
    vectors[:, :3] = has
    vectors += 0.15 * random.normal(size=vectors.shape)
    tags = ["; ".join(np.array(ANIMALS)[row]) for row in has]
    rows = "\n".join(f"{n:02d}.jpg,{tag or ';'}" for n, tag in enumerate(tags))
    (tmp_path / "tags.csv").write_text(f"path,tags\n{rows}\n")
    add_rows(store, [f"{n:02d}.jpg" for n in range(90)], vectors)
    options = TrainOptions(duplicates=None, separator=";")
    for name in ("logistic", "svm", "ridge", "linear"):
        head = train(store, f"{tmp_path}/tags.csv:tags", name, options)
        assert head.evaluate()["micro_f1"]["value"] > (0.75 if name in KERAS else 0.9), name
        assert head.model.is_multilabel
        head.save(tmp_path / name)
        loaded = Model.load(tmp_path / name)
        chosen = loaded.chosen(loaded.probabilities(vectors.astype(np.float32)))
        assert (chosen == has).mean() > (0.8 if name in KERAS else 0.9)
        np.testing.assert_array_equal(loaded.thresholds, head.model.thresholds)


def tagged() -> Evaluation:
    """Three images and three labels, of which the second is never given."""
    codes = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 0]], np.uint8)
    logits = np.array([[4.0, -4.0, 2.0], [-2.0, -4.0, -6.0], [8.0, -4.0, -1.0]], np.float32)
    return Evaluation(np.array(ANIMALS), codes, logits, expit(logits / 4), logits > 0)


def test_an_image_of_several_labels_is_right_if_all_are() -> None:
    assert tagged().is_right.tolist() == [True, False, True]
    assert tagged().rows(np.array([1, 2])).is_right.tolist() == [False, True]


def test_each_label_has_a_row_of_its_own() -> None:
    assert [(row["class"], row["recall"], row["num_images"]) for row in tagged().per_class()] == [
        ("cats", 1.0, 2),
        ("dogs", 0.0, 1),
        ("owls", 1.0, 1),
    ]


def test_figures_before_calibration_are_of_the_logits_themselves() -> None:
    labelled = tagged()
    before = expit(labelled.logits.astype(float))
    losses = -np.log(np.where(labelled.codes, before, 1 - before))
    found = labelled.scores_before_calibration
    assert found["log_loss"]["value"] == pytest.approx(losses.mean(), rel=1e-5)
    assert found["log_loss"]["value"] != pytest.approx(labelled.scores["log_loss"]["value"])
    single = Evaluation(
        labelled.classes,
        np.array([0, 1, 0]),
        labelled.logits,
        softmax(labelled.logits / 4, axis=1),
        labelled.logits > 0,
    )
    sharp = softmax(labelled.logits.astype(float), axis=1)
    loss = -np.log(sharp[[0, 1, 2], [0, 1, 0]]).mean()
    assert single.scores_before_calibration["log_loss"]["value"] == pytest.approx(loss, rel=1e-5)
    bins = single.reliability()
    for name, probabilities in (("before", sharp), ("after", softmax(labelled.logits / 4, axis=1))):
        sure = sum(row["confidence"] * row["num_images"] for row in bins[name]) / 3
        assert sure == pytest.approx(probabilities.max(axis=1).mean(), rel=1e-5)
        right = sum(row["accuracy"] * row["num_images"] for row in bins[name])
        assert right == pytest.approx(2)


def test_a_label_the_model_does_not_know_is_given_to_no_image(store: Store, tmp_path: Path) -> None:
    animals = [*ANIMALS[:2]] * 20
    vectors = animal_vectors(animals)
    add_rows(store, [f"{i}.jpg" for i in range(40)], vectors)
    rows = [f"{i}.jpg,{animal}" for i, animal in enumerate(animals)]
    (tmp_path / "known.csv").write_text("\n".join(["path,tags", *rows]))
    options = TrainOptions(duplicates=None, separator=";")
    train(store, f"{tmp_path}/known.csv:tags", "ridge", options).save(tmp_path / "model")
    rows = [f"{row}; aloof" if row.endswith("cats") else row for row in rows]
    (tmp_path / "more.csv").write_text("\n".join(["path,tags", *rows]))
    labels = f"{tmp_path}/more.csv:tags"
    found = evaluate_model(tmp_path / "model", store, labels, include_trained=True).metrics
    by_class = {row["class"]: row for row in found["per_class"]}
    assert (by_class["aloof"]["recall"], by_class["aloof"]["num_images"]) == (0.0, 20)
    assert found["test"]["accuracy"] == pytest.approx(0.5)  # all dogs, no cat


@pytest.mark.parametrize("head", ["knn", "centroid", "lda"])
def test_a_head_that_cannot_do_what_is_asked_is_refused(zoo: Store, head: str) -> None:
    with pytest.raises(RequestError, match=rf"one of the heads logistic.* Received: head='{head}'"):
        train(zoo, "parent", head, TrainOptions(separator=";"))
    with pytest.raises(RequestError, match="Class weights need one of the heads logistic"):
        train(zoo, "parent", head, TrainOptions(class_weight="balanced"))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"duplicates": 1.2}, "`duplicates` must be at most 1. Received: duplicates=1.2"),
        ({"class_weight": "even"}, "must be balanced. Received: class_weight='even'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(RequestError, match=rule):
        TrainOptions(**options)


def test_an_unknown_head_is_refused_with_those_there_are(zoo: Store) -> None:
    with pytest.raises(RequestError, match="one of logistic, svm, .* Received: head='tree'"):
        train(zoo, "parent", "tree")


def test_a_store_without_rows_is_refused(store: Store) -> None:
    with pytest.raises((StoreError, RequestError), match="has no rows yet|0 of 0 images"):
        train(store)


def test_a_coarser_level_is_scored_too(zoo: Store, tmp_path: Path) -> None:
    coarse = {"cats": "fur", "dogs": "fur", "owls": "feather"}
    rows = "\n".join(f"{i},{coarse[animal_of(i)]}" for i in zoo.ids())
    (tmp_path / "c.csv").write_text(f"path,coarse\n{rows}\n")
    options = TrainOptions(duplicates=None, coarse=f"{tmp_path}/c.csv:coarse")
    found = train(zoo, "parent", options=options).metrics()
    assert found["test"]["coarse_accuracy"] == 1.0
    torn = TrainOptions(duplicates=None, coarse="folder")  # set-1 and set-2 have all animals
    with pytest.raises(RequestError, match=r"of the same coarse class\. Received: set-"):
        train(zoo, "parent", options=torn).metrics()


def test_the_learning_curve_ends_with_the_head_itself(zoo: Store) -> None:
    head = train(zoo, "parent", options=ALONE)
    curve = head.learning_curve()
    assert [point["labels_per_class"] for point in curve] == [1, 2, 5, 10, 16]
    assert curve[-1]["accuracy"] == head.evaluate()["accuracy"]["value"]
    assert all(point["low"] <= point["accuracy"] <= point["high"] for point in curve)


def test_the_learning_curve_leaves_out_what_is_too_few_for_the_neighbours(store: Store) -> None:
    head = train(noise(store), "folder", "knn", TrainOptions(split="0.5", duplicates=None))
    num_images = len(head.images.split.trained_on)
    settings = {"n_neighbors": num_images}
    model = replace(head.model, settings=settings)
    curve = replace(head, model=model).learning_curve()
    assert len(curve) == 1  # the head itself


def test_the_learning_curve_has_so_many_images_of_each_class(store: Store) -> None:
    head = train(noise(store), head="ridge", options=TrainOptions(duplicates=None, split="0.5"))
    order = np.random.default_rng(0).permutation(head.images.split.trained_on)
    of_class = [order[head.images.codes[order] == code] for code in (0, 1)]
    curve, images, tested_on = head.learning_curve(), head.images, head.images.split.tested_on
    for point in curve[:-1]:
        rows = np.sort(np.concatenate([order[: point["labels_per_class"]] for order in of_class]))
        model = refit(head.spec, images, head.model, rows)
        tested = Evaluation.of(model, images, tested_on)
        assert point["accuracy"] == pytest.approx(tested.scores["accuracy"]["value"])
    assert len({point["accuracy"] for point in curve}) > 1


def test_what_is_saved_says_what_each_image_was_for(zoo: Store, tmp_path: Path) -> None:
    head = train(zoo, "parent", options=ALONE)
    head.save(tmp_path / "model")
    table = pq.read_table(tmp_path / "model/predictions.parquet").to_pylist()
    assert [row["image_id"] for row in table] == zoo.ids().tolist()
    assert [row["sha256"] for row in table] == zoo.sha256().tolist()
    tested = [row for row in table if row["part"] == "test"]
    assert len(tested) == 12
    assert all(row["predicted"] == row["label"] for row in tested)
    assert all(row["predicted"] is None for row in table if row["part"] == "train")
    head.save(tmp_path / "model")  # over an older one
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").touch()
    with pytest.raises(ModelError, match="which holds something else"):
        head.save(tmp_path / "other")


@pytest.mark.parametrize(
    "left",
    [
        ("head.skops",),
        ("model.json", "metrics.json"),
        ("report.html",),
        ("backbone.weights.h5", "head.keras"),
        ("predictions.parquet", "pseudo_labels.parquet"),
    ],
)
def test_what_a_kill_left_of_a_model_is_written_over(
    zoo: Store, tmp_path: Path, left: tuple[str, ...]
) -> None:
    (tmp_path / "model").mkdir()
    for name in left:
        (tmp_path / "model" / name).touch()
    train(zoo, "parent", "centroid", ALONE).save(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        *("head.skops", "metrics.json", "model.json", "predictions.parquet")
    }


def test_weights_in_the_models_own_folder_stay_with_it(zoo: Store, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "backbone.keras"
    weights.write_bytes(b"weights")
    head = train(zoo, "parent", "centroid", ALONE)
    recipe = zoo.recipe.model_copy(update={"weights_source": str(weights)})
    replace(head, model=replace(head.model, recipe=recipe)).save(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / "moved")
    moved = Path(Model.load(tmp_path / "moved").recipe.weights_source)
    assert moved == tmp_path / "moved" / "backbone.keras"
    assert moved.read_bytes() == b"weights"


def test_a_model_that_cannot_be_written_leaves_the_older_one(zoo: Store, tmp_path: Path) -> None:
    head = train(zoo, "parent", "centroid", ALONE)
    head.save(tmp_path / "model", lambda folder, _: (folder / "report.html").write_text("older"))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelError, match="model cannot be written: No space left on device"):
        head.save(tmp_path / "model", fail)
    assert (tmp_path / "model" / "report.html").read_text() == "older"
    assert {path.name for path in tmp_path.iterdir()} == {"features", "model"}
    with pytest.raises(EmbedderError, match="Received: s3://bucket/model"):
        head.save("s3://bucket/model")


def test_a_model_is_evaluated_on_what_it_has_not_seen(zoo: Store, tmp_path: Path) -> None:
    head = train(zoo, "parent", options=ALONE)
    head.save(tmp_path / "model")
    judged = evaluate_model(tmp_path / "model", zoo, "parent")
    assert judged.metrics["test"]["num_images"] == 12
    assert judged.metrics["test"] == head.metrics()["test"]
    assert judged.notes == ["48 images were trained on, and are left out."]
    every = evaluate_model(tmp_path / "model", zoo, "parent", include_trained=True)
    assert every.metrics["test"]["num_images"] == 60
    folds = train(zoo, "parent", options=TrainOptions(duplicates=None, split="kfold:3"))
    folds.save(tmp_path / "folds")
    with pytest.raises(RequestError, match="of which all 60 labelled images were; --include"):
        evaluate_model(tmp_path / "folds", zoo, "parent")


def test_validation_images_were_seen_too(zoo: Store, tmp_path: Path) -> None:
    parts = ("train", "val", "test", "train", "")
    rows = [f"{i},{parts[n % 5]}" for n, i in enumerate(zoo.ids()) if parts[n % 5]]
    (tmp_path / "s.csv").write_text("\n".join(["path,part", *rows]))
    options = TrainOptions(duplicates=None, split=f"{tmp_path}/s.csv:part")
    head = train(zoo, "parent", "centroid", options)
    rows = head.images.split.trained_on
    validation = head.images.split.validation
    assert head.fitted.trials == fitted_on(head.spec, head.images, rows, validation).trials
    assert head.fitted.trials != fitted_on(head.spec, head.images, rows).trials
    assert head.images.parts.tolist() == ["train", "validation", "test", "train", ""] * 12
    head.save(tmp_path / "model")
    judged = evaluate_model(tmp_path / "model", zoo, "parent")
    assert judged.notes == ["36 images were trained on, and are left out."]
    assert judged.metrics["test"]["num_images"] == 24  # those of no part were not seen


def test_a_head_learns_from_all_views_and_is_judged_by_the_unaugmented_one(
    tmp_path: Path, archive: Path
) -> None:
    import embedder

    store = embedder.extract(archive, tmp_path / "views", image_size=(64, 96), views=3)
    head = train(store, options=ALONE)
    assert head.images.in_memory.shape == (20, 3, 1280)
    assert len(head.images.split.tested_on) == 4
    np.testing.assert_array_equal(head.images.unaugmented, store.vectors())
