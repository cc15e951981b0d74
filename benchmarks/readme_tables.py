"""Write the tables of README and docs from the committed results; no figure is typed by hand.

python benchmarks/readme_tables.py            # rewrite what stands between the markers
python benchmarks/readme_tables.py --check    # exit code 1 where a document says otherwise
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from prototok.bench.table import summary, table
from prototok.bench.timing import Peak, ceiling
from prototok.report.results import front_of, read
from prototok.report.verdict import mean_of, share_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def result(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def gpu_of(record: dict) -> str | None:
    """Return the name of the GPU that a record is of, or None."""
    name = record["machine"].get("cuda device", "none")
    return None if name == "none" else name


def source(record: dict) -> str:
    m = record["machine"]
    where = f"{m['processor']}, {m['threads']} threads"
    if (gpu := gpu_of(record)) is not None:
        where = f"{gpu}, triton {m['triton']}"
    return (
        f"{where}, torch {m['torch']}, transformers {m['transformers']}, {record['date']}, "
        f"commit {record['commit']}."
    )


def bench() -> str:
    tables = [table(result("bench.json")), summary(result("bench-amx.json"))]
    lines = ["The output of `python -m prototok.bench`, and of another run its first part:"]
    for text in tables:
        lines += ["", "```", text, "```"]
    return "\n".join(lines)


def bench_short() -> str:
    return "\n".join(["```", summary(result("bench.json")), "```"])


def reconstruction() -> str:
    record = result("reconstruction.json")
    lines = [
        "| model | N | recipe | most steps | exact | confirmed | steps, quartiles | s / text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in record["cases"]:
        steps = " / ".join(f"{q:.0f}" for q in c["steps_quartiles"])
        lines.append(
            f"| {c['model']} | {c['length']} | {c['recipe']} | {c['max_steps']} "
            f"| {c['exact']}/{c['texts']} | {c['confirmed']} | {steps} "
            f"| {c['seconds_per_text']:.2f} |"
        )
    return "\n".join([*lines, "", f"`{record['command']}`: {source(record)}"])


def table1() -> str:
    record = result("table1.json")
    lengths = sorted({c["length"] for c in record["cells"]})
    lines = [
        "| arrangement | " + " | ".join(f"N = {n}" for n in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for name in dict.fromkeys(c["arrangement"] for c in record["cells"]):
        cells = {c["length"]: c for c in record["cells"] if c["arrangement"] == name}
        row = " | ".join(f"{cells[n]['mean']:.2f}±{cells[n]['std']:.2f}" for n in lengths)
        lines.append(f"| `{name}` | {row} |")
    what = (
        f"{record['model']}, {record['texts']} texts, the paper's recipe, at most "
        f"{record['recipe']['max_steps']} steps. `{record['command']}`: {source(record)}"
    )
    return "\n".join([*lines, "", what])


def by_processor(pattern: str) -> dict[str, list[dict]]:
    """The records of results that match, by the processor and the instructions that they ran on.

    Without those of a GPU, whose sizes are others.
    """
    found: dict[str, list[dict]] = {}
    for path in sorted(RESULTS.glob(pattern)):
        record = json.loads(path.read_text())
        if gpu_of(record) is not None:
            continue
        m = record["machine"]
        instructions = m.get("C++ kernels", "instructions not recorded").split(",")[0]
        found.setdefault(f"{m['processor']}, {instructions}", []).append(record)
    return found


def ratio_of(quartiles: list[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.2f}× ({low:.2f}–{high:.2f})"


def fit_step() -> str:
    found = by_processor("fit-step-*.json")

    def name(r: dict) -> str:
        return f"{r['model']}, {r['rows']} × {r['length']}, {r['dtype']}"

    def cell(r: dict) -> str:
        skipped = " (work that is skipped counts)" if r["mfu"]["ours"] > 1 else ""
        return (
            f"{ratio_of(r['ratio']['batched'])}; batch 1 {r['ratio']['paper'][1]:.2f}×; "
            f"{r['step_ms']['ours']:.0f} ms for {r['step_ms']['batched']:.0f}; "
            f"MFU {100 * r['mfu']['ours']:.0f} %{skipped}"
            + ("" if "attention" in r else "; the loop with fused attention alone")
        )

    lines = steps_table(found, list(found), name, cell)
    sources = [f"`{r['command']}`: {source(r)}" for records in found.values() for r in records]
    return "\n".join([*lines, "", *sources])


def fit_step_short() -> str:
    """The ratio to the best batched loop alone: models down, processors across."""
    found = by_processor("fit-step-*.json")

    def name(r: dict) -> str:
        return f"{r['model'].removesuffix(' (random weights)')}, {r['rows']} × {r['length']}"

    short = [p.removeprefix("Intel(R) ").replace("(R) Processor", "") for p in found]
    lines = steps_table(found, short, name, lambda r: f"{r['ratio']['batched'][1]:.2f}×")
    return "\n".join(lines)


def steps_on_a_gpu() -> list[dict]:
    return [result(path.name) for path in sorted(RESULTS.glob("fit-step-*-cuda.json"))]


def gpu_steps() -> str:
    """A step on a GPU beside the same loops, with its source."""
    records = steps_on_a_gpu()
    lines = [
        "| step | ours / batched | ours / batch 1 | ms a step | batched | MFU | batched | GiB "
        "| batched |",
        "|---" * 9 + "|",
    ]
    for r in records:
        ms, mfu, peak = r["step_ms"], r["mfu"], r["peak_memory_bytes"]
        lines.append(
            f"| {r['model']}, {r['rows']} × {r['length']} | {ratio_of(r['ratio']['batched'])} "
            f"| {r['ratio']['paper'][1]:.0f}× | {ms['ours']:.1f} | {ms['batched']:.1f} "
            f"| {100 * mfu['ours']:.1f} % | {100 * mfu['batched']:.1f} % "
            f"| {peak['ours'] / 2**30:.1f} | {peak['batched'] / 2**30:.1f} |"
        )
    sources = [f"`{r['command']}`: {source(r)}" for r in records]
    return "\n".join([*lines, "", *sources])


def gpu_short() -> str:
    """The ratio and MFU of a step on a GPU alone."""
    lines = ["|NVIDIA H200|step|MFU|", "|---|---|---|"]
    for r in steps_on_a_gpu():
        name = r["model"].removesuffix(" (random weights)")
        lines.append(
            f"|{name}, {r['rows']} × {r['length']}|{r['ratio']['batched'][1]:.2f}×"
            f"|{100 * r['mfu']['ours']:.0f} %|"
        )
    return "\n".join(lines)


def gpu_tokens() -> str:
    """A token of the KV-cached decoder, and one forward, on a GPU."""
    record = result("decoder-cuda.json")
    what = {
        "early": "a token", "in turn": "a token, every launch waiting for the one before",
        "one forward": "one forward of N positions",
    }  # fmt: skip
    lines = ["| shape, N | what | µs | of its bandwidth or roofline |", "|---|---|---:|---:|"]
    for c in record["cells"]:
        for name, share in c["share"].items():
            lines.append(
                f"| {c['shape']}, {c['length']} | {what[name]} "
                f"| {1e6 * c['seconds'][name][1]:.0f} | {100 * share:.1f} % |"
            )
    return "\n".join([*lines, "", f"`{record['command']}`: {source(record)}"])


def gpu_products() -> str:
    """The rates of products, each shape's by the part of the step, weighted by what they cost."""
    rates: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in (RESULTS / "gemms-cuda.jsonl").read_text().splitlines():
        if not line.startswith("{"):
            continue
        one = json.loads(line)
        if one["gflop"] < 30:
            continue
        of_part = rates.setdefault(one["shape"], {}).setdefault(one["part"], [])
        of_part.append((one["gflop"] * one["times"], one["tflops_per_second"]))
    parts = ("forward", "backward", "head")
    lines = ["| shape | " + " | ".join(parts) + " |", "|---" * 4 + "|"]
    for shape, by_part in rates.items():
        cells = []
        for part in parts:
            some = by_part.get(part, [])
            seconds = sum(work / rate for work, rate in some)
            cells.append(f"{sum(work for work, _ in some) / seconds:.0f}" if some else "–")
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gpu_throughput() -> str:
    """Every way to make N tokens on a GPU, by batch."""
    record = result("throughput-cuda.json")
    lines = ["| N, batch | way | tokens/s | share |", "|---|---|---:|---:|"]
    for case in record["cases"]:
        for t in case["timings"]:
            share = "" if t["share"] is None else f"{100 * t['share']:.0f} %"
            lines.append(
                f"| {case['length']}, {t['batch']} | {t['method']} "
                f"| {t['tokens_per_second']:,.0f} | {share} |"
            )
    return "\n".join([*lines, "", f"`{record['command']}`: {source(record)}"])


