"""The README's commands and code run as they stand."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_commands_run_in_their_order(archive: Path, tmp_path: Path) -> None:
    (commands,) = [block for block in blocks("sh") if "embedder extract" in block]
    scripts = Path(sys.executable).parent
    for line in commands.splitlines():
        command = line.split("#")[0].split()
        done = subprocess.run(
            [scripts / command[0], *command[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"


def test_the_python_code_runs(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(code, names)
    assert names["X"].shape == (20, 1280)  # type: ignore[attr-defined]
    assert len(names["ids"]) == 20  # type: ignore[arg-type]


def test_the_query_runs(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import duckdb

    import embedder

    monkeypatch.chdir(tmp_path)
    embedder.extract(archive, "features", image_size=(64, 96))
    (query,) = blocks("sql")
    assert len(duckdb.sql(query.rstrip().rstrip(";")).fetchall()) == 20


def test_the_make_targets_exist() -> None:
    commands = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    targets = [command.split()[1] for command in commands if command.startswith("make ")]
    assert targets == ["demo", "test"]
    assert shutil.which("make")
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
