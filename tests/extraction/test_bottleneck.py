"""The sentence that names a run's bottleneck: of figures, and of runs that are slow on purpose."""

import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import embedder
from embedder.engines import Features
from embedder.extraction.decoders import Feeding
from embedder.extraction.record import Summary
from embedder.extraction.shard import extract_shard
from embedder.extraction.worker import Job, WorkerState
from embedder.recipe import Recipe
from embedder.sources.listing import list_images
from embedder.store.store import Store
from tests.extraction.test_record import seconds, summary_of, summary_of_nothing
from tests.support import MeanColour, WebServer, body, make_archive

# Figures. ----------------------------------------------------------------------------------------


def waits(read: float, room: float) -> dict[str, float]:
    return {"read": read, "room": room}


def test_a_network_that_decoders_wait_for(mean_colour_recipe: Recipe) -> None:
    summary = summary_of(mean_colour_recipe, seconds=seconds(1, 5, 19, 0.2), waits=waits(1.0, 13.0))
    assert summary.bottleneck == (
        "embed-bound: openvino on CPU was busy 95% of the time, and 2 decoders waited for it 65% "
        "of the time. A GPU, more cores, or on a CPU that has it `--precision bfloat16` would help"
    )
    assert summary.engine_idle == pytest.approx(0.05)


def test_on_a_gpu_neither_cores_nor_bfloat16_would_help(mean_colour_recipe: Recipe) -> None:
    summary = summary_of(
        mean_colour_recipe,
        engine="tensorflow on GPU",
        seconds=seconds(1, 5, 21, 0.2),
        waits=waits(1.0, 13.0),
    )
    assert summary.bottleneck.startswith("embed-bound: tensorflow on GPU was busy 100% of the time")
    assert summary.bottleneck.endswith("time. More GPUs would help")
    assert summary.engine_idle == 0.0  # more than busy, by how its seconds are measured


def test_bfloat16_is_not_advised_to_who_has_it(mean_colour_recipe: Recipe) -> None:
    recipe = mean_colour_recipe.model_copy(update={"precision": "bfloat16"})
    summary = summary_of(recipe, seconds=seconds(1, 5, 19, 0.2), waits=waits(1.0, 13.0))
    assert summary.bottleneck.endswith("More cores, workers or GPUs would help")


@pytest.mark.parametrize(
    ("decode", "advice"), [("exact", "`--decode scaled`"), ("scaled", "More cores or workers")]
)
def test_decoders_that_are_busy(mean_colour_recipe: Recipe, decode: str, advice: str) -> None:
    summary = summary_of(
        mean_colour_recipe.model_copy(update={"decode": decode}),
        seconds=seconds(1, 16, 12, 0.2),
        waits=waits(1.0, 0.5),
    )
    assert summary.bottleneck.startswith(
        "decode-bound: 2 decoders decode 125 images/s beside the network; the engine idled 40% of "
        "the time. "
    )
    assert advice in summary.bottleneck


def test_two_workers_have_twice_as_many_decoders(mean_colour_recipe: Recipe) -> None:
    summary = summary_of(
        mean_colour_recipe,
        seconds=seconds(1, 32, 20, 0.2),
        waits=waits(1.0, 0.5),
        num_embedded=800,
        failures=Counter({("decode", "x"): 200}),  # took their time too
    )
    summary.num_workers = 2
    assert summary.bottleneck.startswith(
        "decode-bound: 4 decoders decode 125 images/s beside the network; the engine idled 50% of "
        "the time. "
    )


@pytest.mark.parametrize(
    ("fastest", "advice"),
    [(0.25, "a larger `--read-ahead`"), (0.01, "A faster disk or network would help")],
)
def test_decoders_that_wait_for_bytes(
    mean_colour_recipe: Recipe, fastest: float, advice: str
) -> None:
    summary = summary_of(
        mean_colour_recipe,
        seconds=seconds(640, 1, 1, 0.2),
        waits=waits(18.0, 0.1),
        reads=[fastest],
    )
    assert summary.bottleneck.startswith(
        "read-bound: an image takes 640.0 ms to read, 64.0 are read at once, at 5.0 MB/s; the "
        "engine idled 95% of the time. "
    )
    assert advice in summary.bottleneck


def test_decoders_that_have_no_images(mean_colour_recipe: Recipe) -> None:
    facts = {"seconds": seconds(1, 4, 2, 8), "waits": waits(1.0, 0.1), "python_seconds": 2.0}
    summary = summary_of(mean_colour_recipe, **facts)
    assert summary.bottleneck.startswith("write-bound: shards are written at 0.6 MB/s; ")
    summary.python_seconds = 9.0
    assert summary.bottleneck.startswith("python-bound: images waited for Python in the engine's")
    summary.num_workers = 20  # of two hundred seconds, not of ten
    assert summary.bottleneck.startswith("decode-bound")


def test_workers_that_wait_for_shards(mean_colour_recipe: Recipe) -> None:
    facts = {"seconds": seconds(1, 2, 2, 0.5), "waits": waits(1.0, 0.1), "python_seconds": 0.5}
    spans = [("a", 100.0 + number, 100.3 + number) for number in range(10)]
    summary = summary_of(mean_colour_recipe, spans=spans, **facts)
    assert summary.bottleneck == (
        "dask-bound: workers had no images in hand 74% of the time, between 10 shards; the engine "
        "idled 90% of the time. Larger shards, or a scheduler with less to do, would help"
    )
    summary.spans = spans[:2]  # their start and end are most of such a run
    assert summary.bottleneck.startswith("decode-bound")


