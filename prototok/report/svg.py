"""Small self-contained SVG figures, drawn without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _LABEL, _BAR, _GAP, _TOP = 860, 330, 16, 4, 64
_COLOURS = ("#0b6e4f", "#3a6ea5", "#c77700", "#8a4f7d", "#6b6b6b", "#a33b3b")


@dataclass(frozen=True)
class Bar:
    """One bar: the group it stands in, what it is, its value and what is written behind it."""

    group: str
    label: str
    value: float
    note: str


def log_bars(title: str, axis: str, bars: Sequence[Bar]) -> str:
    """Draw bars on a logarithmic axis, grouped in the order given, as an SVG document."""
    values = [bar.value for bar in bars]
    low = math.floor(math.log10(min(values)))
    high = max(low + 1, math.ceil(math.log10(max(values))))
    span = _WIDTH - _LABEL - 90

    def x_of(value: float) -> float:
        return _LABEL + span * (math.log10(value) - low) / (high - low)

    groups = list(dict.fromkeys(bar.group for bar in bars))
    labels = list(dict.fromkeys(bar.label for bar in bars))
    height = _TOP + len(bars) * (_BAR + _GAP) + len(groups) * 26 + 30
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="16" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
        f'<text x="16" y="44" fill="#555">{escape(axis)}</text>',
    ]
    for power in range(low, high + 1):
        x = x_of(10.0**power)
        out.append(
            f'<line x1="{x:.1f}" y1="{_TOP - 8}" x2="{x:.1f}" y2="{height - 22}" stroke="#ddd"/>'
            f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle" fill="#555">'
            f"{10**power if power >= 0 else 10.0**power:,}</text>"
        )
    y = float(_TOP)
    for group in groups:
        y += 18
        out.append(f'<text x="16" y="{y - 4:.1f}" font-weight="bold">{escape(group)}</text>')
        for bar in (b for b in bars if b.group == group):
            colour = _COLOURS[labels.index(bar.label) % len(_COLOURS)]
            end = x_of(bar.value)
            middle = y + _BAR - 4
            out.append(
                f'<text x="{_LABEL - 8}" y="{middle:.1f}" text-anchor="end">'
                f"{escape(bar.label)}</text>"
                f'<rect x="{_LABEL}" y="{y:.1f}" width="{max(1.0, end - _LABEL):.1f}" '
                f'height="{_BAR}" fill="{colour}"/>'
                f'<text x="{end + 6:.1f}" y="{middle:.1f}">{escape(bar.note)}</text>'
            )
            y += _BAR + _GAP
        y += 8
    out.append("</svg>")
    return "\n".join(out) + "\n"