def steps_table(
    found: dict[str, list[dict]], titles: list[str], name: Callable[[dict], str],
    cell: Callable[[dict], str],
) -> list[str]:  # fmt: skip
    """The lines of a table, models down, processors across."""
    rows: dict[str, dict[str, str]] = {}
    for processor, records in found.items():
        for r in records:
            rows.setdefault(name(r), {})[processor] = cell(r)
    lines = ["|model, B × N|" + "|".join(titles) + "|", "|---" * (1 + len(found)) + "|"]
    return lines + [
        f"|{of}|" + "|".join(cells.get(p, "–") for p in found) + "|" for of, cells in rows.items()
    ]


def never_slower() -> str:
    """Every cell's ratio: models and dtypes down, rows and lengths across, a table a processor."""
    parts = []
    for processor, records in by_processor("never-slower-*.json").items():
        cells = [c for r in records for c in r["cells"]]
        sizes = sorted({(c["rows"], c["length"]) for c in cells})
        parts += [
            f"**{processor}**: {sum(c['ratio'][1] < 1 for c in cells)} of {len(cells)} cells "
            "below 1.0.", "",
            "| model | " + " | ".join(f"{b} × {n}" for b, n in sizes) + " |",
            "|---" * (1 + len(sizes)) + "|",
        ]  # fmt: skip
        for name in dict.fromkeys((c["preset"], c["dtype"]) for c in cells):
            of = {(c["rows"], c["length"]): c for c in cells if (c["preset"], c["dtype"]) == name}
            row = (f"{of[size]['ratio'][1]:.2f}" if size in of else "–" for size in sizes)
            parts.append(f"| {', '.join(name)} | {' | '.join(row)} |")
        parts += ["", *(f"`{r['command']}`: {source(r)}" for r in records), ""]
    return "\n".join(parts).rstrip()


def one_forward() -> str:
    """Share of the roofline and ratio to plain transformers: models down, lengths across."""
    parts = []
    for processor, records in by_processor("one-forward-*.json").items():
        for r in records:
            lengths = sorted({c["length"] for c in r["cells"]})
            parts += [
                f"**{processor.rpartition(',')[0]}, {r['instructions']}**", "",
                "| model | " + " | ".join(f"N = {n}" for n in lengths) + " |",
                "|---" * (1 + len(lengths)) + "|",
            ]  # fmt: skip
            for name in dict.fromkeys(c["preset"] for c in r["cells"]):
                of = {c["length"]: c for c in r["cells"] if c["preset"] == name}
                row = (
                    f"{of[n]['ms']['ours']:.2f} ms, {of[n]['share'][1]:.0%} "
                    f"({of[n]['share'][0]:.0%}–{of[n]['share'][2]:.0%}), {of[n]['ratio'][1]:.2f}×"
                    for n in lengths
                )
                parts.append(f"| {name} | {' | '.join(row)} |")
            parts += ["", f"`{r['command']}`: {source(r)}", ""]
    return "\n".join(parts).rstrip()


