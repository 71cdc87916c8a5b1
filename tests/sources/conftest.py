"""Folders that the tests of sources share."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.support import touch


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
