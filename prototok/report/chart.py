"""A chart as data, and its drawing as SVG; `prototok.report.raster` draws the same data.

Colours are classes, so that the page's style sheet can turn them dark; a file of its own carries
`STYLE`. Every series has a dash or a marker beside its colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#1f5fa8", "#c2571a", "#2f7d4f", "#8b3f87", "#8a6d00", "#b3263a", "#3b7f8c", "#5c5c5c")
DASHES = ("", "7 3", "2 2", "9 3 2 3", "4 2", "1 2", "12 3", "5 1")
_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 22, 30, 46
_LINE, _GLYPH = 17, 6.1  # height of a line of the legend, width of a character in it

STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#222}.title{font-weight:600;font-size:12.5px}"
    ".grid{stroke:#ddd}.axis{stroke:#777}.guide{stroke:#999;stroke-dasharray:3 3}"
    ".paper{fill:#fff}"
    + "".join(f".s{i}{{stroke:{c}}}.f{i}{{fill:{c}}}" for i, c in enumerate(COLOURS))
)


@dataclass(frozen=True)
class Axis:
    """`ticks`: where to put them; None chooses. `low` and `high` are the least range shown."""

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    ticks: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Series:
    """One series.

    kind      "line", "points" or "guide" (a thin line named at its end)
    low, high  a band around a line
    names     what each point is, shown by a pointer
    weight    size of points, 1 is small
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    kind: str = "line"
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    names: tuple[str, ...] = ()
    weight: float = 1.0
    colour: int | None = None


@dataclass(frozen=True)
class Chart:
    """`name` is that of its files."""

    name: str
    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]

    def coloured(self) -> Iterator[tuple[int, Series]]:
        """Yield each series with the number of its colour."""
        free = 0
        for one in self.series:
            if one.colour is not None:
                yield one.colour % len(COLOURS), one
            elif one.kind == "guide":
                yield 0, one
            else:
                yield free % len(COLOURS), one
                free += 1


