"""Stores, labels and manifests damaged at random: a message, the right status, and no change.

Every command that reads a file is run on a copy of a small world in which that file is damaged.
It may find the damage or do without the file, but it must not end in a traceback, must not say
that all is well where its result is wrong, and must not change what it only reads.
"""

import contextlib
import json
import math
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from typer.testing import CliRunner

from embedder.cli.app import app
from embedder.errors import DamagedShard
from embedder.store.store import Store
from tests.support import assert_same_vectors, make_archive

SMALL = "--image-size", "64x96", "--shard-size", "7"
LABELS = "--labels", "{}/labels.csv:kind", "--duplicates", "none"
JOB = """
[variables]
folder = "."
[[steps]]
command = "extract"
arguments = ["{folder}/photos/list.csv", "{folder}/features"]
image-size = "64x96"
[[steps]]
command = "train"
arguments = ["{folder}/features", "{folder}/model"]
labels = "{folder}/labels.csv:kind"
duplicates = "none"
report = false
"""
HANG_SECONDS = 30  # a command takes less than one; whoever waits for a FIFO, waits for ever

# A store, by what of the world it is; and which commands read it.
STORE = "extract", "repair", "inspect", "verify", "audit", "train", "evaluate", "predict"
MODEL = "train", "evaluate", "predict", "images", "compare"
FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "recipe": ("features/recipe.json", STORE),
    "rows": ("features/embeddings/*.parquet", STORE),
    "failures": ("features/failures/*.parquet", STORE),
    "run": ("features/runs/*.json", ("inspect", "own audit", "train")),
    "lock": ("features/.lock", ("extract",)),
    "manifest": ("photos/list.csv", ("extract", "audit", "images", "run")),
    "parquet manifest": ("photos/list.parquet", ("parquet", "parquet images")),
    "labels": ("labels.csv", ("train", "evaluate", "run")),
    "metrics": ("model/metrics.json", ("compare",)),
    "model": ("model/model.json", MODEL),
    "head": ("model/head.skops", MODEL),
    "predictions": ("model/predictions.parquet", MODEL),
    "job": ("job.toml", ("run",)),
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "extract": ("extract", "{}/photos/list.csv", "{}/features", *SMALL),
    "repair": ("extract", "{}/photos/list.csv", "{}/features", *SMALL, "--repair"),
    "parquet": ("extract", "{}/photos/list.parquet", "{}/others", *SMALL),
    "inspect": ("inspect", "{}/features"),
    "verify": ("verify", "{}/features"),
    "audit": ("verify", "{}/features", "--source", "{}/photos/list.csv", "--audit", "2"),
    "own audit": ("verify", "{}/features", "--audit", "2"),  # of the source of the last run
    "train": ("train", "{}/features", "{}/model", *LABELS, "--no-report"),
    "other": ("train", "{}/features", "{}/other", *LABELS, "--no-report", "--head", "centroid"),
    "evaluate": ("evaluate", "{}/model", "{}/features", *LABELS[:2], "--json", "{}/found.json"),
    "predict": ("predict", "{}/model", "{}/features", "{}/predictions.parquet"),
    "images": ("predict", "{}/model", "{}/photos/list.csv", "{}/images.parquet"),
    "parquet images": ("predict", "{}/model", "{}/photos/list.parquet", "{}/images.parquet"),
    "compare": ("compare", "{}/other", "{}/model"),
    "run": ("run", "{}/job.toml", "--set", "folder={}"),
}
# What may be changed by a command: by one that fails, nothing but what is begun of the store.
CHANGED = {
    "extract": ("features",),
    "repair": ("features",),
    "parquet": ("others",),
    "train": ("model",),
    "evaluate": ("found.json",),
    "predict": ("predictions.parquet",),
    "images": ("images.parquet", ".images.parquet.logits"),
    "parquet images": ("images.parquet", ".images.parquet.logits"),
    "run": ("features", "model"),
}
KEPT = "model", "predictions.parquet", "images.parquet", "found.json"


class World:
    """A small world that is whole, and what is true of it.

    Attributes:
        folder: With `photos`, `features`, `labels.csv`, `model`, `other`, `job.toml`.
        vectors: By id.
        failed: Ids of failures.
        found: The metrics that `evaluate` gives.
        trained: The metrics that `train` gives.
        predicted: Rows of `predict`, by id.
    """

    def __init__(self, folder: Path) -> None:
        store = Store(folder / "features")
        self.folder = folder
        self.vectors = dict(zip(store.ids(), store.vectors(), strict=True))
        self.failed = set(store.failures()["image_id"].to_pylist())
        self.found = json.loads((folder / "found.json").read_text())
        self.trained = json.loads((folder / "model" / "metrics.json").read_text())
        self.predicted = predictions(folder / "predictions.parquet")


