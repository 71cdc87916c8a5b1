"""How many bytes of files may be in memory at once, however many threads read them."""

import threading
from dataclasses import dataclass, field


class ByteBudget:
    """So many bytes for all files that are being read, or that are read and still in memory.

    A file that needs more than there are is let in once nothing else is in memory. The first that
    waits is the next: smaller ones do not overtake it, or it might wait for ever.
    """

    def __init__(self, num_bytes: int) -> None:
        """Hold nothing yet.

        Args:
            num_bytes: Of all files together.
        """
        self.num_bytes = num_bytes
        self.claims: dict[Claim, None] = {}  # which hold bytes
        self.waiting: list[Claim] = []  # first comes, first served
        self.changed = threading.Condition()

    @property
    def num_held(self) -> int:
        """Bytes that are claimed now."""
        return sum(claim.num_bytes for claim in self.claims)

    def claim(self) -> "Claim":
        """The claim of one file; it holds nothing yet."""
        return Claim(self)


@dataclass(eq=False)
class Claim:
    """The bytes of one file.

    Attributes:
        budget: Of which they are.
        num_bytes: How many it holds.
        is_released: Whether they are given back. What it needs after that is not counted.
    """

    budget: ByteBudget = field(repr=False)
    num_bytes: int = 0
    is_released: bool = False

    def need(self, num_bytes: int) -> None:
        """Wait until the file may have so many bytes in memory, in all.

        Nothing is given back where it needs fewer than it holds. A file that turns out larger goes
        before those that have nothing; where all that hold bytes wait for more, the first of them
        gets it, beyond the budget, as none would ever end otherwise.
        """
        budget = self.budget
        with budget.changed:
            if self.is_released or num_bytes <= self.num_bytes:
                return
            num_first = sum(bool(claim.num_bytes) for claim in budget.waiting)
            budget.waiting.insert(num_first if self.num_bytes else len(budget.waiting), self)
            budget.changed.notify_all()
            try:
                budget.changed.wait_for(lambda: self.is_released or self._may_have(num_bytes))
            finally:
                budget.waiting.remove(self)
                budget.changed.notify_all()
            if not self.is_released:
                self.num_bytes = num_bytes
                budget.claims[self] = None

    def _may_have(self, num_bytes: int) -> bool:
        budget = self.budget
        if budget.waiting[0] is not self:
            return False
        others = budget.claims.keys() - {self}
        is_free = budget.num_held + num_bytes - self.num_bytes <= budget.num_bytes
        return is_free or others <= set(budget.waiting)

    def release(self) -> None:
        """Give all of them back, for good: the file is not in memory any more."""
        with self.budget.changed:
            self.is_released, self.num_bytes = True, 0
            self.budget.claims.pop(self, None)
            self.budget.changed.notify_all()
