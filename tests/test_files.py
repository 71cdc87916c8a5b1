"""Files and folders that are there whole, or not at all."""

import ctypes
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from embedder.errors import EmbedderError
from embedder.files import (
    is_temporary,
    local_path,
    remove_abandoned,
    remove_folder,
    replace_folder,
    temporary_beside,
    whole_file,
    whole_folder,
)


def make_folder(path: Path, **texts: str) -> Path:
    path.mkdir(parents=True)
    for name, text in texts.items():
        (path / name).write_text(text)
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_file_that_fails_leaves_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("older")
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"newer")
        raise ZeroDivisionError
    assert content_of(tmp_path) == {"a": "older"}


def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "model", head="older", extra="older")
    with whole_folder(path) as folder:
        (folder / "head").write_text("newer")
        assert content_of(path) == {"head": "older", "extra": "older"}
    assert content_of(path) == {"head": "newer"}
    assert names_in(tmp_path) == ["model"]


def test_a_folder_that_fails_leaves_the_older_one(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "model", head="older")
    with pytest.raises(ZeroDivisionError), whole_folder(path) as folder:
        (folder / "head").write_text("newer")
        raise ZeroDivisionError
    assert content_of(path) == {"head": "older"}
    assert names_in(tmp_path) == ["model"]


def test_a_folder_replaces_another_where_names_cannot_be_swapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_folder(tmp_path / "model", head="older")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())  # an old C library
    with whole_folder(path) as folder:
        (folder / "head").write_text("newer")
    assert content_of(path) == {"head": "newer"}
    assert names_in(tmp_path) == ["model"]


def test_a_folder_that_lost_its_name_in_the_swap_gets_it_back(tmp_path: Path) -> None:
    make_folder(tmp_path / ".model.older", head="older")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "model"):
        raise ZeroDivisionError
    assert content_of(tmp_path / "model") == {"head": "older"}


def test_whoever_stands_in_the_folder_stays_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_folder(tmp_path / "model", head="older", extra="older")
    monkeypatch.chdir(path)
    with whole_folder(Path()) as folder:
        (folder / "head").write_text("newer")
    assert content_of(Path()) == {"head": "newer"}


@pytest.mark.parametrize("is_here", [True, False])
def test_a_folder_that_keeps_its_place_is_filled_from_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_here: bool
) -> None:
    path = make_folder(tmp_path / "elsewhere" / "model", head="older", extra="older")
    if is_here:
        monkeypatch.chdir(path)
    else:
        (tmp_path / "link").symlink_to(path)
    with whole_folder(Path() if is_here else tmp_path / "link") as folder:
        (folder / "head").write_text("newer")
        (folder / "assets").mkdir()
        assert folder.parent.samefile(path)  # the one above it may be another file system
        assert is_temporary(folder)
    assert names_in(path) == ["assets", "head"]
    assert (path / "head").read_text() == "newer"
    assert is_here or (tmp_path / "link").is_symlink()


def test_a_folder_takes_the_place_of_another_at_once(tmp_path: Path) -> None:
    new, path = make_folder(tmp_path / "new", a="newer"), make_folder(tmp_path / "a", a="older")
    replace_folder(new, path)
    assert content_of(path) == {"a": "newer"}
    replace_folder(path, tmp_path / "b")
    assert not path.exists()
    assert content_of(tmp_path / "b") == {"a": "newer"}


def test_what_is_no_file_is_written_to_as_it_is(tmp_path: Path) -> None:
    command = f"mkfifo {tmp_path}/pipe; cat {tmp_path}/pipe"
    with subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE) as reader:
        while not (tmp_path / "pipe").exists():
            pass
        with whole_file(tmp_path / "pipe") as file:
            file.write(b"newer")
        assert reader.communicate()[0] == b"newer"
    assert (tmp_path / "pipe").is_fifo()
    with whole_file(Path("/dev/null")) as file:
        file.write(b"newer")
    assert Path("/dev/null").is_char_device()


def test_a_link_to_a_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("older")
    (tmp_path / "link").symlink_to("a")
    with whole_file(tmp_path / "link") as file:
        file.write(b"newer")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").read_text() == "newer"


def test_a_folder_that_is_deleted_is_gone(tmp_path: Path) -> None:
    remove_folder(make_folder(tmp_path / "a", b="c"))
    assert names_in(tmp_path) == []


def test_a_url_is_no_place_to_write_to(tmp_path: Path) -> None:
    assert local_path(tmp_path) == tmp_path
    with pytest.raises(EmbedderError, match="on a file system.*Received: s3://bucket/model"):
        local_path("s3://bucket/model")


_KILLED = """
import os, signal, sys
from pathlib import Path
from embedder.files import whole_folder
with whole_folder(Path(sys.argv[1])) as folder:
    (folder / "head").write_text("newer")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_the_older_folder_and_what_the_next_one_removes(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "model", head="older")
    done = subprocess.run([sys.executable, "-c", _KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert content_of(path) == {"head": "older"}
    assert len(names_in(tmp_path)) == 2
    with whole_folder(path) as folder:
        (folder / "head").write_text("newer")
    assert names_in(tmp_path) == ["model"]


def test_only_names_of_dead_processes_of_this_machine_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    abandoned = [f".embedder-{host}-{dead.pid}-0123abcd.tmp", f".a.parquet.{host}.{dead.pid}.tmp"]
    kept = [
        temporary_beside(tmp_path / "a").name,
        f".embedder-elsewhere-{dead.pid}-0123abcd.tmp",
        f".embedder-{host}-{10**20}-0123abcd.tmp",  # no number of a process
        ".of-somebody-else.tmp",
        ".tmp",
    ]
    for name in (*abandoned, *kept):
        (tmp_path / name).touch()
    remove_abandoned(tmp_path)
    assert names_in(tmp_path) == sorted(kept)
