"""E8: seconds to fit one text (Table 4 of v2)."""

from __future__ import annotations

import numpy as np

from prototok.report import paper
from prototok.report.chart import Axis, Chart, Series
from prototok.report.experiments.shared import line, n_columns, tokens_axis
from prototok.report.results import Fit, Results, cell
from prototok.report.section import Content, Study
from prototok.report.tables import Cell, GridRow, grid, number

_HEADER = ("model",)
_LENGTHS = (32, 64, 128, 256, 512)


def make(results: Results) -> Content:
    theirs = grid(
        name="table4-paper",
        caption=f"Table 4 of the paper (v2): seconds to fit one text on an A100 or H100 "
        f"({paper.CITATION})",
        header=_HEADER,
        columns=n_columns(_LENGTHS),
        rows=[
            GridRow(names=(model,), cells=[number(row.get(n)) for n in _LENGTHS])
            for model, row in paper.TABLE_4.items()
        ],
    )
    one = results.get("table4")
    if one is None:
        return Content(tables=(theirs,))
    lengths = sorted(one.values("length"))
    rows: list[GridRow] = []
    series: list[Series] = []
    for subject in one.values("subject"):
        for share in one.values("share"):
            part = one.where(subject=subject, share=share)
            cells = [cell(part.where(length=n), _seconds) for n in lengths]
            rows.append(GridRow(names=(subject.name,), cells=cells))
            series.append(line(subject.name, lengths, cells, band=False))
    ours = grid(
        name="table4",
        caption="Seconds to fit one text, alone, early stopping included: median; exact of all",
        header=_HEADER,
        columns=n_columns(lengths),
        rows=rows,
    )
    chart = Chart(
        name="table4",
        title="Seconds to fit one text",
        x=tokens_axis(lengths),
        y=Axis("seconds", log=True),
        series=tuple(series),
    )
    return Content(tables=(ours, theirs), charts=(chart,))


def _seconds(fits: list[Fit]) -> Cell:
    seconds = float(np.median([f["seconds"] for f in fits]))
    exact = sum(f["exact"] for f in fits)
    quartiles = np.quantile([f["seconds"] for f in fits], (0.25, 0.75))
    note = f"quartiles {quartiles[0]:.2f} and {quartiles[1]:.2f}, {exact} of {len(fits)} exact"
    return Cell(f"{seconds:.2f}; {exact}/{len(fits)}", seconds, "measured", note)


STUDY = Study(
    code="E8",
    title="Seconds to fit one text",
    source="Table 4 (v2)",
    names=("table4",),
    there="six models; N = 32 … 512; one A100 or H100, one text at a time",
    make=make,
)
