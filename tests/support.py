"""What several tests share: generated archives, a simple engine, a zoo of vectors, a web server."""

import contextlib
import hashlib
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from embedder.datasets.training_set import TrainingSet
from embedder.engines import Features
from embedder.heads.model_folder import Provenance, Record, RecordedOptions
from embedder.recipe import Recipe
from embedder.sources.listing import Listing
from embedder.sources.reading import read_bytes
from embedder.store.schema import FAILURE_SCHEMA, row_schema, shard_name
from embedder.store.shard_file import vector_array
from embedder.store.store import Store

ROOT = Path(__file__).resolve().parents[1]

TESTS = ROOT / "tests"
SHARED = ROOT.parent / "shared" / "data"


def make_archive(folder: Path, num_images: int, first_seed: int = 0) -> Path:
    """Write images of smooth random colours, in folders `cats` and `dogs`."""
    for number in range(num_images):
        path = (
            folder
            / ("cats", "dogs")[number % 2]
            / f"{number:03d}.{('jpg', 'png')[number % 3 == 0]}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(first_seed + number)).save(path)
    return folder


def picture(seed: int, height: int = 90, width: int = 120) -> NDArray[np.uint8]:
    """An image of smooth random colours: uint8 (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def assert_same_vectors(received: NDArray[Any], expected: NDArray[Any]) -> None:
    """Equal but for rounding: to 1e-5 of the largest value, whatever the values' size."""
    largest = np.abs(expected).max()
    assert largest > 0
    np.testing.assert_allclose(received, expected, atol=1e-5 * largest)


class MeanColour:
    """An engine simple enough to check by eye: (batch, height, width, 3) to (batch, 3)."""

    name = "mean-colour"
    device = "CPU"

    def __init__(
        self,
        batch_size: int = 4,
        num_parallel: int = 2,
        before: Callable[[NDArray[np.uint8]], None] | None = None,
    ) -> None:
        self.batch_size, self.num_parallel, self._before = batch_size, num_parallel, before
        self.num_uploads = 0

    def upload(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        self.num_uploads += 1
        return pixels

    def embed(self, pixels: NDArray[np.uint8]) -> Features:
        assert pixels.shape[0] == self.batch_size
        if self._before is not None:
            self._before(pixels)
        return {"embedding": pixels.mean(axis=(1, 2), dtype=np.float32)}


def rows_of(
    recipe: Recipe,
    ids: list[str],
    vectors: NDArray[Any],
    extras: dict[str, list[Any]] | None = None,
) -> pa.Table:
    """Rows of files of 1 byte, with these vectors and manifest columns."""
    extras = extras or {}
    stored = vector_array(vectors.astype(recipe.store_dtype))
    fields = [pa.field(name, pa.array(values).type) for name, values in extras.items()]
    count = len(ids)
    columns = [
        ids,
        [hashlib.sha256(image_id.encode()).hexdigest() for image_id in ids],
        [1] * count,
        [4] * count,
        [3] * count,
        ["PNG"] * count,
        [None] * count,
        *extras.values(),
        stored,
    ]
    return pa.table(columns, schema=row_schema(recipe, {"embedding": stored.type}, fields))


DIM = 16
ANIMALS = ("cats", "dogs", "owls")


def add_rows(
    store: Store, ids: list[str], vectors: NDArray[Any], extras: dict[str, list[Any]] | None = None
) -> None:
    """Write one shard."""
    rows = rows_of(store.recipe, ids, vectors, extras)
    store.write_shard(rows, FAILURE_SCHEMA.empty_table(), shard_name(store.recipe, ids))


def animal_vectors(animals: Iterable[str], seed: int = 0, noise: float = 0.2) -> NDArray[Any]:
    """Each class in a direction of its own, with noise: float32 (n, DIM), no two rows alike."""
    means = np.array([np.eye(DIM)[ANIMALS.index(animal)] for animal in animals])
    random = np.random.default_rng(seed)
    return (means + noise * random.normal(size=means.shape)).astype(np.float32)


def training_set(
    codes: NDArray[Any],
    classes: Iterable[str] = ANIMALS,
    features: NDArray[Any] | None = None,
    groups: NDArray[Any] | None = None,
) -> TrainingSet:
    """Images of these classes, with features (n, dim) or (n, n_views, dim)."""
    ids = np.array([f"{number}.jpg" for number in range(len(codes))], dtype=object)
    groups = np.arange(len(codes)) if groups is None else groups
    if features is not None:
        features = features.reshape(len(codes), -1, features.shape[-1]).astype(np.float32)
    names = np.array([*classes])
    return TrainingSet(ids, ids, names, codes, groups, rows=np.arange(len(ids)), features=features)


class WebServer:
    """An HTTP server whose answers are functions of a request handler, by path.

    Attributes:
        url: Of its root, with no slash at the end.
        answers: By path, such as `/a.jpg`; what is not there is answered with 404.
        asked: Every request in turn, such as `GET /a.jpg`.
        num_connections: How many connections brought them.
    """

    def __init__(self, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.asked: list[str] = []
        self.num_connections = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # connections are kept

            def setup(self) -> None:
                server.num_connections += 1
                super().setup()

            def do_GET(self) -> None:
                server.asked.append(f"{self.command} {self.path}")
                with contextlib.suppress(ConnectionError):  # whoever asked had enough
                    server.answers.get(self.path, status(404))(self)

            def do_HEAD(self) -> None:
                self.do_GET()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((host, 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"http{'s' if tls else ''}://{host}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def status(code: int) -> Callable[[BaseHTTPRequestHandler], None]:
    """An answer that is an error."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_error(code)

    return answer


def body(content: bytes, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    """An answer with this body, and a Content-Length that is true unless the headers say other."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        for name, value in ({"Content_Length": str(len(content))} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def make_record(**provenance: Any) -> Record:
    """How a model was trained, in the fewest words."""
    made = {"store": "features", "when": "now", "versions": {}, "num_trained_on": 0} | provenance
    options = RecordedOptions(split="0.2")
    return Record(labels="folder", options=options, provenance=Provenance(**made))


def touch(folder: Path, *names: str) -> Path:
    """Make files that hold their own names."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def ids(listing: Listing) -> list[str]:
    """What the images of a listing are called."""
    found: list[str] = listing.refs["image_id"].to_pylist()
    return found


def contents(listing: Listing) -> dict[str, bytes]:
    """What `read_bytes` gives for every ref, by id."""
    paths = listing.refs["path"].to_pylist()
    return dict(zip(ids(listing), map(read_bytes, paths), strict=True))


def holding(*names: str) -> dict[str, bytes]:
    """What `contents` gives of files that `touch` made."""
    return {name: name.encode() for name in names}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    """Write a file; a text as UTF-8."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
