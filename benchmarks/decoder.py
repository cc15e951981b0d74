"""One token of the KV-cached decoder on CUDA against the bandwidth, launched early and not.

    python benchmarks/decoder.py
    python benchmarks/decoder.py --shape llama-3.1-8b --length 256

A shape has random weights. `StaticDecoder` generates N tokens of one row behind one vector, by its
graph: as it is, and with every launch waiting for the one before it, in turn. Its ids must be the
same both ways. The share is that of the bandwidth: what the N tokens must read of weights and cache
over the rate of a copy measured here. Beside it one forward of the same N positions, of its
roofline. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from fit_step import quartiles
from record import RESULTS, keep, provenance, write

from prototok.autoregressive.generate import bytes_read
from prototok.autoregressive.static_kv import StaticDecoder
from prototok.bench.timing import Peak, roofline_seconds
from prototok.common.clock import once
from prototok.decoding.decode import decode_ids
from prototok.model.shapes import load_shape
from prototok.results.arrangement import Arrangement
from prototok_kernels import added_products, cached_attention, next_token, normed_products

KERNELS = (added_products, cached_attention, next_token, normed_products)


def cell(shape: str, length: int, device: str, rounds: int) -> dict:
    """Measure one shape."""
    lm = load_shape(shape, device, "auto")
    peak = Peak.measured(lm.device, lm.dtype)
    mem = torch.randn(1, 1, lm.hidden_size, generator=torch.Generator().manual_seed(0))
    mem = mem.to(lm.device)
    decoders, ids = {}, {}
    for name in ("early", "in turn"):
        with ExitStack() as stack:
            for kernel in KERNELS if name == "in turn" else ():
                stack.enter_context(patch.object(kernel, "early", lambda x: {"EARLY": False}))
            decoders[name] = StaticDecoder(lm.body, lm, 1, length + 64, lm.plan(1, 1))
            ids[name] = decoders[name].generate(mem, length)
    if not torch.equal(*ids.values()):
        raise SystemExit(f"{shape}: launched early the decoder generates other ids")
    vectors, arrangement = torch.randn(1, 2, lm.hidden_size), Arrangement.parse("e m*")

    def forward() -> None:
        decode_ids(lm, vectors, arrangement, length, "auto")

    for _ in range(5):  # captured at the fourth
        forward()
    seconds: dict[str, list[float]] = {name: [] for name in (*decoders, "one forward")}
    for _ in range(rounds):
        for name, decoder in decoders.items():
            run = lambda decoder=decoder: decoder.generate(mem, length)  # noqa: E731
            seconds[name].append(once(run, lm.device) / length)
        seconds["one forward"].append(once(forward, lm.device))
    least = bytes_read(lm, 1, length) / length / peak.bytes_per_second
    roofline = roofline_seconds(lm, 1, length, peak)
    middle = {name: quartiles(each) for name, each in seconds.items()}
    record = {
        "shape": shape, "length": length, "dtype": str(lm.dtype).removeprefix("torch."),
        "bytes_per_second": peak.bytes_per_second, "seconds": middle,
        "share": {name: (roofline if name == "one forward" else least) / each[1]
                  for name, each in middle.items()},
    }  # fmt: skip
    for name, share in record["share"].items():
        each = "a forward" if name == "one forward" else "a token"
        print(f"{shape}, N = {length}, {name}: {1e6 * middle[name][1]:.0f} us {each}, "
              f"{100 * share:.0f} %", flush=True)  # fmt: skip
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shape", action="append", help="default llama-3.2-1b and pythia-160m")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS / "decoder-cuda.json")
    a = parser.parse_args()
    record = provenance() | {"cells": []}
    for shape in a.shape or ("llama-3.2-1b", "pythia-160m"):
        record["cells"].append(cell(shape, a.length, a.device, a.rounds))
        keep(record, a.out)
    write(record, a.out)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
