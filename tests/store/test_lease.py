"""Which runs write a store at the same time, and a dead one holds nothing."""

import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from embedder.errors import StoreBusy, StoreError
from embedder.store.lease import LOCK_FILE, lease
from embedder.store.parts import Part
from embedder.store.store import Store
from tests.cli.test_app import run
from tests.support import add_rows

COMMAND = sys.executable, "-m", "embedder"
_HOLD = """
import sys, time
from pathlib import Path
from embedder.store.lease import lease
from embedder.store.parts import Part
part = Part.parse(sys.argv[2]) if sys.argv[2:] else None
with lease(Path(sys.argv[1]), part=part):
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold(folder: Path, *part: str) -> "subprocess.Popen[str]":
    """A process that holds a store, or a part, until it is told to end."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder), *part],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_told_whose_the_store_is(tmp_path: Path) -> None:
    other = hold(tmp_path / "store")
    rule = rf"one run at a time. Process {other.pid} on .*, since 20.*--wait"
    with pytest.raises(StoreBusy, match=rule), lease(tmp_path / "store", patience=0.1):
        pass
    other.communicate("\n")
    with lease(tmp_path / "store", patience=0.0):
        pass


def test_two_runs_of_one_process_are_kept_apart_too(tmp_path: Path) -> None:
    with lease(tmp_path), pytest.raises(StoreBusy), lease(tmp_path, patience=0.0):
        pass


def test_runs_of_different_parts_hold_a_store_together(tmp_path: Path) -> None:
    others = [hold(tmp_path, part) for part in ("1/3", "2/3")]
    whole = rf"one run at a time. Process {others[0].pid} on .*, part 1/3, and 1 more are writing"
    with (
        pytest.raises(StoreBusy, match=whole + ".*when they end"),
        lease(tmp_path, patience=0.0),
    ):
        pass
    same = rf"one run of each part .* of 3 parts. Process {others[1].pid} on .*, part 2/3, is "
    with (
        pytest.raises(StoreBusy, match=same),
        lease(tmp_path, part=Part(3, 2), patience=0.0),
    ):
        pass
    with (
        pytest.raises(StoreBusy, match=rf"of 4 parts. Process {others[0].pid} .* 1 more are"),
        lease(tmp_path, part=Part(4, 4), patience=0.0),
    ):
        pass
    with lease(tmp_path, part=Part(3, 3), patience=0.0):
        others[1].kill()
        others[1].communicate()
        with lease(tmp_path, part=Part(3, 2), patience=0.0):  # of which that of 4 has left nothing
            others[0].communicate("\n")
            with pytest.raises(StoreBusy), lease(tmp_path, patience=0.0):
                pass
    with lease(tmp_path, part=Part(4, 4), patience=0.0):
        pass