# Runs. -------------------------------------------------------------------------------------------


def summary_of_run(
    recipe: Recipe, source: Path, store: Path, engine: MeanColour, feeding: Feeding | None = None
) -> Summary:
    """Extract a source as one shard."""
    Store.open_or_create(store, recipe, {})
    state = WorkerState(recipe, engine, 2, feeding or Feeding())
    job = Job(recipe, str(store), "mean-colour", None)
    refs = list_images(source).refs
    (receipt,) = extract_shard([job], [state], refs, lambda *_: None, lambda: False)
    summary = summary_of_nothing(recipe)
    summary.add(receipt)
    return summary


def test_a_slow_network_is_named(
    tmp_path: Path, mean_colour_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedder.extraction.decoders._MAX_AHEAD", 4)
    pause = threading.Event()
    slow = MeanColour(before=lambda _: pause.wait(0.05) and None)
    folder = make_archive(tmp_path / "photos", 120)
    summary = summary_of_run(
        mean_colour_recipe, folder, tmp_path / "store", slow, Feeding(read_ahead=1)
    )
    assert summary.bottleneck.startswith("embed-bound: mean-colour on CPU was busy ")


def test_slow_decoding_is_named(tmp_path: Path, mean_colour_recipe: Recipe) -> None:
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (1500, 1500, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.png")
    for number in range(12):
        (tmp_path / "photos" / f"{number}.png").hardlink_to(tmp_path / "0.png")
    summary = summary_of_run(
        mean_colour_recipe, tmp_path / "photos", tmp_path / "store", MeanColour()
    )
    assert summary.bottleneck.startswith("decode-bound: 2 decoders decode ")


def test_a_server_that_answers_late_is_named(
    tmp_path: Path, mean_colour_recipe: Recipe, web: WebServer
) -> None:
    manifest = served(web, tmp_path, lambda: threading.Event().wait(0.1) and None)
    summary = summary_of_run(
        mean_colour_recipe, manifest, tmp_path / "store", MeanColour(), Feeding(read_ahead=8)
    )
    assert summary.bottleneck.startswith("read-bound: an image takes 1")
    assert summary.bottleneck.endswith("a larger `--read-ahead`, or more workers")


def test_a_server_that_serves_one_at_a_time_is_named(
    tmp_path: Path, mean_colour_recipe: Recipe, web: WebServer
) -> None:
    one = threading.Lock()

    def wait_in_line() -> None:
        with one:
            threading.Event().wait(0.02)

    manifest = served(web, tmp_path, wait_in_line)
    summary = summary_of_run(
        mean_colour_recipe, manifest, tmp_path / "store", MeanColour(), Feeding(read_ahead=32)
    )
    assert summary.bottleneck.startswith("read-bound: an image takes ")
    assert summary.bottleneck.endswith("A faster disk or network would help")


def served(web: WebServer, folder: Path, before: Callable[[], None]) -> Path:
    """A manifest of 120 images on a server that does something before each answer."""
    content = next(make_archive(folder / "photos", 1).rglob("*.*")).read_bytes()
    answer = body(content)

    def answer_late(handler: BaseHTTPRequestHandler) -> None:
        before()
        answer(handler)

    web.answers = {f"/{number}.jpg": answer_late for number in range(120)}
    manifest = folder / "list.txt"
    manifest.write_text("".join(f"{web.url}{path}\n" for path in web.answers))
    return manifest


def test_shards_of_an_image_each_are_named(tmp_path: Path) -> None:
    folder = make_archive(tmp_path / "photos", 100)
    # In memory where that can be: a disk may take longer to write a shard than Dask to hand it out.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        store = embedder.extract(folder, Path(place) / "s", image_size=(32, 32), shard_size=1)
        found = store.runs()[-1]["bottleneck"]
    assert found.startswith("dask-bound: workers had no images in hand ")


class Wide(MeanColour):
    """Makes vectors that take longer to write than all else."""

    def embed(self, pixels: NDArray[np.uint8]) -> Features:
        super().embed(pixels)
        shape = len(pixels), 400_000
        return {"embedding": np.random.default_rng(0).random(shape, np.float32)}


def test_slow_writing_is_named(tmp_path: Path, mean_colour_recipe: Recipe) -> None:
    folder = make_archive(tmp_path / "photos", 60)
    summary = summary_of_run(mean_colour_recipe, folder, tmp_path / "store", Wide())
    assert summary.bottleneck.startswith("write-bound: shards are written at ")


@contextmanager
def busy_python() -> Iterator[None]:
    """Other threads of this process that leave Python to nobody for long."""
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(1000))

    threads = [threading.Thread(target=spin) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_process_that_is_busy_with_python_is_named(
    tmp_path: Path, mean_colour_recipe: Recipe
) -> None:
    folder = make_archive(tmp_path / "photos", 600)
    summary_of_run(mean_colour_recipe, folder, tmp_path / "first", MeanColour())  # starts decoders
    with busy_python():
        summary = summary_of_run(
            mean_colour_recipe, folder, tmp_path / "store", MeanColour(batch_size=32)
        )
    assert summary.bottleneck.startswith(
        "python-bound: images waited for Python in the engine's process"
    )
