"""Figure 3 of the paper: throughput of one forward against every autoregressive way.

    python benchmarks/throughput.py --model ../shared/models/stories3m \
        --text ../shared/corpora/tinystories/valid.txt --lengths 8,16,32
    python benchmarks/throughput.py --shape pythia-160m --shape llama-3.2-1b --lengths 128,256

fits texts, verifies them, and times both modes at equal length and at each mode's own longest, at
batch 1 and at the best batch. A shape has random weights: speed only. Without a model or a shape it
takes those two shapes on CUDA and the built-in models elsewhere.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from record import RESULTS, provenance, write

from prototok.bench.measure import BenchSettings, run_bench
from prototok.bench.table import table
from prototok.model.load import BUILT_IN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append")
    parser.add_argument("--shape", action="append", help="pythia-160m, llama-3.2-1b, …, or smoke")
    parser.add_argument("--text", type=Path, help="default: the held-out book in the package")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--lengths", help="such as 8,16,32")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--vllm-python", type=Path, help="an interpreter that has vLLM")
    parser.add_argument("--out", type=Path, default=RESULTS / "throughput.json")
    a = parser.parse_args()
    shapes, models = a.shape or [], a.model or []
    if not shapes and not models:
        if torch.cuda.is_available():
            shapes = ["pythia-160m", "llama-3.2-1b"]
        else:
            models = list(BUILT_IN)
    lengths = tuple(int(n) for n in a.lengths.split(",")) if a.lengths else None
    if shapes and lengths is None:
        lengths = (8,) if shapes == ["smoke"] else (128,)

    def settings(
        models: tuple[str, ...], shape: str | None, lengths: tuple[int, ...] | None
    ) -> BenchSettings:
        return BenchSettings(
            models, shape, lengths, a.texts, a.text, a.recipe, "auto", a.dtype,
            vllm_python=a.vllm_python,
        )  # fmt: skip

    runs = [settings(tuple(models), None, lengths)] if models else []
    # A length at a time, so that what is measured is written before the next.
    runs += [settings((), shape, (n,)) for shape in shapes for n in lengths or ()]
    record: dict = provenance() | {"cases": [], "longest": [], "measured_peaks": {}}
    for each in runs:
        found = run_bench(each, say=lambda line: print(line, flush=True))
        record["cases"] += found["cases"]
        record["longest"] += found["longest"]
        record["measured_peaks"] |= found["measured_peaks"]
        record["recipe"] = found["recipe"]
        write(record, a.out)
    print(table(record))
    keys = ("model", "length", "exact", "ratio_batch_1", "ratio_best_batch", "ceiling")
    print(json.dumps([{key: case[key] for key in keys} for case in record["cases"]]))


if __name__ == "__main__":
    main()
