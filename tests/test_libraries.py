"""Keras's backend: one in a process, and whoever is first has it."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("chosen", [None, "jax"])
def test_many_threads_agree_on_what_keras_runs_on(chosen: str | None) -> None:
    """Also while one of them imports it."""
    code = f"""
import sys, threading
from embedder.libraries import claim_keras_backend, import_keras, keras_backend
sys.setswitchinterval(1e-6)
together, won, seen = threading.Barrier(8), [], []
def claim(number):
    together.wait()
    name = ("jax", "tensorflow")[number % 2]
    if claim_keras_backend(name):
        won.append(name)
if {chosen!r}:
    claim_keras_backend({chosen!r})
threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(won) == 4 and len(set(won)) == 1, won
importer = threading.Thread(target=import_keras)
importer.start()
while importer.is_alive():
    seen.append(keras_backend())
assert set(seen) <= set(won), seen
print(won[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert chosen in (None, done.stdout.strip())
