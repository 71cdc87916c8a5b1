"""Folders that the tests of sources share."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from embedder.sources import attempts
from embedder.sources.attempts import Patience
from tests.support import touch


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Patience:
    """Three attempts, and waits that a test has time for."""
    patience = Patience(
        num_attempts=3,
        connect_seconds=2,
        first_idle_seconds=0.4,
        longest_idle_seconds=0.5,
        total_seconds=20,
        first_wait_seconds=0.01,
    )
    monkeypatch.setattr(attempts, "PATIENCE", patience)
    return patience


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return touch(tmp_path / "photos", "a.jpg", "cats/b.jpg", "cats/c.png", "cats/old/d.jpg")


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """The file system of `memory://`, empty before and after."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()
