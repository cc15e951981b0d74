"""Beyond the paper: what solutions are like, and what they withstand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from prototok.report.chart import COLOURS, Axis, Chart, Series
from prototok.report.results import Results, Subject
from prototok.report.section import Content, Section
from prototok.report.tables import (
    Cell,
    GridRow,
    Table,
    grid,
    label,
    mean_std,
    number,
    table_of,
)

_WHERE = (
    "Norms, and the cosine distance of the nearest embedding of the vocabulary; last the same for "
    "a random direction"
)
_ROBUSTNESS = (
    "Exact solutions that stay exact, and the mean token accuracy; noise and rounding are of e "
    "alone"
)
_HOW = (
    "Noise σ is a share of a vector's root mean square coordinate. Formats of 8 bits and fewer "
    "scale each vector to its largest coordinate. One setting a model: the one with the most exact "
    "solutions; at most 64 of them."
)


@dataclass(frozen=True)
class WhereRow:
    setting: Annotated[Cell, "model"]
    vector: Annotated[Cell, ""]
    solutions: Annotated[Cell, "solutions"]
    norm: Annotated[Cell, "norm"]
    vocabulary_median: Annotated[Cell, "vocabulary median"]
    vocabulary_greatest: Annotated[Cell, "vocabulary greatest"]
    nearest: Annotated[Cell, "nearest"]
    random: Annotated[Cell, "random"]


def section(results: Results) -> Section:
    """Make the section of what `prototok report --measure` found in this run's solutions."""
    groups = results.measured.get("solutions", {}).get("groups", [])
    counts = ", ".join(f"{g['solutions']} solutions of {Subject.of(g).name}" for g in groups)
    return Section(
        code="S",
        title="What solutions are like, and what they withstand",
        source="beyond the paper",
        status=f"complete, {len(groups)} models" if groups else "not measured",
        n=counts or "0",
        here=", ".join(dict.fromkeys(f"fits of {g['experiment']}" for g in groups)) or "–",
        there="–",
        content=_content(groups),
    )


def _content(groups: list[dict[str, Any]]) -> Content:
    if not groups:
        return Content(remarks=("Not measured: prototok report RUN --measure.",))
    titles = [f"{Subject.of(g).name}, N = {g['length']}" for g in groups]
    where = [
        _where(group, title, vector)
        for group, title in zip(groups, titles, strict=True)
        for vector in ("e", "m")
        if vector in group
    ]
    return Content(
        remarks=(_HOW,),
        tables=(
            _withstood(groups, titles),
            table_of("solutions-where", _WHERE, WhereRow, where),
        ),
        charts=tuple(
            _components(f"solutions-pca-{i}", group["pca"], title)
            for i, (group, title) in enumerate(zip(groups, titles, strict=True), start=1)
        ),
    )


def _where(group: dict[str, Any], title: str, vector: str) -> WhereRow:
    own, vocabulary = group[vector], group["vocabulary"]
    return WhereRow(
        setting=label(title),
        vector=label(vector),
        solutions=number(group["solutions"]),
        norm=mean_std(own["norm"], 2),
        vocabulary_median=number(vocabulary[2], 2),
        vocabulary_greatest=number(vocabulary[4], 2),
        nearest=mean_std(own["nearest"], 3),
        random=number(own["random"], 3),
    )


def _withstood(groups: list[dict[str, Any]], titles: list[str]) -> Table:
    conditions = dict.fromkeys((w["what"], w["setting"]) for g in groups for w in g["withstood"])
    return grid(
        name="solutions-robustness",
        caption=_ROBUSTNESS,
        header=("", "condition"),
        columns=titles,
        rows=[
            GridRow(names=condition, cells=[_under(condition, group) for group in groups])
            for condition in conditions
        ],
    )


def _under(condition: tuple[str, str], group: dict[str, Any]) -> Cell:
    for found in group["withstood"]:
        if (found["what"], found["setting"]) == condition:
            text = f"{found['exact']}/{group['solutions']}; {found['accuracy']:.3f}"
            share = found["exact"] / group["solutions"]
            return Cell(text, share, note="exact of all; mean token accuracy")
    return Cell("·", None, "unplanned", "another dtype")


def _components(name: str, found: dict[str, Any], title: str) -> Chart:
    """Draw solutions in the plane of their first two principal components, by context."""
    series = []
    homes = list(dict.fromkeys(found["context"]))
    for home in homes:
        at = [j for j, c in enumerate(found["context"]) if c == home]
        series.append(
            Series(
                # Colours come again after so many: then the points' own names are all there is.
                label=_short(found["text"][at[0]]) if len(homes) <= len(COLOURS) else "",
                x=tuple(found["coordinates"][j][0] for j in at),
                y=tuple(found["coordinates"][j][1] for j in at),
                kind="points",
                names=tuple(found["text"][j] or "" for j in at),
                weight=2,
            )
        )
    share = [f"{100 * v:.0f} %" for v in found["explained"]]
    return Chart(
        name=name,
        title=f"{title}: e by text or context",
        x=Axis(f"first principal component ({share[0]})"),
        y=Axis(f"second ({share[1]})"),
        series=tuple(series),
    )


def _short(text: str | None) -> str:
    """Return the beginning of a text, as the name of its points."""
    words = " ".join((text or "").split())
    return words if len(words) <= 24 else words[:23] + "…"
