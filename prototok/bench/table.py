"""A record of the bench as people read it: the table, the figure, and both on disk."""

from __future__ import annotations

import json
from pathlib import Path

from prototok.bench.timing import BATCHES, ONE
from prototok.common.files import write_text
from prototok.report.svg import Bar, log_bars


def figure(record: dict) -> str:
    """Draw tokens/s at batch 1 of every way, by model and length, as an SVG document."""
    bars = []
    for case in record["cases"]:
        group = f"{case['model']}, N = {case['length']}"
        for t in case["timings"]:
            if t["batch"] == 1:
                label = t["method"] + ("" if t["dtype"] == case["dtype"] else f" ({t['dtype']})")
                rate = t["tokens_per_second"]
                bars.append(Bar(group, label, rate, f"{rate:,.0f}"))
    return log_bars("One forward against autoregressive decoding", "tokens/s at batch 1", bars)


def table(record: dict) -> str:
    """Lay out the record for printing: equal length, each mode's longest, and every way."""
    blocks = ["At equal length, batch 1:", *_aligned(_equal_length(record))]
    if record["longest"]:
        blocks += ["", "Each mode at its own longest length (one forward against K = 1):"]
        blocks += _aligned(_own_longest(record))
    blocks += ["", "Every autoregressive way at batch 1 in tokens/s, strongest first:"]
    blocks += [_every_way(case) for case in record["cases"]]
    return "\n".join([*blocks, "", *_notes(record)])


def _equal_length(record: dict) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (
            "model", "N", "exact", "fit s/text", "one fwd", "tok/s", "of roof", "best AR tok/s",
            "(how)", "ratio", "vs dynamic", "best batch", "ceiling", "break-even",
        )
    ]  # fmt: skip
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
    return rows


def _own_longest(record: dict) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (
            "model", "source", "one fwd N (max)", "time", "tok/s", "AR N (max)", "time", "tok/s",
            "ratio", "best batch",
        )
    ]  # fmt: skip

    def mode(timing: dict | None) -> tuple[str, str]:
        if timing is None:
            return "–", "–"
        return f"{1e3 * timing['seconds']:.2f} ms", f"{timing['tokens_per_second']:,.0f}"

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
    return rows


def _at_batch_1(case: dict) -> list[dict]:
    """Return the timings at batch 1: one forward, then the others, strongest first."""
    found = sorted(
        (t for t in case["timings"] if t["batch"] == 1),
        key=lambda t: (t["method"] != ONE, -t["tokens_per_second"]),
    )
    assert found[0]["method"] == ONE
    return found


def _every_way(case: dict) -> str:
    def one(t: dict) -> str:
        of = f", {_percent(t['share'])} of bandwidth" if t["share"] is not None else ""
        return f"{_way(t)} {t['tokens_per_second']:,.0f}{of}"

    return f"{case['model']} N = {case['length']}: " + "; ".join(map(one, _at_batch_1(case)[1:]))


def _way(timing: dict) -> str:
    how = timing["method"].removeprefix("generate, ").removesuffix(" cache")
    short = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
    return f"{how} {short.get(timing['dtype'], timing['dtype'])}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Pad columns to one width, the first to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells))
    return lines


def _notes(record: dict) -> list[str]:
    m = record["machine"]
    device = m["cuda device"] if m["cuda device"] != "none" else m["processor"]
    dtypes = ", ".join(sorted({c["dtype"] for c in record["cases"]}))
    return [
        f"{device}, {m['threads']} threads, torch {m['torch']}, "
        f"transformers {m['transformers']}, {dtypes}",
        "exact: texts that come back whole when decoded alone, in the model's dtype and float32.",
        "of roof: share of the speed that this machine's matrix and copy rates allow.",
        "ratio: against the fastest autoregressive way. engine static-KV: prototok's own decoder.",
        "vs dynamic: against generate with its default cache, which is the paper's comparison.",
        f"best batch: each way at its best batch size of {', '.join(map(str, BATCHES))}.",
        "ceiling: the largest ratio that two efficient implementations could show here at batch 1.",
        "break-even: decodings after which the fit has paid off.",
        "N (max): longest N, median over texts (best text).",
    ]  # fmt: skip


def write(record: dict, out: Path) -> None:
    """Write bench.json to `out` and the figure beside it, each whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(record, indent=1) + "\n")
    write_text(out.with_suffix(".svg"), figure(record))
