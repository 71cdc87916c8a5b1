"""How long one image is asked for."""

import time
from dataclasses import replace

import pytest

from embedder.errors import ReadError
from embedder.sources import attempts
from embedder.sources.attempts import AttemptError, Limits, Patience, read_patiently

WHOLE = Patience()  # what is so outside of tests


def limits_of(monkeypatch: pytest.MonkeyPatch, patience: Patience) -> list[Limits]:
    """Of each attempt, where all fail at once and nothing is waited for."""
    found: list[Limits] = []

    def fail(limits: Limits) -> bytes:
        found.append(limits)
        raise AttemptError("trouble", 0)

    monkeypatch.setattr(attempts, "PATIENCE", patience)
    with pytest.raises(ReadError, match="trouble"):
        read_patiently(fail)
    return found


def test_each_attempt_waits_longer_for_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    found = limits_of(monkeypatch, WHOLE)
    assert [limits.idle_seconds for limits in found] == [4, 8, 16, 30, 30, 30]
    assert len({limits.deadline for limits in found}) == 1


def test_an_attempt_has_what_is_left_in_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []

    def fail(limits: Limits) -> bytes:
        left.append(limits.attempt_seconds)
        time.sleep(0.15)
        raise AttemptError("trouble", 0)

    monkeypatch.setattr(attempts, "PATIENCE", replace(WHOLE, total_seconds=1.2))
    with pytest.raises(ReadError, match="trouble"):
        read_patiently(fail)
    assert left[0] == pytest.approx(1.2)
    assert left[1] <= 1.05
    assert all(seconds * 10 == pytest.approx(round(seconds * 10)) for seconds in left)


def test_a_server_that_starts_anew_is_waited_for() -> None:
    longest = [WHOLE.first_wait_seconds * 2**i for i in range(WHOLE.num_attempts - 1)]
    assert sum(longest) / 2 > 15  # seconds, on average
    assert sum(longest) + WHOLE.num_attempts * WHOLE.connect_seconds < WHOLE.total_seconds


def test_a_server_may_ask_for_a_wait_of_any_length_that_there_is_time_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(attempts, "PATIENCE", replace(WHOLE, num_attempts=2))

    def fail(_: Limits) -> bytes:
        raise AttemptError("trouble", 100)

    with pytest.raises(ReadError, match="trouble, 2 attempts"):
        read_patiently(fail)
    assert waits == [100]


def test_no_attempt_begins_when_hardly_any_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Limits) -> bytes:
        raise AttemptError("trouble", 115)

    monkeypatch.setattr(attempts, "PATIENCE", WHOLE)
    with pytest.raises(ReadError, match="trouble, 1 attempt$"):
        read_patiently(fail)
