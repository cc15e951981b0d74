"""The report as one HTML page that needs nothing beside itself.

Everything that comes from a run is escaped; the policy in the page's head allows its own style
sheet and its own script, by their hashes, and nothing else: no other script, no style attribute, no
image, no connection.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path

from prototok.report.chart import Chart, svg
from prototok.report.findings import Finding
from prototok.report.gallery import Exhibit, Token
from prototok.report.section import Section
from prototok.report.tables import Cell, Table

_HERE = Path(__file__).parent
MARGINS = (0.1, 0.5, 1.0, 2.0)  # where the colours of a token change
EMPTY = "No fit of this run is done yet: every number below is the paper’s. prototok sweep run RUN"
_VERDICTS = {"holds": "holds", "does not hold": "fails", "mixed": "mixed"}


def page(
    title: str,
    origin: str,
    findings: Sequence[Finding],
    parts: Sequence[Section],
    exhibits: Sequence[Exhibit],
    files: str | None,
) -> str:
    """Make the whole document.

    Args:
        title: of the page.
        origin: versions and where the results come from, one line.
        findings: the paper's findings with what was found here.
        parts: the experiments.
        exhibits: texts of the gallery.
        files: name of the folder beside the page with CSV, LaTeX, SVG, …; None where there is none.
    """
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    body = [
        '<div class="frame">', _contents(title, origin, parts), "<main>",
        _overview(parts, not exhibits),
        _findings(findings), *(_section(part, files) for part in parts), _gallery(exhibits),
        f"<footer>{escape(origin)}</footer>", "</main></div>",
    ]  # fmt: skip
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{style}</style></head><body>",
            *body,
            f"<script>{script}</script></body></html>",
            "",
        ]
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _contents(title: str, origin: str, parts: Sequence[Section]) -> str:
    rows = [
        f'<li><span class="dot {part.state}"></span><a href="#{part.anchor}">{escape(part.code)} '
        f"{escape(part.title)}</a><small>{escape(part.source)} · {escape(part.status)}"
        f"{'' if part.state == 'none' else '<br>' + escape(part.n)}</small></li>"
        for part in parts
    ]
    return (
        f"<nav><h1>{escape(title)}</h1><p>{escape(origin)}</p><ol>"
        '<li><a href="#experiments">Experiments, n, settings</a></li>'
        '<li><a href="#findings">The paper’s findings, here</a></li>'
        + "".join(rows)
        + '<li><a href="#gallery">Texts, token by token</a></li></ol></nav>'
    )


def _overview(parts: Sequence[Section], empty: bool) -> str:
    rows = "".join(
        f'<tr><td class="label"><a href="#{part.anchor}">{escape(part.code)}</a></td>'
        f'<td class="wrap">{escape(part.title)} <span class="source">{escape(part.source)}</span>'
        f'</td><td class="wrap" data-of="status">{escape(part.status)}</td>'
        f'<td class="wrap" data-of="n">{escape(part.n)}</td>'
        f'<td class="wrap" data-of="settings">{escape(part.here)}</td></tr>'
        for part in parts
    )
    return (
        '<section id="experiments"><header><h2>Experiments</h2><p class="remark">'
        "Every experiment of Mezentsev &amp; Oseledets, “Exploring the Latent Capacity of LLMs for "
        "One-Step Text Generation” (arXiv 2505.21189), with what was run here. Their numbers stand "
        "in grey beside ours. In a cell, … is not done yet, · was not planned, * is not whole; the "
        "pointer over a cell shows its n.</p>"
        + (f'<p class="empty">{EMPTY}</p>' if empty else "")
        + "</header>"
        '<figure class="table wide"><table id="table-experiments"><thead><tr>'
        + "".join(_head(text, True) for text in ("", "experiment", "status", "n", "settings here"))
        + f"</tr></thead><tbody>{rows}</tbody></table></figure></section>"
    )


def _findings(findings: Sequence[Finding]) -> str:
    rows = "".join(
        f'<tr><td class="label"><a href="#{escape(f.code.lower())}">{escape(f.code)}</a></td>'
        f'<td class="wrap">{escape(f.claim)}</td>'
        f'<td class="label verdict {_VERDICTS.get(f.verdict, "unknown")}" data-of="here">'
        f"{escape(f.verdict)}</td>"
        f'<td class="wrap" data-of="figures">{escape(f.evidence)}</td></tr>'
        for f in findings
    )
    return (
        '<section id="findings"><header><h2>The paper’s findings, here</h2></header>'
        '<figure class="table wide"><table id="table-findings"><thead><tr>'
        + "".join(_head(text, True) for text in ("", "finding", "here", "figures"))
        + f"</tr></thead><tbody>{rows}</tbody></table></figure></section>"
    )


def _section(part: Section, files: str | None) -> str:
    facts = (
        ("status", part.status), ("n", part.n), ("here", part.here), ("in the paper", part.there),
    )  # fmt: skip
    ours = [t for t in part.content.tables if "-paper" not in t.name]
    theirs = [t for t in part.content.tables if "-paper" in t.name]
    return "\n".join(
        [
            f'<section id="{part.anchor}"><header><h2>{escape(part.code)} {escape(part.title)} '
            f'<span class="source">{escape(part.source)}</span></h2><dl>',
            *(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts),
            "</dl>",
            *(f'<p class="remark">{escape(text)}</p>' for text in part.content.remarks),
            "</header>",
            '<div class="tables">',
            *(_table(t, files, "") for t in ours),
            *(_table(t, files, " theirs") for t in theirs),
            "</div>",
            '<div class="charts">' if part.content.charts else "",
            *(_chart(c, files) for c in part.content.charts),
            "</div>" if part.content.charts else "",
            "</section>",
        ]
    )


def _table(table: Table, files: str | None, kind: str) -> str:
    labels = [all(row[i].state == "label" for row in table.rows) for i in range(len(table.header))]
    head = "".join(_head(text, left) for text, left in zip(table.header, labels, strict=True))
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    return (
        f'<figure class="table{kind}"><figcaption>{escape(table.caption)}'
        f"{_links(files, table.name, ('csv', 'tex'))}</figcaption>"
        f'<table id="table-{escape(table.name)}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></figure>"
    )


def _head(text: str, left: bool) -> str:
    kind = ' class="label"' if left else ""
    return f'<th scope="col"{kind}><button type="button">{escape(text)}</button></th>'


def _cell(cell: Cell) -> str:
    value = "" if cell.value is None else f' data-v="{cell.value!r}"'
    note = f' title="{escape(cell.note)}"' if cell.note else ""
    return f'<td class="{cell.state}"{value}{note}>{escape(cell.text)}</td>'


def _chart(chart: Chart, files: str | None) -> str:
    links = _links(files, chart.name, ("svg",))
    return f"<figure>{svg(chart)}<figcaption>{links}</figcaption></figure>"


def _links(files: str | None, name: str, kinds: tuple[str, ...]) -> str:
    if files is None:
        return ""
    found = " ".join(
        f'<a href="{escape(files)}/{escape(name)}.{kind}">{kind.upper()}</a>' for kind in kinds
    )
    return f' <span class="files">{found}</span>'


def _gallery(exhibits: Sequence[Exhibit]) -> str:
    options = "".join(
        f'<option value="{escape(x.anchor)}">{escape(f"{x.experiment} · {x.title}")}</option>'
        for x in exhibits
    )
    bounds = ("0", *(f"{m:g}" for m in MARGINS))
    key = "".join(f'<span class="t m{i}">&gt; {text}</span>' for i, text in enumerate(bounds) if i)
    return "\n".join(
        [
            '<section id="gallery"><header><h2>Texts, token by token</h2>',
            '<p class="remark">Of each kind of fit the exact one with the least margin and the '
            "best that is not exact. The bar below a token is its margin, the target's logit minus "
            "the best other, decoded alone, the worse of the model’s dtype and float32.</p>",
            "</header>",
            '<p class="key">margin <span class="t m0">0 …</span>'
            f'{key}<span class="t wrong"><s>wanted</s> <b>came</b></span></p>',
            f'<p class="pick" hidden><label for="pick">Text</label><select id="pick">{options}'
            "</select></p>",
            *map(_exhibit, exhibits),
            "" if exhibits else '<p class="remark">No fit is finished.</p>',
            "</section>",
        ]
    )


def _exhibit(one: Exhibit) -> str:
    margin = "" if one.margin is None else f" · least margin {one.margin:.3f}"
    return (
        f'<article class="exhibit" data-anchor="{escape(one.anchor)}"><h3>{escape(one.title)}</h3>'
        f'<p class="remark">{escape(one.experiment)} · {escape(one.about)}{margin}</p>'
        f'<div class="tokens">{"".join(map(token_html, one.tokens))}</div></article>'
    )


def token_html(token: Token) -> str:
    """Draw a token with a bar of its margin's colour; what came beside what was wanted."""
    name = "" if token.margin is None else f' title="margin {token.margin:.3f}"'
    target = escape(_visible(token.target))
    if not token.right:
        came = escape(_visible(token.decoded))
        return f'<span class="t wrong"{name}><s>{target}</s><small><b>{came}</b></small></span>'
    level = 0 if token.margin is None else margin_level(token.margin)
    return f'<span class="t m{level}"{name}>{target}</span>'


def margin_level(margin: float) -> int:
    """Return which of the five colours a margin has: 0 … 4."""
    return sum(margin > bound for bound in MARGINS)


def _visible(text: str) -> str:
    """Show white space that a reader would not see: a token may be nothing else."""
    return text.replace("\n", "⏎").replace("\t", "⇥") or "∅"
