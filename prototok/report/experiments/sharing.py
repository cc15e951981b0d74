"""E2: vectors shared by groups of texts (Table 2)."""

from __future__ import annotations

import math

from prototok.report import paper
from prototok.report.chart import Axis, Chart
from prototok.report.experiments.shared import ACCURACY, accuracy, line, published
from prototok.report.results import Fit, Outcome, Results, cell
from prototok.report.section import Content, Study
from prototok.report.tables import Cell, GridRow, Table, grid, mean_std

_HEADER = ("shared", "aggregate")
_MAX_AND_AVG = "max: the best seed of each text, then the mean over texts; avg: over seeds too."


def make(results: Results) -> Content:
    theirs = grid(
        name="table2-paper",
        caption=f"Table 2 of the paper: token accuracy at N = 256, 256 texts, 10 seeds "
        f"({paper.CITATION})",
        header=_HEADER,
        columns=[f"group of {n}" for n in next(iter(paper.TABLE_2.values()))],
        rows=[published(names, row) for names, row in paper.TABLE_2.items()],
    )
    one = results.get("table2")
    if one is None:
        return Content(tables=(theirs,))
    tables: list[Table] = []
    charts: list[Chart] = []
    for subject in one.values("subject"):
        for length in one.values("length"):
            part = one.where(subject=subject, length=length)
            sizes = sorted(part.values("group_size"), key=lambda n: n or math.inf)
            rows = _rows(part, sizes)
            x = [_texts_of(size, part) for size in sizes]
            name, title = f"table2-{len(tables) + 1}", f"{subject.name}, N = {length}"
            tables.append(
                grid(
                    name=name,
                    caption=f"{title}: token accuracy, mean±std",
                    header=_HEADER,
                    columns=[f"group of {n or 'all'}" for n in sizes],
                    rows=rows,
                )
            )
            charts.append(
                Chart(
                    name=name,
                    title=f"{title}: what sharing costs",
                    x=Axis("texts that share a vector", log=True, ticks=tuple(x)),
                    y=ACCURACY,
                    series=tuple(
                        line("{} shared, {}".format(*row.names), x, row.cells) for row in rows
                    ),
                )
            )
    return Content(remarks=(_MAX_AND_AVG,), tables=(*tables, theirs), charts=tuple(charts))


def _rows(part: Outcome, sizes: list[int | None]) -> list[GridRow]:
    return [
        GridRow(
            names=(str(share), how),
            cells=[cell(part.where(share=share, group_size=n), aggregate) for n in sizes],
        )
        for share in part.values("share")
        for how, aggregate in (("max", accuracy), ("avg", _average))
    ]


def _average(fits: list[Fit]) -> Cell:
    return mean_std([f["accuracy"] for f in fits])


def _texts_of(size: int | None, part: Outcome) -> float:
    return float(size or max(w.rows for w in part.work))


STUDY = Study(
    code="E2",
    title="Vectors shared by groups of texts",
    source="Table 2",
    names=("table2",),
    there="256 PG-19 texts; N = 256; groups of 1, 4, 16, 64, 256; 10 seeds",
    make=make,
)
