"""E7: paths between solutions of one text (Figure 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from prototok.report import paper
from prototok.report.chart import Axis, Chart, Series
from prototok.report.experiments.shared import ACCURACY
from prototok.report.results import Results, Subject
from prototok.report.section import Content, Study
from prototok.report.tables import Cell, label, mean_std, number, table_of

_CAPTION = (
    "Paths between exact solutions of one text: least accuracy along a path, mean±std over pairs; "
    "share of paths that stay at 0.99 or more at every point; length of the curve over that of the "
    f"segment, at most {paper.FIGURE_6_RATIO} in the paper"
)


@dataclass(frozen=True)
class Row:
    model: Annotated[Cell, "model"]
    length: Annotated[Cell, "N"]
    m: Annotated[Cell, "m"]
    pairs: Annotated[Cell, "pairs"]
    straight_least: Annotated[Cell, "straight, least"]
    curve_least: Annotated[Cell, "curve, least"]
    straight_stays: Annotated[Cell, "straight stays"]
    curve_stays: Annotated[Cell, "curve stays"]
    length_ratio: Annotated[Cell, "length ratio"]
    greatest_ratio: Annotated[Cell, "greatest"]


@dataclass(frozen=True)
class Measured:
    """Paths of one setting, as `prototok report --measure` kept them."""

    model: str
    length: int
    share: str | None
    t: tuple[float, ...]
    straight: np.ndarray  # (pairs, points), accuracy
    curve: np.ndarray
    ratio: np.ndarray  # (pairs,)

    @classmethod
    def of(cls, group: dict[str, Any]) -> Measured:
        return cls(
            model=Subject.of(group).name,
            length=group["length"],
            share=group["share"],
            t=tuple(float(v) for v in group["t"]),
            straight=np.array(group["straight"]["accuracy"]),
            curve=np.array(group["curve"]["accuracy"]),
            ratio=np.array(group["curve"]["length_ratio"]),
        )


def make(results: Results) -> Content:
    if results.get("figure6") is None:
        return Content()
    groups = results.measured.get("paths", {}).get("groups", [])
    if not groups:
        return Content(remarks=("Paths were not measured: prototok report RUN --measure.",))
    found = [Measured.of(group) for group in groups]
    settings = groups[0]["settings"]
    remark = (
        f"Lines are means over pairs, bands the middle 80 %. Control points: lr {settings['lr']}, "
        f"{settings['samples']} values of t an update, at most {settings['max_steps']} updates; "
        "the straight segment and the curve move the vectors that are not shared."
    )
    return Content(
        remarks=(remark,),
        tables=(table_of("figure6", _CAPTION, Row, [_row(one) for one in found]),),
        charts=tuple(_chart(f"figure6-{i}", one) for i, one in enumerate(found, start=1)),
    )


def _row(one: Measured) -> Row:
    straight, curve = one.straight.min(1), one.curve.min(1)
    return Row(
        model=label(one.model),
        length=label(one.length),
        m=label("per text" if one.share is None else "shared"),
        pairs=number(len(one.ratio)),
        straight_least=mean_std(straight.tolist()),
        curve_least=mean_std(curve.tolist()),
        straight_stays=_percent(straight >= 0.99),
        curve_stays=_percent(curve >= 0.99),
        length_ratio=mean_std(one.ratio.tolist()),
        greatest_ratio=number(float(one.ratio.max()), 2),
    )


def _chart(name: str, one: Measured) -> Chart:
    own_m = ", m per text" if one.share is None else ""
    return Chart(
        name=name,
        title=f"{one.model}, N = {one.length}{own_m}: accuracy along paths",
        x=Axis("t", low=0, high=1),
        y=ACCURACY,
        series=(
            _series("straight segment", one.t, one.straight, colour=0),
            _series("Bezier curve", one.t, one.curve, colour=1),
        ),
    )


def _series(name: str, t: tuple[float, ...], values: np.ndarray, colour: int) -> Series:
    return Series(
        label=name,
        x=t,
        y=tuple(values.mean(0)),
        low=tuple(np.quantile(values, 0.1, axis=0)),
        high=tuple(np.quantile(values, 0.9, axis=0)),
        colour=colour,
    )


def _percent(held: np.ndarray) -> Cell:
    share = 100 * float(held.mean())
    return Cell(f"{share:.0f} %", share, note=f"{int(held.sum())} of {len(held)}")


STUDY = Study(
    code="E7",
    title="Paths between solutions",
    source="Figure 6",
    names=("figure6",),
    there="5 texts × 10 solutions, 225 pairs; quadratic Bezier curves",
    make=make,
)
