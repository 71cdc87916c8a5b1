"""How far a run is, as Python shows it: on a terminal, in a notebook, and not elsewhere."""

import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import embedder
from embedder.extraction.extract import Progress

SCRIPT = """
import sys, embedder
embedder.extract(sys.argv[1], sys.argv[2], image_size=(64, 96), quiet=sys.argv[3] == "quiet")
"""


def start(archive: Path, store: Path, quiet: str, stderr: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SCRIPT, str(archive), str(store), quiet]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    return subprocess.Popen(command, stderr=stderr, env=environment)


def shown_on_a_terminal(archive: Path, store: Path, quiet: str) -> str:
    ours, theirs = pty.openpty()
    process = start(archive, store, quiet, theirs)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # what Linux says of a terminal that nobody writes to any more
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert process.wait() == 0
    return shown.decode()


def test_on_a_terminal_there_is_a_bar(archive: Path, tmp_path: Path) -> None:
    shown = shown_on_a_terminal(archive, tmp_path / "store", "")
    assert "embedding" in shown
    assert "20/20" in shown
    assert shown_on_a_terminal(archive, tmp_path / "another", "quiet") == ""


def test_elsewhere_nothing_is_printed(archive: Path, tmp_path: Path) -> None:
    with open(tmp_path / "stderr", "wb") as file:
        assert start(archive, tmp_path / "store", "", file.fileno()).wait() == 0
    assert (tmp_path / "stderr").read_bytes() == b""


def test_a_function_is_called_instead(archive: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def note(progress: Progress) -> None:
        seen.append((progress.phase, progress.num_done, progress.num_images))

    embedder.extract(archive, tmp_path / "store", image_size=(64, 96), on_progress=note)
    assert seen[0] == ("listing images", 0, 0)
    assert seen[-1] == ("embedding", 20, 20)


def test_in_a_notebook_one_output_changes(archive: Path, tmp_path: Path) -> None:
    nbformat = pytest.importorskip(
        "nbformat", reason="needs a notebook's kernel: nbclient, ipykernel"
    )
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    code = SCRIPT.replace("sys.argv", repr(["", str(archive), str(tmp_path / "store"), ""]))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook).execute()
    (output,) = notebook.cells[0].outputs
    assert output["data"]["text/plain"].startswith("embedding: 20 of 20, ")
    assert "<progress" in output["data"]["text/html"]
