"""The command line: what a user types, sees, and gets as exit status."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pytest

import embedder
from embedder.backbones.table import BACKBONES
from embedder.checks import doctor
from embedder.engines import available_engines, choose
from embedder.machine import gpus
from embedder.store.store import Store

SMALL = "--image-size", "64x96"


def run(*arguments: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "embedder", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.fixture
def extracted(archive: Path, tmp_path: Path) -> Path:
    (archive / "bad.jpg").write_bytes(b"no image")
    (archive / "notes.txt").touch()
    done = run("extract", archive, tmp_path / "features", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "20 in the store, 20 new" in done.stdout
    assert "1 left out: .txt 1" in done.stdout
    assert "decode  not a readable image; begins with b'no image'" in done.stdout
    assert "images/s" in done.stdout
    assert "bottleneck" in done.stdout
    assert f"embedder inspect {tmp_path / 'features'}" in done.stdout
    assert "embedding 21 images" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr  # plain lines where there is no terminal
    return tmp_path / "features"


def test_extract_tells_what_became_of_every_file(extracted: Path) -> None:
    store = Store(extracted)
    assert (len(store), store.failures().num_rows) == (20, 1)
    record = json.loads(next((extracted / "runs").glob("*.json")).read_text())
    assert record["status"] == "done"
    assert record["counts"]["inputs"] == 21
    assert set(record["seconds"]) == {"read", "decode", "embed", "write"}
    assert record["seconds_total"] > 21 / record["images_per_second"]
    assert record["bottleneck"]


def test_duckdb_reads_the_store_as_it_is(extracted: Path) -> None:
    found = duckdb.sql(
        f"select count(*), min(len(embedding)), min(format) from '{extracted}/embeddings/*.parquet'"
    ).fetchall()
    assert found == [(20, 1280, "JPEG")]


def test_inspect_shows_what_is_in_the_store(extracted: Path) -> None:
    done = run("inspect", extracted)
    assert done.returncode == 0
    for text in ("efficientnet-lite0", "(64, 96)", "not a readable image", "done"):
        assert text in done.stdout


def test_verify_passes_a_good_store(archive: Path, extracted: Path) -> None:
    done = run("verify", extracted, "--source", archive, "--audit", "5")
    assert done.returncode == 0, done.stdout
    assert "5 images embedded again" in " ".join(done.stdout.split())
    assert "FAIL" not in done.stdout


@pytest.mark.parametrize("harm", ["swap", "damage", "change", "delete"])
def test_verify_finds_what_is_wrong(archive: Path, extracted: Path, harm: str) -> None:
    store = Store(extracted)
    (shard,) = store.shards()
    if harm == "swap":  # every vector under the name of another image
        table = store.read_shard(shard.name)
        backwards = table["embedding"].take(list(range(table.num_rows))[::-1])
        position = table.column_names.index("embedding")
        swapped = table.set_column(position, table.schema.field("embedding"), backwards)
        store.replace_shard(shard.name, swapped)
    elif harm == "damage":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif harm == "change":
        shutil.copy(archive / "dogs" / "001.jpg", archive / "cats" / "002.jpg")
    else:
        (archive / "cats" / "002.jpg").unlink()
    done = run("verify", extracted, "--source", archive, "--audit", "20")
    assert done.returncode == 1
    assert "FAIL" in done.stdout
    assert "Traceback" not in done.stderr


def test_backbones_are_listed() -> None:
    done = run("backbones")
    assert done.returncode == 0
    assert all(name in done.stdout for name in BACKBONES)


def test_the_doctor_finds_this_machine_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)  # which JAX may have set in tests
    done = run("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    words = " ".join(done.stdout.split())
    names = available_engines(gpus())
    further = [
        f"{name}: {precision} as float32"
        for name in names
        for precision in doctor.precisions(choose(name, gpus()))
        if precision != "float32"
    ]
    # Rotation, two ways of decoding, the input stage; each engine as plain Keras and alone as in a
    # batch, all of them together; then each further precision.
    assert done.stdout.count("pass ") == 4 + 2 * len(names) + 1 + len(further)
    assert all(check in words for check in further)
    assert f"{', '.join(names[:-1])} and {names[-1]} agree" in words
    for text in ("images/s alone, on black images", "images/s on one core", "hold a run back"):
        assert text in words
    assert done.stderr == ""


def test_the_version_is_told() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"{embedder.__version__}\n")


def test_quiet_prints_nothing(archive: Path, tmp_path: Path) -> None:
    done = run("extract", archive, tmp_path / "features", "--quiet", *SMALL)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract", "{missing}", "{out}"], "which does not exist"),
        (["extract", "{archive}", "{out}", "--backbone", "resnet51"], "must be one of"),
        (["extract", "{archive}", "{out}", "--image-size", "big"], "SIDE or HEIGHTxWIDTH"),
        (["extract", "{archive}", "{out}", "--batch-size", "many"], "must be auto or a number"),
        (["extract", "{archive}", "{out}", "--precision", "float16"], "needs a GPU"),
        (["extract", "{archive}", "{out}", "--max-failures", "7"], "must be at most 1"),
        (["extract", "{archive}", "{out}", "--scheduler", "tcp://127.0.0.1:9"], "not answer"),
        (["extract", "{archive}", "/proc/features"], "cannot be written"),
        (["extract", "{archive}", "{out}", "--weights", "random,random"], "once for each backbone"),
        (
            ["extract", "{archive}", "{out}", "--backbone", "vgg16,VGG16", "--weights", "random"],
            "different networks",
        ),
        (["backbones", "--layers"], "wants the name of a network"),
        (["inspect", "{missing}"], "not a feature store"),
        (["verify", "{archive}"], "not a feature store"),
        (["extract"], "Missing argument"),
    ],
    ids=str,
)
def test_requests_that_make_no_sense_end_with_2(
    archive: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"archive": archive, "missing": tmp_path / "missing", "out": tmp_path / "out"}
    done = run(*(argument.format(**places) for argument in arguments))
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_another_recipe_ends_with_2(archive: Path, extracted: Path) -> None:
    done = run("extract", archive, extracted)
    assert done.returncode == 2
    assert "image_size: (64, 96), not (224, 224)" in done.stderr


def test_too_many_failures_end_with_1(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"no image")
    done = run("extract", tmp_path / "photos", tmp_path / "out", *SMALL)
    assert done.returncode == 1
    assert "1 of 1 images failed" in done.stderr
    assert Store(tmp_path / "out").failures().num_rows == 1


def test_repair_makes_damaged_shards_again_and_says_which(extracted: Path, archive: Path) -> None:
    before = dict(zip(Store(extracted).ids(), Store(extracted).vectors(), strict=True))
    (path,) = Store(extracted).shards()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40  # in the midst of the vectors
    path.write_bytes(content)
    verified = run("verify", extracted)
    assert verified.returncode == 1
    assert "--repair" in verified.stdout
    repaired = run("extract", archive, extracted, *SMALL, "--repair")
    assert repaired.returncode == 0, repaired.stderr
    assert f"Warning: embeddings/{path.name} is put aside, in damaged/" in repaired.stderr
    assert f"1 damaged files made again: embeddings/{path.name}" in repaired.stdout
    after = Store(extracted)
    assert all(
        np.array_equal(v, before[i]) for i, v in zip(after.ids(), after.vectors(), strict=True)
    )
    assert len(after) == 20
    assert run("verify", extracted).returncode == 0


@pytest.mark.parametrize("command", ["extract", "inspect", "verify", "train", "predict"])
def test_a_store_that_is_a_url_is_refused(archive: Path, tmp_path: Path, command: str) -> None:
    places = {
        "extract": (archive, "s3://bucket/store"),
        "train": ("s3://bucket/store", tmp_path / "model"),
        "predict": (tmp_path / "model", archive, "s3://bucket/out.parquet"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "embedder", command, *places.get(command, ("s3://bucket/store",))],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "s3:").exists()
    assert "s3:/" in done.stderr or command == "predict"
