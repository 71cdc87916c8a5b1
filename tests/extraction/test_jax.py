"""Runs on JAX: in this process or in one of its own, and on a store that another engine began."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from embedder.api import extract
from embedder.errors import EngineError
from embedder.libraries import import_keras
from embedder.store import Store
from tests.extraction.test_cluster import scheduler_with_workers
from tests.support import assert_same_vectors, make_archive


def test_a_store_made_by_one_engine_is_continued_by_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import_keras()  # on TensorFlow, so that JAX needs a process of its own
    archive = make_archive(tmp_path / "photos", 12)
    options = {"image_size": (64, 96), "shard_size": 5}
    with caplog.at_level(logging.INFO, "embedder"):
        store = extract(archive, tmp_path / "store", engine="jax", **options)
    assert "Keras runs on tensorflow in this process, so jax runs in a process" in caplog.text
    first = dict(zip(store.ids(), store.vectors(), strict=True))
    make_archive(tmp_path / "photos", 20)
    extract(archive, store.address, engine="openvino", **options)
    assert [run["engine"] for run in store.runs()] == ["jax on CPU", "openvino on CPU"]
    assert [run["counts"]["embedded"] for run in store.runs()] == [12, 8]
    whole = extract(archive, tmp_path / "whole", engine="openvino", **options)
    assert sorted(store.ids()) == sorted(whole.ids())
    expected = dict(zip(whole.ids(), whole.vectors(), strict=True))
    for image_id, vector in zip(store.ids(), store.vectors(), strict=True):
        assert_same_vectors(vector, expected[image_id])
    assert any((first[image_id] != expected[image_id]).any() for image_id in first)


def test_a_process_in_which_keras_runs_on_jax_exports_for_openvino(
    archive: Path, tmp_path: Path
) -> None:
    """By a process of its own, since that needs Keras on TensorFlow."""
    code = """
import sys
import embedder
if __name__ == "__main__":
    import os
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    archive, store = sys.argv[1:]
    embedder.extract(archive, store, engine="jax", image_size=(64, 88), limit=4)
    embedder.extract(archive, store, engine="openvino", image_size=(64, 88))
    embedder.verify(store, audit=3)
    print(keras.config.backend(), "tensorflow" in sys.modules)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, str(script), str(archive), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["jax", "False"]
    runs = Store(str(tmp_path / "store")).runs()
    assert [(run["engine"], run["counts"]["embedded"]) for run in runs] == [
        ("jax on CPU", 4),
        ("openvino on CPU", 16),
    ]


@pytest.mark.slow
def test_a_worker_of_a_scheduler_serves_one_engine_after_the_other(
    archive: Path, tmp_path: Path
) -> None:
    """On JAX it exports for OpenVINO, which needs a process; for TensorFlow it is to be told."""
    options = {"image_size": (64, 84), "limit": 4}
    cache = f"EMBEDDER_CACHE={tmp_path / 'cache'}"
    with scheduler_with_workers(f"{cache} --nworkers 1 --nthreads 2") as address:
        for engine in ("jax", "openvino", "auto"):
            store = extract(archive, tmp_path / engine, engine=engine, scheduler=address, **options)
            assert len(store) == 4
        with pytest.raises(EngineError, match=r"must be tensorflow. .* must be started again"):
            extract(archive, tmp_path / "x", engine="tensorflow", scheduler=address, **options)
    assert (tmp_path / "cache" / "jax").is_dir()
