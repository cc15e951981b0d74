"""Parts that several experiments share: axes, lines over N, cells of accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prototok.report.chart import Axis, Series
from prototok.report.results import Fit, best_seeds
from prototok.report.tables import Cell, GridRow, mean_std

ACCURACY = Axis("token accuracy", low=0, high=1)


def accuracy(fits: list[Fit]) -> Cell:
    """Average the token accuracy of the best seed of each text, ± std."""
    return mean_std([f["accuracy"] for f in best_seeds(fits)])


def published(names: tuple[str, ...], values: Mapping[int, tuple[float, float]]) -> GridRow:
    """Make a row of the paper's: mean ± std by column."""
    return GridRow(names, [Cell(f"{m:.2f}±{s:.2f}", m, std=s) for m, s in values.values()])


def n_columns(lengths: Sequence[int]) -> list[str]:
    return [f"N = {n}" for n in lengths]


def tokens_axis(lengths: Sequence[int]) -> Axis:
    """Put N on a log scale, with at most ten of the lengths as ticks."""
    shown = list(lengths)
    while len(shown) > 10:
        shown = shown[::2]
    return Axis("N, tokens", log=True, ticks=tuple(float(n) for n in shown))


def line(name: str, x: Sequence[float], cells: Sequence[Cell], band: bool = True) -> Series:
    """Draw the means of cells as a line, ± one standard deviation as a band within 0 … 1."""
    known = [(at, one) for at, one in zip(x, cells, strict=True) if one.value is not None]
    middle = [one.value or 0.0 for _, one in known]
    spread = [one.std or 0.0 for _, one in known]
    return Series(
        label=name,
        x=tuple(float(at) for at, _ in known),
        y=tuple(middle),
        low=tuple(max(0.0, y - s) for y, s in zip(middle, spread, strict=True)) if band else (),
        high=tuple(min(1.0, y + s) for y, s in zip(middle, spread, strict=True)) if band else (),
    )
