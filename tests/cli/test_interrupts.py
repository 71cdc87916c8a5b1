"""Ctrl-C, SIGTERM and SIGHUP end the command, whatever its threads do, and leave a record."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from embedder.store.store import Store

# A decoder that never ends, in C, for images of one size; it tells that it has begun.
STUCK = """
import ctypes, multiprocessing, os, pathlib
import PIL.Image

def open_or_hang(*arguments, _open=PIL.Image.open, **options):
    image = _open(*arguments, **options)
    if image.size == (31, 17):
        pathlib.Path(os.environ["BEGUN"]).touch()
        hang()
    return image

def hang():
    kind = ctypes.PyDLL if "KEEPS_PYTHON_TO_ITSELF" in os.environ else ctypes.CDLL
    library, mutex = kind(None), ctypes.create_string_buffer(128)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)

PIL.Image.open = open_or_hang

def fsync_or_hang(file, _fsync=os.fsync):
    if "KEEPS_PYTHON_TO_ITSELF" in os.environ:
        if multiprocessing.current_process().name.startswith("Dask Worker"):
            pathlib.Path(os.environ["BEGUN"]).touch()
            hang()
    _fsync(file)

os.fsync = fsync_or_hang
"""
ENOUGH_SECONDS = 60  # in which what ends at all has ended


@pytest.fixture
def stuck(archive: Path, tmp_path: Path) -> dict[str, str]:
    """An environment in which one image of the archive is never decoded."""
    Image.new("RGB", (31, 17)).save(archive / "dogs" / "stuck.png")
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "sitecustomize.py").write_text(STUCK)
    paths = [str(tmp_path / "shim"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "BEGUN": str(tmp_path / "begun")}


def unignored() -> None:
    """A suite in the background of a shell ignores signals, and so would its children."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(
    command: list[Any], before: Callable[[], None] = unignored, **options: Any
) -> "subprocess.Popen[str]":
    """Start Python in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=before,
        **options,
    )


def extract_command(archive: Path, store: Path, *options: str) -> list[Any]:
    command = ["-m", "embedder", "extract", archive, store, "--image-size", "64x96"]
    return [*command, "--shard-size", "7", *options]


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + ENOUGH_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_begun(begun: str | Path, process: "subprocess.Popen[str]") -> None:
    wait_for(lambda: Path(begun).exists() or process.poll() is not None)


def ended(process: "subprocess.Popen[str]") -> str:
    """What it wrote, once it has ended; a failed test where it does not."""
    try:
        output, _ = process.communicate(timeout=ENOUGH_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.fail("it is alive")
    return output


@pytest.mark.parametrize(
    ("number", "send", "options", "status"),
    [
        (signal.SIGINT, os.kill, (), "interrupted"),
        (signal.SIGTERM, os.killpg, ("--workers", "2"), "ended by SIGTERM"),
    ],
    ids=["SIGINT", "SIGTERM-to-all"],
)
def test_a_signal_ends_a_run_whose_decoder_is_stuck(
    archive: Path,
    tmp_path: Path,
    stuck: dict[str, str],
    number: int,
    send: Callable[[int, int], None],
    options: tuple[str, ...],
    status: str,
) -> None:
    process = start(extract_command(archive, tmp_path / "out", *options), env=stuck)
    wait_for_begun(stuck["BEGUN"], process)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= (5 if options else 2)  # with the decoders
    send(process.pid, number)
    output = ended(process)
    assert process.returncode == 1
    assert "Traceback" not in output
    assert f"{status[0].upper()}{status[1:]}. Finished shards are kept: the same" in output
    assert [run["status"] for run in Store(tmp_path / "out").runs()] == [status]
    assert psutil.wait_procs(workers, timeout=ENOUGH_SECONDS)[1] == []


def test_a_closed_terminal_ends_the_run(
    archive: Path, tmp_path: Path, stuck: dict[str, str]
) -> None:
    terminal, other_end = pty.openpty()
    command = [sys.executable, *map(str, extract_command(archive, tmp_path / "out"))]
    process: subprocess.Popen[str] = subprocess.Popen(
        # A new session takes the first terminal that it opens for its own.
        ["setsid", "--ctty", *command],
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
        env=stuck,
        preexec_fn=unignored,
    )
    os.close(other_end)
    wait_for_begun(stuck["BEGUN"], process)
    os.close(terminal)
    assert process.wait(ENOUGH_SECONDS) == 1
    (record,) = (tmp_path / "out" / "runs").glob("*.json")
    assert json.loads(record.read_text())["status"] == "ended by SIGHUP"


def test_the_second_signal_ends_the_run_without_a_record(
    archive: Path, tmp_path: Path, stuck: dict[str, str]
) -> None:
    (archive / "dogs" / "stuck.png").unlink()
    # No thread of a worker that is writing a shard runs, so it is to be killed.
    stuck["KEEPS_PYTHON_TO_ITSELF"] = "1"
    process = start(extract_command(archive, tmp_path / "out", "--workers", "2"), env=stuck)
    wait_for_begun(stuck["BEGUN"], process)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1)  # sooner it would be the same signal, passed on by a shell
    os.kill(process.pid, signal.SIGINT)
    output = ended(process)
    assert process.returncode == 1
    assert "Finished shards" not in output
    assert Store(tmp_path / "out").runs() == []
    assert psutil.wait_procs(workers, timeout=ENOUGH_SECONDS)[1] == []


def test_a_script_gets_a_keyboard_interrupt(
    archive: Path, tmp_path: Path, stuck: dict[str, str]
) -> None:
    script = """
