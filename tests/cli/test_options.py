"""Option classes as options of the command line: what is typed, and what a function gets."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from embedder.backbones.options import RecipeOptions
from embedder.backbones.table import BACKBONES
from embedder.cli.extraction import make_recipes
from embedder.cli.options import command, parts_of
from embedder.engines.engine import ENGINES
from embedder.extraction.options import RunOptions
from embedder.finetuning.options import STRATEGIES, StrategyName, TuneOptions
from embedder.heads.table import HEADS
from embedder.inference.formats import FORMATS
from embedder.inference.options import ExportFormat
from embedder.options import description_of
from embedder.recipe import Recipe
from embedder.training.options import HeadName, TrainOptions
from tests.support import ROOT

CLASSES = (RecipeOptions, RunOptions, TrainOptions, TuneOptions)
SCRIPTS = Path(sys.executable).parent


def received(cls: Any, *words: str) -> Any:
    """What a function gets that takes options of a class."""
    found = []

    def function(options: Any) -> None:
        found.append(options)

    function.__annotations__["options"] = cls
    app = typer.Typer()
    app.command()(command(function))
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return found[0]


@pytest.mark.parametrize("cls", CLASSES)
def test_without_words_all_have_their_defaults(cls: Any) -> None:
    assert received(cls) == cls()


@pytest.mark.parametrize("cls", CLASSES)
def test_each_attribute_says_what_it_is_for(cls: Any) -> None:
    for name, annotation in cls.__annotations__.items():
        assert description_of(annotation), name
        assert f"\n    {name}: " in cls.__doc__


def test_each_option_of_a_run_without_a_default_says_what_holds_without_it() -> None:
    described = {
        name: description_of(annotation)
        for name, annotation in RunOptions.__annotations__.items()
        if getattr(RunOptions, name) is None
    }
    assert {"decoders", "part", "workers"} <= described.keys()
    assert [name for name, text in described.items() if "If not given, " not in text] == []


@pytest.mark.parametrize(
    ("cls", "words", "values"),
    [
        (
            TuneOptions,
            "--augment flip,crop --augment mixup",
            {"augment": ("flip", "crop", "mixup")},
        ),
        (TuneOptions, "--augment none", {"augment": ()}),
        (TuneOptions, "--augment flip", {"augment": ("flip",)}),
        (
            TuneOptions,
            "--strategy partial --block a,b --block c",
            {"strategy": "partial", "blocks": ("a", "b", "c")},
        ),
        (
            TuneOptions,
            "--auxiliary x --loss-weights 2 7.5",
            {"auxiliary": "x", "loss_weights": (2.0, 7.5)},
        ),
        (
            TuneOptions,
            "--epochs 3 --ema 0.9 --train-norm",
            {"epochs": 3, "ema": 0.9, "train_norm": True},
        ),
        (
            RecipeOptions,
            "--layer a,b --image-size 64X96",
            {"layers": ("a", "b"), "image_size": (64, 96)},
        ),
        (
            RecipeOptions,
            "--image-size 224 --l2-normalise",
            {"image_size": (224, 224), "l2_normalise": True},
        ),
        (RunOptions, "--batch-size auto", {"batch_size": None}),
        (RunOptions, "--batch-size 8 --max-failures 1e-2", {"batch_size": 8, "max_failures": 0.01}),
        (TrainOptions, "--duplicates none --layer top", {"duplicates": None, "column": "top"}),
        (TrainOptions, "--duplicates auto", {}),
        (TrainOptions, "--duplicates .8", {"duplicates": 0.8}),
    ],
)
def test_what_is_typed_arrives(cls: Any, words: str, values: dict[str, Any]) -> None:
    assert received(cls, *words.split()) == cls(**values)


def test_a_comma_may_be_of_a_files_name(tmp_path: Path) -> None:
    (tmp_path / "a,b.h5").touch()
    assert parts_of([f"{tmp_path}/a,b.h5", "c, d"]) == [f"{tmp_path}/a,b.h5", "c", "d"]


def test_the_choices_are_those_there_are() -> None:
    engine = RunOptions.__annotations__["engine"].__origin__
    assert get_args(engine) == ("auto", *ENGINES)
    assert get_args(HeadName) == tuple(HEADS)
    assert get_args(StrategyName) == tuple(STRATEGIES)
    assert get_args(ExportFormat) == tuple(FORMATS)
    assert RecipeOptions.__annotations__.keys() == Recipe.model_fields.keys() - {
        "head",
        "head_source",
        "version",
        "weights_source",
    }


def test_several_networks_make_a_store_each() -> None:
    names = ["mobilenet", "vgg16"]
    made = make_recipes("out", names, ["random"], RecipeOptions(pooling="max"))
    assert [recipe.weights for recipe in made.values()] == ["random:0", "random:0"]
    made = make_recipes("out", names, ["random:1", "random:2"], RecipeOptions())
    assert list(made) == [f"out{os.sep}mobilenet", f"out{os.sep}vgg16"]
    assert [(r.backbone, r.weights) for r in made.values()] == [
        ("mobilenet", "random:1"),
        ("vgg16", "random:2"),
    ]
    assert list(make_recipes("out", ["vgg16"], ["random"], RecipeOptions())) == ["out"]


def shell(name: str, script: str, home: Path) -> str:
    """What a shell of a name prints; zsh and fish are bash here, which goes by its name alone."""
    (home / name).symlink_to("/bin/bash")
    environment = {"HOME": str(home), "PATH": f"{SCRIPTS}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [home / name, "--norc", "-c", f"{script}\n:"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["fine"], ["finetune"]),
        (["extract", "--crop", ""], ["center", "squash", "pad"]),
        (["extract", "--backbone", "mobilenet-v2"], ["mobilenet-v2"]),
        (["backbones", "vgg"], [name for name in BACKBONES if name.startswith("vgg")]),
        (["train", "--head", "l"], ["logistic", "lda", "linear"]),
        (["finetune", "--strategy", "par"], ["partial"]),
        (["finetune", "--augment", "flip,c"], ["flip,crop", "flip,colour", "flip,cutmix"]),
        (["export", "--format", "o"], ["onnx", "openvino"]),
        (["predict", "--engine", "t"], ["tensorflow"]),
        (["extract", "--st"], ["--store-dtype"]),
    ],
    ids=lambda value: value[-1],
)
def test_bash_completes(words: list[str], offered: list[str], tmp_path: Path) -> None:
    quoted = " ".join(f"'{word}'" for word in words)
    script = f"""eval "$(embedder --show-completion)"
        COMP_WORDS=(embedder {quoted}); COMP_CWORD={len(words)}
        _embedder_completion embedder
        printf '%s\\n' "${{COMPREPLY[@]}}" """
    assert shell("bash", script, tmp_path).split() == offered


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("bash", ".bash_completions/embedder.sh"),
        ("zsh", ".zfunc/_embedder"),
        ("fish", ".config/fish/completions/embedder.fish"),
    ],
)
def test_completion_is_installed_for_the_shell_that_asks(
    name: str, file: str, tmp_path: Path
) -> None:
    shown = shell(name, "embedder --install-completion", tmp_path)
    assert f"{name} completion installed" in shown
    script = (tmp_path / file).read_text().strip()
    assert f"_EMBEDDER_COMPLETE=complete_{name}" in script
    done = subprocess.run(  # as click's documentation has it
        [SCRIPTS / "embedder"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "_EMBEDDER_COMPLETE": f"{name}_source"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == script