def predictions(file: Path) -> dict[str, dict[str, Any]]:
    return {row["image_id"]: row for row in pq.read_table(file).to_pylist()}


def run(name: str, folder: Path) -> Result:
    return CliRunner().invoke(app, [word.replace("{}", str(folder)) for word in COMMANDS[name]])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    photos = make_archive(folder / "photos", 12)
    (photos / "cats" / "broken.jpg").write_bytes(b"no picture")
    ids = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.*"))
    kinds = [image_id.split("/")[0] for image_id in ids]
    lines = [f"{image_id},{kind}" for image_id, kind in zip(ids, kinds, strict=True)]
    for file in (photos / "list.csv", folder / "labels.csv"):
        file.write_text("\n".join(["path,kind", *lines]))
    pq.write_table(pa.table({"path": ids, "kind": kinds}), photos / "list.parquet")
    (folder / "job.toml").write_text(JOB)
    for name in ("extract", "parquet", "train", "other", "evaluate", "predict", "images"):
        result = run(name, folder)
        assert result.exit_code == 0, result.output
    assert len(Store(folder / "features").shards()) == 2
    return World(folder)


# Damage. -----------------------------------------------------------------------------------

Draw = Callable[[Any], Any]
DEEP = "[" * 100_000
CONTENTS = ["[]", "{}", "null", "3", '"x"', DEEP, "9" * 5000, "NaN", "\0" * 100, "\ufeff{}", "PAR1"]
VALUES: list[Any] = [
    None,
    True,
    3,
    -1,
    1e308,
    math.nan,
    10**4000,
    "x",
    "",
    "\0",
    [],
    {},
    [3],
    ["x"],
]
NOT_THERE: dict[str, Callable[[Path], None]] = {
    "folder": Path.mkdir,
    "FIFO": lambda path: os.mkfifo(path),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path),
}


def truncated(path: Path, draw: Draw) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw(st.integers(0, max(0, len(content) - 1)))])


def flipped(path: Path, draw: Draw) -> None:
    content = bytearray(path.read_bytes())
    for place in draw(st.lists(st.integers(0, max(0, len(content) - 1)), min_size=1, max_size=4)):
        content[place] ^= draw(st.integers(1, 255))
    path.write_bytes(content)


def replaced(path: Path, draw: Draw) -> None:
    texts = st.sampled_from(CONTENTS).map(str.encode)
    path.write_bytes(draw(st.one_of(texts, st.binary(max_size=64))))


def another_kind(path: Path, draw: Draw) -> None:
    path.unlink()
    NOT_THERE[draw(st.sampled_from(sorted(NOT_THERE)))](path)


def forbidden(path: Path, draw: Draw) -> None:
    path.chmod(0)


def members(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each place in a JSON value: the list or object that holds it, and its key there."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, member in list(items):
        yield value, key
        if isinstance(member, dict | list):
            yield from members(member)


def other_json(path: Path, draw: Draw) -> None:
    content = json.loads(path.read_text())
    holder, key = draw(st.sampled_from(list(members(content))))
    change = draw(st.sampled_from(["delete", "shorten", "value"]))
    if change == "delete":
        del holder[key]
    elif change == "shorten" and isinstance(holder[key], list | str):
        holder[key] = holder[key][1:]
    else:
        holder[key] = draw(st.sampled_from(VALUES))
    path.write_text(json.dumps(content))


def other_table(path: Path, draw: Draw) -> None:
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata or {})
    column = draw(st.integers(0, table.num_columns - 1))
    change = draw(st.sampled_from(["missing", "retyped", "nulls", "shuffled", "empty", "repeated"]))
    of_older_version = draw(st.booleans())
    if of_older_version and change not in ("shuffled", "empty"):  # which only digests can tell
        metadata.pop(b"embedder.digests", None)
    if draw(st.integers(0, 3)) == 3:  # it does not say of which recipe it is
        metadata = {}
    kept = table.schema.field(column)
    if change == "missing":
        table = table.remove_column(column)
    elif change == "retyped":
        values = draw(st.sampled_from([[3], [b"\xff"], [["x"]], [{"x": 3}], [2.5]]))
        table = table.set_column(column, kept.name, pa.array(values * table.num_rows))
    elif change == "nulls":
        values = [None, *table[column].to_pylist()[1:]]
        table = table.set_column(column, kept.with_nullable(True), pa.array(values, kept.type))
    elif change == "shuffled":  # of one column alone: each image has another's
        backwards = table[column].take(list(range(table.num_rows))[::-1])
        table = table.set_column(column, kept, backwards)
    elif change == "empty":
        table = table.slice(0, 0)
    else:
        table = table.append_column(kept, table[column])
    pq.write_table(table.replace_schema_metadata(metadata or None), path)


