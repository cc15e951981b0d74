"""The charts of a report drawn by matplotlib, for PNG and PDF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prototok.common.files import whole
from prototok.report.chart import COLOURS, Chart, Series, extent, tick_label, ticks

_MARKERS = ("o", "s", "^", "D")
_STYLES = ("-", "--", ":", "-.")


def available() -> bool:
    """Return True if matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(chart: Chart, paths: list[Path]) -> None:
    """Write the chart to every path; the suffix says the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.3), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for colour, one in chart.coloured():
        _draw(axes, one, colour)
    (x0, x1), (y0, y1) = extent(chart)
    for axis, scale, (low, high), which in (
        (chart.x, axes.set_xscale, (x0, x1), axes.xaxis),
        (chart.y, axes.set_yscale, (y0, y1), axes.yaxis),
    ):
        if axis.log:
            scale("log")
        at = ticks(axis, low, high)
        which.set_ticks(at, [tick_label(t) for t in at])
        which.set_ticks([], minor=True)
    axes.set(xlim=(x0, x1), ylim=(y0, y1), xlabel=chart.x.label, ylabel=chart.y.label)
    axes.set_title(chart.title, fontsize=9, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    named = {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    if named:
        axes.legend(named.values(), named.keys(), fontsize=6, frameon=False)
    for path in paths:
        # Without a date the same run gives the same bytes.
        metadata = {"CreationDate": None} if path.suffix == ".pdf" else {"Software": None}
        with whole(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], metadata=metadata)


def _draw(axes: object, one: Series, colour: int) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    if one.kind == "guide":
        axes.plot(one.x, one.y, color="#999999", linestyle=":", linewidth=0.8)
        return
    look: dict[str, Any] = {
        "clip_on": one.kind != "points",  # markers on the edge of the frame are whole
        "color": COLOURS[colour],
        "marker": _MARKERS[colour % 4],
        "label": one.label or None,
    }
    if one.kind == "points":
        alpha = 0.55 if one.weight <= 1 else 1.0
        axes.plot(one.x, one.y, linestyle="", markersize=2.5 * one.weight**0.5, alpha=alpha, **look)
        return
    few = len(one.x) <= 24
    look["marker"] = look["marker"] if few else ""
    axes.plot(one.x, one.y, linestyle=_STYLES[colour % 4], linewidth=1.2, markersize=3, **look)
    if one.low:
        axes.fill_between(one.x, one.low, one.high, color=COLOURS[colour], alpha=0.13, linewidth=0)