def limits(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    """Return what an axis spans: data and range asked for, with a margin on a linear axis."""
    inside = [v for v in values if math.isfinite(v) and (v > 0 or not axis.log)]
    low, high = (min(inside), max(inside)) if inside else ((1.0, 10.0) if axis.log else (0.0, 1.0))
    low = low if axis.low is None else min(low, axis.low)
    high = high if axis.high is None else max(high, axis.high)
    if axis.log:
        return (low / 1.25, high * 1.25)
    pad = (high - low or abs(high) or 1.0) * 0.04
    return low - (0 if low == axis.low else pad), high + (0 if high == axis.high else pad)


def extent(chart: Chart) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the ranges of both axes."""
    drawn = [s for s in chart.series if s.kind != "guide"] or list(chart.series)
    xs = [v for s in drawn for v in s.x]
    ys = [v for s in drawn for v in (*s.y, *s.low, *s.high)]
    return limits(chart.x, xs), limits(chart.y, ys)


def ticks(axis: Axis, low: float, high: float) -> list[float]:
    """Return where an axis is marked."""
    if axis.ticks is not None:
        return [t for t in axis.ticks if low <= t <= high]
    if axis.log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        few = [10.0**p for p in powers if low <= 10.0**p <= high]
        if len(few) >= 2:
            return few
        fine = [t for p in powers for m in (1, 2, 5) if low <= (t := m * 10.0**p) <= high]
        if len(fine) >= 2:
            return fine
    step = _nice((high - low) / 5)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float) -> str:
    """Write a number with at most four significant digits, thousands apart."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.0e}"
    rounded = round(value, 4)
    return f"{rounded:,.0f}" if rounded == int(rounded) else f"{rounded:g}"


def svg(chart: Chart, alone: bool = False) -> str:
    """Draw the chart as an `<svg>` element; `alone` makes it a document with its own style."""
    (x0, x1), (y0, y1) = extent(chart)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    to_x, to_y = _scale(chart.x, x0, x1, _LEFT, right), _scale(chart.y, y0, y1, bottom, _TOP)
    legend, lines = _legend(chart)
    height = _HEIGHT + _LINE * lines
    space = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
    size = f' width="{_WIDTH}" height="{height}"' if alone else ""
    clip = f"clip-{chart.name}"
    out = [
        f'<svg{space} viewBox="0 0 {_WIDTH} {height}"{size} role="img" '
        f'aria-label="{escape(chart.title)}" class="chart">'
    ]
    if alone:
        out.append(f"<style>{STYLE}</style>")
    out.append(f'<rect class="paper" width="{_WIDTH}" height="{height}"/>')
    out.append(f'<text class="title" x="{_LEFT}" y="18">{escape(chart.title)}</text>')
    for t in ticks(chart.x, x0, x1):
        at = f"{to_x(t):.1f}"
        out.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{_TOP}" y2="{bottom}"/>')
        out.append(f'<text x="{at}" y="{bottom + 15}" text-anchor="middle">{tick_label(t)}</text>')
    for t in ticks(chart.y, y0, y1):
        at = f"{to_y(t):.1f}"
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at}" y2="{at}"/>')
        out.append(
            f'<text x="{_LEFT - 6}" y="{to_y(t) + 4:.1f}" text-anchor="end">{tick_label(t)}</text>'
        )
    middle = (_TOP + bottom) / 2
    out += [
        f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>',
        f'<line class="axis" x1="{_LEFT}" x2="{_LEFT}" y1="{_TOP}" y2="{bottom}"/>',
        f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 14}" text-anchor="middle">'
        f"{escape(chart.x.label)}</text>",
        f'<text transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(chart.y.label)}</text>",
        f'<clipPath id="{escape(clip)}"><rect x="{_LEFT - 2}" y="{_TOP - 2}" '
        f'width="{right - _LEFT + 4}" height="{bottom - _TOP + 4}"/></clipPath>',
        f'<g clip-path="url(#{escape(clip)})">',
    ]
    for colour, one in chart.coloured():
        out += _lines(one, colour, to_x, to_y)
    out.append("</g>")
    for colour, one in chart.coloured():  # whole, also those on the edge of the frame
        out += _markers(one, colour, to_x, to_y)
    out += [*_guide_names(chart, to_x, to_y, (x0, x1), (y0, y1)), *legend, "</svg>"]
    return "\n".join(out) + "\n"


def _places(one: Series, to_x: _Scale, to_y: _Scale) -> list[tuple[float, float, int]]:
    """Return where the points that can be shown stand, each with its number."""
    return [
        (to_x(x), to_y(y), i)
        for i, (x, y) in enumerate(zip(one.x, one.y, strict=True))
        if to_x.shows(x) and to_y.shows(y)
    ]


