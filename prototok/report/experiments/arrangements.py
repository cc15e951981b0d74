"""E1: where e and m stand (Table 1)."""

from __future__ import annotations

from prototok.report import paper
from prototok.report.chart import Chart
from prototok.report.experiments.shared import (
    ACCURACY,
    accuracy,
    line,
    n_columns,
    published,
    tokens_axis,
)
from prototok.report.results import Outcome, Results, cell
from prototok.report.section import Content, Study
from prototok.report.tables import GridRow, Table, grid

_RECIPE = "AdamW lr 0.01, betas (0.9, 0.9), decay 0.01, N(0, 1), at most 5000 steps"
_HEADER = ("arrangement",)


def make(results: Results) -> Content:
    theirs = grid(
        name="table1-paper",
        caption=f"Table 1 of the paper: accuracy, mean±std, Llama-3.2-1B, 50 texts "
        f"({paper.CITATION})",
        header=_HEADER,
        columns=n_columns(list(paper.TABLE_1["e m*"])),
        rows=[published((name,), row) for name, row in paper.TABLE_1.items()],
    )
    one = results.get("table1")
    if one is None:
        return Content(tables=(theirs,))
    lengths = sorted(one.values("length"))
    tables: list[Table] = []
    charts: list[Chart] = []
    for i, subject in enumerate(one.values("subject"), start=1):
        rows = _rows(one.where(subject=subject), one.values("arrangement"), lengths)
        tables.append(
            grid(
                name=f"table1-{i}",
                caption=f"{subject.name}: token accuracy, mean±std over texts",
                header=_HEADER,
                columns=n_columns(lengths),
                rows=rows,
            )
        )
        charts.append(
            Chart(
                name=f"table1-{i}",
                title=f"{subject.name}: which arrangement carries a text",
                x=tokens_axis(lengths),
                y=ACCURACY,
                series=tuple(line(str(row.names[0]), lengths, row.cells) for row in rows),
            )
        )
    return Content(tables=(*tables, theirs), charts=tuple(charts))


def _rows(part: Outcome, arrangements: list[str], lengths: list[int]) -> list[GridRow]:
    return [
        GridRow(
            names=(name,),
            cells=[cell(part.where(arrangement=name, length=n), accuracy) for n in lengths],
        )
        for name in arrangements
    ]


STUDY = Study(
    code="E1",
    title="Where e and m stand",
    source="Table 1",
    names=("table1",),
    there=f"Llama-3.2-1B; 50 PG-19 texts; N = 1, 2, 4, …, 1024; {_RECIPE}",
    make=make,
)