def models() -> str:
    lines = [
        "| model | shape | parameters | held-out loss | training |",
        "|---|---|---|---|---|",
    ]
    for name in ("tiny-llama", "tiny-neox"):
        folder = ROOT / "prototok" / "models" / name
        r = json.loads((folder / "training.json").read_text())
        config = json.loads((folder / "config.json").read_text())
        lines.append(
            f"| `{name}` | {r['architecture']}, d {config['hidden_size']}, "
            f"{config['num_hidden_layers']} layers, V {config['vocab_size']} "
            f"| {r['parameters'] / 1e6:.1f}M "
            f"| {r['held_out_loss']:.3f} nats a token, {r['held_out_nats_per_byte']:.3f} a byte "
            f"| {r['settings']['tokens'] / 1e6:.1f}M tokens |"
        )
    return "\n".join(lines)


# Dense bf16 FLOP/s and bytes/s, from the makers' data sheets.
GPUS = {
    "H200 SXM": (989e12, 4.8e12),
    "H100 SXM": (989e12, 3.35e12),
    "A100 SXM 80 GB": (312e12, 2.039e12),
    "A100 PCIe 80 GB": (312e12, 1.935e12),
}


def ceilings() -> str:
    lines = ["| GPU | dense bf16 TFLOP/s | TB/s | ceiling |", "|---|---|---|---|"]
    for name, (flops, rate) in GPUS.items():
        most = ceiling(1 << 30, torch.bfloat16, Peak(flops, rate))
        lines.append(f"| {name} | {flops / 1e12:.0f} | {rate / 1e12:.2f} | {most:.0f}× |")
    return "\n".join(lines)


ARMS = ("m as fast as e", "m at a tenth", "m frozen")
MODES = {"shared": "one forward, m shared", "own": "one forward, m not shared"}


def figure2() -> str:
    lines = [
        "| model | mode | N: max / median / mean | H_LM, nats | texts | most steps |",
        "|---|---|---|---|---|---|",
    ]
    sources = []
    for path in sorted(RESULTS.glob("figure2_*.json")):
        record = json.loads(path.read_text())
        for c in record["cases"]:
            longest, nats = c["longest"], statistics.fmean(c["h_lm_nats"])
            mode = MODES.get(c["mode"]) or f"autoregressive, K = {c['mode'][2:]}"
            lines.append(
                f"| {c['model']} | {mode} | {max(longest)} / {statistics.median(longest):g} / "
                f"{statistics.fmean(longest):.1f} | {nats:.1f} | {len(longest)} "
                f"| {record['recipe']['max_steps']} |"
            )
        sources.append(f"`{record['command']}`: {source(record)}")
    return "\n".join([*lines, "", *sources])


def steps_of(quartiles: list[float | None]) -> str:
    return " / ".join("–" if q is None else f"{q:.0f}" for q in quartiles)


