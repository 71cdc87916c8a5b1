"""The package's functions: their signatures, their types, and that each does its job."""

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embedder
from embedder.backbones.options import RecipeOptions
from embedder.errors import RequestError, StoreError
from embedder.extraction.options import RunOptions
from embedder.finetuning.options import TuneOptions
from embedder.training.options import TrainOptions
from tests import stub
from tests.support import ROOT

SIZE = (64, 96)
SCRIPT = """
import embedder

store = embedder.extract("photos", "features", backbone="resnet50", image_size=(64, 96))
head = embedder.train(store, head="ridge", split="0.2")
tuned = embedder.finetune("model", "photos", "tuned", strategy="cut", workers=2)
reveal_type(store)
reveal_type(head)
reveal_type(tuned)
reveal_type(embedder.predict("model", "photos", "out.parquet"))
reveal_type(embedder.__version__)
embedder.extract("photos", "features", bakcbone="resnet50")
embedder.extract("photos", "features", crop="middle")
embedder.finetune("model", "photos", "tuned", limit=5)
embedder.train(store, head="rigde")
"""


def test_every_name_is_there_and_is_said_to_be() -> None:
    assert {*embedder.__all__} <= {*dir(embedder)}
    for name in embedder.__all__:
        assert getattr(embedder, name).__doc__, name
    with pytest.raises(AttributeError):
        embedder.extrakt  # noqa: B018


def test_the_types_are_those_of_the_functions_and_their_options() -> None:
    message = "embedder/__init__.pyi is out of date: run `make format`, or `python -m tests.stub`"
    assert stub.STUB.read_text() == stub.make_stub(), message


def test_a_type_checker_knows_the_options(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    found = [line.split(":", 1)[1] for line in done.stdout.splitlines()]
    assert [line for line in found if "note: Revealed" in line] == [
        '7: note: Revealed type is "embedder.store.store.Store"',
        '8: note: Revealed type is "embedder.training.trained_head.TrainedHead"',
        '9: note: Revealed type is "embedder.finetuning.finetune.Tuned"',
        '10: note: Revealed type is "embedder.inference.predict.Predictions"',
        '11: note: Revealed type is "str"',
    ]
    errors = "\n".join(line for line in found if "error:" in line)
    assert [line.split(":")[0] for line in errors.splitlines()] == ["12", "13", "14", "15"], errors
    assert 'Unexpected keyword argument "bakcbone" for "extract"; did you mean "backbone"' in errors


@pytest.mark.parametrize(
    ("function", "classes"),
    [
        (embedder.extract, (RecipeOptions, RunOptions)),
        (embedder.train, (TrainOptions,)),
        (embedder.predict, (RunOptions,)),
        (embedder.finetune, (TuneOptions,)),
    ],
)
def test_options_are_parameters_with_their_defaults(
    function: Any, classes: tuple[Any, ...]
) -> None:
    parameters = inspect.signature(function).parameters
    for field in (field for cls in classes for field in fields(cls)):
        assert parameters[field.name].default == field.default
        assert f"        {field.name}: " in function.__doc__


def test_an_unknown_option_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"Unknown option: bakcbone\. There are: .*backbone"):
        embedder.extract(tmp_path, tmp_path / "store", bakcbone="resnet50")  # type: ignore[call-arg]
    with pytest.raises(RequestError, match=r"Unknown option: limit\. There are: .*engine, workers"):
        embedder.finetune("model", tmp_path, tmp_path / "out", limit=5)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="`crop` must be .*center.* Received: crop='middle'"):
        embedder.extract(tmp_path, tmp_path / "store", crop="middle")  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


def test_the_whole_way(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = embedder.extract(archive, "features", image_size=SIZE)
    assert all(check.passed for check in embedder.verify("features", str(archive), audit=2))
    head = embedder.train("features", head="ridge", duplicates=None, split="0.3")
    assert repr(head).startswith("<TrainedHead ridge: 2 classes, accuracy ")
    metrics = head.save("model")
    low, high = metrics["intervals"]["test"]["accuracy"]
    assert repr(head).endswith(f"{metrics['test']['accuracy']:.3f} ({low:.3f} to {high:.3f})>")

    model = embedder.load_model("model")
    assert model.classes.tolist() == ["cats", "dogs"]
    result = embedder.evaluate("model", embedder.open_store("features"), include_trained=True)
    assert repr(result).startswith("<EvaluationResult 20 images: accuracy ")
    seen: list[str] = []
    predictions = embedder.predict(
        "model", archive, "out.parquet", on_progress=lambda progress: seen.append(progress.phase)
    )
    assert repr(predictions) == "<Predictions out.parquet: 20 images, 0 failed>"
    assert repr(predictions.summary).endswith(": 20 new, 0 failed, done>")
    assert "embedding" in seen

    seen.clear()
    tuned = embedder.finetune(
        *("model", archive, "tuned"),
        strategy="scratch",
        epochs=1,
        augment=(),
        on_progress=lambda progress: seen.append(progress.phase),
    )
    assert repr(tuned).startswith("<Tuned tuned: scratch, accuracy ")
    assert any(phase.startswith("epoch 1: loss ") for phase in seen)
    rows = embedder.compare(["model", "tuned"])
    assert [row["model"] for row in rows] == ["model", "tuned"]
    exported = embedder.export("model", "exported", "openvino", num_images=2)
    assert repr(exported).startswith("<Exported ")
    assert repr(exported).endswith(" MB, compared on 2 images>")
    np.testing.assert_array_equal(store.ids(), embedder.open_store("features").ids())
    with pytest.raises(StoreError):
        embedder.open_store("nowhere")


def test_backbones_are_listed_by_the_names_that_extract_takes() -> None:
    names = embedder.list_backbones()
    assert {"efficientnet-lite0", "resnet50"} <= {*names}
