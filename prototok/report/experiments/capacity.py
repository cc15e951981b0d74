"""E3: capacity in tokens and in nats (Table 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from prototok.report import paper
from prototok.report.chart import Axis, Chart, Series
from prototok.report.experiments.shared import tokens_axis
from prototok.report.results import (
    Fit,
    Outcome,
    Results,
    best_seeds,
    cell,
    kuratov,
    longest,
)
from prototok.report.section import Content, Study
from prototok.report.tables import Cell, GridRow, Table, grid, mean_std, number

_HEADER = ("source", "m")
_SUCCESS = (
    "Success is a token accuracy of at least 0.99 as decoded alone. ≥ marks a cell in which a text "
    "still came back at the longest N tried. A text that came back at no N counts as 0."
)


@dataclass(frozen=True)
class Statistic:
    """One way of putting the longest N of each text into a number."""

    name: str
    caption: str
    make: Callable[[list[Fit]], Cell]


def longest_lengths(fits: list[Fit]) -> list[int]:
    """Return each text's longest N; 0 where not even the shortest came back."""
    return [0 if fit is None else fit["length"] for fit in longest(fits).values()]


def nats(fits: list[Fit]) -> Cell:
    """Average H_LM at the longest N, ± std over texts; 0 where none came back."""
    return mean_std([0.0 if fit is None else fit["h_lm"] for fit in longest(fits).values()], 1)


def _max(fits: list[Fit]) -> Cell:
    return _capped(max(longest_lengths(fits)), fits)


def _median(fits: list[Fit]) -> Cell:
    return _capped(float(np.median(longest_lengths(fits))), fits, 1)


def _mean(fits: list[Fit]) -> Cell:
    return mean_std(longest_lengths(fits), 1)


def _kuratov(fits: list[Fit]) -> Cell:
    return number(kuratov(fits))


def _capped(value: float, fits: list[Fit], digits: int = 0) -> Cell:
    """Mark what may be more: a text came back at the longest N that was tried."""
    at_end = max(longest_lengths(fits)) == max(f["length"] for f in fits)
    found = number(value, digits, f"n = {len(longest(fits))} texts")
    note = found.note + ("; the longest N tried, so at least" if at_end else "")
    return Cell(("≥" if at_end else "") + found.text, found.value, "measured", note)


STATISTICS = (
    Statistic(
        name="max",
        caption="C_tokens: the longest N that any text came back at, which is how the paper's "
        "numbers behave",
        make=_max,
    ),
    Statistic(name="median", caption="C_tokens: the median text's longest N", make=_median),
    Statistic(
        name="mean", caption="C_tokens: mean±std over texts of the longest N", make=_mean
    ),
    Statistic(
        name="kuratov",
        caption="Kuratov et al.'s max tokens: the largest N whose mean accuracy is at least 0.99",
        make=_kuratov,
    ),
    Statistic(
        name="nats", caption="H_LM in nats at the longest N, mean±std over texts", make=nats
    ),
)  # fmt: skip


def make(results: Results) -> Content:
    theirs = (
        _published("tokens", "C_tokens", paper.TABLE_3_TOKENS),
        _published("nats", "H_LM in nats", paper.TABLE_3_NATS),
    )
    one = results.get("table3")
    if one is None:
        return Content(tables=theirs)
    subjects = one.values("subject")
    return Content(
        remarks=(_SUCCESS,),
        tables=(*(_table(one, statistic) for statistic in STATISTICS), *theirs),
        charts=tuple(_solved(one.where(subject=s), i) for i, s in enumerate(subjects, start=1)),
    )


def _published(name: str, caption: str, given: Mapping) -> Table:
    return grid(
        name=f"table3-paper-{name}",
        caption=f"Table 3 of the paper: {caption} ({paper.CITATION})",
        header=_HEADER,
        columns=paper.MODELS,
        rows=[
            GridRow(
                names=(source, "shared" if shared else "per text"),
                cells=[_theirs(value) for value in values],
            )
            for (source, shared), values in given.items()
        ],
    )


def _theirs(value: float | tuple[float, float]) -> Cell:
    if isinstance(value, tuple):
        return Cell(f"{value[0]:.1f}±{value[1]:.1f}", value[0])
    return number(value)


def _table(one: Outcome, statistic: Statistic) -> Table:
    subjects = one.values("subject")
    return grid(
        name=f"table3-{statistic.name}",
        caption=statistic.caption,
        header=_HEADER,
        columns=[s.name for s in subjects],
        rows=[
            GridRow(
                names=(source, "per text" if share is None else "shared"),
                cells=[
                    cell(one.where(subject=s, source=source, share=share), statistic.make)
                    for s in subjects
                ],
            )
            for source in one.values("source")
            for share in one.values("share")
        ],
    )


def _solved(part: Outcome, i: int) -> Chart:
    """Draw the share of texts that came back, over N."""
    lengths = sorted(part.values("length"))
    series = []
    for source in part.values("source"):
        for share in part.values("share"):
            own = part.where(source=source, share=share)
            solved: dict[float, float] = {}
            for n in lengths:
                fits = best_seeds(own.where(length=n).fits())
                if fits:
                    solved[float(n)] = float(np.mean([f["accuracy"] >= 0.99 for f in fits]))
            name = f"{source}, m {'per text' if share is None else 'shared'}"
            series.append(Series(label=name, x=tuple(solved), y=tuple(solved.values())))
    return Chart(
        name=f"table3-solved-{i}",
        title=f"{part.work[0].subject.name}: share of texts that come back",
        x=tokens_axis(lengths),
        y=Axis("texts with accuracy ≥ 0.99", low=0, high=1),
        series=tuple(series),
    )


STUDY = Study(
    code="E3",
    title="Capacity in tokens and in nats",
    source="Table 3",
    names=("table3",),
    there="six models; four sources; N = 4, 5, 8, …, 1448; m per text and shared; texts a cell not "
    "given",
    make=make,
)