import os, signal, sys
import embedder
try:
    embedder.extract(sys.argv[1], sys.argv[2], image_size=(64, 96), shard_size=7)
except KeyboardInterrupt as error:
    print(type(error).__name__, signal.getsignal(signal.SIGINT).__name__, flush=True)
    os._exit(7)  # the decoder is the script's own affair
"""
    process = start(["-c", script, archive, tmp_path / "out"], env=stuck)
    wait_for_begun(stuck["BEGUN"], process)
    os.kill(process.pid, signal.SIGINT)
    assert ended(process).strip() == "KeyboardInterrupt default_int_handler"
    assert process.returncode == 7
    assert [run["status"] for run in Store(tmp_path / "out").runs()] == ["interrupted"]


# The process alone, without a run. ------------------------------------------------------------


def start_body(
    folder: Path, body: str, constants: dict[str, float] | None = None, **options: Any
) -> "subprocess.Popen[str]":
    """Start a command that does this, with constants of the module `interrupts`, and await it."""
    lines = [
        "import signal, sys, threading, time",
        "from embedder.cli import interrupts",
        *(f"interrupts.{name} = {value}" for name, value in (constants or {}).items()),
        "with interrupts.ending_the_process():",
        f"    pathlib.Path({str(folder / 'begun')!r}).touch()",
        *(f"    {line}" for line in body.splitlines()),
    ]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = start(["-c", "\n".join([STUCK, *lines])], env=buffered, **options)
    wait_for_begun(folder / "begun", process)
    return process


def test_a_library_that_does_not_return_is_ended_after_a_while(tmp_path: Path) -> None:
    body = "print('unflushed', end='')\nhang()"
    process = start_body(tmp_path, body, {"_GRACE_SECONDS": 1})
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process) == "unflushed"
    assert process.returncode == 1


def test_a_library_that_does_not_return_is_ended_by_the_second_signal(tmp_path: Path) -> None:
    process = start_body(tmp_path, "hang()", {"_GRACE_SECONDS": 9999, "_SAME_SIGNAL_SECONDS": 0.1})
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    ended(process)
    assert process.returncode == 1


def test_a_signal_that_is_passed_on_as_well_counts_once(tmp_path: Path) -> None:
    body = """
try:
    threading.Event().wait()
except KeyboardInterrupt as error:
    time.sleep(0.5)
    print(type(error).__name__, error)
    sys.exit(1)
"""
    process = start_body(tmp_path, body, {"_GRACE_SECONDS": 9999, "_SAME_SIGNAL_SECONDS": 9999})
    for _ in range(3):
        os.kill(process.pid, signal.SIGHUP)
        time.sleep(0.05)
    assert ended(process) == "Interrupted ended by SIGHUP\n"
    assert process.returncode == 1


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    process = start_body(
        tmp_path,
        "print(sys.stdin.read())",
        before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),  # as `nohup` does
        stdin=subprocess.PIPE,
    )
    os.kill(process.pid, signal.SIGHUP)
    time.sleep(0.5)
    output, _ = process.communicate("alive", timeout=ENOUGH_SECONDS)
    assert (output, process.returncode) == ("alive\n", 0)


@pytest.mark.parametrize("status", [0, 2])
def test_without_a_signal_the_status_is_the_commands_own(tmp_path: Path, status: int) -> None:
    process = start_body(tmp_path, f"print('unflushed', end='')\nsys.exit({status})")
    assert ended(process) == "unflushed"
    assert process.returncode == status


def test_a_failed_command_does_not_wait_for_its_threads(tmp_path: Path) -> None:
    body = "print('unflushed', end='')\nthreading.Thread(target=hang).start()\nsys.exit(1)"
    process = start_body(tmp_path, body)
    assert ended(process) == "unflushed"
    assert process.returncode == 1


def test_a_signal_ends_a_command_that_waits_for_a_thread(tmp_path: Path) -> None:
    body = "threading.Thread(target=hang).start()\nsys.exit(0)"
    process = start_body(tmp_path, body, {"_GRACE_SECONDS": 9999})
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    assert "Traceback" not in ended(process)
    assert process.returncode == 1