def damages_of(path: Path) -> list[Callable[[Path, Draw], None]]:
    found = [truncated, flipped, replaced, another_kind]
    found += [forbidden] if os.geteuid() else []  # root may read it all the same
    found += {".json": [other_json] * 3, ".parquet": [other_table] * 3}.get(path.suffix, [])
    return found


# What must be so all the same. -------------------------------------------------------------


def tree(folder: Path) -> dict[str, Any]:
    """What is in a folder, by path, but for locks, records of runs and what they may change."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name == ".lock" or "/runs/" in name:
            continue
        kind = stat.S_IFMT(path.lstat().st_mode)
        found[name] = path.read_bytes() if kind == stat.S_IFREG and os.access(path, 4) else kind
    return found


@contextlib.contextmanager
def no_hang(folder: Path) -> Iterator[None]:
    """End a command that waits for ever for somebody to write into a FIFO."""
    hung = []

    def answer() -> None:
        hung.append(True)
        for path in folder.rglob("*"):
            if stat.S_ISFIFO(path.lstat().st_mode):
                os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))

    watch = threading.Timer(HANG_SECONDS, answer)
    watch.start()
    yield
    watch.cancel()
    assert not hung, "it waits for ever"


def check_told(result: Result) -> None:
    """It ended with a status, and a message where it failed."""
    told = result.output
    if not isinstance(result.exception, SystemExit | None):
        told += "".join(traceback.format_exception(result.exception))
    assert isinstance(result.exception, SystemExit | None), told
    assert result.exit_code in (0, 1, 2), told
    assert "Traceback" not in told
    if result.exit_code:
        assert any(line.startswith(("Error: ", "FAIL ")) for line in told.splitlines()), told
        assert ": None" not in told


def check_unchanged(name: str, result: Result, before: dict[str, Any], folder: Path) -> None:
    after = tree(folder)
    may_change = CHANGED.get(name, ())
    if result.exit_code:
        may_change = tuple(top for top in may_change if top not in KEPT or name == "run")
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert {path for path in changed if path.split("/")[0] not in may_change} == set()


def check_right(name: str, kind: str, world: World, folder: Path) -> None:
    """What a command says it has done is done, and right."""
    if name in ("extract", "repair", "run", "verify", "audit", "own audit", "parquet"):
        store = Store(folder / CHANGED.get(name, ("features",))[0])
        # A run that has nothing to do reads no vectors: whoever reads them is told.
        with contextlib.suppress(*([DamagedShard] if name == "extract" else [])):
            check_store(store, world, is_all=name != "verify" and "manifest" not in kind)
    if name in ("parquet", "parquet images", "images") or kind == "labels":
        return
    if name == "evaluate":
        found = json.loads((folder / "found.json").read_text())
        assert found["test"] == pytest.approx(world.found["test"])
    if name in ("train", "run"):
        trained = json.loads((folder / "model" / "metrics.json").read_text())
        assert trained["test"] == pytest.approx(world.trained["test"])
    if name == "predict":
        ids = world.vectors if kind == "failures" else world.predicted
        found = predictions(folder / "predictions.parquet")
        assert {i: found[i] for i in ids} == {i: world.predicted[i] for i in ids}


def check_store(store: Store, world: World, is_all: bool) -> None:
    """Each image that is a row has its own vector, and perhaps all images are there."""
    rows = dict(zip(store.ids(), store.vectors(), strict=True))
    failed = store.failures()["image_id"].to_pylist()
    if is_all:
        assert set(rows) == set(world.vectors)
        assert set(failed) == world.failed
    for image_id in rows.keys() & world.vectors.keys():
        assert_same_vectors(rows[image_id], world.vectors[image_id])


def check_damage(kind: str, draw: Draw, world: World) -> None:
    """Damage a file, and run every command that reads it, each on a fresh copy."""
    pattern, commands = FILES[kind]
    file = draw(st.sampled_from(sorted(world.folder.glob(pattern)))).relative_to(world.folder)
    damage = draw(st.sampled_from(damages_of(file)))
    with tempfile.TemporaryDirectory() as temporary:
        damaged = Path(temporary) / "damaged"
        copy(world.folder, damaged)
        damage(damaged / file, draw)
        for name in commands:
            folder = Path(temporary) / name.replace(" ", "-")
            copy(damaged, folder)
            before = tree(folder)
            with no_hang(folder):
                result = run(name, folder)
            check_told(result)
            check_unchanged(name, result, before, folder)
            if result.exit_code == 0:
                check_right(name, kind, world, folder)


def copy(folder: Path, to: Path) -> None:
    """A copy that keeps times of change, FIFOs and links that lead nowhere."""

    def copy_file(source: str, target: str) -> None:
        if stat.S_ISFIFO(os.stat(source).st_mode):
            os.mkfifo(target)
        else:
            shutil.copy2(source, target)

    shutil.copytree(folder, to, symlinks=True, copy_function=copy_file)


COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "phases": [Phase.generate],  # each example takes a second, and is small as it is
    "report_multiple_bugs": False,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}


@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=4, derandomize=True, **COMMON)
@given(data=st.data())
def test_damage_is_told_or_does_no_harm(world: World, kind: str, data: Any) -> None:
    check_damage(kind, data.draw, world)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=int(os.environ.get("EMBEDDER_DAMAGES", "300")), **COMMON)
@given(data=st.data())
def test_much_damage_is_told_or_does_no_harm(world: World, kind: str, data: Any) -> None:
    check_damage(kind, data.draw, world)


# Named cases: what was found, each as small as it gets. --------------------------------------


def test_an_audit_of_a_store_without_rows_says_so(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "broken.jpg").write_bytes(b"no picture")
    extracted = ("extract", str(photos), str(tmp_path / "out"), *SMALL, "--max-failures", "1")
    assert CliRunner().invoke(app, extracted).exit_code == 0
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "out"), "--audit", "3"])
    assert result.exit_code == 0
    assert "the store has no rows to embed again" in result.output


def told(world: World, tmp_path: Path, name: str, damage: Callable[[Path], None]) -> str:
    """What a command says, in one line, of a copy of the world that is damaged."""
    folder = tmp_path / "damaged"
    copy(world.folder, folder)
    damage(folder)
    with no_hang(folder):
        result = run(name, folder)
    check_told(result)
    assert result.exit_code != 0
    return " ".join(result.output.split())


def first(folder: Path, pattern: str) -> Path:
    return min(folder.glob(pattern))


def with_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("pattern", "name", "rule"),
    [
        ("features/recipe.json", "inspect", "recipe.json cannot be read: "),
        ("features/embeddings/*", "verify", "a regular file, or a link to one. Received: "),
        ("features/failures/*", "inspect", "a regular file, or a link to one. Received: "),
        ("labels.csv", "train", "labels.csv cannot be read: "),
        ("photos/list.csv", "extract", "list.csv, which is a FIFO"),
    ],
)
def test_nobody_waits_for_a_fifo(
    world: World, tmp_path: Path, pattern: str, name: str, rule: str
) -> None:
    assert rule in told(world, tmp_path, name, lambda folder: with_fifo(first(folder, pattern)))


@pytest.mark.parametrize("target", ["nowhere", "itself"])
@pytest.mark.parametrize("name", ["extract", "inspect", "verify", "train", "predict"])
def test_a_shard_that_is_a_link_which_leads_nowhere_is_told(
    world: World, tmp_path: Path, name: str, target: str
) -> None:
    def damage(folder: Path) -> None:
        path = first(folder, "features/embeddings/*")
        path.unlink()
        path.symlink_to(path if target == "itself" else target)

    assert "a regular file, or a link to one" in told(world, tmp_path, name, damage)


def test_a_run_record_that_is_a_fifo_is_none(world: World, tmp_path: Path) -> None:
    copy(world.folder, tmp_path / "world")
    with_fifo(record := first(tmp_path / "world", "features/runs/*.json"))
    with no_hang(tmp_path):
        result = run("inspect", tmp_path / "world")
    assert result.exit_code == 0
    assert f"no records of runs, in runs/: {record.name}" in result.output


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"when": 3}', DEEP], ids=lambda c: c[:12])
def test_a_run_record_that_is_foreign_is_left_out_by_inspect(
    world: World, tmp_path: Path, content: str
) -> None:
    copy(world.folder, tmp_path / "world")
    (tmp_path / "world" / "features" / "runs" / "x.json").write_text(content)
    result = run("inspect", tmp_path / "world")
    assert result.exit_code == 0, result.output
    assert "no records of runs, in runs/: x.json" in result.output


@pytest.mark.parametrize("kind", ["embeddings", "failures"])
def test_two_columns_of_one_name_are_damage(world: World, tmp_path: Path, kind: str) -> None:
    def damage(folder: Path) -> None:
        table = pq.read_table(path := first(folder, f"features/{kind}/*"))
        pq.write_table(table.append_column("sha256", table["sha256"]), path)

    assert "is damaged: it has two columns of one name" in told(world, tmp_path, "extract", damage)


@pytest.mark.parametrize("inner", [False, True], ids=["a vector", "a value of one"])
def test_a_vector_that_is_missing_is_damage(world: World, tmp_path: Path, inner: bool) -> None:
    def damage(folder: Path) -> None:  # as an older version would have written it
        table = pq.read_table(path := first(folder, "features/embeddings/*"))
        metadata = dict(table.schema.metadata)
        del metadata[b"embedder.digests"]
        vectors = table["embedding"].to_pylist()
        vectors[0] = [None, *vectors[0][1:]] if inner else None
        place = table.column_names.index("embedding")
        column = pa.array(vectors, pa.list_(pa.float32(), 1280))
        table = table.set_column(place, "embedding", column).replace_schema_metadata(metadata)
        pq.write_table(table, path)

    for number, name in enumerate(("train", "verify", "predict")):
        message = told(world, tmp_path / str(number), name, damage)
        assert "is damaged: the column embedding has nulls" in message


def test_digests_that_are_nested_too_deeply_are_damage(world: World, tmp_path: Path) -> None:
    def damage(folder: Path) -> None:
        table = pq.read_table(path := first(folder, "features/embeddings/*"))
        metadata = table.schema.metadata | {b"embedder.digests": DEEP.encode()}
        pq.write_table(table.replace_schema_metadata(metadata), path)

    assert "is damaged" in told(world, tmp_path, "train", damage)


LONG = "x" * 300  # longer than a name may be


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["extract", LONG, "{}/new"], "which does not exist"),
        (["extract", f"{{}}/photos/{LONG}*/a.jpg", "{}/new"], "holds no image"),
        (["extract", "{}/photos", f"{{}}/{LONG}", *SMALL], "File name too long"),
        (["extract", "{}/photos", "{}/a\0b", *SMALL], "A path cannot have a NUL"),
        (["inspect", "{}/a\0b"], "A path cannot have a NUL"),
        (["inspect", f"{{}}/{LONG}"], "File name too long"),
        (["train", "{}/features", "{}/new", "--split", LONG], "`split` must be"),
        (["train", "{}/features", "{}/new", "--labels", f"{LONG}.csv:x"], "File name too long"),
        (["train", "{}/features", "{}/new", "--labels", "a\0b.csv:x"], "null"),
        (["train", "{}/features", "{}/new", "--labels", "a**.txt:2"], "cannot be found"),
        (["train", "{}/features", f"{{}}/{LONG}"], "File name too long"),
        (["export", "{}/model", LONG, "--format", "onnx"], "File name too long"),
        (["finetune", "{}/model", "{}/photos", LONG], "File name too long"),
        (["predict", "{}/model", LONG, "{}/new.parquet"], "which does not exist"),
        (["predict", "{}/model", "{}/photos", LONG], "File name too long"),
        (["evaluate", LONG, "{}/features"], "File name too long"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_names_that_cannot_be_are_told(world: World, words: list[str], rule: str) -> None:
    before = tree(world.folder)
    spelled = [word.replace("{}", str(world.folder)) for word in words]
    result = CliRunner().invoke(app, spelled)
    check_told(result)
    assert result.exit_code == 2
    assert rule in result.output
    assert tree(world.folder) == before


def test_a_source_1200_folders_deep_goes_all_the_way(world: World, tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for name in ["photos", *["d"] * 1200]:
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    with open(os.open("a.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=here), "wb") as file:
        file.write((world.folder / "photos" / "dogs" / "001.jpg").read_bytes())
    os.close(here)
    photos, model = str(tmp_path / "photos"), str(world.folder / "model")
    features, out = str(tmp_path / "features"), str(tmp_path / "out.parquet")
    for words in (
        ["extract", photos, features, *SMALL],
        ["inspect", features],
        ["verify", features, "--source", photos, "--audit", "1"],
        ["predict", model, features, out],
        ["predict", model, photos, out],
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
    (vector,) = Store(features).vectors()
    assert_same_vectors(vector, world.vectors["dogs/001.jpg"])
    assert list(predictions(Path(out))) == ["d/" * 1200 + "a.jpg"]
    while (tmp_path / "photos" / "d").exists():  # pytest could not remove it
        (tmp_path / "photos" / "d").rename(tmp_path / "e")
        shutil.rmtree(tmp_path / "photos")
        (tmp_path / "e").rename(tmp_path / "photos")


def test_a_store_whose_name_is_not_utf8(world: World, tmp_path: Path) -> None:
    store = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    photos = os.fsdecode(os.fsencode(tmp_path) + b"/photos\xfe")
    shutil.copytree(world.folder / "photos", photos)
    commands = [
        ["extract", f"{photos}/list.csv", store, *SMALL],
        ["inspect", store],
        ["verify", store, "--source", f"{photos}/list.parquet", "--audit", "2"],
    ]
    for words in commands:
        done = subprocess.run(
            [sys.executable, "-m", "embedder", *words],
            capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": "ascii:strict"},
        )
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr
        if words[0] == "extract":
            assert b"\\udcff" in done.stdout
    assert len(Store(store)) == 12
    for file in (Path(store) / "runs").glob("*.json"):
        record = json.loads(file.read_bytes())
        assert record["source"] == f"{photos}/list.csv"


def test_a_full_disk_is_told_and_not_its_record(world: World, tmp_path: Path) -> None:
    """A real disk that is full: neither the shard nor the run's record has room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        (disk / "other").write_bytes(bytes(44_000))
        words = ["extract", str(world.folder / "photos"), str(disk / "features"), *SMALL]
        result = CliRunner().invoke(app, words)
        check_told(result)
        assert result.exit_code == 1
        (message,) = (line for line in result.output.splitlines() if line.startswith("Error: "))
        assert "No space left on device" in message
        assert "run the same command again" in message
        (disk / "other").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        result = CliRunner().invoke(app, words)
        check_told(result)
        assert "Read-only file system" in result.output
        assert result.exit_code == 2
        subprocess.run(["mount", "-o", "remount,rw,size=10m", str(disk)], check=True)
        assert CliRunner().invoke(app, words).exit_code == 0
        assert len(Store(disk / "features")) == 12
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"head": []}', '{"seconds": 3}', DEEP])
@pytest.mark.parametrize("file", ["metrics.json", "model.json", "predictions.parquet"])
def test_what_compare_reads_of_a_model_must_make_sense(
    world: World, tmp_path: Path, file: str, content: str
) -> None:
    message = told(
        world, tmp_path, "compare", lambda folder: (folder / "model" / file).write_text(content)
    )
    assert message.startswith("Error: ")
    assert f"{tmp_path}/damaged/model" in message


def test_predictions_that_have_lost_rows_do_not_pass_training_images_off_as_unseen(
    world: World, tmp_path: Path
) -> None:
    def damage(folder: Path) -> None:
        table = pq.read_table(path := folder / "model" / "predictions.parquet")
        pq.write_table(table.slice(0, 0), path)
        content = json.loads((file := folder / "model" / "model.json").read_text())
        del content["tables"]  # as of a model that was made before they were kept
        file.write_text(json.dumps(content))

    message = told(world, tmp_path, "evaluate", damage)
    assert "predictions.parquet with 0 of the 9 images" in message


@pytest.mark.parametrize("change", ["missing", "retyped", "FIFO"])
def test_predictions_that_compare_cannot_use_are_told(
    world: World, tmp_path: Path, change: str
) -> None:
    def damage(folder: Path) -> None:
        path = folder / "model" / "predictions.parquet"
        if change == "FIFO":
            return with_fifo(path)
        table = pq.read_table(path).drop_columns(["sha256"])
        if change == "retyped":
            table = table.append_column("sha256", pa.array([{"x": 3}] * table.num_rows))
        return pq.write_table(table, path)

    assert "/model/predictions.parquet" in told(world, tmp_path, "compare", damage)