def _lines(one: Series, colour: int, to_x: _Scale, to_y: _Scale) -> list[str]:
    """Draw the line of a series, and its band."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in _places(one, to_x, to_y))
    if one.kind == "guide":
        return [f'<polyline class="guide" fill="none" points="{path}"/>']
    out = []
    if one.low:
        band = [f"{to_x(x):.1f},{to_y(v):.1f}" for x, v in zip(one.x, one.high, strict=True)]
        band += [
            f"{to_x(x):.1f},{to_y(v):.1f}"
            for x, v in reversed(list(zip(one.x, one.low, strict=True)))
        ]
        out.append(f'<polygon class="f{colour}" fill-opacity="0.13" points="{" ".join(band)}"/>')
    if one.kind == "line":
        dash = f' stroke-dasharray="{DASHES[colour]}"' if DASHES[colour] else ""
        out.append(
            f'<polyline class="s{colour}" fill="none" stroke-width="1.8"{dash} points="{path}"/>'
        )
    return out


def _markers(one: Series, colour: int, to_x: _Scale, to_y: _Scale) -> list[str]:
    """Draw the points of a series; of a line only where they are few."""
    out: list[str] = []
    shown = [] if one.kind == "guide" else _places(one, to_x, to_y)
    if one.kind == "points" or len(shown) <= 24:
        size = 2.6 * one.weight**0.5
        opacity = ' fill-opacity="0.55"' if one.kind == "points" and one.weight <= 1 else ""
        for x, y, i in shown:
            name = one.names[i] if one.names else f"{one.label}: {one.x[i]:g}, {one.y[i]:.4g}"
            out.append(
                f'<g class="f{colour}"{opacity}><title>{escape(name)}</title>'
                f"{_marker(colour, x, y, size)}</g>"
            )
    return out


def _marker(colour: int, x: float, y: float, r: float) -> str:
    """Draw a circle, square, triangle or diamond, by colour."""
    shape = colour % 4
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>'
    if shape == 1:
        return f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r:.1f}" height="{2 * r:.1f}"/>'
    r *= 1.3
    corners = (
        ((0, -r), (r, 0.8 * r), (-r, 0.8 * r)) if shape == 2 else ((0, -r), (r, 0), (0, r), (-r, 0))
    )
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{path}"/>'


def _guide_names(
    chart: Chart, to_x: _Scale, to_y: _Scale, xs: tuple[float, float], ys: tuple[float, float]
) -> list[str]:
    """Put each guide's name near the last of its points that is inside the frame."""
    out = []
    for one in chart.series:
        if one.kind != "guide" or not one.label:
            continue
        inside = [
            (x, y) for x, y in _along(one, chart) if xs[0] <= x <= xs[1] and ys[0] <= y <= ys[1]
        ]
        if inside:
            x, y = inside[int(len(inside) * 0.94)]
            out.append(
                f'<text x="{to_x(x):.1f}" y="{to_y(y) - 4:.1f}" text-anchor="end" '
                f'class="faint">{escape(one.label)}</text>'
            )
    return out


def _along(one: Series, chart: Chart) -> Iterator[tuple[float, float]]:
    """Return two hundred points on a guide's line, straight as it is drawn."""
    (xa, xb), (ya, yb) = (one.x[0], one.x[-1]), (one.y[0], one.y[-1])
    for i in range(201):
        t = i / 200
        x = xa ** (1 - t) * xb**t if chart.x.log else xa + t * (xb - xa)
        y = ya ** (1 - t) * yb**t if chart.y.log else ya + t * (yb - ya)
        yield x, y


def _legend(chart: Chart) -> tuple[list[str], int]:
    """Draw the legend below the frame; say how many lines it takes."""
    entries: dict[str, tuple[int, Series]] = {}
    for colour, one in chart.coloured():
        if one.kind != "guide" and one.label:
            entries.setdefault(one.label, (colour, one))
    if not entries:
        return [], 0
    out, x, y = [], float(_LEFT), float(_HEIGHT + 4)
    lines = 1
    for text, (colour, one) in entries.items():
        width = 34 + _GLYPH * len(text)
        if x + width > _WIDTH - 4 and x > _LEFT:
            x, y, lines = float(_LEFT), y + _LINE, lines + 1
        if one.kind == "line":
            dash = f' stroke-dasharray="{DASHES[colour]}"' if DASHES[colour] else ""
            out.append(
                f'<line class="s{colour}" x1="{x:.0f}" x2="{x + 20:.0f}" y1="{y - 4:.0f}" '
                f'y2="{y - 4:.0f}" stroke-width="1.8"{dash}/>'
            )
        out.append(f'<g class="f{colour}">{_marker(colour, x + 10, y - 4, 2.6)}</g>')
        out.append(f'<text x="{x + 25:.0f}" y="{y:.0f}">{escape(text)}</text>')
        x += width
    return out, lines


@dataclass(frozen=True)
class _Scale:
    """A value's place on the paper."""

    log: bool
    low: float
    high: float
    start: float
    end: float

    def shows(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.log)

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(max(value, 1e-300) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def _scale(axis: Axis, low: float, high: float, start: float, end: float) -> _Scale:
    return _Scale(axis.log, low, high, start, end)


def _nice(step: float) -> float:
    """Return the next of 1, 2, 5 × 10ⁿ above `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))
