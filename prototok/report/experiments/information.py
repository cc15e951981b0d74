"""E4: information, autoregressive against one forward (Figure 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from prototok.report.chart import Axis, Chart, Series
from prototok.report.experiments.capacity import nats
from prototok.report.results import Fit, Outcome, Results, cell, longest
from prototok.report.section import Content, Study
from prototok.report.tables import Cell, Table, label, number, table_of

_POINTS = (
    "Small points are texts that came back at some N in both modes, large ones the means of their "
    "(model, source). Autoregressive success is decided by really generating."
)


@dataclass(frozen=True)
class Comparison:
    """K [mem] vectors against one forward whose m is shared ("m") or each text's own (None)."""

    vectors: int
    share: str | None

    @property
    def title(self) -> str:
        vectors = f"{self.vectors} [mem] vector{'s' if self.vectors > 1 else ''}"
        return f"{vectors} against m {'shared' if self.share else 'per text'}"


@dataclass(frozen=True)
class Row:
    model: Annotated[Cell, "model"]
    source: Annotated[Cell, "source"]
    autoregressive: Annotated[Cell, "autoregressive"]
    one_forward: Annotated[Cell, "one forward"]
    ratio: Annotated[Cell, "ratio"]


@dataclass(frozen=True)
class Pairs:
    """Texts of one (model, source) that came back in both modes: nats of each, text by text."""

    name: str
    autoregressive: list[float]
    one_forward: list[float]


def make(results: Results) -> Content:
    one = results.get("figure2")
    if one is None:
        return Content()
    tables, charts = [], []
    for comparison in (Comparison(1, "m"), Comparison(2, None)):
        table, chart = _compare(one, comparison)
        tables.append(table)
        charts.append(chart)
    return Content(remarks=(_POINTS,), tables=tuple(tables), charts=tuple(charts))


def _compare(one: Outcome, comparison: Comparison) -> tuple[Table, Chart]:
    rows: list[Row] = []
    seen: list[Pairs] = []
    for subject in one.values("subject"):
        for source in one.values("source"):
            part = one.where(subject=subject, source=source)
            left = part.where(mode="autoregressive", vectors=comparison.vectors)
            right = part.where(mode="one-forward", share=comparison.share)
            ours, other = _nats_by_text(left.fits()), _nats_by_text(right.fits())
            both = [t for t in ours if t in other]
            pairs = Pairs(
                name=f"{subject.name}, {source}",
                autoregressive=[ours[t] for t in both],
                one_forward=[other[t] for t in both],
            )
            rows.append(
                Row(
                    model=label(subject.name),
                    source=label(source),
                    autoregressive=cell(left, nats),
                    one_forward=cell(right, nats),
                    ratio=_ratio(pairs),
                )
            )
            if both:
                seen.append(pairs)
    name, title = f"figure2-{comparison.vectors}", comparison.title
    caption = f"H_LM in nats at the longest accurate prefix, {title}"
    return table_of(name, caption, Row, rows), _chart(name, title[0].upper() + title[1:], seen)


def _nats_by_text(fits: list[Fit]) -> dict[str, float]:
    found = longest(fits)
    return {t: f["h_lm"] for t, f in found.items() if f is not None and f["h_lm"] > 0}


def _ratio(pairs: Pairs) -> Cell:
    above, below = pairs.autoregressive, pairs.one_forward
    if not above:
        return Cell("·", None, "unplanned", "no text came back in both modes")
    return number(float(np.mean(above) / np.mean(below)), 2, f"n = {len(above)} texts")


def _chart(name: str, title: str, seen: list[Pairs]) -> Chart:
    texts = [
        Series(
            label=pairs.name,
            x=tuple(pairs.autoregressive),
            y=tuple(pairs.one_forward),
            kind="points",
            colour=place,
        )
        for place, pairs in enumerate(seen)
    ]
    means = [
        Series(
            label="",
            x=(float(np.mean(pairs.autoregressive)),),
            y=(float(np.mean(pairs.one_forward)),),
            kind="points",
            names=(f"{pairs.name}: mean of {len(pairs.autoregressive)} texts",),
            weight=6,
            colour=place,
        )
        for place, pairs in enumerate(seen)
    ]
    values = [v for s in texts for v in (*s.x, *s.y)] or [10.0, 100.0]
    low, high = min(values) / 1.5, max(values) * 1.5  # both axes alike: y = x is the diagonal
    return Chart(
        name=name,
        title=title,
        x=Axis("H_LM, autoregressive (nats)", log=True, low=low, high=high),
        y=Axis("H_LM, one forward (nats)", log=True, low=low, high=high),
        series=(*_guides(texts), *texts, *means),
    )


def _guides(texts: list[Series]) -> list[Series]:
    xs = [x for s in texts for x in s.x] or [1.0, 10.0]
    ends = (min(xs) / 3, max(xs) * 3)
    return [
        Series(
            label=f"y = x{'' if k == 1 else f'/{k}'}",
            x=ends,
            y=(ends[0] / k, ends[1] / k),
            kind="guide",
        )
        for k in (1, 2, 5)
    ]


STUDY = Study(
    code="E4",
    title="Information, autoregressive against one forward",
    source="Figure 2",
    names=("figure2",),
    there="the texts of Table 3; one [mem] vector against m shared, two against m per text",
    make=make,
)
