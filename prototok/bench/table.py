"""A record of the bench as people read it: the table, the figure, and both on disk."""

from __future__ import annotations

import json
from pathlib import Path

from prototok.bench.timing import BATCHES, ONE
from prototok.common.files import write_text
from prototok.report.svg import Dot, log_dots


def figure(record: dict) -> str:
    """Draw tokens/s at batch 1 of every way, fastest first, by model and length, as SVG."""
    dots = []
    for case in record["cases"]:
        ways = [t for t in case["timings"] if t["batch"] == 1]
        for t in sorted(ways, key=lambda t: -t["tokens_per_second"]):
            rate, other = t["tokens_per_second"], t["dtype"] != case["dtype"]
            slow, quick = t["quartiles"][1], t["quartiles"][0]
            dots.append(
                Dot(
                    f"{case['model']}, N = {case['length']}",
                    t["method"] + (f" ({t['dtype']})" if other else ""), t["method"], rate,
                    f"{rate:,.0f}", rate * t["seconds"] / slow, rate * t["seconds"] / quick, other,
                )
            )  # fmt: skip
    about = "A dot: the median; its bar: quartiles of the time. A ring: in another dtype."
    title = "One forward against autoregressive decoding"
    return log_dots(title, about, "tokens/s at batch 1", dots)


def table(record: dict, wide: bool = False) -> str:
    """Lay out the record for printing: equal length, fits, each mode's longest, and every way.

    80 columns; `wide` shows every column.
    """
    blocks = ["At equal length, batch 1:", *_columns(_equal_length(record), wide)]
    blocks += _with_and_without(record)
    if record["longest"]:
        blocks += ["", "Each mode at its own longest length (one forward against K = 1):"]
        blocks += _columns(_own_longest(record), wide)
    blocks += ["", "Every autoregressive way at batch 1 in tokens/s, strongest first:"]
    for case in record["cases"]:
        blocks += _every_way(case)
    return "\n".join([*blocks, "", *notes(record, wide)])


def summary(record: dict) -> str:
    """Return equal length and fits alone, with the machine and what the columns mean."""
    lines = _columns(_equal_length(record), wide=False) + _with_and_without(record)
    return "\n".join([*lines, "", *notes(record | {"longest": []}, wide=False)])


Column = tuple[str, bool]  # its name, and whether 80 columns have room for it
_EQUAL: tuple[Column, ...] = (
    ("model", True), ("N", True), ("exact", True), ("fit s", True), ("one fwd", False),
    ("tok/s", True), ("of roof", False), ("best AR", True), ("(how)", False),
    ("ratio", True), ("vs dynamic", True), ("best batch", False), ("ceiling", True),
    ("break-even", False),
)  # fmt: skip
_LONGEST: tuple[Column, ...] = (
    ("model", True), ("source", False), ("one fwd N (max)", True), ("time", False),
    ("tok/s", True), ("AR N (max)", True), ("time", False), ("tok/s", True), ("ratio", True),
    ("best batch", False),
)  # fmt: skip


def _columns(rows: tuple[tuple[Column, ...], list[tuple[str, ...]]], wide: bool) -> list[str]:
    """Return the lines of a table, with the columns that fit, or with all of them."""
    header, body = rows
    kept = [i for i, (_, narrow) in enumerate(header) if wide or narrow]
    names = tuple(name for name, _ in header)
    return _aligned([tuple(row[i] for i in kept) for row in (names, *body)])


def _equal_length(record: dict) -> tuple[tuple[Column, ...], list[tuple[str, ...]]]:
    rows: list[tuple[str, ...]] = []
    for c in record["cases"]:
        ways = _at_batch_1(c)
        one, best = ways[:2]
        fit = c["fit_seconds_per_text"]
        rows.append(
            (
                c["model"],
                str(c["length"]),
                "–" if c["exact"] is None else f"{c['exact']}/{c['texts']}",
                f"{c['step_seconds']:.3g} a step" if fit is None else f"{fit:.2f}",
                f"{1e3 * one['seconds']:.2f} ms",
                f"{one['tokens_per_second']:,.0f}",
                _percent(one["share"]),
                f"{best['tokens_per_second']:,.0f}",
                _way(best),
                f"{c['ratio_batch_1']:.1f}×",
                f"{c['ratio_dynamic_batch_1']:.1f}×",
                f"{c['ratio_best_batch']:.1f}×",
                f"{c['ceiling']:.0f}×",
                "–" if c["break_even_decodes"] is None else f"{c['break_even_decodes']:,.0f}",
            )
        )
    return _EQUAL, rows