def steps_to_exact() -> str:
    record = result("recipes.json")
    lines = [
        "| model | N | recipe | exact | 95 % | steps | first right | against paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cells = [s for s in record["summary"] if s["part"] == "test" and s["texts"] >= 16]
    papers = {s["model"]: s["steps_quartiles"][1] for s in cells if s["recipe"] == "paper"}
    for s in sorted(cells, key=lambda s: list(papers).index(s["model"])):
        middle, paper = s["steps_quartiles"][1], papers[s["model"]]
        # A median that was not reached is at least the budget.
        ratio = f"{paper / middle:.1f}×" if paper else f"> {5000 / middle:.1f}×" if middle else "–"
        low, high = s["exact_interval"]
        first = s["first_right_quartiles"][1]
        lines.append(
            f"| {s['model']} | {s['length']} | {s['recipe']} | {s['exact']}/{s['texts']} "
            f"| {low:.2f}–{high:.2f} | {steps_of(s['steps_quartiles'])} "
            f"| {'–' if first is None else f'{first:.0f}'} "
            f"| {'1' if s['recipe'] == 'paper' else ratio} |"
        )
    return "\n".join([*lines, "", f"`{record['command']}`: {source(record)}"])


def width() -> str:
    """The paper's recipe and `fast` before from one record, `fast` as it is from another."""
    before, record = result("recipes.json"), result("recipes_width.json")
    lines = [
        "| model | N | recipe | exact | steps | first right | against paper |",
        "|---|---|---|---|---|---|---|",
    ]

    def cells_of(summary: list[dict], when: str) -> dict[tuple[str, str], dict]:
        cells = [s for s in summary if s["part"] == "test" and s["texts"] >= 16]
        return {(s["model"], s["recipe"] + when): s for s in cells}

    # From a prior both are run anew, from the same one: another draw of it moves the median.
    cells = cells_of(before["summary"], ", before")
    cells = {key: s for key, s in cells.items() if "+" not in key[1]}
    cells |= cells_of(record["summary"], "")
    for model in dict.fromkeys(s["model"] for s in record["summary"]):
        paper = cells[model, "paper, before"]["steps_quartiles"][1]
        names = ("fast, before", "fast", "fast, before + prior", "fast + prior")
        for name in (*names, "fast, margin 0 + prior"):
            if (model, name) not in cells:
                continue
            s = cells[model, name]
            middle, first = s["steps_quartiles"][1], s["first_right_quartiles"][1]
            ratio = f"{paper / middle:.1f}×" if paper else f"> {5000 / middle:.1f}×"
            lines.append(
                f"| {model} | {s['length']} | {name} | {s['exact']}/{s['texts']} "
                f"| {steps_of(s['steps_quartiles'])} | {first:.0f} | {ratio} |"
            )
    return "\n".join([*lines, "", f"`{record['command']}`: {source(record)}"])


def sinks() -> str:
    """Each small model with nothing in front, behind one token, and behind learned vectors."""
    lines = [
        "| model | N | share on position 0 | in front | exact | median steps of the exact |",
        "|---|---|---|---|---|---|",
    ]
    for model in ("tiny-llama", "tiny-neox", "stories3m", "neox4m"):
        record = result(f"sink_{model}.json")
        share = record["share of attention on position 0"]
        lines += [
            f"| {model} | {record['length']} | {share:.3f} | {c['prefix']} "
            f"| {c['exact']} of {record['texts']} | {c['median']:.0f} |"
            for c in record["cells"]
        ]
    return "\n".join([*lines, "", f"Last: `{record['command']}`: {source(record)}"])


def fronts() -> str:
    """What stands in front of SmolLM2-135M."""
    record = result("sink_fronts.json")
    lines = [
        "| in front | exact | confirmed, bf16 / fp32 | steps of the exact | accuracy |",
        "|---|---|---|---|---|",
    ]
    for c in record["cells"]:
        steps = ", ".join(map(str, c["steps of the exact"]))
        confirmed, front = c["confirmed"], c["prefix"].replace("|", "\\|")
        lines.append(
            f"| {front} | {c['exact']} of {record['texts']} "
            f"| {confirmed['bfloat16']} / {confirmed['float32']} | {steps or '–'} "
            f"| {statistics.fmean(c['accuracy']):.2f} |"
        )
    return "\n".join([*lines, "", f"Last: `{record['command']}`: {source(record)}"])


def real_model() -> str:
    """Texts of SmolLM2-135M that no setting was chosen on, by length, recipe and source."""
    lines = [
        "| N | recipe | in front | most steps | source | exact | 95 % | steps | first right "
        "| tokens right | confirmed |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    paths = sorted((RESULTS / "real").rglob("*.json"))
    records = [json.loads(path.read_text()) for path in paths]
    cells: dict[tuple, list[tuple[dict, dict]]] = {}
    for path, record in zip(paths, records, strict=True):
        # A folder is named for what `fast` was like, where it was not as it is.
        folder = path.parent.name
        before = "" if folder == "real" else f", {folder.replace('-', ' ')}"
        for cell in record["cells"]:
            front = cell["prefix"].removesuffix(" (as asked)")
            arranged = record.get("arrangement", "e m*")
            how = cell["recipe"] + before + ("" if arranged == "e m*" else f", `{arranged}`")
            key = record["length"], how, front, record["max_steps"]
            cells.setdefault(key, []).append((record, cell))
    for key, parts in sorted(cells.items()):
        by_source: dict[str, list[tuple[float, float | None, float]]] = {}
        for record, cell in parts:
            each = record["texts"] // len(record["sources"])
            names = [name for name in record["sources"] for _ in range(each)]
            ended = [
                step if accuracy == 1 else math.inf
                for step, accuracy in zip(cell["steps"], cell["accuracy"], strict=True)
            ]
            first = cell.get("first right", ended)  # the paper's recipe ends there
            for name, *fit in zip(names, ended, first, cell["accuracy"], strict=True):
                by_source.setdefault(name, []).append(tuple(fit))
        by_source["all"] = [fit for fits in by_source.values() for fit in fits]
        for name, fits in sorted(by_source.items(), key=lambda item: (item[0] == "all", item)):
            steps = [ended for ended, _, _ in fits]
            exact = sum(map(math.isfinite, steps))
            share = share_of(exact, len(fits))
            right = [math.inf if right is None else right for _, right, _ in fits]
            accuracy = statistics.fmean(accuracy for _, _, accuracy in fits)
            confirmed = [
                str(sum(cell["confirmed"][dtype] for _, cell in parts))
                for dtype in ("bfloat16", "float32")
            ]
            lines.append(
                f"| {' | '.join(map(str, key))} | {name} | {exact} of {len(fits)} "
                f"| {share.low:.2f}–{share.high:.2f} "
                f"| {steps_of([at_share(steps, q) for q in (0.25, 0.5, 0.75)])} "
                f"| {steps_of([at_share(right, 0.5)])} | {accuracy:.2f} "
                f"| {' / '.join(confirmed) if name == 'all' else ''} |"
            )
    commits = ", ".join(sorted({record["commit"] for record in records}))
    files = f"`benchmarks/results/real/`: {len(records)} files, each with its command"
    return "\n".join([*lines, "", f"{files}; the last: {source(records[-1])} All: {commits}."])


def arrangements_real() -> str:
    """Table 1 of SmolLM2-135M: what comes back in each arrangement, behind a token and without."""
    one = read(RESULTS / "paper-real").experiments["table1"]
    columns = [
        (subject, n)
        for subject in one.values("subject")
        for n in sorted(set(one.where(subject=subject).values("length")))
        if n not in (2, 4)
    ]
    heads = [f"{front_of(subject.prefix)}: N = {n}" for subject, n in columns]
    lines = ["| arrangement | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for name in one.values("arrangement"):
        cells = []
        for subject, n in columns:
            fits = one.where(subject=subject, length=n, arrangement=name).fits()
            steps = [fit["steps"] if fit["exact"] else math.inf for fit in fits]
            middle = statistics.median(steps) if fits else math.inf
            exact = f"{sum(map(math.isfinite, steps))}/{len(fits)}"
            right = f"{statistics.mean(fit['accuracy'] for fit in fits):.2f}" if fits else ""
            updates = f"{middle:.0f}" if math.isfinite(middle) else "–"
            cells.append(f"{exact}, {right}, {updates}" if fits else "")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def at_share(values: list[float], share: float) -> float | None:
    """Return the value that `share` of them do not exceed; None where it is infinite."""
    value = sorted(values)[min(len(values) - 1, int(share * len(values)))]
    return value if math.isfinite(value) else None


def expected() -> str:
    """What a newcomer may expect: models from small to real, with what a step of each costs."""
    lines = [
        "| model | parameters | N | exact | steps, quartiles | a step | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    width = {(s["model"], s["recipe"]): s for s in result("recipes_width.json")["summary"]}
    for name in ("tiny-neox", "tiny-llama"):
        of = width[name, "fast + prior"]
        trained = json.loads((ROOT / "prototok" / "models" / name / "training.json").read_text())
        lines.append(
            f"| `{name}` (built in) | {trained['parameters'] / 1e6:.1f}M | {of['length']} "
            f"| {of['exact']} of {of['texts']} | {steps_of(of['steps_quartiles'])} | | |"
        )
    records = [json.loads(path.read_text()) for path in RESULTS.glob("real/16-fast-*.json")]
    fits = [
        step if accuracy == 1 else math.inf
        for record in records
        for cell in record["cells"]
        for step, accuracy in zip(cell["steps"], cell["accuracy"], strict=True)
    ]
    step = result("fit-step-smollm2-135m-avx512bf16.json")
    lines.append(
        f"| SmolLM2-135M | 135M | {records[0]['length']} | {sum(map(math.isfinite, fits))} of "
        f"{len(fits)} | {steps_of([at_share(fits, q) for q in (0.25, 0.5, 0.75)])} "
        f"| {step['step_ms']['ours']:.0f} ms for {step['rows']} texts "
        f"of {step['length']} tokens | {step['peak_memory_bytes']['process'] / 1e9:.1f} GB |"
    )
    return "\n".join([
        *lines, "",
        "A step of that shape (random weights) and the peak of the process that timed it, loops of "
        f"transformers included: `{step['command']}`: {source(step)}",
    ])  # fmt: skip


def soak() -> str:
    record = result("soak.json")
    units = {"memory": "MiB resident", "throughput": "texts a CPU second"}
    lines = ["| | median | growth over the run |", "|---|---|---|"]
    for name, row in record["verdict"].items():
        what = units.get(name, name.replace("_", " "))
        lines.append(f"| {what} | {row['median']:.4g} | {row['growth']:+.2g} |")
    last, m = record["windows"][-1], record["machine"]
    return "\n".join([
        *lines, "", f"{record['minutes']:.0f} minutes, of which the process had "
        f"{last['cpu_minutes']:.0f} minutes of CPU time: {m['processor']}, {m['threads']} threads, "
        f"torch {m['torch']}.",
    ])  # fmt: skip


def longest() -> str:
    """From the four texts a length of the study: the longest of them that comes back, a text."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in result("recipes.json")["cells"].values():
        if row["part"] == "test" and len(row["exact"]) == 4:
            key = row["model"], row["recipe"]["name"]
            found.setdefault(key, {})[row["length"]] = row["accuracy"]
    lines = [
        "| model | lengths tried | paper, a text | mean | fast + prior, a text | mean | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(model for model, _ in found):
        most = {
            recipe: [
                max((n for n, a in found[model, recipe].items() if a[text] >= 0.99), default=0)
                for text in range(4)
            ]
            for recipe in ("paper", "fast")
        }
        mean = {recipe: statistics.fmean(values) for recipe, values in most.items()}
        tried = ", ".join(map(str, sorted(found[model, "fast"])))
        lines.append(
            f"| {model} | {tried} | {', '.join(map(str, most['paper']))} | {mean['paper']:.1f} "
            f"| {', '.join(map(str, most['fast']))} | {mean['fast']:.1f} "
            f"| {mean['fast'] / mean['paper']:.2f}× |"
        )
    return "\n".join(lines)


def transfer() -> str:
    record = result("transfer.json")
    lines = [
        "| model | N | m learned on | as fast as e | at a tenth | frozen |",
        "|---|---|---|---|---|---|",
    ]
    rows: dict[tuple, dict[str, str]] = {}
    for c in record["cells"]:
        key = c["model"], c["length"], c["learned_on"] or "nothing: no prior"
        middle = c["steps_quartiles"][1]
        steps = "–" if middle is None else f"{middle:.0f}"
        rows.setdefault(key, {})[c["m"]] = f"{steps} ({c['exact']}/{c['texts']})"
    for (model, length, learned_on), arms in rows.items():
        # Without a prior there is nothing to leave m at.
        shown = [
            arms.get(m, arms.get("no prior", "") if i == 0 else "") for i, m in enumerate(ARMS)
        ]
        lines.append(f"| {model} | {length} | {learned_on} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", f"`{record['command']}`: {source(record)}"])


def capacity() -> str:
    record = result("capacity.json")
    lines = [
        "| model | grid up to | most steps | capacity, a text | one fit a length | apart "
        "| updates | CPU time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, c in record["cases"].items():
        texts, fits = c["capacity"]["exact"], c["one_fit_a_length"]["exact"]
        ratio = c["cost_ratio"]
        lines.append(
            f"| {model} | {c['grid'][-1]} | {c['max_steps']} | {', '.join(map(str, texts))} "
            f"| {', '.join(map(str, fits))} | {', '.join(map(str, c['grid_steps_apart']))} "
            f"| {ratio['updates']:.2f} | {ratio['cpu_seconds']:.2f} |"
        )
    return "\n".join([*lines, "", f"`{record['command']}`: {source(record)}"])


# Result files, and what a model's name gets behind it: `fast` of the same prior and processor
# stands beside each network.
AMORTISED = {
    "amortised.json": "",
    "amortised-amx.json": ", on AMX",
    "amortised-amx-prior.json": ", on AMX, best of 8 priors",
}
AMORTISED_REAL = {"amortised_real.json": "", "amortised_real-amx.json": ", on AMX"}
PARTS = {"amortised_parts.json": ""}


def amortised_cells(files: dict[str, str] = AMORTISED) -> list[dict]:
    cells = [
        c | {"model": c["model"] + where}
        for name, where in files.items() for c in result(name)["cells"].values()
    ]  # fmt: skip
    return sorted(cells, key=lambda c: (c["model"], c["length"], "trained" in c))


def amortised_commands() -> str:
    """The command lines of all cells, under the machine that ran them."""
    runs: dict[str, dict[str, dict[str, None]]] = {}
    for c in amortised_cells() + amortised_cells(PARTS):
        on, _, when = source(c).partition(c["date"])
        found = runs.setdefault(on.strip(" ,"), {}).setdefault(c["command"], {})
        found[c["date"] + when.rstrip(".")] = None
    return "\n\n".join(
        "\n".join([f"{on}:", "", *(f"* `{name}`: {'; '.join(of)}" for name, of in made.items())])
        for on, made in runs.items()
    )


def network_of(cell: dict) -> str:
    """Name a network by its training."""
    before = re.search(r"Optimizer trained at N = ([\d, ]+) for (\d+)", cell.get("begun") or "")
    at = ", ".join(map(str, cell["trained"]))
    words = f"{at}: {cell['training_steps']} steps"
    if before is not None:
        words = f"{before[1]}: {before[2]} steps, then {words}"
    if cell.get("near"):
        words += f" held near ({cell['near']:g})"
    return words + (" behind its encoder" if "shipped" in cell["recipe"] else "")


def paid(cell: dict, fast: dict) -> str:
    """The texts after which training has cost fewer positions than it has saved."""
    of_training = cell.get("training_positions")
    means = [statistics.mean(s for s in c["steps"] if s is not None) for c in (fast, cell)]
    saved = (means[0] - means[1]) * cell["length"]
    if of_training is None or saved <= 0:
        return "–"
    texts = of_training / saved
    digits = 10 ** (math.floor(math.log10(texts)) - 1)
    return f"{round(texts / digits) * digits:,}"


def amortised() -> str:
    cells = [c for c in amortised_cells() if c.get("text") is None]
    fast = {(c["model"], c["length"]): c for c in cells if "trained" not in c}
    lines = [
        "| model | N | network | trained at N | solved | 95 % | steps | 95 % of texts within "
        "| against fast | CPU ms a text | paid after texts |",
        "|---" * 11 + "|",
    ]
    # Those trained behind an encoder are in its table, short trainings in that of lengths.
    own = [
        c for c in cells
        if ("shipped" in c["recipe"] and c["length"] in c["trained"])
        or (c.get("trained") == [c["length"]] and c["training_steps"] >= 3000
            and "Encoder" not in (c.get("begun") or ""))
    ]  # fmt: skip
    used = {(c["model"], c["length"]): fast[c["model"], c["length"]] for c in own}
    shown = [c for c in cells if c in own or c in used.values()]
    for c in shown:
        low, high = c["solved_interval"]
        theirs = used[c["model"], c["length"]]
        name, how, after = "none: `fast`", "", ""
        if c is not theirs:
            name, how, after = c["recipe"].split(", ")[1], network_of(c), paid(c, theirs)
            if c.get("patience") is not None:
                name += f", patience {c['patience']}"
        quartiles, last = c["steps_quartiles"], c["steps_95"]
        # A guess may need no update at all.
        times = f"{theirs['steps_quartiles'][1] / quartiles[1]:.1f}×" if quartiles[1] else "–"
        cpu = f"{c['cpu_ms']:.1f}" if "cpu_ms" in c else ""
        lines.append(
            f"| {c['model']} | {c['length']} | {name} | {how} | {c['solved']}/{c['texts']} "
            f"| {low:.2f}–{high:.2f} | {steps_of(quartiles)} | {'–' if last is None else last} "
            f"| {times} | {cpu} | {after} |"
        )
    return "\n".join(lines)


def amortised_lengths() -> str:
    """Steps of networks that were tried at several lengths, as recipe "learned" has them."""
    cells = [
        c for c in amortised_cells() if c.get("text") is None and c.get("patience") is None
    ]  # fmt: skip
    lengths = sorted({c["length"] for c in cells})
    lines = [
        "| model | network, trained at N | " + " | ".join(f"N = {n}" for n in lengths) + " |",
        "|---" * (2 + len(lengths)) + "|",
    ]
    rows: dict[tuple[str, str], dict[int, dict]] = {}
    for c in cells:
        name = "none: `fast`"
        if "trained" in c:
            name = f"{c['recipe'].split(', ')[1]}, {network_of(c)}"
        rows.setdefault((c["model"], name), {})[c["length"]] = c
    rows = {name: row for name, row in rows.items() if len(row) > 1}

    def order(item: tuple[tuple[str, str], dict[int, dict]]) -> tuple:
        (model, name), row = item
        return model, next(iter(row.values())).get("trained", []), name

    for (model, name), row in sorted(rows.items(), key=order):
        shown = []
        for n in lengths:
            c = row.get(n)
            if c is None:
                shown.append("")
                continue
            missed = c["texts"] - c["solved"]
            shown.append(steps_of(c["steps_quartiles"]) + (f", {missed} missed" if missed else ""))
        lines.append(f"| {model} | {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def amortised_parts() -> str:
    """What a network sees and how long its texts stay, one changed at a time."""
    cells = amortised_cells(PARTS)

    def changed(cell: dict) -> tuple:
        return cell["reach"] is not None, cell["horizon"] or 0, cell["recipe"]

    lines = [
        "| model | N | steps of training | seed | sees | horizon | solved | steps "
        "| 95 % of texts within | more updates a text than the first of them | 95 % |",
        "|---" * 11 + "|",
    ]
    by_model: dict[tuple[str, int], list[dict]] = {}
    for c in cells:
        by_model.setdefault((c["model"], c["length"]), []).append(c)
    for (model, n), found in by_model.items():
        fast = next(c for c in found if "trained" not in c)
        whole, *others = sorted((c for c in found if c is not fast), key=changed)
        for c in (fast, whole, *others):
            how = "| none: `fast` | | | "
            if c is not fast:
                sees = "gradient alone" if c["reach"] == 0 else "gradient, tokens, errors"
                horizon = c["horizon"] or max(16, n * n // 4)  # what a training takes by itself
                seed = c["recipe"].split(" ")[-1]
                how = f"| {c['training_steps']} | {seed} | {sees} | {horizon} "
            lines.append(
                f"| {model} | {n} {how}| {c['solved']}/{c['texts']} "
                f"| {steps_of(c['steps_quartiles'])} | {c['steps_95']} | {more_updates(c, whole)} |"
            )
    return "\n".join(lines)


def more_updates(cell: dict, base: dict) -> str:
    """Two columns: the mean over texts that both solve, and its interval over texts."""
    if cell is base:
        return "| "
    pairs = zip(cell["steps"], base["steps"], strict=True)
    more = [a - b for a, b in pairs if a is not None and b is not None]
    found = mean_of(more)
    return f"{found.value:+.1f} | {found.low:+.1f} to {found.high:+.1f}".replace("-", "−")


def amortised_texts() -> str:
    """Steps on texts of another kind than the model was trained on."""
    names = {None: "held-out novel", "valid.txt": "children's stories"}
    cells = [c for c in amortised_cells() if "trained" not in c or "shipped" in c["recipe"]]
    others = {(c["model"], c["length"]) for c in cells if c.get("text") is not None}
    lines = ["| model | N | texts | `fast` | solved | learned | solved | against fast |"]
    lines.append("|---" * 8 + "|")
    pairs: dict[tuple, dict[bool, dict]] = {}
    for c in cells:
        if (c["model"], c["length"]) in others:
            which = (c["model"], c["length"], c.get("text"))
            pairs.setdefault(which, {})["trained" in c] = c
    for (model, n, text), both in pairs.items():
        if len(both) < 2:
            continue
        fast, learned = both[False], both[True]
        middle = [c["steps_quartiles"][1] for c in (fast, learned)]
        shown = " | ".join(
            f"{steps_of(c['steps_quartiles'])} | {c['solved']}/{c['texts']}"
            for c in (fast, learned)
        )
        lines.append(
            f"| {model} | {n} | {names.get(text, text)} | {shown} | {middle[0] / middle[1]:.1f}× |"
        )
    return "\n".join(lines)


def priors() -> str:
    """What the seed of a prior decides, the seed that fits are soonest from first."""
    cells = sorted(result("priors.json")["cells"].values(), key=lambda c: c["tried"])
    lines = [
        "| model | N | seed of the prior | tried | fast | learned, short training |",
        "|---" * 6 + "|",
    ]
    for c in cells:
        fits = [
            f"{steps_of(c[name]['steps_quartiles'])}, {c[name]['solved']}/{c[name]['texts']}"
            for name in ("fast", "learned")
        ]
        lines.append(
            f"| {c['model']} | {c['length']} | {c['seed']} | {c['tried']} | {' | '.join(fits)} |"
        )
    sources = {f"`{c['command']}`: {source(c)}": None for c in cells}
    return "\n".join([*lines, "", "\n\n".join(sources)])


def amortised_real() -> str:
    """A learned optimiser on a real model, beside `fast` from noise and from the same prior."""
    cells = [
        (c, where) for name, where in AMORTISED_REAL.items() for c in result(name)["cells"].values()
    ]
    cells.sort(
        key=lambda of: (of[0]["model"], of[0]["length"], of[1], len(of[0].get("stages", ())))
    )
    lines = [
        "| N | recipe | solved | 95 % | steps | 95 % of the median | first right "
        "| tokens right after 4 / 8 / 16 / 32 / 64 |",
        "|---" * 8 + "|",
    ]
    for c, where in cells:
        name, (low, high) = c["recipe"] + where, c["solved_interval"]
        name += ", other windows" if c.get("other") else ""
        if "stages" in c:
            stages = [f"{s['steps']} steps at {s['length']}" for s in c["stages"]]
            if begun := re.findall(r"-(\d+)x(\d+)x\d+x\d+", c.get("begun") or ""):
                before = [f"{steps} steps at {length}" for length, steps in begun]
                stages = [*before, f"then from a better prior {stages[0]}", *stages[1:]]
            name += f", {', '.join(stages)}"
        right = " / ".join(f"{share:.2f}" for share in c["right"].values())
        middle = "–".join("∞" if s is None else f"{s:.0f}" for s in c["median_interval"])
        first = "–" if c["first_right"] is None else c["first_right"]
        lines.append(
            f"| {c['length']} | {name} | {c['solved']}/{c['texts']} | {low:.2f}–{high:.2f} "
            f"| {steps_of(c['steps_quartiles'])} | {middle} | {first} | {right} |"
        )
    sources = {f"`{c['command']}`: {source(c)}": None for c, _ in cells}
    return "\n".join([*lines, "", "\n\n".join(sources)])


def encoder() -> str:
    cells = sorted(
        result("encoder.json")["cells"].values(),
        key=lambda c: (c["model"], c["length"], c["training_steps"]),
    )
    lines = [
        "| model | N | trained at | steps, on | seed | tokens right | 95 % | exact | 95 % "
        "| fast from the prior | fast from the guess | optimiser | learned from the prior "
        "| learned from the guess |",
        "|---" * 14 + "|",
    ]
    for c in cells:
        trained = c["trained"]
        at = f"{trained[0]}–{trained[-1]}" if len(trained) > 1 else trained[0]
        right, exact = c["right_interval"], c["exact_interval"]
        on = {"samples": "samples of the model", "text": "other text"}[c["training_text"]]
        by = c.get("optimizer", {"training_steps": "–", "begun": None})
        optimizer = f"{by['training_steps']}" + (" more, half on guesses" if by["begun"] else "")
        names = [
            f"{how} from the {of}" for how in ("fast", "learned") for of in ("prior", "encoder")
        ]
        fits = [
            f"{steps_of(c[name]['steps_quartiles'])}, {c[name]['solved']}/{c[name]['texts']}"
            if name in c
            else "–"
            for name in names
        ]
        fits.insert(2, optimizer)
        lines.append(
            f"| {c['model']} | {c['length']} | {at} | {c['training_steps']}, {on} | {c['seed']} "
            f"| {c['right']:.2f} | {right[0]:.2f}–{right[1]:.2f} | {c['exact']}/{c['texts']} "
            f"| {exact[0]:.2f}–{exact[1]:.2f} | {' | '.join(fits)} |"
        )
    sources = {f"`{c['command']}`: {source(c)}": None for c in cells}
    return "\n".join([*lines, "", "\n\n".join(sources)])


def data_engine() -> str:
    """Rates here, what a GPU may do, and the long run; each where it has been measured."""
    path = RESULTS / "data_engine.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    lines = [] if record else ["Not measured yet; `python benchmarks/data_engine.py` does."]
    if "rates" in record:
        rates = record["rates"]
        lines += [
            "| model | N | recipe | exact | steps a text | CPU ms a text | texts an hour "
            "| bytes a text | GPU: rows at once | ms a step | µs a text, steps "
            "| µs a text, verified | texts an hour |",
            "|---" * 13 + "|",
        ]
        for c in rates["cells"]:
            on_gpu = "| | | | | |"
            if (g := c.get("gpu")) is not None:
                step, verified = g["us_of_steps_a_text"][0], g["us_of_verification_a_text"]
                on_gpu = (
                    f"| {g['rows']} | {g['ms_a_step'][0]:.1f} | {step:.0f} "
                    f"| {step + verified:,.0f} | {g['texts_an_hour'][0]:,.0f} |"
                )
            lines.append(
                f"| {c['model']} | {c['length']} | {c['recipe']} | {c['exact']}/{c['texts']} "
                f"| {c['steps_a_text']:.0f} | {c['cpu_ms_a_text']:.1f} | {c['texts_an_hour']:,.0f} "
                f"| {c['bytes_a_text']:,.0f} {on_gpu}"
            )
        gpu = rates["cells"][0]["gpu"]["gpus"][0]
        lines += [
            "", f"GPU: an estimate for {gpu} by a rehearsal (docs/gpu.md), nothing was run there. "
            "Steps are those of full slots; verification is two decodings a text, alone and "
            "without a graph, at an assumed 8 µs a launch.",
            "", f"`{rates['command']}`: {source(rates)}",
        ]  # fmt: skip
    if "long" in record:
        one = record["long"]
        apart = len(one["shards_that_differ"])
        lines += [
            "", f"{one['texts']:,} texts of {one['length']} tokens ({one['model']}, shards of "
            f"{one['shard']}), {one['exact']:,} exact: {one['mib_after_first_shard']:.0f} MiB "
            f"resident after the first shard, {one['mib_at_the_end']:.0f} after the last, "
            f"{one['mib_most']:.0f} at most. {one['killed_texts']:,} of them again under "
            f"{one['kills']} kills: {apart} of {one['killed_shards']} shards differ.",
            "", f"`{one['command']}`: {source(one)}",
        ]  # fmt: skip
    return "\n".join(lines)


KILLED = {
    "fit": "prototok fit", "capacity": "prototok capacity", "dataset": "prototok dataset",
    "sweep": "prototok sweep run",
}  # fmt: skip


def kills() -> str:
    record = result("kills.json")
    lines = [
        "| command | kills | that left a temporary file | runs to the end | problems |",
        "|---|---|---|---|---|",
    ]
    for name, command in KILLED.items():
        c = record[name]
        lines.append(
            f"| `{command}` | {c['kills']} | {c['kills_that_left_a_file_half_written']} "
            f"| {c.get('runs_to_the_end', 1)} | {len(c['problems'])} |"
        )
    sweep = record["sweep"]
    return "\n".join([
        *lines,
        "", f"Of the sweep {sweep['kills_of_driver']} kills were of the driver and "
        f"{sweep['kills_of_workers']} of workers; {'; '.join(sweep['verify'])}.",
        "", f"`{record['command']}`: {source(record)}",
    ])  # fmt: skip


DOCUMENTS = {
    "docs/scaling.md": (data_engine,),
    "docs/sink.md": (sinks, fronts, real_model, arrangements_real),
    "docs/amortised.md": (
        amortised,
        amortised_lengths,
        amortised_parts,
        amortised_texts,
        amortised_commands,
        priors,
        encoder,
        amortised_real,
    ),
    "docs/reliability.md": (kills, soak),
    "docs/dev/recipes.md": (width, steps_to_exact, longest, transfer, capacity),
    "docs/gpu.md": (gpu_steps, gpu_tokens, gpu_throughput, gpu_products),
    "README.md": (bench_short, fit_step_short, gpu_short),
    "docs/quickstart.md": (expected,),
    "docs/results.md": (bench, one_forward, reconstruction, table1, fit_step, never_slower, models),
    "docs/claim.md": (ceilings, figure2),
}


def filled(text: str, document: str) -> str:
    for make in DOCUMENTS[document]:
        name = make.__name__
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        body = make()
        text, count = re.subn(
            pattern, lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text, flags=re.DOTALL
        )
        assert count == 1, f"{document} has no markers for {name}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    for document in DOCUMENTS:
        path = ROOT / document
        before = path.read_text(encoding="utf-8")
        after = filled(before, document)
        if not check:
            path.write_text(after, encoding="utf-8")
        elif before != after:
            sys.exit(
                f"{document} does not say what the results say; run benchmarks/readme_tables.py"
            )


if __name__ == "__main__":
    main()
