"""What feeds the network, in words: by made-up figures, and by real files."""

import pytest

from embedder.checks.feeding import Decoding, feeding, measure_decoding
from embedder.checks.trial import Speed
from embedder.recipe import Recipe


@pytest.mark.parametrize(
    ("network", "decoder", "cores", "num_gpus", "words"),
    [
        # Two cores compute 100 images/s or decode 1,600: of 17 ms an image, 1 ms is decoding.
        (100.0, 800.0, 2, 0, ["takes 6% of the cores", "the network will", "about 94 images/s"]),
        (100.0, 25.0, 2, 0, ["takes 67% of the cores", "decoding will", "about 33 images/s"]),
        (
            9000.0,
            1000.0,
            16,
            1,
            ["9 decoders would feed the GPU", "16 cores: the network", "9,000"],
        ),
        (9001.0, 1000.0, 16, 1, ["10 decoders would feed the GPU"]),
        (9000.0, 500.0, 16, 1, ["18 decoders", "16 cores: decoding will", "8,000 images/s"]),
        (9000.0, 1000.0, 16, 2, ["18 decoders would feed 2 GPUs", "decoding will", "16,000"]),
        (9000.0, 1000.0, 32, 2, ["18 decoders", "32 cores: the network will", "18,000"]),
        (10.0, 1000.0, 1, 1, ["1 decoder would feed the GPU, and there is 1 core: the network"]),
    ],
)
def test_what_holds_a_run_back_is_told(
    network: float, decoder: float, cores: int, num_gpus: int, words: list[str]
) -> None:
    speed, decoding = Speed("GPU", 32, False, network), Decoding(decoder, "3 images")
    told = feeding("jax", speed, decoding, cores, num_gpus)["feeding"]
    for text in words:
        assert text in told


def test_what_was_measured_is_told() -> None:
    decoding = Decoding(1234.0, "3 images")
    told = feeding("jax", Speed("GPU", 512, True, 9876.0), decoding, 16, 2)
    assert told["network"] == (
        "9,876 images/s alone, on black images: jax on 1 GPU, batches of 512 (found here)"
    )
    assert told["decoder"] == "1,234 images/s on one core, read and decoded: 3 images"
    told = feeding("openvino", Speed("CPU", 4, False, 50.0), decoding, 2, 0)
    assert "openvino on 2 CPU cores, batches of 4 (the default, before" in told["network"]


def test_decoding_is_measured_on_generated_images_where_there_is_no_demo(
    lite0: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedder.sources.demo_images._PACKAGE", "no_such_package")
    found = measure_decoding(lite0)
    assert found.images.startswith("8 generated JPEG images of 0.79 megapixels")
    assert "pip install 'image-embedder[demo]'" in found.images
    assert found.images_per_second > 0


def test_decoding_is_measured_on_demo_images(lite0: Recipe) -> None:
    pytest.importorskip("conformal_clip_data", reason="needs the demo images")
    assert measure_decoding(lite0).images.startswith("200 demo images of 0.06 megapixels")
