"""Tables of a report, and their forms on disk: CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_type_hints

import numpy as np

# What a cell stands for: a measurement, part of one, nothing yet, a failure, nothing planned, or a
# number that somebody else reports.
STATES = ("measured", "partial", "missing", "failed", "unplanned", "label")


@dataclass(frozen=True)
class Cell:
    """A cell: the text shown, the number to sort by (None: the text), its state, a remark.

    `std` is the standard deviation that is shown with a mean, over `n` values; None where there is
    none, or where it is not known.
    """

    text: str
    value: float | None = None
    state: str = "measured"
    note: str = ""
    std: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Table:
    """`name` is that of its files; every row has as many cells as `header` has entries."""

    name: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.header) for row in self.rows), self.name


def table_of(name: str, caption: str, kind: type, rows: Sequence[object]) -> Table:
    """Make a table of rows of the dataclass `kind`, whose fields are `Annotated[Cell, header]`."""
    columns = get_type_hints(kind, include_extras=True)
    return Table(
        name=name,
        caption=caption,
        header=tuple(hint.__metadata__[0] for hint in columns.values()),
        rows=tuple(tuple(getattr(row, field) for field in columns) for row in rows),
    )


@dataclass(frozen=True)
class GridRow:
    """A row of a `grid`: what it is called, and a cell a column."""

    names: tuple[object, ...]
    cells: Sequence[Cell]


def grid(
    name: str,
    caption: str,
    header: tuple[str, ...],
    columns: Sequence[str],
    rows: Sequence[GridRow],
) -> Table:
    """Make a table whose columns are values of a setting; `header` is over the rows' names."""
    return Table(
        name=name,
        caption=caption,
        header=(*header, *columns),
        rows=tuple((*map(label, row.names), *row.cells) for row in rows),
    )


def label(text: object) -> Cell:
    """Make a cell that names its row."""
    value = float(text) if isinstance(text, int | float) else None
    return Cell(str(text), value, "label")


def mean_std(values: Sequence[float], digits: int = 2) -> Cell:
    """Make a cell of mean ± standard deviation (of the population: the paper's n is small)."""
    mean, std = float(np.mean(values)), float(np.std(values))
    n = len(values)
    return Cell(f"{mean:.{digits}f}±{std:.{digits}f}", mean, note=f"n = {n}", std=std, n=n)


def number(value: float | None, digits: int = 0, note: str = "") -> Cell:
    """Make a cell of a number with `digits` behind the point; None is shown as an en dash."""
    if value is None or not math.isfinite(value):
        return Cell("–", None, "measured", note)
    return Cell(f"{value:,.{digits}f}", float(value), "measured", note)


def to_csv(table: Table) -> str:
    """Write the numbers as RFC 4180; a cell without a measurement gives its state.

    A column of means has three here: mean, std and n.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    spread = [any(row[i].std is not None for row in table.rows) for i in range(len(table.header))]
    header: list[str] = []
    for text, wide in zip(table.header, spread, strict=True):
        header += [f"{text} {part}".strip() for part in ("mean", "std", "n")] if wide else [text]
    writer.writerow(header)
    for row in table.rows:
        written: list[object] = []
        for cell, wide in zip(row, spread, strict=True):
            written += _spread_out(cell) if wide else [_number_of(cell)]
        writer.writerow(written)
    return out.getvalue()


def _spread_out(cell: Cell) -> list[object]:
    if cell.std is None or cell.value is None:
        return [_number_of(cell), "", ""]
    n = "" if cell.n is None else cell.n
    return [f"{cell.value:.6g}", f"{cell.std:.6g}", n]


def _number_of(cell: Cell) -> str:
    """Return what is shown, without commas between thousands where it is one number."""
    text = _plain(cell)
    bare = text.replace(",", "")
    return bare if cell.value is not None and _is_number(bare) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def to_latex(table: Table) -> str:
    """Write a `table` environment for the booktabs package."""
    numeric = [all(row[i].state != "label" for row in table.rows) for i in range(len(table.header))]
    columns = "".join("r" if right else "l" for right in numeric)
    lines = [
        "% \\usepackage{booktabs}",
        "\\begin{table}",
        "  \\centering",
        f"  \\caption{{{_tex(table.caption)}}}",
        f"  \\label{{tab:{table.name}}}",
        f"  \\begin{{tabular}}{{{columns}}}",
        "    \\toprule",
        "    " + " & ".join(_tex(text) for text in table.header) + " \\\\",
        "    \\midrule",
        *("    " + " & ".join(_tex(_plain(cell)) for cell in row) + " \\\\" for row in table.rows),
        "    \\bottomrule",
        "  \\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _plain(cell: Cell) -> str:
    return f"[{cell.state}]" if cell.state in ("missing", "failed", "unplanned") else cell.text


_TEX = {
    "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}",
    "±": "$\\pm$", "≥": "$\\geq$", "×": "$\\times$", "–": "--", "…": "\\ldots{}", "·": "$\\cdot$",
    "<": "\\textless{}", ">": "\\textgreater{}", "−": "$-$",
} | {c: "\\" + c for c in "&%$#_{}"}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text)
