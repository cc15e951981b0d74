"""When a finding holds: a mean or a share with its 95 % interval, held against a bound.

A comparison that the figures do not decide is undecided: neither a success nor a failure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# The 0.975 quantiles of Student's t for 1 … 30 degrees of freedom; beyond, 2 covers them all.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """An estimate from `n` observations with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f}, n = {self.n})"

    def at_least(self, bound: float) -> bool | None:
        """Return True if the whole interval reaches the bound, False if none of it does."""
        if self.low >= bound:
            return True
        return False if self.high < bound else None


def mean_of(values: Sequence[float]) -> Interval:
    """Return the mean with Student's interval; one observation has none and decides nothing."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return Interval(mean, -math.inf, math.inf, n)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = (_T[n - 2] if n - 2 < len(_T) else 2.0) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def share_of(successes: int, n: int) -> Interval:
    """Return a share with Wilson's interval."""
    z, p = 1.96, successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(p, middle - half, middle + half, n)


@dataclass(frozen=True)
class Comparison:
    """One comparison of a finding; `held` is None where the figures do not decide it."""

    held: bool | None
    evidence: str


def all_of(*conditions: bool | None) -> bool | None:
    """Return False if one is refuted, True if all hold, None if something is open."""
    if False in conditions:
        return False
    return None if None in conditions else True


def judged(comparisons: Sequence[Comparison]) -> tuple[str, str]:
    """Return the verdict over all comparisons, and their evidence.

    It is holds, does not hold, mixed (decided both ways), undecided or not measured.
    """
    if not comparisons:
        return "not measured", "–"
    held = [comparison.held for comparison in comparisons]
    if True in held and False in held:
        word = "mixed"
    elif None in held:
        word = "undecided"
    else:
        word = "holds" if held[0] else "does not hold"
    return word, "; ".join(comparison.evidence for comparison in comparisons)