def _with_and_without(record: dict) -> list[str]:
    """Return the block that sets `fast` beside the networks of a built-in model, if they ran."""
    rows: list[tuple[str, ...]] = [
        ("model", "N", "fast: exact", "steps", "fit s", "learned: exact", "steps", "fit s")
    ]
    for c in record["cases"]:
        learned = c.get("learned")  # not in a record of before
        if learned is None:
            continue
        row = [c["model"], str(c["length"])]
        for exact, steps, seconds in (
            (c["exact"], c["fit_steps_median"], c["fit_seconds_per_text"]),
            (learned["exact"], learned["steps_median"], learned["seconds_per_text"]),
        ):
            row += [
                f"{exact}/{c['texts']}", "–" if steps is None else f"{steps:.0f}", f"{seconds:.3f}",
            ]  # fmt: skip
        rows.append(tuple(row))
    if len(rows) == 1:
        return []
    return ["", "Fits without and with the networks that the model brings:", *_aligned(rows)]


def _own_longest(record: dict) -> tuple[tuple[Column, ...], list[tuple[str, ...]]]:
    def mode(timing: dict | None) -> tuple[str, str]:
        if timing is None:
            return "–", "–"
        return f"{1e3 * timing['seconds']:.2f} ms", f"{timing['tokens_per_second']:,.0f}"

    rows: list[tuple[str, ...]] = []
    for r in record["longest"]:
        reached = []
        for found, grid in zip((r["one_forward"], r["autoregressive"]), r["grids"], strict=True):
            open_end = "≥ " if max(found) == grid[-1] else ""
            reached.append(f"({open_end}{max(found)})")
        ratio, best = r["ratio_batch_1"], r["ratio_best_batch"]
        rows.append(
            (
                r["model"],
                r["source"],
                f"{r['one_forward_length']} {reached[0]}",
                *mode(r["one_forward_timing"]),
                f"{r['autoregressive_length']} {reached[1]}",
                *mode(r["autoregressive_timing"]),
                "–" if ratio is None else f"{ratio:.1f}×",
                "–" if best is None else f"{best:.1f}×",
            )
        )
    return _LONGEST, rows


def _at_batch_1(case: dict) -> list[dict]:
    """Return the timings at batch 1: one forward, then the others, strongest first."""
    found = sorted(
        (t for t in case["timings"] if t["batch"] == 1),
        key=lambda t: (t["method"] != ONE, -t["tokens_per_second"]),
    )
    assert found[0]["method"] == ONE
    return found


def _every_way(case: dict) -> list[str]:
    ways = _at_batch_1(case)[1:]
    width = max(len(_way(t)) for t in ways)

    def one(t: dict) -> str:
        of = f"  {_percent(t['share'], ' of bandwidth')}" if t["share"] is not None else ""
        return f"  {_way(t):<{width}}  {t['tokens_per_second']:>9,.0f}{of}"

    return [f"{case['model']}, N = {case['length']}", *map(one, ways)]


def _way(timing: dict) -> str:
    how = timing["method"].removeprefix("generate, ").removesuffix(" cache")
    short = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
    return f"{how} {short.get(timing['dtype'], timing['dtype'])}"


def _percent(share: float | None, of: str = "") -> str:
    """Return a share of what memory or products allow, with the reason where it is above 1."""
    if share is None:
        return "–"
    return f"{100 * share:.0f} %{of}" + (" (weights stay in a cache)" if share > 1 else "")


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Pad columns to one width, the first to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells))
    return lines


def notes(record: dict, wide: bool) -> list[str]:
    """Return the machine, and what the columns mean that are shown."""
    m = record["machine"]
    device = m["cuda device"] if m["cuda device"] != "none" else m["processor"]
    dtypes = ", ".join(sorted({c["dtype"] for c in record["cases"]}))
    lines = [
        f"{device}, {m['threads']} threads, {dtypes}",
        f"torch {m['torch']}, transformers {m['transformers']}",
        "exact: texts that come back whole when decoded alone, in two dtypes.",
        "fit s: seconds a text. tok/s: of one forward. best AR: of the fastest loop.",
        "ratio: of these two. vs dynamic: against generate as it comes, as in the paper.",
        "ceiling: the largest ratio two efficient implementations could show here.",
    ]
    if record["longest"]:
        lines.append("N (max): longest N, median over texts (best text).")
    if wide:
        lines += [
            "of roof: share of the speed that this machine's matrix and copy rates allow.",
            "engine static-KV: prototok's own decoder.",
            f"best batch: each way at its best batch size of {', '.join(map(str, BATCHES))}.",
            "break-even: decodings after which the fit has paid off.",
        ]
    return lines


def write(record: dict, out: Path) -> None:
    """Write bench.json to `out` and the figure beside it, each whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(record, indent=1) + "\n")
    write_text(out.with_suffix(".svg"), figure(record))
