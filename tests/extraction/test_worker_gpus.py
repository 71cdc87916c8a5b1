"""GPUs and cores of workers on a machine that has two nodes of four cores."""

import os
from pathlib import Path

import pynvml
import pytest

from embedder.extraction.worker_gpus import Place, local_places, tell_of_gpus
from tests.fake_nvml import Card, functions

FIRST, SECOND = [0, 1, 2, 3], [4, 5, 6, 7]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cards a and b are on the first node, c on the second, and of d the node is not known."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*FIRST, *SECOND})
    cards = [Card(f"GPU-{name}", bus=bus) for bus, name in enumerate("abcd")]
    for name, function in functions(cards).items():
        monkeypatch.setattr(pynvml, name, function)
    for bus, cores in enumerate(["0-3", "0-3", "4-7"]):
        folder = tmp_path / f"sys/bus/pci/devices/0000:{bus:02x}:00.0"
        folder.mkdir(parents=True)
        (folder / "local_cpulist").write_text(f"{cores}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("gpus", "num_workers", "places"),
    [
        ("", 2, [(None, []), (None, [])]),
        ("ac", 2, [("a", FIRST), ("c", SECOND)]),
        ("ac", 4, [("a", FIRST), ("c", SECOND), ("a", FIRST), ("c", SECOND)]),
        ("d", 1, [("d", [])]),
        ("e", 2, [("e", []), ("e", [])]),  # not one of the machine
        ("a", 1, [("a", [])]),  # alone it may use both nodes
        ("ab", 2, [("a", []), ("b", [])]),  # the second node would have nothing to do
        ("abc", 3, [("a", FIRST), ("b", FIRST), ("c", SECOND)]),
        ("abcd", 4, [("a", FIRST), ("b", FIRST), ("c", SECOND), ("d", [])]),
    ],
)
def test_a_worker_is_near_its_gpu_where_that_costs_it_no_cores(
    root: Path, gpus: str, num_workers: int, places: list[tuple[str | None, list[int]]]
) -> None:
    found = local_places([f"GPU-{name}" for name in gpus], num_workers, root)
    assert found == [Place(gpu and f"GPU-{gpu}", cores) for gpu, cores in places]


def test_a_gpu_that_is_nobodys_and_one_of_a_single_worker_are_not_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found: dict[str, tuple[str, str] | None] = {
        "tcp://a:1": ("a", "0000:01:00.0"),
        "tcp://b:1": ("b", "0000:01:00.0"),
    }
    found |= {"tcp://c:1": None, "tcp://d:1": None}
    tell_of_gpus(found, set(found), "tcp://s:8786", expected=False)
    assert caplog.messages == []


def test_a_shared_gpu_is_told_again_only_of_a_new_worker(caplog: pytest.LogCaptureFixture) -> None:
    found = dict.fromkeys(("tcp://a:1", "tcp://a:2"), ("a", "0000:01:00.0"))
    for new in ({"tcp://a:2"}, {"tcp://b:1"}):
        tell_of_gpus(found, new, "tcp://s:8786", expected=True)
    assert len(caplog.messages) == 1
