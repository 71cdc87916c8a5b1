"""Parts: the same share of the images on every machine, and each image in one of them."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from embedder.errors import RequestError
from embedder.store.parts import Part, last_division, part_numbers, share_of

IDS = [f"cats/{number:04d}.jpg" for number in range(3000)] + ["größe/日本.png", ""]


def numbers(ids: list[str], num_parts: int) -> list[int]:
    return part_numbers(pa.chunked_array([pa.array(ids, pa.string())]), num_parts).tolist()


def test_the_part_of_an_image_never_changes() -> None:
    # The hash of no bytes is that of xxHash's own tests; the others are as they were first.
    assert numbers([""], 1000) == [1 + 0x2D06800538D394C2 % 1000]
    assert numbers(["cats/0000.jpg", "größe/日本.png"], 1000) == [123, 903]


def test_the_part_of_an_image_depends_on_nothing_else() -> None:
    alone = [numbers([image_id], 7)[0] for image_id in IDS[-100:]]
    assert numbers(IDS, 7)[-100:] == alone
    chunks = pa.chunked_array([pa.array(IDS[:5]), pa.array(IDS[5:]).slice(10)])
    assert part_numbers(chunks, 7).tolist() == numbers(IDS[:5] + IDS[15:], 7)
    code = f"from tests.store.test_parts import *; print(numbers(IDS, 7) == {numbers(IDS, 7)})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "1"}
    )
    assert done.stdout == "True\n", done.stderr


def test_every_image_is_in_one_part_and_the_parts_are_of_about_one_size() -> None:
    table = pa.table({"image_id": IDS, "row": range(len(IDS))})
    shares = [share_of(table, Part(8, number)) for number in range(1, 9)]
    together = pa.concat_tables(shares)
    assert sorted(together["row"].to_pylist()) == list(range(len(IDS)))
    assert all(share["row"].to_pylist() == sorted(share["row"].to_pylist()) for share in shares)
    sizes = np.array([share.num_rows for share in shares])
    assert abs(sizes - len(IDS) / 8).max() < 5 * np.sqrt(len(IDS) / 8)
    assert share_of(table, None) is table
    assert numbers([], 3) == []


@pytest.mark.parametrize("text", ["3/16", "03/16", "1/1", "999999/999999"])
def test_a_part_is_read(text: str) -> None:
    number, count = map(int, text.split("/"))
    assert Part.parse(text) == Part(count, number)
    assert str(Part.parse(text)) == f"{number}/{count}"


@pytest.mark.parametrize(
    "text", ["", "3", "0/4", "5/4", "-1/4", "1/0", "1/2/3", "a/b", "1 / 4", "1/1000000", "²/4"]
)
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"must be I/N, with I from 1 to N.*Received: part="):
        Part.parse(text)


def test_the_last_division_is_what_the_newest_run_with_a_part_says() -> None:
    def run(part: object, status: str = "done") -> dict[str, object]:
        return {"status": status, "options": {"part": part}}

    assert last_division([run(None), {"status": "done"}, run(3), run("9/4")]) == {}
    runs = [run("1/3"), run("1/2", "killed"), run("1/2"), run(None), run("2/3", "too many")]
    assert last_division(runs) == {Part(3, 1): "done", Part(3, 2): "too many", Part(3, 3): None}