def test_a_part_of_another_division_whose_run_has_ended_is_not_locked_by_those_that_look(
    tmp_path: Path,
) -> None:
    ended = hold(tmp_path, "1/3")
    ended.kill()
    ended.communicate()
    with lease(tmp_path, part=Part(4, 4)), (tmp_path / ".lock-part-1-of-3").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_run_of_the_whole_source_keeps_all_parts_out(tmp_path: Path) -> None:
    with lease(tmp_path, part=Part(3, 2)):
        pass
    other = hold(tmp_path)
    rule = rf"one run of each part at a time.* Process {other.pid} on .*\d, is writing it"
    with pytest.raises(StoreBusy, match=rule), lease(tmp_path, part=Part(3, 2), patience=0.0):
        pass
    other.communicate("\n")
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def together(*scripts: list[str]) -> list[str]:
    """What processes print that begin at the same moment, each once it has said `ready`."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", *script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for script in scripts
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return outputs


_DROP = """
import sys
from embedder.store.store import Store
store, half = Store(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for number in range(half, 40, 2):
    store.drop([(f"{number:02d}.jpg", sys.argv[3])])
"""


def test_two_runs_that_rewrite_one_shard_each_drop_their_own(store: Store) -> None:
    add_rows(store, [f"{number:02d}.jpg" for number in range(41)], np.ones((41, 3)))
    (name,) = store.shard_names()
    outputs = together(*([_DROP, str(store), half, name] for half in "01"))
    assert outputs == ["", ""]
    assert store.ids().tolist() == ["40.jpg"]


_COME_AND_GO = """
import sys
from embedder.store.store import Store
store = Store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(400):
    name = f"{number}.parquet"
    (store.path / "embeddings" / name).hardlink_to(sys.argv[2])
    store.drop([("coming.jpg", name)])
"""

_INDEX = """
import sys
from embedder.store.store import Store
store = Store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(400):
    assert "staying.jpg" in store.index()["image_id"].to_pylist()
"""


def test_shards_that_another_run_removes_just_now_are_no_damage(
    store: Store, tmp_path: Path
) -> None:
    add_rows(store, ["coming.jpg"], np.ones((1, 3)))
    (coming,) = store.shards()
    shutil.move(coming, tmp_path / "coming.parquet")
    add_rows(store, ["staying.jpg"], np.ones((1, 3)))
    come_and_go = [_COME_AND_GO, str(store), str(tmp_path / "coming.parquet")]
    assert together(come_and_go, [_INDEX, str(store)]) == ["", ""]


def test_a_shard_that_another_host_replaces_just_now_is_read_again(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where NFS gives up on a file that is open: it cannot be read, and the next one can."""
    add_rows(store, ["a.jpg"], np.ones((1, 3)))
    (shard,) = store.shards()
    whole = shard.rename(tmp_path / "whole.parquet")
    shard.symlink_to(tmp_path / "nowhere")
    caplog.set_level(logging.INFO)

    def replace(_: logging.LogRecord) -> bool:
        whole.replace(shard)
        return True

    logger = logging.getLogger("embedder")
    logger.addFilter(replace)
    try:
        assert store.index()["image_id"].to_pylist() == ["a.jpg"]
    finally:
        logger.removeFilter(replace)
    assert "reading again, as another run may have replaced it" in caplog.text


_CREATE = """
import sys, time
from embedder.errors import RecipeMismatch
from embedder.recipe import Recipe
from embedder.store.store import Store
recipe = Recipe(backbone="mean-colour", weights="0" * 64, image_size=(48, int(sys.argv[2])))
print("ready", flush=True)
sys.stdin.readline()
for number in range(40):
    try:
        place = f"{sys.argv[1]}/{number}"
        store = Store.open_or_create(place, recipe, {}, is_shared=True)
        assert Store(place).recipe == recipe == store.recipe
        print(number, flush=True)
    except RecipeMismatch:
        pass
"""


def test_of_runs_that_make_a_store_at_the_same_time_one_recipe_is_kept(tmp_path: Path) -> None:
    widths = ("64", "96", "64", "96")
    outputs = together(*([_CREATE, str(tmp_path), width] for width in widths))
    made = [set(output.split()) for output in outputs]
    assert made[0] == made[2]
    assert made[1] == made[3]
    assert made[0] | made[1] == set(map(str, range(40)))
    assert not made[0] & made[1]
    assert not list(tmp_path.rglob("*.tmp"))


_CREATE_WHILE_LISTED = """
import os, shutil, sys
from embedder.store.store import Store, check_place
made, place = sys.argv[1:]
os.mkdir(place)
def watch(event, arguments):
    if event in ("os.listdir", "os.scandir") and str(arguments[0]) == place:
        shutil.copytree(made, place, dirs_exist_ok=True)
sys.addaudithook(watch)
check_place(place)
assert len(Store(place)) == 3
"""


def test_a_store_that_another_run_makes_just_now_is_nothing_else(
    store: Store, tmp_path: Path
) -> None:
    add_rows(store, ["a.jpg", "b.jpg", "c.jpg"], np.ones((3, 3)))
    command = [sys.executable, "-c", _CREATE_WHILE_LISTED, str(store), str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    other = hold(tmp_path)
    other.kill()
    assert other.wait() == -signal.SIGKILL
    other.communicate()
    with lease(tmp_path, patience=0.0):
        assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()


def test_waiting_ends_with_the_other_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = hold(tmp_path)
    caplog.set_level(logging.INFO)

    def end_the_other(record: logging.LogRecord) -> bool:
        other.communicate("\n")  # as soon as it is told that there is something to wait for
        return True

    logger = logging.getLogger("embedder")
    logger.addFilter(end_the_other)
    try:
        with lease(tmp_path, wait=True, patience=0.0):
            assert f"Process {other.pid}" in caplog.text
    finally:
        logger.removeFilter(end_the_other)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100_000], ids=lambda t: t[:4])
def test_a_lock_that_says_nothing_is_respected_all_the_same(tmp_path: Path, text: str) -> None:
    other = hold(tmp_path)
    (tmp_path / LOCK_FILE).write_text(text)
    with pytest.raises(StoreBusy, match="Another run is writing"), lease(tmp_path, patience=0.0):
        pass
    other.communicate("\n")


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written: "), lease(tmp_path / "file" / "store"):
        pass


def test_a_lock_that_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(StoreError, match=r"written: .*/\.lock: Is a dir"), lease(tmp_path):
        pass


def test_the_command_line_tells_a_second_run_and_waits_when_asked(
    archive: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    other = hold(store)
    second = run("extract", archive, store, "--image-size", "64x96")
    assert second.returncode == 1
    assert f"Process {other.pid} on " in second.stderr
    assert "With --wait this run begins when that one ends" in second.stderr
    assert not (store / "recipe.json").exists()
    waiting = subprocess.Popen(
        [*COMMAND, "extract", archive, store, "--image-size", "64x96", "--wait"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stderr is not None
    for line in waiting.stderr:
        if "waiting for it" in line:
            break
    other.communicate("\n")
    waiting.communicate()
    assert waiting.returncode == 0
    assert len(Store(store)) == 20
