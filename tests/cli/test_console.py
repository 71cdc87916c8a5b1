"""What the command line prints: names as they are, and failures by kind."""

import os
import shutil
import subprocess
from collections import Counter

import pytest

from embedder.cli import console
from embedder.errors import EmbedderError
from embedder.extraction.record import grouped_reasons

NAME = "holiday:x:[red]:smile:.jpg"


def test_no_part_of_a_name_is_read_as_an_emoji_or_as_markup(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console.print_facts({NAME: f"embedder inspect {NAME}"})
    console.print_table((NAME,), [[NAME]])
    console.print_reasons(Counter({("read", NAME): 1}))
    with pytest.raises(Exception), console.exit_status():  # noqa: B017 - Typer's own
        raise EmbedderError(NAME)
    output = capsys.readouterr()
    assert output.out.count(NAME) == 5
    assert output.err == f"Error: {NAME}\n"


def test_reasons_that_differ_in_particulars_of_the_file_are_one() -> None:
    truncated = "image file is truncated ({} bytes not processed)"
    magic = "not a readable image; begins with {!r}"
    reasons = Counter(
        {
            ("decode", truncated.format("1,024")): 2,
            ("decode", truncated.format(7)): 1,
            ("read", truncated.format(7)): 1,
            ("decode", magic.format(b"it's")): 3,
            ("decode", magic.format(b'"\x00')): 4,
            ("decode", "checksum is 0badcafe01, not 12345678ff"): 1,
            ("decode", "checksum is 1234567890, not 12345678ff"): 1,
            ("decode", "more than 178,956,970 pixels: 300000x20000"): 5,
            ("decode", "more than 178,956,970 pixels: 200000x20000"): 5,
            ("decode", "value N"): 1,
            ("decode", "value 5"): 1,
        }
    )
    assert grouped_reasons(reasons) == {
        ("decode", "image file is truncated (N bytes not processed)"): 3,
        ("read", "image file is truncated (7 bytes not processed)"): 1,
        ("decode", "not a readable image; begins with b'...'"): 7,
        ("decode", "checksum is N, not 12345678ff"): 2,
        ("decode", "more than 178,956,970 pixels: Nx20000"): 10,
        ("decode", "value N"): 1,
        ("decode", "value 5"): 1,
    }


def test_the_table_of_reasons_has_a_line_for_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_reasons(Counter({("read", f"{n:,} bytes are missing"): 1 for n in range(2000)}))
    output = capsys.readouterr().out
    assert "2,000     read   N bytes are missing" in output
    assert "more reasons" not in output


@pytest.mark.parametrize("name", [b"plain", b"two words", b"a'b\xffc\\d", b"\xe9t\xe9 \xff1"])
def test_a_word_of_a_command_is_read_by_bash_as_it_was(name: bytes) -> None:
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    command = f"printf %s {console.shell_word(os.fsdecode(name))}"
    assert subprocess.run(["bash", "-c", command], capture_output=True).stdout == name
    command.encode()  # it can be printed as it is
