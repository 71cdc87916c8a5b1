"""A disk that is full: the command says what cannot be written and why, and nothing is lost."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import embedder
from embedder.heads.model import Model
from embedder.training.options import TrainOptions
from embedder.training.train import train
from tests.support import TESTS, make_archive

SIZE = (64, 96)
# A limit on the size of a file is met as a full disk is: by an error when it is written.
LIMITED = """
import resource, signal, sys
from embedder.cli.app import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main()
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos`, their `features`, and `model`, a logistic head on them."""
    folder = tmp_path_factory.mktemp("world")
    make_archive(folder / "photos", 40)
    store = embedder.extract(folder / "photos", folder / "features", image_size=SIZE)
    train(store, "folder", "logistic", TrainOptions(duplicates=None)).save(folder / "model")
    return folder


def refused(limit: int, *arguments: str | Path) -> str:
    """What a command says on its last line that cannot write files of more than `limit` bytes."""
    command = [sys.executable, "-c", LIMITED, str(limit), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("limit", [100, 40_000])  # of the head, of the report
def test_a_training_leaves_the_older_model(world: Path, tmp_path: Path, limit: int) -> None:
    model = shutil.copytree(world / "model", tmp_path / "model")
    words = ["--head", "centroid", "--duplicates", "none"]
    message = refused(limit, "train", world / "features", model, *words)
    assert message == f"Error: The model {model} cannot be written: File too large"
    assert Model.load(model).head == "logistic"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_prediction_leaves_the_older_file(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.parquet"
    out.write_text("older")
    message = refused(1000, "predict", world / "model", world / "features", out)
    assert message == f"Error: {out} cannot be written: File too large"
    assert out.read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["p.parquet"]


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "model", "features", "--include-trained", "--json"),
        ("compare", "model", "model", "--json"),
        ("compare", "model", "model", "--report"),
    ],
)
def test_what_was_asked_for_leaves_the_older_file(
    world: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "out").write_text("older")
    places = [world / word if (world / word).exists() else word for word in command]
    message = refused(100, *places, tmp_path / "out")
    assert message == f"Error: {tmp_path / 'out'} cannot be written: File too large"
    assert (tmp_path / "out").read_text() == "older"


@pytest.mark.parametrize(
    ("limit", "file"),
    [(100_000, "pixels.npy"), (1_000_000, "checkpoint.npz"), (2_000_000, "backbone.weights.h5")],
)
def test_a_fine_tuning_says_which_file(world: Path, tmp_path: Path, limit: int, file: str) -> None:
    words = ["--strategy", "bias", "--epochs", "1", "--batch-size", "8"]
    if file == "backbone.weights.h5":  # which is smaller than a checkpoint
        command = ["finetune", world / "model", world / "photos", tmp_path / "out", *words]
        done = subprocess.run([sys.executable, TESTS / "killing.py", "half-", "1", *command])
        assert done.returncode < 0
    message = refused(
        limit, "finetune", world / "model", world / "photos", tmp_path / "out", *words
    )
    assert file in message
    assert "cannot be written: " in message
    assert "too large" in message
    assert not (tmp_path / "out").exists()


def test_an_export_leaves_the_older_one(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    message = refused(
        8_000_000, "export", world / "model", out, "--format", "keras", "--images", "1"
    )
    assert message == f"Error: The export {out} cannot be written: File too large"
    assert list(tmp_path.iterdir()) == []
