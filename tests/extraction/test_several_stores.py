"""Several networks in one run: a store each, and every image read once."""

import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from embedder.backbones.resolve import make_recipe
from embedder.extraction.extract import run_extraction
from embedder.extraction.options import RunOptions
from embedder.recipe import Recipe
from embedder.store.store import Store
from tests.support import assert_same_vectors


def recipes_in(folder: Path, **sizes: tuple[int, int]) -> dict[str, Recipe]:
    """Small recipes, by the folder of their store."""
    return {
        str(folder / name): make_recipe(
            name, "random", image_size=size, crop_fraction=0.9, interpolation="bicubic"
        )
        for name, size in sizes.items()
    }


def test_several_networks_give_what_each_gives_alone(archive: Path, tmp_path: Path) -> None:
    (archive / "broken.jpg").write_bytes(b"no picture")
    both = recipes_in(tmp_path / "both", mobilenet=(64, 96), vgg16=(64, 96))
    summaries = run_extraction(archive, both, RunOptions(shard_size=8, max_failures=1))
    for (path, recipe), summary in zip(both.items(), summaries, strict=True):
        alone = tmp_path / "alone" / recipe.backbone
        run_extraction(archive, {str(alone): recipe}, RunOptions(shard_size=8, max_failures=1))
        assert (summary.num_embedded, summary.num_failures) == (20, 1)
        assert [p.name for p in Store(path).shards()] == [p.name for p in Store(alone).shards()]
        assert Store(path).failures().equals(Store(alone).failures())
        np.testing.assert_array_equal(Store(path).ids(), Store(alone).ids())
        assert_same_vectors(Store(path).vectors(), Store(alone).vectors())


class CountingServer(SimpleHTTPRequestHandler):
    """Serves a folder, and counts how often each file is fetched."""

    fetched: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        self.fetched[self.path] += 1
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


def test_several_networks_read_an_image_once_where_they_see_the_same_pixels(
    archive: Path, tmp_path: Path
) -> None:
    paths = sorted(path.relative_to(archive).as_posix() for path in archive.rglob("*.*"))
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(CountingServer, directory=str(archive))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = [f"http://127.0.0.1:{server.server_port}/{path}" for path in paths]
        (tmp_path / "urls.txt").write_text("\n".join(urls[:5]))
        ahead, behind = recipes_in(tmp_path / "s", mobilenet=(64, 96), vgg16=(64, 96)).items()
        run_extraction(tmp_path / "urls.txt", dict([ahead]), RunOptions())
        assert CountingServer.fetched.total() == 5
        (tmp_path / "urls.txt").write_text("\n".join(urls))
        CountingServer.fetched.clear()
        summaries = run_extraction(tmp_path / "urls.txt", dict([ahead, behind]), RunOptions())
        assert [summary.num_embedded for summary in summaries] == [15, 20]
        # Those that the first store had already are read for the second alone.
        assert set(CountingServer.fetched.values()) == {1}, CountingServer.fetched
        assert CountingServer.fetched.total() == 20
        CountingServer.fetched.clear()
        other_size = recipes_in(tmp_path / "s", resnet50=(96, 64))
        run_extraction(tmp_path / "urls.txt", dict([ahead]) | other_size, RunOptions())
        assert CountingServer.fetched.total() == 20
        server.shutdown()
    assert [len(Store(tmp_path / "s" / name)) for name in ("mobilenet", "vgg16", "resnet50")] == [
        20,
        20,
        20,
    ]


def test_several_networks_run_on_worker_processes(archive: Path, tmp_path: Path) -> None:
    both = recipes_in(tmp_path / "both", mobilenet=(64, 96), vgg16=(96, 64))
    run_extraction(archive, both, RunOptions(shard_size=8, workers=2))
    for path, recipe in both.items():
        (run,) = Store(path).runs()
        assert (len(Store(path)), run["workers"], run["status"]) == (20, 2, "done")
        assert Store(path).recipe == recipe
