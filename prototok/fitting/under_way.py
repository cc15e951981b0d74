"""How far fits under way are, and how long they may still take."""

from __future__ import annotations

import bisect
import itertools
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from prototok.common.memory import held
from prototok.common.progress import duration
from prototok.fitting.engine.rows import Group
from prototok.fitting.engine.run import FitEvent
from prototok.fitting.engine.setup import Setup


class Ended(Protocol):
    """A row whose fit ended."""

    @property
    def steps(self) -> int: ...


class UnderWay:
    """Watches rows being fitted, and says in one line where they are."""

    def __init__(self, groups: Sequence[Group], setup: Setup) -> None:
        """Take the groups that will be fitted, and what they are fitted with."""
        given = setup.inputs.given
        self.scored = {row.index: len(row.targets) - given for g in groups for row in g.rows}
        self.texts = len({row.text for group in groups for row in group.rows})
        self.most, self.device = setup.recipe.max_steps, setup.lm.device
        self.ended: list[int] = []  # steps of the rows that ended, rising
        self.event: FitEvent | None = None
        self.started = time.monotonic()

    def see(self, event: FitEvent) -> None:
        """Take the last look at the device."""
        self.event = event

    def end(self, rows: Iterable[Ended]) -> None:
        """Take rows that ended."""
        for row in rows:
            bisect.insort(self.ended, row.steps)

    def note(self) -> str:
        """Return step of most, accuracy so far, texts a minute, time left and memory."""
        if self.event is None:
            return ""
        steps, rows = self.event.steps.tolist(), self.event.rows.tolist()
        right = statistics.fmean(
            correct / self.scored[row]
            for row, correct in zip(rows, self.event.correct.tolist(), strict=True)
        )
        spent = time.monotonic() - self.started
        said = [f"step {max(steps)} of {self.most}", f"accuracy {right:.2f}"]
        if self.ended:
            rate = 60 * len(self.ended) / len(self.scored) * self.texts / spent
            said.append(f"{rate:.3g} texts/min")
        return ", ".join([*said, *self._left(steps, spent), f"{held(self.device) / 1e9:.1f} GB"])

    def _left(self, steps: list[int], spent: float) -> list[str]:
        """Return the time left: likely, by the rows that ended, and at most; [] before a step."""
        made = sum(self.ended) + sum(steps)
        if not made:
            return []
        waiting = len(self.scored) - len(self.ended) - len(steps)
        a_step = spent / made  # of one row
        most = a_step * (sum(self.most - step for step in steps) + waiting * self.most)
        if not self.ended:
            return [f"at most {duration(most)} left"]
        likely = a_step * sum(self._expected(steps + [0] * waiting))
        return [f"about {duration(likely)} left, at most {duration(most)}"]

    def _expected(self, steps: list[int]) -> Iterable[float]:
        """Yield how many updates each row may still need, by the rows that needed more than it."""
        sums = [0, *itertools.accumulate(self.ended)]
        for step in steps:
            longer = bisect.bisect_right(self.ended, step)
            others = len(self.ended) - longer
            mean = (sums[-1] - sums[longer]) / others if others else self.most
            yield mean - step
