"""Decoder processes: what kills, hangs or starves one is a failure, and costs no other image."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedder.errors import EngineError
from embedder.extraction import decoder_link
from embedder.extraction.decoders import DecoderPool, Feeding, Outcome
from embedder.extraction.record import Work
from embedder.pixels import Pixels
from embedder.store import Failure
from tests.support import make_archive, picture

PIXELS = Pixels((48, 64), "squash", 1.0, "bicubic", "exact", 1)

# What a decoder does with a file that has the marker in it: a shim around Pillow, which decoder
# processes find on their import path.
SHIM = """
import os, signal, time
from PIL import Image

def _open(file, *arguments, real=Image.open, **options):
    content = file.getvalue()
    if b"POISON:" in content:
        what = content.split(b"POISON:")[1].split(b";")[0].decode()
        if what == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif what == "abort":
            os.abort()
        elif what == "exit":
            os._exit(3)
        elif what == "hang":
            while True:
                pass
        elif what == "sleep":
            time.sleep(1000)
        elif what == "memory":
            held = [bytes(2**26) for _ in range(2**16)]
        elif what == "once" and not os.path.exists(os.environ["POISON_ONCE"]):
            open(os.environ["POISON_ONCE"], "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
    return real(file, *arguments, **options)

Image.open = _open

if "NO_MEMORY" in os.environ:  # for batches
    import mmap
    class _NoMemory(mmap.mmap):
        def __new__(cls, file, length):
            if length > mmap.PAGESIZE:
                raise OSError(12, "Cannot allocate memory")
            return super().__new__(cls, file, length)
    mmap.mmap = _NoMemory

# A network disk, on which each file takes a while to be found.
def _stat(path, real=os.stat):
    hangs = b"003" in path or b"014" in path if isinstance(path, bytes) else False
    if hangs and b"/hung/" in path:
        time.sleep(1000)
    elif isinstance(path, bytes) and b"/slow/" in path:
        with open(os.environ["READS"], "ab", buffering=0) as file:
            file.write(b"+")
            time.sleep(0.03)
            file.write(b"-")
    return real(path)

os.stat = _stat
"""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Decoder processes that are started by each test, and end with it."""
    decoder_link.end_idle()
    yield
    for thread in threading.enumerate():
        if thread.name == "decoder":
            thread.join(timeout=30)
    decoder_link.end_idle()


@pytest.fixture
def shimmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoder processes that are started now do as the marker says."""
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "sitecustomize.py").write_text(SHIM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shim"))
    monkeypatch.setenv("POISON_ONCE", str(tmp_path / "once"))
    monkeypatch.setenv("READS", str(tmp_path / "reads"))


def poison(path: Path, what: str) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(picture(0)).save(path, "JPEG", comment=f"POISON:{what};".encode())


def pool(num_decoders: int = 2, views: int = 1, **feeding: float) -> DecoderPool:
    pixels = PIXELS._replace(views=views)
    return DecoderPool(pixels, 4, 4, num_decoders, Feeding(**feeding))


def load(
    pool: DecoderPool, folder: Path, meanwhile: Callable[[], None] = lambda: None
) -> dict[str, tuple[Outcome, np.ndarray]]:
    """What became of each file below a folder, and its pixels; the engine is left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    feed = pool.feed([bytes(path) for path in paths], Work())
    found: dict[str, tuple[Outcome, np.ndarray]] = {}
    filled: dict[int, int] = {}
    try:
        for outcomes in feed.outcomes():
            meanwhile()
            for outcome in outcomes:
                name = str(paths[outcome.position].relative_to(folder))
                assert name not in found
                pixels = np.stack([pool.shared.slot(slot).copy() for slot in outcome.slots])
                found[name] = outcome, pixels
                if isinstance(outcome.found, Failure):
                    feed.reuse(outcome.slots)
                    continue
                for slot in outcome.slots:
                    batch = slot // pool.batch_size
                    filled[batch] = filled.get(batch, 0) + 1
                    if filled[batch] == pool.batch_size:
                        del filled[batch]
                        feed.hand_over(batch)
                        pool.release(batch)
    finally:
        feed.close()
    return found


def failures(found: dict[str, tuple[Outcome, np.ndarray]]) -> dict[str, Failure]:
    return {
        name: outcome.found
        for name, (outcome, _) in found.items()
        if isinstance(outcome.found, Failure)
    }


POISONS = {
    "segfault": "its decoder was killed by signal 11 (SIGSEGV)",
    "abort": "its decoder was killed by signal 6 (SIGABRT)",
    "exit": "its decoder ended with status 3",
    "hang": "took longer than 1 s",
    "sleep": "took longer than 1 s",
    "memory": "needed more than 2 GiB",
}


def test_poison_is_a_failure_with_its_reason_and_costs_no_other_image(
    tmp_path: Path, shimmed: None
) -> None:
    folder = make_archive(tmp_path / "photos", 60)
    alone = load(pool(), folder)
    for number, what in enumerate(POISONS):
        poison(folder / "cats" / f"{10 * number:03d}x.jpg", what)
    found = load(pool(decode_timeout=1.0), folder)
    assert failures(found) == {
        f"cats/{10 * number:03d}x.jpg": Failure("decode", reason)
        for number, reason in enumerate(POISONS.values())
    }
    assert len(found) == 66
    for name, (outcome, pixels) in alone.items():
        assert found[name][0].sha256 == outcome.sha256
        np.testing.assert_array_equal(found[name][1], pixels)


def test_an_image_whose_decoder_was_killed_once_is_loaded(tmp_path: Path, shimmed: None) -> None:
    folder = make_archive(tmp_path / "photos", 20)
    poison(folder / "cats" / "005x.jpg", "once")
    found = load(pool(), folder)
    assert (tmp_path / "once").exists()
    assert failures(found) == {}
    assert len(found) == 21


def test_a_batch_of_poison_alone_ends(tmp_path: Path, shimmed: None) -> None:
    for number in range(6):
        poison(tmp_path / "photos" / f"{number}.jpg", "abort")
    found = load(pool(), tmp_path / "photos")
    assert {failure.error for failure in failures(found).values()} == {POISONS["abort"]}
    assert len(found) == 6


def test_decoders_that_are_killed_without_an_image_in_work_are_replaced(tmp_path: Path) -> None:
    folder = make_archive(tmp_path / "photos", 200)
    small = pool(num_decoders=2)
    load(small, folder)
    wait_for_idle(2)
    for link in decoder_link._idle:
        os.kill(link._process.pid, signal.SIGKILL)
    assert len(load(small, folder)) == 200


def reads_at_once(path: Path) -> list[int]:
    """How many reads were in work as each of them began, in their order."""
    marks = [1 if mark == "+" else -1 for mark in path.read_text()]
    return [sum(marks[: number + 1]) for number, mark in enumerate(marks) if mark == 1]


def test_files_that_are_slow_to_read_are_read_many_at_once(tmp_path: Path, shimmed: None) -> None:
    make_archive(tmp_path / "photos" / "slow", 120)
    found = load(pool(num_decoders=2, read_ahead=16), tmp_path / "photos")
    assert len(found) == 120
    assert failures(found) == {}
    at_once = reads_at_once(tmp_path / "reads")
    assert len(at_once) == 120
    assert max(at_once[:2]) <= 2  # nobody knows yet
    assert 8 < max(at_once) <= 16 + 2  # and one each that was begun before


def test_a_file_that_cannot_be_read_in_time_is_a_failure(tmp_path: Path, shimmed: None) -> None:
    make_archive(tmp_path / "photos" / "hung", 8)
    found = load(pool(decode_timeout=0.5), tmp_path / "photos")
    assert failures(found) == {"hung/dogs/003.png": Failure("read", "took longer than 0.5 s", True)}
    assert len(found) == 8


def test_threads_that_hang_with_files_hold_up_no_others(tmp_path: Path, shimmed: None) -> None:
    make_archive(tmp_path / "photos" / "slow" / "hung", 30)
    found = load(pool(num_decoders=1, read_ahead=1, decode_timeout=0.5), tmp_path / "photos")
    assert len(found) == 30
    assert sorted(failures(found)) == ["slow/hung/cats/014.jpg", "slow/hung/dogs/003.png"]


def test_decoders_that_break_outside_of_any_image_end_the_run(
    tmp_path: Path, shimmed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_MEMORY", "1")
    folder = make_archive(tmp_path / "photos", 20)
    with pytest.raises(EngineError, match="die without an image in work: its decoder ended with"):
        load(pool(), folder)


def wait_for_idle(count: int) -> None:
    deadline = time.monotonic() + 30
    while len(decoder_link._idle) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_decoders_that_cannot_start_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_archive(tmp_path / "photos", 5)
    (tmp_path / "msgpack.py").write_text("raise ImportError('msgpack is broken')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match="cannot be started: ImportError: msgpack is broken"):
        load(pool(), folder)


def test_what_a_decoder_process_loads(tmp_path: Path) -> None:
    link = decoder_link.DecoderLink()
    small = pool(num_decoders=1)
    decoder_link._idle.append(link)
    load(small, make_archive(tmp_path / "photos", 3))
    maps = Path(f"/proc/{link._process.pid}/maps").read_text()
    for library in ("openvino", "tensorflow", "pyarrow", "pydantic", "libarrow"):
        assert library not in maps
    assert "PIL" in maps
