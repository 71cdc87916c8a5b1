"""How long the steps of a training take."""

import time


class Stopwatch:
    """Times the steps of a training.

    Attributes:
        seconds: Of each step, by its name.
    """

    def __init__(self) -> None:
        """Start."""
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a step, and begin the next."""
        now = time.perf_counter()
        self.seconds[name], self._last = round(now - self._last, 3), now
