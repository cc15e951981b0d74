"""Our step against the best plain transformers loop, over presets, dtypes, rows and lengths.

    python benchmarks/never_slower.py
    python benchmarks/never_slower.py --presets stories3m --dtypes bfloat16 --rows 1 --lengths 16

A cell is one model shape with random weights, one dtype, B rows of N tokens. The plain loop runs
with torch's fused attention and with the eager one; the better of the two counts. Losses and
gradients must agree before anything is timed, and the variants take turns. The ratio is of time a
step, theirs to ours, median and quartiles over the rounds: below 1 we are slower. The last line is
JSON; what is measured is written after every cell.
"""

from __future__ import annotations

import argparse
import itertools
import json
from functools import partial
from pathlib import Path

import torch
from fit_step import (
    ATTENTION,
    PlainLoop,
    add_instructions,
    engine,
    fastest,
    gate,
    instructions,
    limited_to,
    measure,
    model_of,
    quartiles,
)  # fmt: skip
from record import RESULTS, keep, provenance, write

import prototok
from prototok.common.allocator import keep_freed_memory

PRESETS = ("stories3m", "pythia-160m", "smollm2-135m")


def cell(
    preset: str, dtype: torch.dtype, rows: int, length: int, rounds: int, seconds: float
) -> dict:  # fmt: skip
    """Measure one cell."""
    device = torch.device("cpu")
    plain, _ = model_of(preset, None, device)
    plain = plain.to(dtype)
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    lm = prototok.load(plain, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(lm.vocab_size, (rows, length), generator=generator)
    runner = engine(lm, targets)
    e, m = (bank.values[:rows].clone() for bank in runner.slots.banks)
    loop = PlainLoop(plain, targets, e, m)
    agreement = gate(runner, loop, dtype)

    rates, _ = measure(
        {
            "ours": (lambda: runner.advance(1), rows),
            **{name: (partial(loop.step, name), rows) for name in ATTENTION},
        },
        device, rounds, seconds,
    )  # fmt: skip
    best = fastest(rates, ATTENTION)
    return {
        "preset": preset, "dtype": str(dtype).removeprefix("torch."), "rows": rows,
        "length": length, "agreement": agreement, "best_loop": best,
        "step_ms": {name: 1e3 * rows / quartiles(rate)[1] for name, rate in rates.items()},
        "ratio": quartiles([a / b for a, b in zip(rates["ours"], rates[best], strict=True)]),
        "plan": lm.plan(rows, length, pair=True).summary(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--lengths", default="16,64,128")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="a variant, in each round")
    parser.add_argument("--out", type=Path, help="default results/never-slower-INSTRUCTIONS.json")
    add_instructions(parser)
    arguments = parser.parse_args()
    with limited_to(arguments.instructions):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Measure all cells and write the record."""
    keep_freed_memory()
    out = arguments.out or RESULTS / f"never-slower-{instructions()}.json"
    record: dict = {"benchmark": "never_slower", **provenance(), "cells": []}
    print("model         dtype     B    N   ours ms   best loop ms   ratio (quartiles)")
    for preset, dtype, rows, length in itertools.product(
        arguments.presets.split(","), arguments.dtypes.split(","),
        map(int, arguments.rows.split(",")), map(int, arguments.lengths.split(",")),
    ):  # fmt: skip
        found = cell(
            preset, getattr(torch, dtype), rows, length, arguments.rounds, arguments.seconds
        )
        record["cells"].append(found)
        keep(record, out)
        low, middle, high = found["ratio"]
        theirs = found["step_ms"][found["best_loop"]]
        print(
            f"{preset:12}  {dtype:8} {rows:2} {length:4} {found['step_ms']['ours']:9.2f} "
            f"{theirs:9.2f} {found['best_loop']:5} {middle:6.2f} ({low:.2f}-{high:.2f})",
            flush=True,
        )
    slower = [c for c in record["cells"] if c["ratio"][1] < 1.0]
    print(f"{len(slower)} of {len(record['cells'])} cells are below 1.0")
    write(record, out)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
