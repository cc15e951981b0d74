"""What one constant token in front does on a model with an attention sink.

    python benchmarks/get_smollm2.py
    python benchmarks/sink.py --text NOVEL.txt

fits the same texts by the recipes `paper` and `fast`, without and behind a prefix. It prints for
each how many are exact, the steps that those took, and the mean token accuracy. A fit that does not
end is counted as not exact; the median of the steps is over the exact ones alone, so read both.
`--prefix` may be given more than once, to compare prefixes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from get_smollm2 import FOLDER
from record import RESULTS, provenance, write

import prototok
from prototok.fitting.recipe import recipe_of
from prototok.model.sink import sink_of
from prototok.texts.files import chunks, read_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(FOLDER), help="folder or hub id")
    parser.add_argument("--text", type=Path, required=True, help="a book in UTF-8")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--recipes", default="paper,fast")
    parser.add_argument("--prefix", action="append", help="text; default: what auto would take")
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--seconds", type=float, help="start no more fits after so many")
    parser.add_argument("--out", type=Path, default=RESULTS / "sink.json")
    a = parser.parse_args()
    if not Path(a.model).exists() and Path(a.model) == FOLDER:
        sys.exit(f"{FOLDER} is missing; python benchmarks/get_smollm2.py fetches it")
    lm = prototok.load(a.model)
    sink = sink_of(lm)
    print(f"{lm.identity.name}: {sink}")
    pieces = chunks(lm, read_text(a.text), a.length, a.texts)
    fronts: list = [None, *(a.prefix or ([sink.prefix] if sink.prefix else []))]
    started, cells = time.monotonic(), []
    print(f"{len(pieces)} texts, N = {a.length}, at most {a.max_steps} steps")
    for front in fronts:
        for name in a.recipes.split(","):
            if a.seconds is not None and time.monotonic() - started > a.seconds:
                continue
            recipe = dataclasses.replace(recipe_of(name), max_steps=a.max_steps)
            fit = prototok.fast_fit(lm, pieces, recipe=recipe, prefix=front, progress=True)
            cells.append(_cell(name, fit))
            print(_line(cells[-1]), flush=True)
    record = provenance() | {
        "model": lm.identity.name.rsplit("/", 1)[-1],
        "dtype": str(lm.dtype).removeprefix("torch."),
        "share of attention on position 0": sink.share,
        "texts": len(pieces),
        "length": a.length,
        "max_steps": a.max_steps,
        "cells": cells,
    }
    write(record, a.out)
    print(json.dumps([{k: c[k] for k in ("recipe", "prefix", "exact")} for c in cells]))


def _cell(recipe: str, fit: prototok.FitResult) -> dict:
    solved = fit.steps[fit.exact]
    return {
        "recipe": recipe,
        "prefix": fit.tokens.provenance["prefix"],
        "exact": int(fit.exact.sum()),
        "steps of the exact": sorted(solved.tolist()),
        "median": float(torch.median(solved.double())) if len(solved) else None,
        "accuracy": fit.accuracy[:, 0].tolist(),
        "steps": fit.steps[:, 0].tolist(),
    }


def _line(cell: dict) -> str:
    accuracy = sum(cell["accuracy"]) / len(cell["accuracy"])
    median = "–" if cell["median"] is None else f"{cell['median']:.0f}"
    return (
        f"{cell['recipe']}, {cell['prefix']}: {cell['exact']} of {len(cell['steps'])} exact, "
        f"median steps {median}, mean accuracy {accuracy:.2f}"
    )


if __name__ == "__main__":
    main()
