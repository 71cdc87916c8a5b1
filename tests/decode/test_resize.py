"""Crops, sizes and filters."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from embedder.decode import resize
from embedder.decode.decode import decode_rgb
from tests.decode.test_decode import (
    BLACK,
    BLUE,
    CROPS,
    GREEN,
    RED,
    WHITE,
    bands,
    both_ways,
    colours,
    encode,
    make_recipe,
    mean_difference,
    noisy,
)
from tests.support import picture


def test_center_crops_the_sides_away() -> None:
    pixels = decode_rgb(encode(bands()), make_recipe((96, 48), interpolation="nearest")).pixels
    assert pixels.shape == (96, 48, 3)
    assert colours(pixels) == {GREEN}


def test_center_crops_top_and_bottom_away() -> None:
    upright = bands().transpose(1, 0, 2)
    pixels = decode_rgb(encode(upright), make_recipe((48, 96), interpolation="nearest")).pixels
    assert pixels.shape == (48, 96, 3)
    assert colours(pixels) == {GREEN}


def test_a_crop_of_the_images_own_proportions_keeps_all_of_it() -> None:
    pixels = decode_rgb(encode(bands()), make_recipe((32, 96), interpolation="nearest")).pixels
    assert colours(pixels[:, :32]) == {RED}
    assert colours(pixels[:, 32:64]) == {GREEN}
    assert colours(pixels[:, 64:]) == {BLUE}


def test_a_crop_fraction_keeps_the_middle_of_what_fits() -> None:
    framed = np.zeros((100, 200, 3), np.uint8)
    framed[25:75, 50:150] = WHITE
    recipe = make_recipe((40, 80), crop_fraction=0.5, interpolation="nearest")
    assert colours(decode_rgb(encode(framed), recipe).pixels) == {WHITE}
    recipe = make_recipe((40, 80), crop_fraction=0.6, interpolation="nearest")
    pixels = decode_rgb(encode(framed), recipe).pixels
    frame = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    assert all(colours(side) == {BLACK} for side in frame)


def test_squash_shows_the_whole_image_in_other_proportions() -> None:
    recipe = make_recipe((96, 48), crop="squash", interpolation="nearest")
    pixels = decode_rgb(encode(bands()), recipe).pixels
    assert pixels.shape == (96, 48, 3)
    assert colours(pixels[:, :16]) == {RED}
    assert colours(pixels[:, 16:32]) == {GREEN}
    assert colours(pixels[:, 32:]) == {BLUE}


def test_pad_shows_the_whole_image_between_black_bars() -> None:
    recipe = make_recipe((96, 48), crop="pad", interpolation="nearest")
    pixels = decode_rgb(encode(bands()), recipe).pixels
    assert colours(pixels[:40]) == colours(pixels[56:]) == {BLACK}
    assert colours(pixels[40:56, :16]) == {RED}
    assert colours(pixels[40:56, 32:]) == {BLUE}
    upright = decode_rgb(
        encode(bands().transpose(1, 0, 2)), make_recipe((48, 96), crop="pad")
    ).pixels
    assert colours(upright[:, :40]) == colours(upright[:, 56:]) == {BLACK}
    assert BLACK not in colours(upright[:, 40:56])


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("height", "width"), [(90, 130), (130, 90), (30, 41), (333, 96)])
@pytest.mark.parametrize("size", [(48, 64), (80, 40)])
@pytest.mark.parametrize(("how", "tolerance"), [("exact", 0.0), ("scaled", 0.3)])
def test_geometry_is_that_of_pillows_own_operations(
    interpolation: str, height: int, width: int, size: tuple[int, int], how: str, tolerance: float
) -> None:
    photo = picture(7, height, width)
    image, encoded = Image.fromarray(photo), encode(photo)
    resample = Image.Resampling[interpolation.upper()]
    target = (size[1], size[0])  # Pillow's order

    def pixels(crop: str, crop_fraction: float = 1.0) -> NDArray[np.uint8]:
        options = {"crop": crop, "crop_fraction": crop_fraction, "interpolation": interpolation}
        return decode_rgb(encoded, make_recipe(size, decode=how, **options)).pixels

    squashed = np.asarray(image.resize(target, resample))
    assert mean_difference(pixels("squash"), squashed) <= tolerance  # of 255
    fitted = ImageOps.fit(image, target, resample)
    assert mean_difference(pixels("center"), np.asarray(fitted)) < 0.1 + tolerance
    # A bleed takes its share from each of two sides.
    bled = ImageOps.fit(image, target, resample, bleed=0.125)
    assert mean_difference(pixels("center", 0.75), np.asarray(bled)) < 0.1 + tolerance
    contained = np.asarray(ImageOps.contain(image, target, resample))
    top, left = (size[0] - contained.shape[0]) // 2, (size[1] - contained.shape[1]) // 2
    padded = np.zeros((*size, 3), np.uint8)
    padded[top:, left:][: contained.shape[0], : contained.shape[1]] = contained
    assert mean_difference(pixels("pad"), padded) <= tolerance
    assert mean_difference(pixels("center"), squashed) > 1  # the crops do differ


def test_filters_differ() -> None:
    board = (np.indices((96, 128)).sum(axis=0) % 2 * 255).astype(np.uint8)
    found = {
        name: decode_rgb(encode(board), make_recipe((40, 52), interpolation=name)).pixels
        for name in ("nearest", "bilinear", "bicubic", "lanczos")
    }
    assert colours(found["nearest"]) == {BLACK, WHITE}
    for name in ("bilinear", "bicubic", "lanczos"):
        assert abs(found[name].mean() - 127.5) < 5  # antialiased: a board of small squares is grey
        assert found[name].std() < 40
    assert len({pixels.tobytes() for pixels in found.values()}) == 4


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5000, 1), (1, 5000)])
def test_images_of_one_pixel_or_one_line_decode(crop: str, height: int, width: int) -> None:
    encoded = encode(Image.new("RGB", (width, height), RED))
    decoded = decode_rgb(encoded, make_recipe((48, 64), crop=crop, crop_fraction=0.875))
    assert decoded.pixels.shape == (48, 64, 3)
    assert (decoded.width, decoded.height) == (width, height)
    assert RED in colours(decoded.pixels)
    assert colours(decoded.pixels) <= ({RED, BLACK} if crop == "pad" else {RED})


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("shape", [(300, 400), (57, 41), (1, 1), (3, 700)])
def test_scaled_resizes_by_the_same_filter(
    interpolation: str, crop: str, shape: tuple[int, int]
) -> None:
    encoded = encode(picture(3, *shape), "PNG")
    exact, scaled = both_ways(encoded, (48, 40), crop=crop, interpolation=interpolation)
    assert mean_difference(exact, scaled) < (0.001 if interpolation == "nearest" else 0.5)


@pytest.mark.skipif(resize.simd is None, reason="there is no wheel for this platform")
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_scaled_resizes_with_vector_instructions(interpolation: str) -> None:
    encoded = encode(noisy(300, 400), "PNG")
    exact, scaled = both_ways(encoded, (48, 40), interpolation=interpolation)
    assert (exact != scaled).any()  # they round otherwise
    for other in {"bilinear", "bicubic", "lanczos"} - {interpolation}:
        exact_other, _ = both_ways(encoded, (48, 40), interpolation=other)
        assert mean_difference(exact_other, scaled) > 2 * mean_difference(exact, scaled)


def test_scaled_resizes_with_pillow_where_nothing_faster_is_installed(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(encode(noisy(300, 400), "PNG"))
    code = f"""
