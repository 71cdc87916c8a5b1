"""What a check found: a line with a verdict."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        passed: Whether it is as it should be.
        detail: The numbers.
    """

    name: str
    passed: bool
    detail: str
