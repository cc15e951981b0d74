"""How results show themselves: in one line, and as a small table in a notebook."""

from __future__ import annotations

import dataclasses
import html
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ROWS = 10  # of a table in a notebook
_FEW = 8  # values of a tensor that are shown


def shapes(self: object) -> str:
    """Return the repr of a dataclass in one line: of a tensor a few values, or dtype and shape."""
    fields = dataclasses.fields(self)  # type: ignore[arg-type]
    shown = (f"{f.name}={_short(getattr(self, f.name))}" for f in fields if f.repr)
    return f"{type(self).__name__}({', '.join(shown)})"


def _short(value: Any) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and dtype is not None:
        if len(shape) == 1 and shape[0] <= _FEW:
            values = value.tolist()
            return str([float(f"{v:.4g}") if isinstance(v, float) else v for v in values])
        return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
    if isinstance(value, list | dict):
        return f"{type(value).__name__} of {len(value)}"
    return repr(value)


def count(number: int, what: str) -> str:
    """Return a number with its noun: "1 text", "2 texts"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def html_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]], of: int) -> str:
    """Return an HTML table of the first rows of `of`, everything in it escaped."""

    def row(cells: Iterable[object], kind: str) -> str:
        return (
            "<tr>"
            + "".join(f"<{kind}>{html.escape(str(cell))}</{kind}>" for cell in cells)
            + "</tr>"
        )

    body = "".join(row(cells, "td") for cells, _ in zip(rows, range(MOST_ROWS), strict=False))
    more = f"<p>… and {of - MOST_ROWS} more</p>" if of > MOST_ROWS else ""
    return (
        f"<div><p>{html.escape(title)}</p><table><thead>{row(header, 'th')}</thead>"
        f"<tbody>{body}</tbody></table>{more}</div>"
    )


def empty_figure(width: float, height: float) -> Figure:
    """Return a matplotlib figure, in inches, that a notebook shows without pyplot."""
    from matplotlib import figure

    class Figure(figure.Figure):
        def _repr_png_(self) -> bytes:
            png = io.BytesIO()
            self.savefig(png, format="png")
            return png.getvalue()

    return Figure(figsize=(width, height), layout="constrained")
