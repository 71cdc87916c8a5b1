"""A kill at any moment leaves the older result or the newer, and the same command then succeeds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from embedder.recipe import Recipe
from embedder.store.store import Store
from tests.support import TESTS, add_rows, animal_vectors

KILLING = TESTS / "killing.py"


def run(script: str, *arguments: str | Path) -> list[list[str]]:
    """What a script prints, which forks: it must not share a process with TensorFlow's threads."""
    code = f"import sys; sys.path.insert(0, {str(KILLING.parent)!r})\n{script}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.fixture
def features(tmp_path: Path) -> Path:
    """Features of forty owls, cats and dogs."""
    recipe = Recipe(backbone="mean-colour", weights="0" * 64, image_size=(48, 64))
    store = Store.open_or_create(tmp_path / "features", recipe, {})
    animals = ["owls", "cats", "dogs"] * 20
    add_rows(
        store,
        [f"{a}/{i:02d}.jpg" for i, a in enumerate(animals)],
        animal_vectors(animals, noise=0.3),
    )
    return store.path


SAVE = """
import sys
from pathlib import Path
from tests.killing import kills
from embedder.training.train import train
from embedder.heads.model import Model
from embedder.store.store import Store
from embedder.training.options import TrainOptions
store, out = Store(sys.argv[1]), Path(sys.argv[2])
options = TrainOptions(duplicates=None)
older, newer = (train(store, "folder", head, options) for head in ("ridge", "centroid"))
def save(head):
    head.save(out, lambda folder, metrics: (folder / "report.html").write_text(head.model.head))
for number in kills(str(out.parent), lambda: save(older), lambda: save(newer)):
    found, page = Model.load(out).head, (out / "report.html").read_text()
    print(found, page, len(list(out.iterdir())))
    save(newer)
    again = Model.load(out).head
    print(again, (out / "report.html").read_text(), len(list(out.parent.iterdir())))
"""


def test_a_killed_training_leaves_a_whole_model_and_the_next_one_works(
    features: Path, tmp_path: Path
) -> None:
    lines = run(SAVE, features, tmp_path / "models" / "animals")
    after, again = lines[::2], lines[1::2]
    assert [
        line for line in after if line not in (["ridge"] * 2 + ["5"], ["centroid"] * 2 + ["5"])
    ] == []
    assert {line[0] for line in after} == {"ridge", "centroid"}
    assert again == [["centroid", "centroid", "1"]] * len(after)
    assert len(after) >= 7


PREDICT = """
import sys
from pathlib import Path
import pyarrow.parquet as pq
from tests.killing import kills
from embedder.training.train import train
from embedder.inference.predict import predict
from embedder.store.store import Store
from embedder.training.options import TrainOptions
features, model, out = (Path(text) for text in sys.argv[1:])
head = train(Store(features), "folder", "centroid", TrainOptions(duplicates=None))
head.model.save(model)
for number in kills(
    str(out.parent),
    lambda: predict(model, features, out, top_k=1),
    lambda: predict(model, features, out, top_k=2),
):
    ranked = pq.read_table(out)["top_k"].to_pylist()
    predict(model, features, out, top_k=3)
    again = pq.read_table(out)["top_k"].to_pylist()
    print(len(ranked), len(ranked[0]), len(again[0]), len(list(out.parent.iterdir())))
"""


def test_a_killed_prediction_leaves_the_older_file_and_the_next_one_works(
    features: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    lines = run(PREDICT, features, tmp_path / "model", tmp_path / "out" / "p.parquet")
    assert lines == [["60", "1", "3", "1"]] * 2  # before it is begun, and before it is renamed
