"""Say early that fits will hardly come back whole, from what is right when their first cycle ends.

A cosine that has run down shows what a fit is worth so far. The bound below comes from the runs in
docs/dev/recipes.md, "Progress that will not come". Nothing is changed by it: fits go on.
"""

from __future__ import annotations

from prototok.fitting.engine.run import FitEvent

# No fit with a smaller share of right tokens at the end of its first cycle came back whole.
FEW = 0.4


class Outlook:
    """Which rows had few tokens right, at their best, when the first cycle had ended.

    lengths  the targets of each row, by its place in the results
    ends     updates of its first cycle, likewise; of a row that has none here nothing is said
    behind   the rows; who sees one end takes it out
    """

    def __init__(self, lengths: dict[int, int], ends: dict[int, int]) -> None:
        self.lengths, self.ends = lengths, ends
        self.behind: set[int] = set()
        self._best: dict[int, int] = {}  # right tokens of the rows in their first cycle

    def see(self, event: FitEvent) -> None:
        """Take note of a look at the device."""
        seen = zip(event.rows.tolist(), event.steps.tolist(), event.correct.tolist(), strict=True)
        for row, step, correct in seen:
            if step <= self.ends.get(row, -1):
                self._best[row] = max(self._best.get(row, 0), correct)
            elif row in self._best and self._best.pop(row) < FEW * self.lengths[row]:
                self.behind.add(row)

    def note(self) -> str:
        """Return what a line of progress says of it; empty where there is nothing to say."""
        if not self.behind:
            return ""
        steps = max(self.ends[row] for row in self.behind)
        return f"{len(self.behind)} will hardly end, few tokens right after {steps} steps; "
