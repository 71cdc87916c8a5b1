"""Job files say what would be typed, and are refused before anything is started."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from embedder.cli.app import app
from embedder.cli.job_file import read_job
from embedder.errors import JobError
from embedder.store.store import Store
from tests.support import ROOT, make_archive

JOBS = ROOT / "jobs"

JOB = """
[variables]
photos = "photos"
out = "run"

[[steps]]
command = "extract"
arguments = ["{photos}", "{out}/features"]
image-size = "64x96"
quiet = true
prune = false

[[steps]]
command = "extract"
arguments = ["{photos}", "{out}/several"]
backbone = ["mobilenet", "vgg16"]
weights = ["random:1", "random:2"]
limit = 3
"""


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "job.toml").write_text(text)
    return tmp_path / "job.toml"


def test_a_step_is_what_would_be_typed(tmp_path: Path) -> None:
    first, second = read_job(write(tmp_path, JOB), {"out": "elsewhere {x}"})
    features = "elsewhere {x}/features"
    assert first == ["extract", "photos", features, "--image-size", "64x96", "--quiet"]
    options = (
        "--backbone mobilenet --backbone vgg16 --weights random:1 --weights random:2 --limit 3"
    )
    assert second == ["extract", "photos", "elsewhere {x}/several", *options.split()]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("steps = 3", r"must have \[\[steps\]\]"),
        ("", r"must have \[\[steps\]\].*with nothing"),
        (JOB + "\n[stepz]\na = 1", "and nothing else.*stepz"),
        ("[[steps]]\nsource = 3", "must name its `command`"),
        ('[[steps]]\ncommand = "extract"\narguments = "x"', "must be a list. Received: 'x'"),
        ('[[steps]]\ncommand = "extract"\narguments = ["{where}"]', "one of its variables: none"),
        ("[[steps]", "cannot be read: "),
        ('variables = "x"\n[[steps]]\ncommand = "extract"', r"\[variables\] .* Received: 'x'"),
        ('[variables]\na = ["b"]\n[[steps]]\ncommand = "extract"', r"a text or a number.*\['b'\]"),
        ('[[steps]]\ncommand = "extract"\nlimit = {a = 1}', "a text or a number.*'a': 1"),
        ("a = " + "[" * 5000, "cannot be read: it is nested too deeply"),
        ("a = " + "9" * 5000, "cannot be read: "),
        ("#" * 2**20 + "\na = 1", "at most 1,048,576 bytes"),
    ],
)
def test_what_is_no_job_is_refused(tmp_path: Path, text: str, rule: str) -> None:
    with pytest.raises(JobError, match=rule):
        read_job(write(tmp_path, text), {})


@pytest.mark.parametrize(
    "text", ["{a!r:>999999999}", "{a:>99}", "{a!s}", "{a.__class__}", "{a[0]}", "{}", "{0}", "{a"]
)
def test_in_braces_are_names_and_nothing_else(tmp_path: Path, text: str) -> None:
    job = f'[variables]\na = "b"\n[[steps]]\ncommand = "extract"\narguments = ["{text}"]'
    with pytest.raises(JobError, match=r"(one of its variables: a|variable's name).*Received: '{"):
        read_job(write(tmp_path, job), {})


def test_braces_can_be_written(tmp_path: Path) -> None:
    job = '[variables]\na = "b"\n[[steps]]\ncommand = "extract"\narguments = ["{{{a}}} {a}"]'
    assert read_job(write(tmp_path, job), {}) == [["extract", "{b} b"]]


@pytest.mark.parametrize(
    ("num_names", "num_words", "rule"),
    [(20_000, 1, "A word of a job .* 65,536"), (6, 30_000, "The words of a job .* 1,048,576")],
)
def test_variables_do_not_blow_up(
    tmp_path: Path, num_names: int, num_words: int, rule: str
) -> None:
    arguments = ", ".join([f'"{"{a}" * num_names}"'] * num_words)
    variable = f'[variables]\na = "{"x" * 10_000}"'
    text = f'{variable}\n[[steps]]\ncommand = "extract"\narguments = [{arguments}]'
    with pytest.raises(JobError, match=rule):
        read_job(write(tmp_path, text), {})


def test_a_variable_that_the_job_has_not_cannot_be_set(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="a variable of the job: photos, out. Received: phtos"):
        read_job(write(tmp_path, JOB), {"phtos": "x"})


def test_a_job_runs_its_steps(archive: Path, tmp_path: Path) -> None:
    text = JOB.split("[[steps]]\ncommand", 2)
    job = write(tmp_path, f"{text[0]}[[steps]]\ncommand{text[1]}")
    out = tmp_path / "run"
    done = CliRunner().invoke(
        app, ["run", str(job), "--set", f"photos={archive}", "--set", f"out={out}"]
    )
    assert done.exit_code == 0, done.output
    assert len(Store(out / "features")) == 20
    assert f"$ embedder extract {archive}" in done.output


@pytest.mark.parametrize(
    ("step", "rule"),
    [
        ('command = "extrac"', "must be one of embedder's, but run. Received: extrac"),
        ('command = "run"\narguments = ["job.toml"]', "but run. Received: run"),
        ('command = "verify"\narguments = ["x"]\naudits = 3', "No such option: --audits"),
        ('command = "verify"\nhelp = true', "it runs nothing"),
        ('command = "verify"', "Missing argument"),
        ('command = "train"\narguments = ["x", "y"]\nseed = -1', "`seed` must be at least 0"),
    ],
)
def test_a_bad_step_is_refused_before_the_first_is_started(
    archive: Path, tmp_path: Path, step: str, rule: str
) -> None:
    good = f'[[steps]]\ncommand = "extract"\narguments = ["{archive}", "{tmp_path}/features"]\n'
    job = write(tmp_path, f"{good}\n[[steps]]\n{step}\n")
    done = CliRunner().invoke(app, ["run", str(job)])
    assert done.exit_code == 2
    assert rule in done.output
    assert not (tmp_path / "features").exists()


def test_a_step_that_fails_ends_the_job_with_its_status(archive: Path, tmp_path: Path) -> None:
    bad = f'[[steps]]\ncommand = "verify"\narguments = ["{tmp_path}/nothing"]\n'
    good = f'[[steps]]\ncommand = "extract"\narguments = ["{archive}", "{tmp_path}/features"]\n'
    done = CliRunner().invoke(app, ["run", str(write(tmp_path, f"{bad}\n{good}"))])
    assert done.exit_code == 2
    assert "is not a feature store" in done.output
    assert not (tmp_path / "features").exists()


def test_the_textile_job_runs_the_whole_way(archive: Path, tmp_path: Path) -> None:
    settings = ("--set", f"images={archive}", "--set", f"out={tmp_path}/out")
    settings += ("--set", "epochs=1", "--set", "cut_epochs=1")
    done = CliRunner().invoke(app, ["run", str(JOBS / "textile.toml"), *settings])
    assert done.exit_code == 0, done.output
    for model in ("model", "gradual", "cut"):
        assert (tmp_path / "out" / model / "report.html").stat().st_size > 1e6
    assert pq.read_metadata(tmp_path / "out/predictions.parquet").num_rows == 20
    assert (tmp_path / "out/export/labels.txt").read_text() == "cats\ndogs\n"
    assert "frozen + logistic" in done.output


def test_the_grocery_job_runs_the_whole_way(tmp_path: Path) -> None:
    grocery = tmp_path / "grocery"
    for part, size in (("train", 12), ("val", 4), ("test", 6)):
        make_archive(grocery / part / "Fruit", size, first_seed=len(part) * 100)
        paths = sorted(path.relative_to(grocery) for path in (grocery / part).rglob("*.*g"))
        lines = [f"{path}, {path.parent.name == 'dogs':d}, 0" for path in paths]
        (grocery / f"{part}.txt").write_text("\n".join(lines))
    settings = ("--set", f"grocery={grocery}", "--set", f"out={tmp_path}/out")
    settings += ("--set", "backbone=efficientnet-lite0")  # which other tests have at hand
    done = CliRunner().invoke(app, ["run", str(JOBS / "grocery.toml"), *settings])
    assert done.exit_code == 0, done.output
    assert "coarse_accuracy    1.000" in done.output
    assert pq.read_metadata(tmp_path / "out/predictions.parquet").num_rows == 6


def test_the_demo_images_have_a_name_in_jobs(tmp_path: Path) -> None:
    pytest.importorskip("conformal_clip_data", reason="needs the demo images")
    ((_, source, _),) = (words for words in read_job(JOBS / "textile.toml", {})[:1])
    assert len(list(Path(source).rglob("*.jpg"))) == 2000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no FIFOs")
def test_a_job_that_is_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "job.toml")
    command = [sys.executable, "-m", "embedder", "run", "job.toml"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2
    assert "The job job.toml cannot be read: " in found.stderr
    assert "not a regular file" in found.stderr
