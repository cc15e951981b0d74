"""What `capacity` finds and costs beside one fit for every length of the grid.

    python benchmarks/capacity.py
    python benchmarks/capacity.py --model ../shared/models/stories260k \
        --text ../shared/corpora/tinystories/valid.txt

Both ways have the same texts, recipe and most updates a fit, and the paper's grid as far as
--longest. Cost is counted in updates and in this process's CPU seconds. The last line is JSON, and
every model is a line of results/capacity.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from figure2 import texts_of
from record import RESULTS, provenance, write

import prototok
from prototok.fitting.capacity import GRID
from prototok.fitting.recipe import FAST
from prototok.model.load import BUILT_IN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny-neox")
    parser.add_argument("--text", type=Path, help="default: what a built-in model has not seen")
    parser.add_argument("--book", action="store_true", help="cut --text into chunks")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--longest", type=int, default=128)
    parser.add_argument("--max-steps", type=int, default=900)
    parser.add_argument("--out", type=Path, default=RESULTS / "capacity.json")
    a = parser.parse_args()
    torch.set_num_threads(1)
    lm = prototok.load(a.model)
    if a.text is None:
        if a.model not in BUILT_IN:
            parser.error("--text: needed for a model that is not built in")
        a.text = Path(prototok.__file__).parent / "models" / a.model / "held_out.txt"
        a.book = True
    grid = [n for n in GRID if n <= a.longest]
    texts = texts_of(lm, a.text, a.book, grid[-1], a.texts)
    recipe = dataclasses.replace(FAST, max_steps=a.max_steps)

    clock = time.process_time()
    found = prototok.capacity(lm, texts, lengths=grid, recipe=recipe, progress=True)
    grown = {
        "exact": found.exact.tolist(),
        "updates": int(found.steps.sum()),
        "cpu_seconds": time.process_time() - clock,
    }
    clock = time.process_time()
    longest, updates = [0] * a.texts, 0
    for n in grid:
        fit = prototok.fast_fit(lm, texts, length=n, recipe=recipe, progress=True)
        updates += int(fit.steps.sum())
        longest = [n if e else g for e, g in zip(fit.exact[:, 0].tolist(), longest, strict=True)]
        print(f"N = {n}: {int(fit.exact.sum())} of {a.texts} exact", flush=True)
    one_by_one = {
        "exact": longest,
        "updates": updates,
        "cpu_seconds": time.process_time() - clock,
    }
    place = {n: i for i, n in enumerate([0, *grid])}
    case = {
        "grid": grid,
        "max_steps": a.max_steps,
        "capacity": grown,
        "one_fit_a_length": one_by_one,
        "grid_steps_apart": [
            place[f] - place[g] for f, g in zip(grown["exact"], longest, strict=True)
        ],
        "cost_ratio": {
            key: grown[key] / one_by_one[key] for key in ("updates", "cpu_seconds")
        },
    }  # fmt: skip
    record = json.loads(a.out.read_text()) if a.out.exists() else {"cases": {}}
    record["cases"][Path(a.model).name] = case | {"commit": provenance()["commit"]}
    write(record | provenance(), a.out)


if __name__ == "__main__":
    main()
