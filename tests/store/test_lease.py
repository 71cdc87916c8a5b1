"""One run at a time on a store, and a dead one holds nothing."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from embedder.errors import StoreBusy, StoreError
from embedder.store.lease import LOCK_FILE, lease
from embedder.store.store import Store
from tests.cli.test_app import run

COMMAND = sys.executable, "-m", "embedder"
_HOLD = """
import sys, time
from pathlib import Path
from embedder.store.lease import lease
with lease(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold(folder: Path) -> "subprocess.Popen[str]":
    """A process that holds a store until it is told to end."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)],
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
