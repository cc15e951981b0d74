"""What a callback saw during a fit, kept row by row.

Letters: R rows (text × seeds + seed), P looks at one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prototok.common.shown import count, empty_figure

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Curve:
    """One row's looks, in order; every tensor is (P,).

    steps    int64, updates made before the score
    loss     fp32, nats a token, in the batch and at the recipe's temperature
    accuracy fp32, share of right tokens in the batch
    margin   fp32, smallest (target logit − best other logit)
    """

    steps: Tensor
    loss: Tensor
    accuracy: Tensor
    margin: Tensor

    def __repr__(self) -> str:
        return f"Curve({count(len(self.steps), 'look')})"


@dataclass(frozen=True, eq=False)
class History:
    """The curves of all rows of a fit, `curves[text][seed]`: every step on the CPU."""

    curves: list[list[Curve]]

    def __repr__(self) -> str:
        looks = sum(len(curve.steps) for row in self.curves for curve in row)
        return f"History({count(len(self.curves), 'text')}, {count(looks, 'look')})"

    def select(self, seeds: list[int]) -> History:
        """Keep one seed of each text."""
        return History([[row[seed]] for row, seed in zip(self.curves, seeds, strict=True)])

    def to_pandas(self) -> pandas.DataFrame:
        """Return a data frame, one row a look: text, seed (its place), step, loss, …"""
        import pandas

        frames = [
            pandas.DataFrame(
                {
                    "text": text,
                    "seed": seed,
                    "step": curve.steps.numpy(),
                    "loss": curve.loss.numpy(),
                    "accuracy": curve.accuracy.numpy(),
                    "margin": curve.margin.numpy(),
                }
            )
            for text, row in enumerate(self.curves)
            for seed, curve in enumerate(row)
        ]
        return pandas.concat(frames, ignore_index=True)

    def plot(self) -> Figure:
        """Draw loss and accuracy over steps, one line a row; needs matplotlib."""
        try:
            figure = empty_figure(7, 4)
        except ImportError:
            raise ImportError("plot needs matplotlib: pip install 'prototok[analysis]'") from None
        above, below = figure.subplots(2, 1, sharex=True)
        for row in self.curves:
            for curve in row:
                above.plot(curve.steps, curve.loss, linewidth=1)
                below.plot(curve.steps, curve.accuracy, linewidth=1)
        above.set(ylabel="loss, nats a token", yscale="log")
        below.set(ylabel="token accuracy", xlabel="step", ylim=(-0.02, 1.02))
        return figure


class Recorder:
    """Collects what each row's looks show while a fit runs."""

    def __init__(self, lengths: list[int], seeds: int) -> None:
        """Take the number N of tokens of each text, and how many seeds each has."""
        self.lengths, self.seeds = lengths, seeds
        self.seen: list[list[tuple[float, ...]]] = [[] for _ in range(len(lengths) * seeds)]

    def note(
        self, rows: Tensor, steps: Tensor, loss: Tensor, correct: Tensor, margin: Tensor
    ) -> None:
        """Keep one look at the rows in flight; every tensor has one value a row."""
        columns = (steps, loss, correct, margin)
        for row, *values in zip(rows.tolist(), *(c.tolist() for c in columns), strict=True):
            self.seen[row].append(tuple(values))

    def history(self) -> History:
        """Return the curves of what was seen."""

        def curve(row: int) -> Curve:
            looks = torch.tensor(self.seen[row], dtype=torch.float64, device="cpu").view(-1, 4)
            length = self.lengths[row // self.seeds]
            return Curve(
                steps=looks[:, 0].long(),
                loss=(looks[:, 1] / length).float(),
                accuracy=(looks[:, 2] / length).float(),
                margin=looks[:, 3].float(),
            )

        texts = range(len(self.lengths))
        return History([[curve(t * self.seeds + s) for s in range(self.seeds)] for t in texts])
