"""Images of any mode to 8-bit RGB."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from embedder.decode import tone
from embedder.decode.decode import decode_rgb
from tests.decode.test_decode import (
    BLACK,
    BLUE,
    GREEN,
    RED,
    WHITE,
    bands,
    colours,
    encode,
    make_recipe,
    mean_difference,
)


def test_one_picture_in_several_colour_modes_decodes_alike(odd: Path) -> None:
    recipe = make_recipe((50, 80), crop="squash")

    def decode_mode(name: str) -> NDArray[np.uint8]:
        return decode_rgb((odd / "modes" / name).read_bytes(), recipe).pixels

    rgb = decode_mode("RGB.jpg")
    for name in ("CMYK.jpg", "LAB.webp", "P.png"):
        assert mean_difference(decode_mode(name), rgb) < 1  # of 255
    for name in ("L.png", "1.png"):
        grey = decode_mode(name)
        assert (grey == grey[:, :, :1]).all()
        assert mean_difference(grey.mean(axis=2), rgb.mean(axis=2)) < 6  # of 255
    assert mean_difference(rgb[:, :, ::-1], rgb) > 10  # swapped channels would show


@pytest.mark.parametrize(
    ("dtype", "image_format"),
    [("<u2", "PNG"), ("<u2", "TIFF"), (">u2", "TIFF"), ("<i4", "TIFF"), ("<f4", "TIFF")],
)
def test_deep_samples_are_stretched_from_their_own_range(dtype: str, image_format: str) -> None:
    values = np.linspace(291, 694, 48 * 64).reshape(48, 64).round().astype(dtype)
    expected = ((values.astype(float) - 291) * 255 / (694 - 291)).round()
    decoded = decode_rgb(encode(values, image_format), make_recipe())
    np.testing.assert_array_equal(decoded.pixels, np.repeat(expected[:, :, None], 3, axis=2))


def test_a_real_16_bit_file_is_neither_black_nor_white(odd: Path) -> None:
    recipe = make_recipe((64, 48), crop="squash")
    for name in ("16bit.MM.deflate.tif", "16bit.cropped.jp2"):
        pixels = decode_rgb((odd / "formats" / name).read_bytes(), recipe).pixels
        assert pixels.min() < 30
        assert pixels.max() > 200
        assert 30 < pixels.mean() < 100


def test_samples_below_zero_and_without_a_value_are_stretched_too() -> None:
    values = np.full((48, 64), -3.0, np.float32)
    values[:, 32:] = 1.0
    values[0, 0], values[0, 1], values[0, 2] = np.nan, np.inf, -np.inf
    pixels = decode_rgb(encode(values, "TIFF"), make_recipe()).pixels
    assert (pixels[:, 32:] == 255).all()
    assert (pixels[:, :32] == 0).all()


def test_a_deep_picture_of_one_value_is_black() -> None:
    values = np.full((48, 64), 40_000, np.uint16)
    assert colours(decode_rgb(encode(values), make_recipe()).pixels) == {BLACK}


@pytest.mark.parametrize("strip", [40, 200, 2**18])  # a part of a row, some rows, the whole
@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<f4"])
def test_strips_of_a_deep_picture_are_stretched_like_the_whole(
    dtype: str, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tone, "_STRIP_PIXELS", strip)
    generator = np.random.default_rng(0)
    step = 2**23 if dtype == "<i4" else 256  # of the samples, for one of the result
    # Halfway between two results, or off by one, which float32 does not see at 32 bits.
    halves = generator.integers(0, 255, (48, 64)) * step + step // 2
    values = halves + generator.integers(-1, 2, (48, 64))
    values[0, 0], values[-1, -1] = 0, 255 * step
    expected = (values / step).round()
    values -= {"<u2": 0, "<i4": 2**30, "<f4": 1000}[dtype]
    decoded = decode_rgb(encode(values.astype(dtype), "TIFF"), make_recipe())
    np.testing.assert_array_equal(decoded.pixels, np.repeat(expected[:, :, None], 3, axis=2))


def test_transparency_is_blended_on_white() -> None:
    rgba = np.zeros((48, 64, 4), np.uint8)
    rgba[:, :20] = (*RED, 255)
    rgba[:, 20:40] = (*GREEN, 0)
    rgba[:, 40:] = (*BLUE, 128)
    for image_format in ("PNG", "TIFF"):
        pixels = decode_rgb(encode(rgba, image_format), make_recipe()).pixels
        assert colours(pixels[:, :20]) == {RED}
        assert colours(pixels[:, 20:40]) == {WHITE}
        assert colours(pixels[:, 40:]) == {(127, 127, 255)}


def test_transparency_of_grey_and_palette_pictures_is_blended_on_white() -> None:
    grey = np.zeros((48, 64, 2), np.uint8)  # grey, alpha
    grey[:, :32, 1] = 255
    palette = Image.new("P", (64, 48), 1)
    palette.putpalette([*RED, *GREEN, *BLUE])
    palette.paste(2, (32, 0, 64, 48))
    keyed = Image.fromarray(bands(48, 66)[:, 1:65])
    cases = {
        encode(Image.fromarray(grey, "LA")): (BLACK, WHITE),
        encode(palette, transparency=1): (WHITE, BLUE),
        encode(palette, "GIF", transparency=2): (GREEN, WHITE),
        encode(keyed, transparency=RED): (WHITE, BLUE),
    }
    for encoded, (left, right) in cases.items():
        pixels = decode_rgb(encoded, make_recipe(interpolation="nearest")).pixels
        assert colours(pixels[:, :10]) == {left}
        assert colours(pixels[:, -10:]) == {right}


@pytest.mark.parametrize("strip", [40, 200, 2**18])  # a part of a row, some rows, the whole
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "1"])
def test_strips_of_a_transparent_picture_are_blended_like_the_whole(
    mode: str, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tone, "_STRIP_PIXELS", strip)
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 4), dtype=np.uint8)
    image = Image.fromarray(noise).convert("RGB" if mode == "P" else mode).convert(mode)
    keys: dict[str, Any] = {"P": bytes(range(256)), "RGB": (0, 0, 0), "L": 100, "1": 255}
    encoded = encode(image, **({"transparency": keys[mode]} if mode in keys else {}))
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.has_transparency_data
        white = Image.new("RGBA", image.size, "white")
        expected = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    assert len(colours(np.asarray(expected))) > 1
    np.testing.assert_array_equal(decode_rgb(encoded, make_recipe()).pixels, expected)


def test_infinite_samples_in_a_picture_of_one_value() -> None:
    values = np.ones((48, 64), np.float32)
    values[0, 0] = np.inf
    assert decode_rgb(encode(values, "TIFF"), make_recipe()).pixels.max() == 0
