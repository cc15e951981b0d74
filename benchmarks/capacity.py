"""What `capacity` finds and costs beside one fit for every length of the grid.

    python benchmarks/capacity.py

Both ways have the same texts, recipe and most updates a fit.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from record import RESULTS, provenance, write

import prototok
from prototok.capacity import GRID
from prototok.data import chunks, read_text
from prototok.engine.recipe import FAST
from prototok.frozen_lm import BUILT_IN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny-neox", choices=BUILT_IN)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--longest", type=int, default=45)
    parser.add_argument("--max-steps", type=int, default=900)
    a = parser.parse_args()
    torch.set_num_threads(1)
    lm = prototok.load(a.model)
    path = Path(prototok.__file__).parent / "models" / a.model / "held_out.txt"
    grid = [n for n in GRID if n <= a.longest]
    texts = chunks(lm, read_text(path), a.longest, a.texts)
    recipe = dataclasses.replace(FAST, max_steps=a.max_steps)

    found = prototok.capacity(lm, texts, lengths=grid, recipe=recipe, progress=True)
    by_grid, cost, steps, seconds = [0] * a.texts, 0, 0, 0.0
    for n in grid:
        fit = prototok.fast_fit(lm, texts, length=n, recipe=recipe, progress=True)
        steps += int(fit.steps.sum())
        cost += n * int(fit.steps.sum())
        seconds += float(fit.seconds.sum())
        by_grid = [n if e else g for e, g in zip(fit.exact[:, 0].tolist(), by_grid, strict=True)]
        print(f"N = {n}: {int(fit.exact.sum())} of {a.texts} exact", flush=True)
    place = {n: i for i, n in enumerate([0, *grid])}
    apart = [
        place[f] - place[g] for f, g in zip(found.exact.tolist(), by_grid, strict=True)
    ]  # fmt: skip
    write(
        provenance()
        | {
            "model": a.model,
            "grid": grid,
            "max_steps": a.max_steps,
            "capacity": {
                "exact": found.exact.tolist(),
                "steps": int(found.steps.sum()),
                "seconds": float(found.seconds.sum()),
            },
            "one_fit_a_length": {
                "exact": by_grid, "steps": steps, "target_updates": cost, "seconds": seconds,
            },
            "grid_steps_apart": apart,
        },
        RESULTS / "capacity.json",
    )  # fmt: skip


if __name__ == "__main__":
    main()