import sys
sys.modules["cykooz_resizer"] = None
from embedder.backbones.resolve import make_recipe
from embedder.decode.decode import decode_rgb
scaled, exact = (make_recipe(decode=how) for how in ("scaled", "exact"))
encoded = open({str(file)!r}, "rb").read()
assert (decode_rgb(encoded, scaled).pixels == decode_rgb(encoded, exact).pixels).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_scaled_resizes_in_many_threads_at_once() -> None:
    files = [encode(noisy(200 + 10 * number, 300), "PNG") for number in range(16)]
    recipe = make_recipe((48, 40), decode="scaled")
    alone = [decode_rgb(file, recipe).pixels for file in files]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda file: decode_rgb(file, recipe).pixels, files * 8))
    for number, pixels in enumerate(together):
        np.testing.assert_array_equal(pixels, alone[number % len(files)])


@pytest.mark.parametrize(
    ("height", "width", "side"),
    [(29, 31, 224), (348, 348, 336), (3024, 4032, 176), (480, 640, 464)],
)
def test_rounding_never_puts_the_crop_outside_the_image(height: int, width: int, side: int) -> None:
    pixels = decode_rgb(
        encode(Image.new("RGB", (width, height), "red")), make_recipe((side, side))
    ).pixels
    assert (pixels == (255, 0, 0)).all()
