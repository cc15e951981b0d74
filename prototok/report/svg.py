"""Figures that stand alone, drawn without a plotting library: values on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _LABEL, _NOTE, _ROW, _TOP, _BOTTOM = 860, 250, 640, 21, 66, 48
_LIGHT = ("#1f5fa8", "#c2571a", "#2f7d4f", "#8b3f87", "#8a6d00", "#b3263a", "#3b7f8c", "#5c5c5c")
_DARK = ("#7fb2ee", "#f0985f", "#6cc18f", "#d38fcf", "#d9bd5a", "#f0808c", "#7cc4d1", "#b5b5b5")


@dataclass(frozen=True)
class Dot:
    """One row of a figure.

    group, label  what it stands under, and its name
    method        what its colour stands for
    value         None: there is no value, and `note` says why
    note          written at the right
    low, high     ends of its error bar; high may be infinite
    hollow        a ring in place of a dot
    """

    group: str
    label: str
    method: str
    value: float | None
    note: str
    low: float | None = None
    high: float | None = None
    hollow: bool = False


def log_dots(title: str, about: str, axis: str, dots: Sequence[Dot]) -> str:
    """Draw values with error bars on a logarithmic axis, in the order given, as an SVG document.

    `about` is one line below the title; `axis` is what is measured. Dark where the reader's
    colours are.
    """
    numbers = [v for d in dots for v in (d.value, d.low, d.high) if v and math.isfinite(v)]
    low, high = _limits(numbers or [1.0])
    left, right = _LABEL + 10, _NOTE - 12

    def x_of(value: float) -> float:
        if not math.isfinite(value):
            return float(right)
        return left + (right - left) * math.log(value / low) / math.log(high / low)

    methods = list(dict.fromkeys(dot.method for dot in dots))
    groups = list(dict.fromkeys(dot.group for dot in dots))
    bottom = _TOP + len(dots) * _ROW + len(groups) * 30
    height = bottom + _BOTTOM
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}">',
        f"<title>{escape(title)}</title>",
        f"<style>{_style(len(methods))}</style>",
        f'<rect class="paper" width="{_WIDTH}" height="{height}"/>',
        f'<text x="16" y="26" class="title">{escape(title)}</text>',
        f'<text x="16" y="46" class="soft">{escape(about)}</text>',
    ]
    for tick in _ticks(low, high):
        x = x_of(tick)
        out.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>'
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" class="soft">'
            f"{tick:,g}</text>"
        )
    out.append(
        f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
        f'<text x="{(left + right) / 2:.0f}" y="{bottom + 36}" text-anchor="middle">'
        f"{escape(axis)}, log scale</text>"
    )
    y = float(_TOP)
    for group in groups:
        y += 24
        out.append(f'<text x="16" y="{y - 2:.0f}" class="group">{escape(group)}</text>')
        for dot in (d for d in dots if d.group == group):
            y += _ROW
            out.append(
                f'<text x="{_LABEL}" y="{y:.0f}" text-anchor="end">{escape(dot.label)}</text>'
                f'<text x="{_NOTE}" y="{y:.0f}">{escape(dot.note)}</text>'
            )
            out += _mark(dot, methods.index(dot.method) % len(_LIGHT), y - 4, x_of)
        y += 6
    return "\n".join([*out, "</svg>"]) + "\n"


def _mark(dot: Dot, colour: int, y: float, x_of: Callable[[float], float]) -> list[str]:
    """Draw the error bar and the dot on it, where there are any."""
    out = []
    if dot.low is not None and dot.high is not None:
        path = f"M{x_of(dot.low):.1f} {y:.1f}H{x_of(dot.high):.1f}"
        for end in filter(math.isfinite, (dot.low, dot.high)):  # an open end has no cap
            path += f"M{x_of(end):.1f} {y - 4:.1f}v8"
        out.append(f'<path class="s{colour}" d="{path}"/>')
    if dot.value is not None:
        kind = f"ring s{colour}" if dot.hollow else f"f{colour}"
        out.append(
            f'<circle class="{kind}" cx="{x_of(dot.value):.1f}" cy="{y:.1f}" r="4.5">'
            f"<title>{escape(f'{dot.label}: {dot.note}')}</title></circle>"
        )
    return out


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Return what the axis spans: the data and a tenth of a decade at either end."""
    low, high = min(values), max(values)
    if high < 10 * low:  # never less than a decade, so that little looks like little
        middle = math.sqrt(low * high)
        low, high = min(low, middle / 10**0.5), max(high, middle * 10**0.5)
    return low / 10**0.1, high * 10**0.1


def _ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 of each decade, or fewer where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 100 else (1, 3) if high / low < 3000 else (1,)
    return [m * 10.0**p for p in powers for m in steps if low <= m * 10.0**p <= high]


def _style(methods: int) -> str:
    """Return the style sheet, with a colour for each of so many methods."""

    def colours(chosen: Sequence[str]) -> str:
        return "".join(
            f".s{i}{{stroke:{c}}}.f{i}{{fill:{c}}}" for i, c in enumerate(chosen[:methods])
        )

    return (
        "text{font:12px system-ui,sans-serif;fill:#1c1e21}.title{font-size:15px;font-weight:600}"
        ".group{font-weight:600}.soft{fill:#5d636b}.paper{fill:#fff}"
        ".grid{stroke:#e6e8eb}.axis{stroke:#8b929a}path,.ring{fill:none;stroke-width:1.6}"
        ".ring{fill:#fff}" + colours(_LIGHT) + "@media(prefers-color-scheme:dark){"
        "text{fill:#e4e6e9}.soft{fill:#a9b0b8}.paper,.ring{fill:#14171a}.grid{stroke:#2a2f35}"
        ".axis{stroke:#7d848c}" + colours(_DARK) + "}"
    )
