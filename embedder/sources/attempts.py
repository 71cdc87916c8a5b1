"""Asking again where a server's trouble passes."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from embedder.errors import ReadError

# What a server says of itself or of now, not of the image.
PASSING_STATUSES = {408, 425, 429, 500, 502, 503, 504}
# What the user may mend by the next run: credentials, a proxy's too, and a lock.
MENDABLE_STATUSES = {401, 403, 407, 423}


@dataclass(frozen=True)
class Patience:
    """How long and how often one image is asked for.

    Attributes:
        num_attempts: Requests at most.
        connect_seconds: For a connection.
        first_idle_seconds: Without a byte, after which the first attempt is given up; then twice as
            long each time. Most requests that hang are answered at once when they are sent again,
            and a server that is slow gets its time in the end.
        longest_idle_seconds: Without a byte, after which any attempt is given up.
        total_seconds: For one image, all attempts and the waiting between them.
        first_wait_seconds: At most, before the second attempt, unless the server asks for another
            wait; then twice as long each time. A server that starts anew is down for some ten
            seconds.
    """

    num_attempts: int = 6
    connect_seconds: float = 5
    first_idle_seconds: float = 4
    longest_idle_seconds: float = 30
    total_seconds: float = 120
    first_wait_seconds: float = 1


PATIENCE = Patience()
# The time that is left for an attempt is told in so many steps, of which it has one at least: a
# store of a bucket has one limit, and connections of its own.
_NUM_STEPS = 12


class Limits(NamedTuple):
    """How long one attempt may take.

    Attributes:
        connect_seconds: For a connection.
        idle_seconds: Without a byte.
        attempt_seconds: For this attempt: what is left, in whole steps.
        total_seconds: For the image, all attempts and the waiting between them.
        deadline: When `total_seconds` are over, as `time.monotonic` has it.
    """

    connect_seconds: float
    idle_seconds: float
    attempt_seconds: float
    total_seconds: float
    deadline: float

    def remaining_seconds(self) -> float:
        """Until the deadline.

        Raises:
            AttemptError: It is over.
        """
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise self.too_late()
        return seconds

    def too_late(self) -> "AttemptError":
        """What to say once the deadline is over."""
        return AttemptError(f"not read within {self.total_seconds:g} seconds")


class AttemptError(Exception):
    """An attempt failed, and the next may not.

    Args:
        reason: Why.
        wait_seconds: How long the server asks to wait, or None.
    """

    def __init__(self, reason: str, wait_seconds: float | None = None) -> None:
        """Keep them."""
        super().__init__(reason)
        self.wait_seconds = wait_seconds


def read_patiently(read_once: Callable[[Limits], bytes]) -> bytes:
    """Read, and read again while what went wrong may pass.

    Args:
        read_once: One attempt.

    Raises:
        ReadError: Every attempt failed, which may pass, or one failed for good.
    """
    patience = PATIENCE
    deadline = time.monotonic() + patience.total_seconds
    least_seconds = patience.total_seconds / _NUM_STEPS
    num_attempts = 0
    while True:
        num_attempts += 1
        try:
            return read_once(_limits(patience, num_attempts, deadline))
        except AttemptError as trouble:
            wait_seconds = _wait_seconds(trouble, num_attempts, patience)
            is_late = time.monotonic() + wait_seconds + least_seconds > deadline
            if is_late or num_attempts == patience.num_attempts:
                plural = "s" if num_attempts > 1 else ""
                reason = f"{trouble}, {num_attempts} attempt{plural}"
                raise ReadError(reason, is_passing=True) from trouble
        time.sleep(wait_seconds)


def _limits(patience: Patience, num_attempts: int, deadline: float) -> Limits:
    idle_seconds = patience.first_idle_seconds * 2 ** (num_attempts - 1)
    step_seconds = patience.total_seconds / _NUM_STEPS
    # The first attempt has the whole, though a moment has passed.
    num_steps = max(int((deadline - time.monotonic()) / step_seconds + 0.01), 1)
    return Limits(
        patience.connect_seconds,
        min(idle_seconds, patience.longest_idle_seconds),
        num_steps * step_seconds,
        patience.total_seconds,
        deadline,
    )


def _wait_seconds(trouble: AttemptError, num_attempts: int, patience: Patience) -> float:
    """Exponential back-off with full jitter, or what the server asks for."""
    if trouble.wait_seconds is not None:
        return trouble.wait_seconds
    longest = patience.first_wait_seconds * 2 ** (num_attempts - 1)
    # Spreads requests; keeps no secret.
    return random.uniform(0, longest)  # noqa: S311
