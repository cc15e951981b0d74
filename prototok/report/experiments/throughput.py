"""E5: throughput at the longest text that comes back (Figure 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from prototok.report import paper
from prototok.report.chart import Axis, Chart, Series
from prototok.report.results import Fit, Outcome, Results, cell
from prototok.report.section import Content, Study
from prototok.report.tables import Cell, label, number, table_of

_LOOP = (
    f"The paper reports {paper.FIGURE_3_RATIO}× without naming the loop it is against. Here it is "
    "prototok's own static-KV decoder. A ratio depends on N, on the machine and on the loop; "
    "python -m prototok.bench measures the ceiling beside it."
)


@dataclass(frozen=True)
class Row:
    model: Annotated[Cell, "model"]
    source: Annotated[Cell, "source"]
    autoregressive_n: Annotated[Cell, "autoregressive N"]
    autoregressive_ms: Annotated[Cell, "ms"]
    autoregressive_rate: Annotated[Cell, "tokens/s"]
    one_forward_n: Annotated[Cell, "one forward N"]
    one_forward_ms: Annotated[Cell, "ms"]
    one_forward_rate: Annotated[Cell, "tokens/s"]
    ratio: Annotated[Cell, "ratio"]


def make(results: Results) -> Content:
    one = results.get("figure3")
    if one is None:
        return Content()
    rows: list[Row] = []
    points: list[Series] = []
    for subject in one.values("subject"):
        for source in one.values("source"):
            part = one.where(subject=subject, source=source)
            left, right = part.where(mode="autoregressive"), part.where(mode="one-forward")
            theirs, ours = fastest(left.fits()), fastest(right.fits())
            ratio = None
            if theirs and ours:
                x, y = theirs["tokens_per_second"], ours["tokens_per_second"]
                ratio = y / x
                points.append(
                    Series(f"{subject.name}, {source}", (x,), (y,), kind="points", weight=5)
                )
            rows.append(
                Row(
                    model=label(subject.name),
                    source=label(source),
                    autoregressive_n=_cell(left, theirs, "length"),
                    autoregressive_ms=_cell(left, theirs, "decode_seconds", 1e3, 2),
                    autoregressive_rate=_cell(left, theirs, "tokens_per_second"),
                    one_forward_n=_cell(right, ours, "length"),
                    one_forward_ms=_cell(right, ours, "decode_seconds", 1e3, 2),
                    one_forward_rate=_cell(right, ours, "tokens_per_second"),
                    ratio=number(
                        ratio, 1, "one forward over autoregressive, each at its own longest N"
                    ),
                )
            )
    caption = "Throughput at the longest text that came back whole, batch 1"
    table = table_of("figure3", caption, Row, rows)
    return Content(remarks=(_LOOP,), tables=(table,), charts=(_chart(points),))


def _cell(part: Outcome, best: Fit | None, name: str, scale: float = 1, digits: int = 0) -> Cell:
    shown = number(best[name] * scale if best else None, digits)
    return cell(part, lambda fits: shown)


def _chart(points: list[Series]) -> Chart:
    low = min((s.x[0] for s in points), default=1.0) / 3
    high = max((s.x[0] for s in points), default=100.0) * 3
    guides = [
        Series(label=f"{k}×", x=(low, high), y=(k * low, k * high), kind="guide")
        for k in (1, 10, paper.FIGURE_3_RATIO)
    ]
    return Chart(
        name="figure3",
        title="Tokens a second, one forward against autoregressive",
        x=Axis("autoregressive (tokens/s)", log=True, low=low, high=high),
        y=Axis("one forward (tokens/s)", log=True, low=low),
        series=(*guides, *points),
    )


def fastest(fits: list[Fit]) -> Fit | None:
    """Return the paper's point: the longest exact text, and of these the median decoding."""
    timed = [f for f in fits if f["exact"] and f["tokens_per_second"]]
    if not timed:
        return None
    most = max(f["length"] for f in timed)
    at_most = sorted(
        (f for f in timed if f["length"] == most), key=lambda f: f["tokens_per_second"]
    )
    return at_most[len(at_most) // 2]


STUDY = Study(
    code="E5",
    title="Throughput",
    source="Figure 3",
    names=("figure3",),
    there="longest text reconstructed without loss over its time; GPU, batch, dtype, cache not "
    "given",
    make=make,
)
