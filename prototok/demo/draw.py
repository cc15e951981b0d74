"""What the page shows, as strings of HTML and SVG; all that comes from a text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from prototok.common.shown import count
from prototok.demo.play import POINTS, SOLUTIONS, Film, Look, Walk
from prototok.report.chart import Axis, Chart, Series, svg
from prototok.report.gallery import Token
from prototok.report.page import MARGINS, margin_level, token_html

_LINES = 40  # of a film: more looks than these are thinned out
_CELL, _LINE, _LEFT, _TOP = 18, 6, 40, 16  # sizes in the film


def box(*parts: str) -> str:
    """Enclose parts in what the page's style sheet looks for."""
    return f'<div class="prototok">{"".join(parts)}</div>'


def sentence(text: str, kind: str = "") -> str:
    """Draw a line of text; `kind` is "", "good" or "bad"."""
    return box(f'<p class="says {kind}">{escape(text)}</p>')


def key() -> str:
    """Explain the colours."""
    bounds = ("0", *(f"{m:g}" for m in MARGINS))
    shown = "".join(f'<span class="t m{i}">&gt; {b}</span>' for i, b in enumerate(bounds))
    return box(
        f'<p class="key">margin, target logit − best other {shown}'
        '<span class="t wrong"><s>wanted</s> <small><b>came</b></small></span></p>'
    )


def tokens(film: Film, look: Look) -> str:
    """Draw the text's tokens, each in the colour of its margin."""
    shown = (
        token_html(Token(_piece(film, wanted), _piece(film, came), right, margin))
        for wanted, came, right, margin in zip(
            film.targets.tolist(), look.ids.tolist(), look.right.tolist(), look.margin.tolist(),
            strict=True,
        )
    )  # fmt: skip
    return f'<div class="tokens">{"".join(shown)}</div>'


def facts(look: Look) -> str:
    """Say how many tokens are right, and the smallest margin."""
    least = f"{float(look.margin.min()):.2f}".replace("-", "−")
    return f"{int(look.right.sum())} of {len(look.ids)} tokens right, smallest margin {least}"


def solutions(film: Film, step: int) -> str:
    """Draw both solutions as they were after `step` updates."""
    parts = []
    for s in range(SOLUTIONS):
        if film.looks[s]:
            look = film.look_at(s, step)
            head = f"Solution {s + 1} · update {look.step} · {facts(look)}"
            parts += [f"<h4>{escape(head)}</h4>", tokens(film, look)]
    return box(*parts)


def story(film: Film) -> str:
    """Draw accuracy by position, step by step: a line for every look, the newest below."""
    parts = []
    for s, looks in enumerate(film.looks):
        if looks:
            parts.append(
                f"<figure><figcaption>Solution {s + 1}</figcaption>{_grid(looks)}</figure>"
            )
    return box(f'<div class="story">{"".join(parts)}</div>')


def _grid(looks: Sequence[Look]) -> str:
    every = max(1, -(-len(looks) // _LINES))
    shown = [*looks[:-1:every], looks[-1]]
    n = len(shown[0].ids)
    width, height = _LEFT + n * _CELL, _TOP + len(shown) * _LINE + 2
    out = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" class="grid-of-looks" '
        f'aria-label="right tokens by position and update">',
        f'<text x="{_LEFT}" y="11">position 1</text>' if n > 4 else "",
        f'<text x="{width}" y="11" text-anchor="end">{n}</text>',
    ]
    for line, look in enumerate(shown):
        y = _TOP + line * _LINE
        levels = [
            f"m{margin_level(margin)}" if right else "wrong"
            for right, margin in zip(look.right.tolist(), look.margin.tolist(), strict=True)
        ]
        start = 0
        for i in range(1, n + 1):  # neighbours of one colour are one rectangle
            if i == n or levels[i] != levels[start]:
                out.append(
                    f'<rect class="{levels[start]}" x="{_LEFT + start * _CELL}" y="{y}" '
                    f'width="{(i - start) * _CELL}" height="{_LINE}"/>'
                )
                start = i
    for line in {0, len(shown) - 1}:
        at = _TOP + line * _LINE + 6
        out.append(f'<text x="{_LEFT - 5}" y="{at}" text-anchor="end">{shown[line].step}</text>')
    return "".join([*out, "</svg>"])


def margins(film: Film) -> str:
    """Draw the margin at every position, of both solutions as they ended."""
    n = len(film.targets)
    places = tuple(float(i) for i in range(1, n + 1))
    names = [_piece(film, i) for i in film.targets.tolist()]
    ended = [looks[-1] for looks in film.looks]
    series = [Series("", (1.0, float(n)), (0.0, 0.0), kind="guide")]
    for s, look in enumerate(ended):
        values = tuple(look.margin.tolist())
        said = tuple(f"{name!r}: {v:.2f}" for name, v in zip(names, values, strict=True))
        series.append(Series(f"solution {s + 1}", places, values, names=said, colour=s))
    chart = Chart(
        "margins", "Margin at every position",
        Axis("position"), Axis("target logit − best other", low=0.0), tuple(series),
    )  # fmt: skip
    return box(f"<figure>{svg(chart)}</figure>")


def outcome(film: Film) -> tuple[str, str]:
    """Say how the fit ended, and whether that is "good" or "bad"."""
    assert film.fit is not None
    exact = int(film.fit.exact.sum())
    if exact:
        steps = " and ".join(str(n) for n in film.fit.steps[0].tolist())
        return (
            f"Ended after {steps} updates; {exact} of {SOLUTIONS} give the whole text back.",
            "good",
        )
    return "Neither solution gives the whole text back. Try a shorter one.", "bad"


def verdict(film: Film, texts: Sequence[str]) -> str:
    """Say what came back, decoded alone."""
    assert film.fit is not None
    exact = film.fit.exact[0].tolist()
    parts = []
    for s, text in enumerate(texts):
        steps = int(film.fit.steps[0, s])
        least = float(film.fit.margin[0, s])
        says = (
            f"Solution {s + 1}: the whole text after {count(steps, 'update')}, decoded alone in "
            f"two dtypes; smallest margin {least:.2f}."
            if exact[s]
            else f"Solution {s + 1}: {int(film.fit.correct[0, s])} of {len(film.targets)} tokens "
            f"after {count(steps, 'update')}; try a shorter text."
        )
        kind = "good" if exact[s] else "bad"
        parts.append(f'<p class="says {kind}">{escape(says)}</p><pre>{escape(text)}</pre>')
    return box(*parts)


def path(way: Walk, t: float, curved: bool) -> str:
    """Draw the tokens at t of a way, over the accuracy along both ways."""
    look, accuracy = way.at(t, curved), way.accuracy()
    grid = tuple(i / (POINTS - 1) for i in range(POINTS))
    series = [
        Series(label, grid, tuple(accuracy[name]), colour=i)
        for i, (name, label) in enumerate(
            (("straight", "straight segment"), ("curve", "Bezier curve"))
        )
        if name in accuracy
    ]
    share = float(look.right.float().mean())
    here = Series("here", (t,), (share,), kind="points", weight=6, colour=5)
    chart = Chart(
        "path", "Accuracy on the way from solution 1 to solution 2",
        Axis("t", low=0.0, high=1.0), Axis("token accuracy", low=0.0, high=1.0), (*series, here),
    )  # fmt: skip
    head = f"t = {t:.2f} · {facts(look)}"
    return box(f"<h4>{escape(head)}</h4>", tokens(way.film, look), f"<figure>{svg(chart)}</figure>")


def _piece(film: Film, token: int) -> str:
    return film.lm.decode_ids([token])
