"""One forward at batch 1 against the roofline of this machine, and against plain transformers.

    python benchmarks/one_forward.py
    python benchmarks/one_forward.py --presets stories3m --lengths 64 --instructions avx512bf16

A cell is one model shape with random weights in bfloat16 and a text of N tokens: the forward that
`prototok.decode` makes of e and m, with its ids on the host, beside transformers' forward of the
same vectors with each attention and the argmax of its logits. All of them take turns with a large
square product of the same dtype, torch's, so that the roofline is of the same minutes: the larger
of 2·P FLOPs a position over the rate of that product, and of the bytes of the weights over the rate
of a copy. `share` is that time over ours, median and quartiles over the rounds; attention's own
products are not counted. The ids must be those of transformers before anything is timed, but for
positions that rounding may flip. The last line is JSON; what is measured is written after every
cell.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from fit_step import (
    ATTENTION,
    add_instructions,
    fastest,
    instructions,
    limited_to,
    measure,
    model_of,
    quartiles,
)
from never_slower import PRESETS
from record import RESULTS, keep, provenance, write

import prototok
from prototok.bench.machine import copy_rate
from prototok.bench.timing import Peak, roofline_seconds
from prototok.common.allocator import keep_freed_memory
from prototok.decoding.decode import decode_ids
from prototok.results.arrangement import Arrangement

SQUARE = 1024
ALIKE = 0.75  # share of positions whose ids must be those of transformers: logits are of noise


@torch.no_grad()
def cell(preset: str, length: int, rounds: int, seconds: float, copied: float) -> dict:
    """Measure one cell; `copied` is the rate of a copy in bytes a second."""
    device = torch.device("cpu")
    plain, _ = model_of(preset, None, device)
    lm = prototok.load(plain, device=device, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    spread = float(plain.get_input_embeddings().weight.float().std())
    vectors = spread * torch.randn(1, 2, lm.hidden_size, generator=generator)
    arrangement = Arrangement.parse("e m*")
    inputs = vectors.bfloat16()[:, arrangement.layout(length)]
    a, b = (torch.randn(SQUARE, SQUARE, generator=generator).bfloat16() for _ in range(2))

    def theirs(name: str) -> torch.Tensor:
        plain.set_attn_implementation(name)
        return plain(inputs_embeds=inputs, use_cache=False).logits.argmax(-1)

    def ours() -> torch.Tensor:
        return decode_ids(lm, vectors, arrangement, length, "auto")

    alike = float((ours() == theirs("eager")).float().mean())
    if alike < ALIKE:
        raise SystemExit(f"{preset} x {length}: {alike:.0%} of the ids are those of transformers")

    def of(call: Callable[[], object]) -> Callable[[], None]:
        return lambda: (call(), None)[1]

    rates, _ = measure(
        {
            "ours": (of(ours), 1),
            **{name: (of(lambda name=name: theirs(name)), 1) for name in ATTENTION},  # type: ignore[misc]
            "square": (of(lambda: a @ b), 1),
        },
        device, rounds, seconds,
    )  # fmt: skip
    least = []
    for rate in rates["square"]:
        bound = roofline_seconds(lm, 1, length, Peak(2 * SQUARE**3 * rate, copied))
        assert bound is not None  # that of a family of ours
        least.append(bound)
    best = fastest(rates, ATTENTION)
    return {
        "preset": preset, "length": length, "alike": alike, "best_loop": best,
        "ms": {name: 1e3 / quartiles(rate)[1] for name, rate in rates.items()},
        "roofline_ms": 1e3 * quartiles(least)[1],
        "share": quartiles([a * b for a, b in zip(rates["ours"], least, strict=True)]),
        "ratio": quartiles([a / b for a, b in zip(rates["ours"], rates[best], strict=True)]),
        "plan": lm.plan(1, length).summary(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--lengths", default="16,64,128")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="a variant, in each round")
    add_instructions(parser)
    parser.add_argument("--out", type=Path, help="default results/one-forward-INSTRUCTIONS.json")
    arguments = parser.parse_args()
    with limited_to(arguments.instructions):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Measure all cells and write the record."""
    keep_freed_memory()
    name = instructions()
    out = arguments.out or RESULTS / f"one-forward-{name}.json"
    copied = copy_rate(torch.device("cpu"))
    record: dict = {
        "benchmark": "one_forward", **provenance(), "instructions": name,
        "copy_bytes_per_second": copied, "cells": [],
    }  # fmt: skip
    print("model           N   ours ms   roofline ms   share (quartiles)   best plain ms   ratio")
    for preset, length in itertools.product(
        arguments.presets.split(","), map(int, arguments.lengths.split(","))
    ):
        found = cell(preset, length, arguments.rounds, arguments.seconds, copied)
        record["cells"].append(found)
        keep(record, out)
        low, middle, high = found["share"]
        print(
            f"{preset:12} {length:4} {found['ms']['ours']:9.2f} {found['roofline_ms']:13.2f} "
            f"{middle:7.0%} ({low:.0%}-{high:.0%}) {found['ms'][found['best_loop']]:15.2f} "
            f"{found['ratio'][1]:7.2f}",
            flush=True,
        )
    write(record, out)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
