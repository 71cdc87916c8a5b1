"""Two models on the same images: which is better, and whether it is chance."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from embedder.evaluation.metrics import paired_difference

SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True)
class PairedTest:
    """A model against another, on the same images.

    Attributes:
        gain: Difference in accuracy, `value`, `low` and `high` of the 95 % interval.
        num_better: Images that only the first has right.
        num_worse: Images that only the other has right.
        p_value: Of McNemar's exact test (McNemar 1947): how often two models that are equally good
            would differ so much.
        seconds: That the first took to train.
        is_tuned: Whether the first is the other, fine-tuned; else it is another model.
    """

    gain: dict[str, float]
    num_better: int
    num_worse: int
    p_value: float
    seconds: float
    is_tuned: bool

    @classmethod
    def of(
        cls,
        ours: NDArray[np.bool_],
        theirs: NDArray[np.bool_],
        seconds: float,
        is_tuned: bool = True,
    ) -> Self:
        """Compare which of the same images are right.

        Args:
            ours: (n,), of the first.
            theirs: (n,), of the other, in the same order.
            seconds: As the attribute.
            is_tuned: As the attribute.
        """
        better, worse = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        p_value = binomtest(better, better + worse).pvalue if better + worse else 1.0
        gain = paired_difference(ours, theirs)
        return cls(gain, better, worse, float(p_value), seconds, is_tuned)

    @property
    def verdict(self) -> str:
        """Whether it paid, in words."""
        gain, low, high = (100 * self.gain[name] for name in ("value", "low", "high"))
        figures = f"{abs(gain):.1f} points [{low:.1f}, {high:.1f}] for {self.seconds:,.0f} s"
        what, other = ("fine-tuning", "the head") if self.is_tuned else ("it", "the first")
        if self.p_value >= SIGNIFICANCE_LEVEL or low <= 0 <= high:
            change = f"{gain:+.1f} points [{low:.1f}, {high:.1f}]"
            return f"no gain beyond the interval, {change}: keep {other}"
        if gain > 0:
            return f"{what} gains {figures}: take it"
        return f"{what} loses {figures}: keep {other}"
