"""The commands on heads: what a user types, sees, and finds in the model's folder."""

import html
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import embedder
from embedder.cli.app import app
from embedder.heads.model import Model
from embedder.report import model_report as head_report
from embedder.report.model_report import notes_of, report_of
from embedder.store.store import Store
from embedder.training.options import TrainOptions
from embedder.training.train import train
from tests.support import ANIMALS, add_rows, animal_vectors, make_archive, picture

SIZE = (64, 96)
HOSTILE = "<img src=x onerror=alert(1)>.jpg"
FILES = ["head.skops", "metrics.json", "model.json", "predictions.parquet"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: str | Path) -> str:
    """What is printed by a command that works."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: str | Path) -> str:
    """The one line that a user's mistake is answered with."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert result.output.startswith("Error: ")
    assert len(result.output.strip().splitlines()) == 1
    return result.output


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fact(output: str, name: str) -> str:
    """What is printed beside a name."""
    (line,) = (line for line in output.splitlines() if line.startswith(f"{name}  "))
    return line.removeprefix(name).strip()


@pytest.fixture
def hard(store: Store) -> Store:
    """Clusters that touch, and one image of a hostile name, which is of no class it looks like."""
    animals = list(ANIMALS) * 20
    ids = [f"{animal}/{i:02d}.jpg" for i, animal in enumerate(animals)]
    add_rows(store, ids, animal_vectors(animals, noise=0.5))
    add_rows(store, [f"cats/{HOSTILE}"], 3 * animal_vectors(["dogs"], noise=0.0))
    return store


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, `photos`, one of a hostile name, and their `features`."""
    folder = tmp_path_factory.mktemp("world")
    photos = make_archive(folder / "photos", 24)
    Image.fromarray(picture(99)).save(photos / "cats" / HOSTILE)
    embedder.extract(photos, folder / "features", image_size=SIZE)
    return folder


# train --------------------------------------------------------------------------------------


def test_train_prints_what_is_in_the_model(zoo: Store, tmp_path: Path) -> None:
    model = tmp_path / "my model"
    shown = done("train", zoo.path, model, "--labels", "parent", "--duplicates", "none")
    assert names_in(model) == sorted([*FILES, "report.html"])
    saved = json.loads((model / "metrics.json").read_text())
    assert fact(shown, "tested on") == "12 images"
    assert fact(shown, "accuracy") == "1.000  (95 % interval 1.000 to 1.000)"
    low, high = saved["intervals"]["test"]["log_loss"]
    expected = f"{saved['test']['log_loss']:.3f}  (95 % interval {low:.3f} to {high:.3f})"
    assert fact(shown, "log_loss") == expected
    assert fact(shown, "model") == str(model)
    assert fact(shown, "report") == str(model / "report.html")
    assert fact(shown, "next") == f"embedder predict '{model}' SOURCE predictions.parquet"
    record = Model.load(model).recorded()
    assert (record.labels, record.options.duplicates) == ("parent", None)


def test_every_option_reaches_the_head(zoo: Store, tmp_path: Path) -> None:
    words = "--labels parent --head svm --split kfold:3 --duplicates 0.97 --class-weight balanced"
    done("train", zoo.path, tmp_path / "m", *words.split(), "--seed", "7", "--no-report")
    assert names_in(tmp_path / "m") == FILES
    model = Model.load(tmp_path / "m")
    options = model.recorded().options
    assert model.head == "svm"
    assert options.split == "kfold:3"
    assert options.duplicates == 0.97
    assert options.class_weight == "balanced"
    assert options.seed == 7
    words = "--labels parent --layer embedding --coarse parent --no-report"
    shown = done("train", zoo.path, tmp_path / "n", *words.split())
    options = Model.load(tmp_path / "n").recorded().options
    assert options.column == "embedding"
    assert options.duplicates == 0.9  # auto
    assert fact(shown, "coarse_accuracy").startswith("1.000")


def test_several_labels_and_unlabelled_images_can_be_asked_for(zoo: Store, tmp_path: Path) -> None:
    ids = zoo.ids().tolist()
    tags = [f"{i},{i.split('/')[1]}{'; paws' if 'owls' not in i else ''}" for i in ids]
    (tmp_path / "tags.csv").write_text("\n".join(["path,tags", *tags]))
    labels = ("--labels", f"{tmp_path}/tags.csv:tags")
    shown = done("train", zoo.path, tmp_path / "m", *labels, "--separator", ";", "--head", "svm")
    assert fact(shown, "micro_f1").startswith("1.000")
    assert Model.load(tmp_path / "m").classes.tolist() == [*ANIMALS, "paws"]
    lines = [f"{i},{i.split('/')[1]}" for i in ids if i.startswith("set-1")]
    (tmp_path / "half.csv").write_text("\n".join(["path,animal", *lines]))
    words = ("--head", "svm", "--unlabelled", zoo.path, "--unlabelled-method", "label-spreading")
    shown = done(
        "train", zoo.path, tmp_path / "n", "--labels", f"{tmp_path}/half.csv:animal", *words
    )
    assert "30 rows of the store have no label." in shown
    assert "Of 30 unlabelled images" in shown
    assert "(label-spreading): " in shown
    assert "pseudo_labels.parquet" in names_in(tmp_path / "n")


def split_file(store: Store, folder: Path, **part_of: str) -> str:
    """A split by class: `part_of` says `TRAIN-TEST` parts in turn."""
    rows = []
    for number, image_id in enumerate(store.ids()):
        parts = part_of[image_id.split("/")[1]].split("-")
        rows.append(f"{image_id},{parts[number % len(parts)]}")
    (folder / "split.csv").write_text("\n".join(["path,part", *rows]))
    return f"{folder}/split.csv:part"


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        (
            {},
            [
                "Trained on 48 images (settings chosen and calibrated by cross-validation among "
                "them), tested on 12, by a random split (0.2).",
                "0 groups of near-duplicates (cosine of at least 0.999) hold 0 of the 60 images, "
                "the largest 1.",
            ],
        ),
        (
            {"split": "kfold:3", "duplicates": None},
            [
                "Tested by 3-fold cross-validation on all 60 labelled images; the model is "
                "trained on all of them.",
                "Near-duplicates were not looked for.",
            ],
        ),
        (
            {"split": "official"},
            [
                "(10 of them to choose settings and to calibrate), tested on 30, by the official",
                "1 classes have no training image, and are never predicted.",
            ],
        ),
    ],
    ids=["share", "folds", "official"],
)
def test_the_report_says_what_is_printed(
    zoo: Store, tmp_path: Path, options: dict[str, str | None], notes: list[str]
) -> None:
    parts = {"cats": "train-test-val-train", "dogs": "train-val-test-train", "owls": "test"}
    options = {"split": "0.2", "duplicates": "0.999"} | options
    if options["split"] == "official":
        options["split"] = split_file(zoo, tmp_path, **parts)
    words = ["--split", str(options["split"]), "--duplicates", str(options["duplicates"]).lower()]
    words += ["--head", "svm"]
    shown = done("train", zoo.path, tmp_path / "m", "--labels", "parent", *words)
    duplicates = float(options["duplicates"]) if options["duplicates"] else None
    head = train(
        zoo, "parent", "svm", TrainOptions(split=str(options["split"]), duplicates=duplicates)
    )
    expected = notes_of(head, head.metrics())
    assert shown.splitlines()[: len(expected)] == expected
    page = html.unescape((tmp_path / "m/report.html").read_text())
    for note in expected:
        assert note in page
    for note in notes:
        assert note in shown
    before, after = head.test.scores_before_calibration, head.test.scores
    assert (
        f"Calibration divides logits by {head.model.temperature:.3g}: log-loss "
        f"{before['log_loss']['value']:.3f} to {after['log_loss']['value']:.3f}, calibration "
        f"error {before['ece']['value']:.3f} to {after['ece']['value']:.3f}."
    ) in shown


def test_near_duplicates_are_told_with_what_they_would_have_done(
    store: Store, tmp_path: Path
) -> None:
    random = np.random.default_rng(3)
    copies = np.repeat(random.normal(size=(30, 40)), 3, axis=0) + 0.01 * random.normal(
        size=(90, 40)
    )
    animals = np.repeat(random.choice(["cats", "dogs"], 30), 3)
    add_rows(store, [f"{animal}/{i:03d}.jpg" for i, animal in enumerate(animals)], copies)
    words = ("--head", "centroid", "--no-report")
    shown = done("train", store.path, tmp_path / "m", *words)
    assert "30 groups of near-duplicates (cosine of at least 0.9) hold 90 of the 90" in shown
    saved = json.loads((tmp_path / "m/metrics.json").read_text())
    naive, ours = saved["near_duplicates"]["naive"]["value"], saved["test"]["accuracy"]
    assert naive > ours
    assert f"the accuracy would read {naive:.3f} in place of {ours:.3f}." in shown


def test_the_report_shows_the_surest_mistakes_first(hard: Store) -> None:
    head = train(hard, head="svm", options=TrainOptions(duplicates=None, split="kfold:3"))
    report = report_of(head, head.metrics())
    predicted = {row["image_id"]: row for row in head.predictions().to_pylist()}
    wrong = [row for row in predicted.values() if row["predicted"] != row["label"]]
    assert 3 < len(wrong) <= 24
    assert {m.image_id for m in report.mistakes} == {row["image_id"] for row in wrong}
    for mistake in report.mistakes:
        row = predicted[mistake.image_id]
        assert (mistake.label, mistake.predicted) == (row["label"], row["predicted"])
        assert mistake.probability == row["probability"]
    sure = [mistake.probability for mistake in report.mistakes]
    assert sure == sorted(sure, reverse=True)
    assert report.mistakes[0].image_id == f"cats/{HOSTILE}"
    assert report.confusion.trace() == 61 - len(wrong)
    assert report.confusion.sum(axis=1).tolist() == [21, 20, 20]  # true classes are rows
    for point in report.map_points:
        row = predicted[point.image_id]
        assert (point.label, point.predicted) == (row["label"], row["predicted"])
    assert len(report.map_points) == 61


def test_of_many_images_the_map_shows_some(hard: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_report, "_NUM_MAP_POINTS", 25)
    head = train(hard, head="centroid", options=TrainOptions(split="kfold:3"))
    predicted = {row["image_id"]: row for row in head.predictions().to_pylist()}
    points = report_of(head, head.metrics()).map_points
    assert len({point.image_id for point in points}) == 25
    for point in points:
        row = predicted[point.image_id]
        assert (point.label, point.predicted) == (row["label"], row["predicted"])


def test_the_report_shows_which_settings_were_chosen(hard: Store) -> None:
    head = train(hard, head="svm", options=TrainOptions(duplicates=None))
    report = report_of(head, head.metrics())
    rows = report.tables["How settings were chosen"]
    assert [row["settings"] for row in rows] == ["C 0.3", "C 1.0", "C 3.0"]
    (chosen,) = (row for row in rows if row["chosen"])
    assert chosen["settings"] == f"C {head.model.settings['C']}"
    assert float(chosen["held-out log-loss"]) == min(float(r["held-out log-loss"]) for r in rows)
    assert report.provenance["recipe"] == hard.recipe.fingerprint
    assert report.provenance["labels"] == "folder"
    alone = train(hard, head="centroid")  # nothing to choose
    assert report_of(alone, alone.metrics()).tables == {}


def test_a_hostile_name_is_text_in_the_report(hard: Store, tmp_path: Path) -> None:
    words = "--head centroid --split kfold:3 --duplicates none"
    done("train", hard.path, tmp_path / "m", *words.split())
    page = (tmp_path / "m/report.html").read_text()
    assert "<img src=x" not in page
    assert "onerror=alert(1)&gt;.jpg" in page
    rows = pq.read_table(tmp_path / "m/predictions.parquet").to_pylist()
    assert f"cats/{HOSTILE}" in [row["image_id"] for row in rows]


def test_pictures_with_a_hostile_name_go_the_whole_way(world: Path, tmp_path: Path) -> None:
    words = ("--head", "centroid", "--split", "kfold:3")
    shown = done("train", world / "features", tmp_path / "m", *words)
    assert "The report has no pictures" not in shown
    page = (tmp_path / "m/report.html").read_text()
    assert "<img src=x" not in page
    assert "data:image/jpeg;base64," in page
    done("predict", tmp_path / "m", world / "photos", tmp_path / "p.parquet", "--quiet")
    ids = pq.read_table(tmp_path / "p.parquet")["image_id"].to_pylist()
    assert f"cats/{HOSTILE}" in ids
    shown = done("train", world / "features", tmp_path / "n", *words, "--source", tmp_path / "gone")
    assert "The report has no pictures: " in shown
    assert "data:image/jpeg;base64," not in (tmp_path / "n/report.html").read_text()
    moved = (world / "photos").rename(world / "moved")
    try:
        shown = done("train", world / "features", tmp_path / "n", *words, "--source", moved)
    finally:
        moved.rename(world / "photos")
    assert "no pictures" not in shown
    assert "data:image/jpeg;base64," in (tmp_path / "n/report.html").read_text()


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("--head tree", "`head` must be one of logistic, svm"),
        ("--split 0.7", "must be above 0 and at most 0.5. Received: split=0.7"),
        ("--split half", "`split` must be a share between 0 and 1"),
        ("--split kfold:99", "at least 99 groups of near-duplicates"),
        ("--labels class", "`labels` must be folder, parent"),
        ("--labels column:animal", "a column of the store. Received: animal"),
        ("--labels nowhere.csv:animal", "nowhere.csv cannot be read"),
        ("--duplicates 1.5", "`duplicates` must be at most 1. Received: duplicates="),
        ("--class-weight even", "must be balanced. Received: class_weight='even'"),
        ("--class-weight balanced --head knn", "Class weights need one of the heads logistic"),
        ("--separator ; --head lda", "Multi-label targets need one of the heads"),
        ("--layer top", "must be one of the store's features: embedding. Received: top"),
        ("--unlabelled nowhere", "nowhere is not a feature store"),
        ("--unlabelled nowhere --head knn", "Unlabelled images need one of the heads"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(
    zoo: Store, tmp_path: Path, words: str, rule: str
) -> None:
    before = names_in(tmp_path)
    labels = () if "--labels" in words else ("--labels", "parent")
    assert rule in refused("train", zoo.path, tmp_path / "m", *labels, *words.split())
    assert names_in(tmp_path) == before


def test_coarse_labels_that_do_not_fit_leave_nothing_behind(zoo: Store, tmp_path: Path) -> None:
    words = ("--labels", "parent", "--coarse", "folder", "--head", "centroid")
    shown = refused("train", zoo.path, tmp_path / "m", *words)
    assert "must be of the same coarse class. Received: set-" in shown
    assert not (tmp_path / "m").exists()


def test_over_an_older_model_no_file_of_it_is_left(zoo: Store, tmp_path: Path) -> None:
    words = ("train", zoo.path, tmp_path / "m", "--labels", "parent", "--head", "centroid")
    done(*words)
    done(*words, "--no-report")
    assert names_in(tmp_path / "m") == FILES


@pytest.mark.parametrize("words", ["--seed -1", "--head knn"])
def test_too_few_images_or_a_bad_seed_are_a_mistake_too(
    store: Store, tmp_path: Path, words: str
) -> None:
    animals = list(ANIMALS) * 5
    add_rows(store, [f"{a}/{i}.jpg" for i, a in enumerate(animals)], animal_vectors(animals))
    result = run("train", store.path, tmp_path / "m", "--no-report", *words.split())
    assert result.exit_code in (0, 2)


@pytest.mark.filterwarnings("ignore:Only one sample available")
@pytest.mark.parametrize("head", ["logistic", "svm", "ridge", "lda"])
def test_a_class_of_one_image_beside_one_other_is_a_mistake_too(
    store: Store, tmp_path: Path, head: str
) -> None:
    animals = ["cats"] * 30 + ["dogs"]
    add_rows(store, [f"{a}/{i}.jpg" for i, a in enumerate(animals)], animal_vectors(animals))
    words = ("--no-report", "--duplicates", "none", "--head", head)
    result = run("train", store.path, tmp_path / "m", *words)
    assert result.exit_code in (0, 2)


def test_duplicates_that_are_no_number_are_a_wrong_option(zoo: Store, tmp_path: Path) -> None:
    result = run("train", zoo.path, tmp_path / "m", "--duplicates", "many")
    assert result.exit_code == 2
    shown = " ".join(result.output.replace("│", " ").split())
    assert "`duplicates` must be auto, none or a number. Received: many" in shown
    assert "Traceback" not in result.output
    assert not (tmp_path / "m").exists()


def test_places_that_make_no_sense_are_refused(zoo: Store, tmp_path: Path) -> None:
    assert "is not a feature store" in refused("train", tmp_path / "no", tmp_path / "m")
    assert not (tmp_path / "m").exists()
    words = ("--labels", "parent", "--duplicates", "none", "--head", "centroid")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.txt").touch()
    shown = refused("train", zoo.path, tmp_path / "thesis", *words)
    assert "must be written to an empty folder" in shown
    assert names_in(tmp_path / "thesis") == ["thesis.txt"]
    assert "empty folder" in refused("train", zoo.path, zoo.path, *words)
    file = tmp_path / "thesis/thesis.txt"
    assert "empty folder" in refused("train", zoo.path, file, *words)
    assert "cannot be written" in refused("train", zoo.path, file / "m", *words)
    assert file.read_text() == ""


# evaluate -----------------------------------------------------------------------------------


@pytest.fixture
def model(zoo: Store, tmp_path: Path) -> Path:
    """A model of the zoo, which saw 48 of its 60 images."""
    head = train(zoo, "parent", "centroid", TrainOptions(duplicates=None))
    head.save(tmp_path / "model")
    return tmp_path / "model"


def test_evaluate_leaves_out_what_was_trained_on(zoo: Store, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "all.json"
    shown = done("evaluate", model, zoo.path, "--labels", "parent", "--json", out)
    assert shown.startswith("48 images were trained on, and are left out.\n")
    assert fact(shown, "tested on") == "12 images"
    saved = json.loads((model / "metrics.json").read_text())
    assert json.loads(out.read_text()) == {
        name: saved[name] for name in ("test", "intervals", "before_calibration", "per_class")
    }
    shown = done("evaluate", model, zoo.path, "--labels", "parent", "--include-trained")
    assert "left out" not in shown
    assert fact(shown, "tested on") == "60 images"


def test_evaluate_prints_the_five_classes_of_least_f1(store: Store, tmp_path: Path) -> None:
    names = [f"class {n}" for n in range(7)]
    ids = [f"{names[n % 7]}/{n:03d}.jpg" for n in range(140)]
    vectors = np.eye(7)[np.arange(140) % 7]
    swapped = np.arange(140) % 7 == 6
    vectors[swapped] = np.eye(7)[5]  # nobody can tell class 6 from class 5
    add_rows(store, ids, vectors + 0.05 * np.random.default_rng(0).normal(size=vectors.shape))
    train(store, head="centroid", options=TrainOptions(duplicates=None)).save(tmp_path / "m")
    shown = done("evaluate", tmp_path / "m", store.path, "--json", tmp_path / "all.json")
    rows = json.loads((tmp_path / "all.json").read_text())["per_class"]
    listed = shown.split("least F1:")[1].strip().splitlines()
    assert len(listed) == 5
    assert {line.split("  ")[0] for line in listed[:2]} == {"class 5", "class 6"}
    worst = min(rows, key=lambda row: row["f1"])
    assert listed[0].split("  ", 1)[1].strip() == (
        f"F1 {worst['f1']:.3f}, precision {worst['precision']:.3f}, "
        f"recall {worst['recall']:.3f}, {worst['num_images']} images"
    )
    assert fact(shown, "top_5").startswith("1.000")


def test_evaluate_tells_of_classes_and_rows_it_does_not_know(
    zoo: Store, model: Path, tmp_path: Path
) -> None:
    new = Store.open_or_create(tmp_path / "new", zoo.recipe, {})
    animals = ["cats", "dogs", "owls", "owls"] * 5
    ids = [f"{animal.replace('owls', 'bats')}/{i}.jpg" for i, animal in enumerate(animals)]
    add_rows(new, [*ids, "loose.jpg"], animal_vectors([*animals, "cats"], seed=4))
    shown = done("evaluate", model, new.path, "--json", tmp_path / "j.json")
    assert "1 rows have no label." in shown
    assert "The model does not know 1 of the classes, such as bats." in shown
    assert "bats" in shown.split("least F1")[0]
    assert fact(shown, "tested on") == "20 images"
    assert fact(shown, "accuracy").startswith("0.500")
    rows = json.loads((tmp_path / "j.json").read_text())["per_class"]
    assert {row["class"]: row["recall"] for row in rows} == {
        "bats": 0.0,
        "cats": 1.0,
        "dogs": 1.0,
        "owls": 0.0,
    }


def test_what_cannot_be_evaluated_is_refused(zoo: Store, model: Path, tmp_path: Path) -> None:
    labels = ("--labels", "parent")
    assert "no is not a model" in refused("evaluate", tmp_path / "no", zoo.path, *labels)
    assert "not a feature store" in refused("evaluate", model, tmp_path / "no", *labels)
    assert "`labels` must be" in refused("evaluate", model, zoo.path, "--labels", "x")
    recipe = zoo.recipe.model_copy(update={"crop": "squash"})
    other = Store.open_or_create(tmp_path / "other", recipe, {})
    add_rows(other, ["a/cats/1.jpg", "a/dogs/1.jpg"], animal_vectors(["cats", "dogs"]))
    shown = refused("evaluate", model, other.path, *labels)
    assert "trained on features of another recipe than the store" in shown
    assert "crop: center, not squash" in shown
    train(zoo, "parent", "centroid", TrainOptions(split="kfold:3")).save(tmp_path / "folds")
    shown = refused("evaluate", tmp_path / "folds", zoo.path, *labels, "--json", tmp_path / "j")
    assert "of which all 60 labelled images were; --include-trained" in shown
    assert not (tmp_path / "j").exists()


def test_unknown_classes_are_printed_as_plain_names(
    zoo: Store, model: Path, tmp_path: Path
) -> None:
    new = Store.open_or_create(tmp_path / "new", zoo.recipe, {})
    add_rows(new, ["cats/1.jpg", "bats/2.jpg"], animal_vectors(["cats", "owls"], seed=4))
    assert "np.str_" not in done("evaluate", model, new.path)


def test_a_class_that_no_image_has_needs_no_coarse_one(
    zoo: Store, model: Path, tmp_path: Path
) -> None:
    new = Store.open_or_create(tmp_path / "new", zoo.recipe, {})
    add_rows(new, ["fur/cats/1.jpg", "fur/dogs/2.jpg"], animal_vectors(["cats", "dogs"]))
    words = ("--labels", "parent", "--coarse", "folder")
    assert fact(done("evaluate", model, new.path, *words), "coarse_accuracy").startswith("1.000")


def test_a_model_that_does_not_tell_what_it_saw_is_refused(zoo: Store, model: Path) -> None:
    (model / "predictions.parquet").unlink()
    refused("evaluate", model, zoo.path, "--labels", "parent")


def test_a_file_that_cannot_be_written_is_a_mistake_too(
    zoo: Store, model: Path, tmp_path: Path
) -> None:
    words = ("--labels", "parent", "--json", tmp_path / "no/all.json")
    refused("evaluate", model, zoo.path, *words)


def test_images_that_gave_a_pseudo_label_count_as_trained_on(store: Store, tmp_path: Path) -> None:
    animals = list(ANIMALS) * 4
    ids = [f"{animal}/{i:02d}.jpg" for i, animal in enumerate(animals)]
    add_rows(store, ids, animal_vectors(animals, 3, 0.4))
    new = Store.open_or_create(tmp_path / "new", store.recipe, {})
    animals = list(ANIMALS) * 60
    add_rows(
        new, [f"{a}/new-{i}.jpg" for i, a in enumerate(animals)], animal_vectors(animals, 23, 0.4)
    )
    add_rows(store, [f"{i[:4]}/test-{i[5:]}" for i in ids], animal_vectors(animals[:12], 13, 0.4))
    parts = [f"{i},{'test' if 'test-' in i else 'train'}" for i in store.ids()]
    (tmp_path / "split.csv").write_text("\n".join(["path,part", *parts]))
    split = f"{tmp_path}/split.csv:part"
    options = TrainOptions(duplicates=None, split=split, unlabelled=str(new.path))
    head = train(store, "folder", "svm", options)
    assert head.semi_supervised is not None and head.semi_supervised.training.kept_round > 0
    head.save(tmp_path / "m")
    shown = done("evaluate", tmp_path / "m", new.path)
    assert "were trained on, and are left out" in shown


# predict ------------------------------------------------------------------------------------


def test_predict_writes_a_row_for_each_row_of_a_store(
    zoo: Store, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.parquet"
    shown = done("predict", model, zoo.path, out, "--top-k", "2")
    assert fact(shown, "predicted") == "60 images"
    assert fact(shown, "failed") == "0 images"
    assert fact(shown, "predictions") == str(out)
    rows = pq.read_table(out).to_pylist()
    assert len(rows) == 60
    assert all(row["class"] == row["image_id"].split("/")[1] for row in rows)
    assert {len(row["top_k"]) for row in rows} == {2}
    assert done("predict", model, zoo.path, tmp_path / "q.parquet", "--quiet") == ""
    assert pq.read_metadata(tmp_path / "q.parquet").num_rows == 60
    names = ["features", "model", "p.parquet", "q.parquet"]
    assert names_in(tmp_path) == names  # no temporary file


def test_predict_runs_images_and_keeps_what_is_asked_for(world: Path, tmp_path: Path) -> None:
    done("train", world / "features", tmp_path / "m", "--head", "centroid", "--no-report")
    places = (tmp_path / "m", world / "photos", tmp_path / "p.parquet")
    shown = done("predict", *places, "--limit", "5", "--shard-size", "3")
    assert fact(shown, "predicted") == "5 images"
    assert "images/s" in shown
    assert "logits" not in shown  # what is kept is out of sight
    (kept,) = (tmp_path / ".p.parquet.logits").iterdir()
    assert len(Store(kept).shards()) == 2
    shown = done("predict", *places, "--store", tmp_path / "kept")
    assert fact(shown, "store") == str(tmp_path / "kept")
    assert fact(shown, "predicted") == "25 images"
    assert Store(tmp_path / "kept").vectors().shape == (25, 1280)


def test_what_cannot_be_predicted_is_refused(zoo: Store, model: Path, tmp_path: Path) -> None:
    before = names_in(tmp_path)
    out = tmp_path / "p.parquet"
    assert "no is not a model" in refused("predict", tmp_path / "no", zoo.path, out)
    shown = refused("predict", model, zoo.path, tmp_path / "no/p.parquet")
    assert "OUT must be a file in a folder that exists" in shown
    assert "OUT must be a file" in refused("predict", model, zoo.path, tmp_path)
    assert "`top_k` must be at least 1" in refused("predict", model, zoo.path, out, "--top-k", "0")
    result = run("predict", model, tmp_path / "nowhere", out)
    assert result.exit_code == 2
    assert "which does not exist" in result.output
    assert "Traceback" not in result.output
    assert names_in(tmp_path) == before
    recipe = zoo.recipe.model_copy(update={"crop": "squash"})
    other = Store.open_or_create(tmp_path / "other", recipe, {})
    add_rows(other, ["a/1.jpg"], animal_vectors(["cats"]))
    assert "crop: center, not squash" in refused("predict", model, other.path, out)
    assert not out.exists()
