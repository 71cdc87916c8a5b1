"""Decoding: any file to RGB at the recipe's size, or a reason why not."""

import csv
import io
import math
import re
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from embedder.decode import decode
from embedder.decode.decode import FORMATS, MAX_PIXELS, decode_rgb, prepare_decoders
from embedder.decode.pixel_budget import PixelBudget
from embedder.errors import DecodeError
from embedder.recipe import Recipe
from embedder.sources.refs import IMAGE_EXTENSIONS
from tests.decode.test_pixel_budget import is_let_in
from tests.support import picture

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
CROPS = ("center", "squash", "pad")


def make_recipe(image_size: tuple[int, int] = (48, 64), **options: Any) -> Recipe:
    return Recipe(backbone="none", weights="0" * 64, image_size=image_size, **options)


def encode(image: Image.Image | NDArray[Any], image_format: str = "PNG", **options: Any) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def colours(pixels: NDArray[np.uint8]) -> set[tuple[int, ...]]:
    return {tuple(map(int, colour)) for colour in np.unique(pixels.reshape(-1, 3), axis=0)}


def bands(height: int = 100, width: int = 300) -> NDArray[np.uint8]:
    """A red, a green and a blue third, from left to right."""
    return np.repeat(np.array([[RED, GREEN, BLUE]], np.uint8), width // 3, axis=1).repeat(height, 0)


def mean_difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(np.abs(one.astype(float) - other).mean())


def largest_difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> int:
    return int(np.abs(one.astype(int) - other).max())


# The shared odd files --------------------------------------------------------------------------


def test_extensions_that_are_listed_are_those_of_the_formats_that_are_read() -> None:
    Image.init()
    readable = {extension for extension, name in Image.EXTENSION.items() if name in FORMATS}
    # Several images in one JPEG: Pillow opens it as a JPEG, and has no separate reader.
    assert readable | {".mpo"} == IMAGE_EXTENSIONS
    assert ".mpo" not in readable


@pytest.mark.parametrize("how", ["exact", "scaled"])
def test_every_odd_file_comes_out_as_expected(odd: Path, how: str) -> None:
    prepare_decoders()
    recipe = make_recipe(decode=how)
    with (odd / "expected.csv").open(newline="", encoding="utf-8") as lines:
        expected = {row["file"]: row["expect"] for row in csv.DictReader(lines)}
    assert len(expected) == 180
    outcomes, reasons = {}, {}
    for file in expected:
        try:
            decoded = decode_rgb((odd / file).read_bytes(), recipe)
        except DecodeError as error:
            outcomes[file], reasons[file] = "fail", str(error)
        else:
            outcomes[file] = "ok"
            assert decoded.pixels.shape == (48, 64, 3)
            assert decoded.pixels.dtype == np.uint8
            assert min(decoded.width, decoded.height) > 0
    assert {file: outcomes[file] for file in expected if outcomes[file] != expected[file]} == {}
    # Equal files must fail with equal words, also where Pillow names the buffer in memory.
    assert {
        f: reason for f, reason in reasons.items() if re.search("object at|0x[0-9a-f]{8}", reason)
    } == {}


def test_silenced_decoders_write_nothing_to_standard_error(odd: Path) -> None:
    warns, errs = "crash-2020-10-test.tif", "m3-63c8b14ea08a18c884d05a3431716047.tif"
    code = """
import pathlib, sys
from embedder.decode.decode import decode_rgb, prepare_decoders
from embedder.errors import DecodeError
from embedder.recipe import Recipe

volume, *files = sys.argv[1:]
if volume == "silent":
    prepare_decoders()
recipe = Recipe(backbone="none", weights="0" * 64, image_size=(48, 64))
for file in files:
    try:
        decode_rgb(pathlib.Path(file).read_bytes(), recipe)
    except DecodeError as error:
        print(error)
"""
    loud, silent = (
        subprocess.run(
            [sys.executable, "-c", code, volume, warns, errs],
            cwd=odd / "exceptions",
            capture_output=True,
            text=True,
            check=True,
        )
        for volume in ("loud", "silent")
    )
    for error in ("TIFFFetchNormalTag: ", "Cannot handle zero number of tiles"):
        assert error in loud.stderr  # both are errors of libtiff
    assert "UserWarning: " in loud.stderr  # a warning of Pillow
    assert silent.stderr == ""
    assert silent.stdout == loud.stdout == "OSError: decoder error -2\n" * 2


def test_memory_of_decoded_pictures_is_kept_for_the_next() -> None:
    prepare_decoders()
    encoded = encode(noisy(400, 500), "JPEG")
    decode_rgb(encoded, make_recipe())
    Image.core.reset_stats()
    decode_rgb(encoded, make_recipe())
    assert Image.core.get_stats()["reused_blocks"] > 0
    assert Image.core.get_stats()["allocated_blocks"] == 0
    assert Image.core.get_blocks_max() * Image.core.get_block_size() == 64 * 2**20


# Rotation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["exact", "scaled"])
@pytest.mark.parametrize(
    ("family", "width", "height"), [("Landscape", 1800, 1200), ("Portrait", 1200, 1800)]
)
def test_the_eight_orientations_of_a_picture_decode_alike(
    odd: Path, family: str, width: int, height: int, how: str
) -> None:
    recipe = make_recipe((height // 20, width // 20), crop="squash", decode=how)
    files = [odd / "orientation" / f"{family}_{number}.jpg" for number in range(1, 9)]
    decoded = [decode_rgb(file.read_bytes(), recipe) for file in files]
    assert {(image.width, image.height) for image in decoded} == {(width, height)}
    # Each has its own digit in the middle.
    beside = np.ones(recipe.image_size, bool)
    rows, columns = (slice(side // 3, 2 * side // 3) for side in recipe.image_size)
    beside[rows, columns] = False
    upright = decoded[0].pixels[beside]
    for image in decoded[1:]:
        assert mean_difference(image.pixels[beside], upright) < 1  # of 255: JPEG noise
    mirrored = decoded[0].pixels[:, ::-1][beside]
    assert mean_difference(mirrored, upright) > 30  # the least that a wrong turn would show


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_rotation_is_applied_in_every_format_that_records_it(image_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by a quarter to see it upright
    encoded = encode(bands(), image_format, exif=exif)
    decoded = decode_rgb(encoded, make_recipe((90, 32), crop="squash", interpolation="nearest"))
    assert (decoded.width, decoded.height) == (100, 300)
    for row, colour in ((10, RED), (45, GREEN), (80, BLUE)):
        assert np.abs(decoded.pixels[row].astype(int) - colour).max() < 10  # of 255: JPEG noise


# Formats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "TIFF", "WEBP"])
def test_the_first_frame_or_page_is_used(image_format: str) -> None:
    first, *others = (Image.new("RGB", (64, 48), colour) for colour in (RED, GREEN, BLUE))
    lossless = {"lossless": True} if image_format == "WEBP" else {}
    encoded = encode(first, image_format, save_all=True, append_images=others, **lossless)
    with Image.open(io.BytesIO(encoded)) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert colours(decode_rgb(encoded, make_recipe()).pixels) == {RED}


def test_several_pictures_in_one_jpeg_give_the_first() -> None:
    first, second = (Image.new("RGB", (64, 48), colour) for colour in ("red", "blue"))
    decoded = decode_rgb(encode(first, "MPO", save_all=True, append_images=[second]), make_recipe())
    assert decoded.format == "MPO"
    assert mean_difference(decoded.pixels, np.full((48, 64, 3), RED, np.uint8)) < 2


@pytest.mark.parametrize("image_format", ["BMP", "GIF", "JPEG", "PNG", "WEBP"])
def test_the_format_is_that_of_the_bytes_and_the_size_is_the_original(image_format: str) -> None:
    decoded = decode_rgb(encode(bands(90, 120), image_format), make_recipe((64, 48)))
    assert decoded.format == image_format
    assert (decoded.width, decoded.height) == (120, 90)
    assert decoded.pixels.shape == (64, 48, 3)
    assert decoded.pixels.dtype == np.uint8


# Scaled decoding -------------------------------------------------------------------------------


def noisy(height: int, width: int, deviation: float = 20) -> NDArray[np.uint8]:
    """Smooth colours and noise: what is decoded at another scale is not quite the same."""
    noise = np.random.default_rng(0).normal(0, deviation, (height, width, 3))
    return (picture(3, height, width) + noise).clip(0, 255).astype(np.uint8)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def is_whole(exact: NDArray[np.uint8], scaled: NDArray[np.uint8]) -> bool:
    """Whether all pixels were decoded both times: the other resizing alone differs by 1."""
    return largest_difference(exact, scaled) <= 1


def both_ways(encoded: bytes, size: tuple[int, int], **options: Any) -> list[NDArray[np.uint8]]:
    """`exact`, then `scaled`."""
    recipes = (make_recipe(size, decode=how, **options) for how in ("exact", "scaled"))
    return [decode_rgb(encoded, recipe).pixels for recipe in recipes]


def squash_at(encoded: bytes, divisor: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """What `squash` makes of a JPEG of which one pixel in `divisor` is decoded."""
    with Image.open(io.BytesIO(encoded)) as image:
        box = (0, 0, image.width / divisor, image.height / divisor)
        image.draft(None, (image.width // divisor, image.height // divisor))
        assert image.width == math.ceil(box[2])
        return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box))


@pytest.mark.parametrize("tight", ["height", "width"])
@pytest.mark.parametrize(
    ("side", "divisor"),
    [(159, 1), (160, 2), (161, 2), (319, 2), (320, 4), (639, 4), (640, 8), (1600, 8)],
)
def test_scaled_leaves_twice_the_target_or_more_and_no_more_than_needed(
    side: int, divisor: int, tight: str
) -> None:
    image, target = noisy(side, 1400), (40, 32)  # 43 times as wide: the height decides
    if tight == "width":
        image, target = image.transpose(1, 0, 2), (32, 40)
    encoded = encode(image, "JPEG")
    exact, scaled = both_ways(encoded, target, crop="squash")
    np.testing.assert_array_equal(exact, squash_at(encoded, 1, target))
    assert largest_difference(scaled, squash_at(encoded, divisor, target)) <= 1  # of 255
    candidates = {d: squash_at(encoded, d, target) for d in (1, 2, 4, 8)}
    assert divisor == min(candidates, key=lambda d: mean_difference(scaled, candidates[d]))


@pytest.mark.parametrize(
    ("crop", "crop_fraction", "side"),
    # Only `center` crops.
    [("center", 1.0, 160), ("center", 0.8, 200), ("squash", 0.8, 160), ("pad", 0.8, 160)],
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_scaled_decodes_all_pixels_below_four_times_the_target(
    crop: str, crop_fraction: float, side: int, orientation: int
) -> None:
    for height in (side - 1, side):
        image = noisy(height, 1400)
        if orientation == 6:  # lies on its side in the file
            image = image.transpose(1, 0, 2)
        encoded = encode(image, "JPEG", exif=turned(orientation))
        exact, scaled = both_ways(encoded, (40, 32), crop=crop, crop_fraction=crop_fraction)
        assert is_whole(exact, scaled) == (height < side)


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("height", [200, 401, 803])  # decoded at 1/2, 1/4, 1/8
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_scaled_is_close_to_exact(crop: str, height: int, options: dict[str, Any]) -> None:
    encoded = encode(noisy(height, height + 101), "JPEG", quality=90, **options)
    exact, scaled = both_ways(encoded, (48, 40), crop=crop)
    assert not is_whole(exact, scaled)
    assert mean_difference(exact, scaled) < 1.5  # of 255
    assert mean_difference(exact, scaled[:, ::-1]) > 10  # what a wrong image would show


@pytest.mark.parametrize("kind", ["L", "CMYK", "MPO"])
def test_scaled_reads_grey_and_print_colours_and_several_pictures_in_one_jpeg(kind: str) -> None:
    first, second = (Image.fromarray(noisy(401, 502, 60)[:, ::step]) for step in (1, -1))
    if kind == "MPO":
        encoded = encode(first, kind, save_all=True, append_images=[second])
        assert decode_rgb(encoded, make_recipe(decode="scaled")).format == "MPO"
    else:
        encoded = encode(first.convert(kind), "JPEG")
    exact, scaled = both_ways(encoded, (48, 64))
    assert not is_whole(exact, scaled)
    assert mean_difference(exact, scaled) < 1.5  # of 255
    assert mean_difference(exact, scaled[:, ::-1]) > 10


@pytest.mark.parametrize(
    ("orientation", "size"), [(1, (502, 401)), (3, (502, 401)), (6, (401, 502))]
)
def test_scaled_reports_the_size_of_the_original(orientation: int, size: tuple[int, int]) -> None:
    encoded = encode(noisy(401, 502), "JPEG", exif=turned(orientation))
    assert not is_whole(*both_ways(encoded, (48, 40)))
    decoded = decode_rgb(encoded, make_recipe((48, 40), decode="scaled"))
    assert (decoded.width, decoded.height) == size


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_shows_the_same_part_in_every_orientation(crop: str, orientation: int) -> None:
    # One pixel more than a multiple of 8: seven eighths of the last decoded pixel are surplus.
    image = np.zeros((673, 849, 3), np.uint8)
    image[200:232, 300:340] = WHITE
    encoded = encode(image, "JPEG", exif=turned(orientation))
    options = {"crop_fraction": 0.9} if crop == "center" else {}
    exact, scaled = both_ways(encoded, (36, 34), crop=crop, **options)
    assert not is_whole(exact, scaled)
    for axis in (0, 1):
        where = [
            np.average(np.arange(len(pixels)), weights=pixels.sum(axis=2).sum(axis=1))
            for pixels in (np.moveaxis(pixels, axis, 0).astype(float) for pixels in (exact, scaled))
        ]
        assert where[0] == pytest.approx(where[1], abs=0.05)  # of a pixel of the network's input


@pytest.mark.parametrize("image_format", ["BMP", "GIF", "PNG", "TIFF", "WEBP"])
def test_scaled_decodes_all_pixels_of_other_formats(image_format: str) -> None:
    assert is_whole(*both_ways(encode(noisy(400, 500), image_format), (40, 50)))


def test_scaled_refuses_a_truncated_jpeg_like_exact() -> None:
    encoded = encode(noisy(400, 500), "JPEG")
    for kept in (len(encoded) // 2, len(encoded) - 2):  # the last two bytes say that it ends
        with pytest.raises(DecodeError, match=r"^OSError: image file is truncated"):
            decode_rgb(encoded[:kept], make_recipe((40, 50), decode="scaled"))


def test_scaled_refuses_a_bomb_by_what_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 400 * 500 - 1)
    with pytest.raises(DecodeError, match=r"^declares more than 199,999 pixels: 500 x 400$"):
        decode_rgb(encode(noisy(400, 500), "JPEG"), make_recipe((40, 50), decode="scaled"))


# Refusals --------------------------------------------------------------------------------------


def png_that_declares(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0")
    chunks = [header, data, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


def test_a_bomb_is_refused_by_what_it_declares() -> None:
    with pytest.raises(DecodeError, match=r"^declares more than 178,956,970 pixels"):
        decode_rgb(png_that_declares(2**31 - 1, 2**31 - 1), make_recipe())
    with pytest.raises(DecodeError, match=r"^declares more than 178,956,970 pixels"):
        decode_rgb(png_that_declares(MAX_PIXELS + 1, 1), make_recipe())


def test_the_limit_itself_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 5000)
    assert decode_rgb(encode(bands(50, 99)[:, :99]), make_recipe()).width == 99
    assert decode_rgb(encode(picture(1, 50, 100)), make_recipe()).width == 100
    rule = r"^declares more than 5,000 pixels: 100 x 51$"
    with pytest.raises(DecodeError, match=rule):
        decode_rgb(encode(picture(1, 51, 100)), make_recipe())


def test_a_bomb_is_refused_before_its_pixels_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = png_that_declares(100, 51)  # and has the pixels of none
    with pytest.raises(DecodeError, match=r"^OSError: image file is truncated"):
        decode_rgb(encoded, make_recipe())
    monkeypatch.setattr(decode, "MAX_PIXELS", 5000)
    with pytest.raises(DecodeError, match=r"^declares more than 5,000 pixels: 100 x 51$"):
        decode_rgb(encoded, make_recipe())


def test_a_size_that_changes_while_loading_is_checked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def field(record: int, number: int, content: bytes) -> bytes:
        return struct.pack(">BBBH", 0x1C, record, number, len(content)) + content

    # An IPTC stream that says 30 x 20 and holds 200 x 100.
    encoded = (
        field(3, 20, struct.pack(">H", 30))
        + field(3, 30, struct.pack(">H", 20))
        + field(3, 60, b"\1\0")
        + field(3, 120, b"\5")
        + field(8, 10, encode(np.full((100, 200), 77, np.uint8)))
    )
    assert decode_rgb(encoded, make_recipe()).width == 200
    monkeypatch.setattr(decode, "MAX_PIXELS", 5000)
    with pytest.raises(DecodeError, match=r"^declares more than 5,000 pixels: 200 x 100$"):
        decode_rgb(encoded, make_recipe())


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP"])
def test_a_truncated_file_is_refused(image_format: str) -> None:
    prepare_decoders()
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    encoded = encode(noise, image_format)
    assert decode_rgb(encoded, make_recipe()).width == 120
    with pytest.raises(DecodeError):
        decode_rgb(encoded[: len(encoded) // 2], make_recipe())


def test_a_truncated_jpeg_is_refused_with_the_reason() -> None:
    encoded = encode(picture(1), "JPEG")
    with pytest.raises(DecodeError, match=r"^OSError: image file is truncated"):
        decode_rgb(encoded[:-200], make_recipe())


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(DecodeError, match=r"^the file is empty$"):
        decode_rgb(b"", make_recipe())


def test_what_is_no_image_is_refused_with_how_it_begins() -> None:
    with pytest.raises(DecodeError, match=r"^not a readable image; begins with b'<!DOCTYP'$"):
        decode_rgb(b"<!DOCTYPE html><title>404</title>", make_recipe())


def test_postscript_is_refused_since_reading_it_would_run_it() -> None:
    encoded = encode(picture(1), "EPS")
    with pytest.raises(DecodeError, match=r"^not a readable image; begins with b'%!PS-Ado'$"):
        decode_rgb(encoded, make_recipe())


# Memory and time -------------------------------------------------------------------------------

# Prints the peak after a small image, and after a large one in so many threads at once.
PEAK = r"""
import pathlib, re, sys
from concurrent.futures import ThreadPoolExecutor
from embedder.decode import decode, resize, tone
from embedder.decode.pixel_budget import PixelBudget
from embedder.recipe import Recipe

recipe = Recipe(backbone="none", weights="0" * 64, image_size=(48, 64))
decode._budget = PixelBudget(1, num_ordinary=0)  # one at a time
for file in sys.argv[2:]:
    encoded = pathlib.Path(file).read_bytes()
    with ThreadPoolExecutor(int(sys.argv[1])) as threads:
        list(threads.map(decode.decode_rgb, [encoded] * 8, [recipe] * 8))
    print(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
"""


def peak_bytes(folder: Path, num_threads: int, mode: str, **options: Any) -> float:
    """Memory for each of 6 million pixels, beyond that of a small image."""
    files = [folder / "small", folder / "large"]
    for file, size in zip(files, ((80, 60), (3000, 2000)), strict=True):
        image = Image.new(mode, size)
        image.putpixel((0, 0), 1 if mode in ("I;16", "F") else (1, 2, 3, 4)[: len(mode)])
        lzw = {"compression": "tiff_lzw"} if mode in ("F", "CMYK") else {}
        file.write_bytes(encode(image, "TIFF" if lzw else "PNG", **options, **lzw))
    command = [sys.executable, "-c", PEAK, str(num_threads), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, peak = (int(line) * 1024 for line in done.stdout.split())
    return (peak - before) / (3000 * 2000)


needs_linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's count of memory"
)


@needs_linux
@pytest.mark.parametrize(
    ("mode", "options"),
    [("I;16", {}), ("F", {}), ("RGBA", {}), ("RGB", {"transparency": (1, 2, 3)}), ("CMYK", {})],
)
def test_a_picture_takes_little_more_than_itself_and_its_rgb(
    mode: str, options: dict[str, Any], tmp_path: Path
) -> None:
    assert peak_bytes(tmp_path, 1, mode, **options) < 12  # each of the two takes up to 4


@needs_linux
def test_large_pictures_at_once_take_little_more_memory_than_one(tmp_path: Path) -> None:
    assert peak_bytes(tmp_path, 8, "CMYK") < 11  # bytes a pixel; alone 8


def test_pictures_are_decoded_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = PixelBudget(90 * 120, num_ordinary=0)
    monkeypatch.setattr(decode, "_budget", budget)
    encoded = encode(picture(1, 90, 120))
    alone = decode_rgb(encoded, make_recipe()).pixels
    with ThreadPoolExecutor(4) as threads:
        with budget.taken(1):
            waiting = [threads.submit(decode_rgb, encoded, make_recipe()) for _ in range(4)]
            assert not any(is_let_in(budget, future) for future in waiting)
        for future in waiting:
            np.testing.assert_array_equal(future.result(timeout=60).pixels, alone)
    assert budget.num_free == 90 * 120


def test_pictures_that_fail_give_back_their_part_of_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget = PixelBudget(90 * 120, num_ordinary=0)
    monkeypatch.setattr(decode, "_budget", budget)
    encoded = encode(noisy(90, 120), "JPEG")
    for _ in range(3):
        with pytest.raises(DecodeError, match=r"^OSError: image file is truncated"):
            decode_rgb(encoded[:-200], make_recipe())
    assert budget.num_free == 90 * 120
    assert decode_rgb(encoded, make_recipe()).width == 120


@pytest.mark.parametrize(("options", "divisor"), [({}, 4), ({"progressive": True}, 1)])
def test_a_jpeg_takes_of_the_budget_what_is_decoded_of_it(
    options: dict[str, Any], divisor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = encode(noisy(800, 960), "JPEG", **options)
    budget = PixelBudget(800 * 960, num_ordinary=0)
    monkeypatch.setattr(decode, "_budget", budget)
    recipe = make_recipe((96, 100), decode="scaled")  # a quarter of each side, and twice the target
    with ThreadPoolExecutor(1) as threads:
        with budget.taken(800 * 960 * (divisor**2 - 1) // divisor**2):  # what it needs is left
            threads.submit(decode_rgb, encoded, recipe).result(timeout=60)
        with budget.taken(800 * 960 * (divisor**2 - 1) // divisor**2 + 1):
            waiting = threads.submit(decode_rgb, encoded, recipe)
            assert not is_let_in(budget, waiting)
        waiting.result(timeout=60)


def with_scans(encoded: bytes, num_scans: int) -> bytes:
    """A grey progressive JPEG whose last scan is repeated, until there are so many."""
    header, *scans = re.split(rb"(?=\xff\xc4)", encoded[:-2])  # each begins with its tables
    num_missing = num_scans - encoded.count(b"\xff\xda")
    return header + b"".join(scans) + scans[-1] * num_missing + encoded[-2:]


@pytest.mark.parametrize("how", ["exact", "scaled"])
def test_a_jpeg_of_more_scans_than_a_photo_has_is_refused(how: str) -> None:
    grey = encode(Image.new("L", (300, 200), 77), "JPEG", progressive=True)
    recipe = make_recipe(decode=how)
    np.testing.assert_array_equal(
        decode_rgb(with_scans(grey, 500), recipe).pixels, decode_rgb(grey, recipe).pixels
    )
    rule = r"^has 501 scans; a JPEG of 300 x 200 pixels may have up to 500$"
    with pytest.raises(DecodeError, match=rule):
        decode_rgb(with_scans(grey, 501), recipe)


@pytest.mark.parametrize("how", ["exact", "scaled"])
def test_the_larger_a_jpeg_the_fewer_scans_it_may_have(how: str) -> None:
    grey = encode(Image.new("L", (8192, 4096), 77), "JPEG", progressive=True)
    rule = r"^has 129 scans; a JPEG of 8192 x 4096 pixels may have up to 128$"
    with pytest.raises(DecodeError, match=rule):
        decode_rgb(with_scans(grey, 129), make_recipe(decode=how))
    # Twice as many as Pillow writes for a colour photo, for the largest image of all.
    assert decode.MAX_SCANNED_PIXELS // MAX_PIXELS >= 20


def test_scans_of_one_channel_each_are_counted_also_where_nothing_is_progressive() -> None:
    def in_colour(num_scans: int) -> bytes:
        """A grey image as each of three channels, in scans of one channel."""
        grey = encode(Image.new("L", (64, 48), 200), "JPEG")
        frame = grey.index(b"\xff\xc0")
        scan = grey.index(b"\xff\xda")
        channels = b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
        colour = b"\xff\xc0\0\x11" + grey[frame + 4 : frame + 9] + b"\3" + channels
        scans = [
            grey[scan : scan + 5] + bytes([number % 3 + 1]) + grey[scan + 6 : -2]
            for number in range(num_scans)
        ]
        return grey[:frame] + colour + grey[frame + 13 : scan] + b"".join(scans) + b"\xff\xd9"

    pixels = decode_rgb(in_colour(3), make_recipe()).pixels
    expected = Image.new("YCbCr", (64, 48), (200, 200, 200)).convert("RGB")
    assert mean_difference(pixels, np.asarray(expected)) < 1
    with pytest.raises(DecodeError, match=r"^has 501 scans; "):
        decode_rgb(in_colour(501), make_recipe())


def test_what_only_looks_like_a_scan_is_not_counted() -> None:
    scans = b"\xff\xda\0\x02" * 600  # such as those of a preview in a segment, or behind the end
    comment = b"\xff\xfe" + (2 + len(scans)).to_bytes(2, "big") + scans
    for options in ({}, {"progressive": True}):
        plain = encode(noisy(90, 120), "JPEG", **options)
        last = plain.rindex(b"\xff\xda")
        for encoded in (plain[:last] + comment + plain[last:], plain + b"\0\x02" + scans):
            np.testing.assert_array_equal(
                decode_rgb(encoded, make_recipe()).pixels, decode_rgb(plain, make_recipe()).pixels
            )


_LITTLE_MEMORY = """
import io, resource, sys
from PIL import Image
from embedder.decode.decode import decode_rgb
from embedder.errors import DecodeError
from embedder.recipe import Recipe
recipe = Recipe(backbone="any", weights="0" * 64, image_size=(48, 64))
file = io.BytesIO()
Image.new("RGB", (8000, 8000)).save(file, "PNG")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, -1))  # a third of the image
try:
    decode_rgb(file.getvalue(), recipe)
except DecodeError as error:
    print(error, error.is_passing)
"""


def test_a_lack_of_memory_may_pass() -> None:
    done = subprocess.run([sys.executable, "-c", _LITTLE_MEMORY], capture_output=True, text=True)
    assert done.stdout == "not enough memory to decode it True\n", done.stderr
