"""Thumbnails are of the whole image, and small."""

import io

import numpy as np
import pytest
from PIL import Image

from embedder.errors import DecodeError
from embedder.report.thumbnails import thumbnail_of
from tests.support import picture


def encoded(seed: int = 0, height: int = 90, width: int = 120) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(seed, height, width)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("height", "width"), [(90, 120), (120, 90), (50, 50), (1, 400)])
def test_a_thumbnail_is_the_whole_picture_and_no_padding(height: int, width: int) -> None:
    with Image.open(io.BytesIO(thumbnail_of(encoded(5, height, width), side=64))) as image:
        assert image.format == "JPEG"
        assert max(image.size) == 64
        assert image.width / image.height == pytest.approx(
            min(width / height, 64), rel=0.03
        )  # one row at least
        expected = Image.fromarray(picture(5, height, width)).resize(image.size)
        difference = np.abs(np.asarray(image, float) - np.asarray(expected, float))
        assert difference.mean() < 12


def test_a_thumbnail_of_no_picture_is_a_decode_error() -> None:
    with pytest.raises(DecodeError):
        thumbnail_of(b"no picture", side=64)
