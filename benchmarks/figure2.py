"""Figure 2 of the paper: H_LM of the longest prefix that comes back whole, mode against mode.

    python benchmarks/figure2.py --model ../shared/models/stories3m \
        --text ../shared/corpora/tinystories/valid.txt

gives each text the longest N at which it is exact (generated, or decoded in one forward, at batch
1) on a grid: autoregressive with K = 1, 2, … [mem] vectors, and one forward with m shared by the
texts and not shared. A text that fails at a length is not tried at a longer one; where m is shared
all texts are fitted together at every length, as in the paper. H_LM is in nats.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import RESULTS, provenance, write

import prototok
from prototok import autoregressive
from prototok.fitting.recipe import FAST, Recipe
from prototok.model.frozen_lm import FrozenLM
from prototok.texts.files import chunks, read_text

# Texts, cut, to which of them are exact.
Fit = Callable[[list[list[int]]], list[bool]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--text", type=Path, required=True, help="paragraphs are the texts")
    parser.add_argument("--book", action="store_true", help="cut the file into chunks instead")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--grid", default="1,2,3,4,6,8,11,16,22,32", help="lengths to try")
    parser.add_argument("--modes", default="ar1,ar2,shared,own", help="arK, shared, own")
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS / "figure2.json")
    a = parser.parse_args()
    recipe = dataclasses.replace(FAST, max_steps=a.max_steps)
    grid = [int(n) for n in a.grid.split(",")]
    cases = []
    for name in a.model:
        lm = prototok.load(name)
        texts = texts_of(lm, a.text, a.book, max(grid), a.texts)
        for mode in a.modes.split(","):
            clock = time.perf_counter()
            longest = longest_exact(texts, grid, fit_of(lm, mode, recipe), mode == "shared")
            nats = [
                float(prototok.information(lm, [ids[:n]]).nats) if n else 0.0
                for ids, n in zip(texts, longest, strict=True)
            ]
            seconds = time.perf_counter() - clock
            cases.append(
                {
                    "model": lm.identity.name.rsplit("/", 1)[-1],
                    "mode": mode,
                    "longest": longest,
                    "h_lm_nats": nats,
                    "grid": grid,
                    "seconds": seconds,
                }
            )
            print(
                f"{cases[-1]['model']:12} {mode:7} longest: max {max(longest)}, median "
                f"{statistics.median(longest):g}, mean {statistics.fmean(longest):.1f}; "
                f"H_LM {statistics.fmean(nats):.1f} nats; {seconds:.0f} s",
                flush=True,
            )
            # After every case: a run of hours that is cut off leaves what it has.
            write(provenance() | {"recipe": dataclasses.asdict(recipe), "cases": cases}, a.out)


def texts_of(lm: FrozenLM, path: Path, book: bool, length: int, count: int) -> list[list[int]]:
    """The first `count` texts of at least `length` tokens, cut to that."""
    if book:
        found = chunks(lm, read_text(path), length, count)
    else:
        paragraphs = [lm.encode(part) for part in read_text(path).split("\n\n")]
        found = [ids[:length] for ids in paragraphs if len(ids) >= length][:count]
    if len(found) < count or len(found[-1]) < length:
        raise SystemExit(f"text: {path} has fewer than {count} texts of {length} tokens")
    return found


def fit_of(lm: FrozenLM, mode: str, recipe: Recipe) -> Fit:
    if mode.startswith("ar"):
        return lambda texts: exact_of(
            autoregressive.fit(lm, texts, int(mode[2:]), recipe=recipe).exact
        )
    share = "m" if mode == "shared" else None
    return lambda texts: exact_of(prototok.fast_fit(lm, texts, share=share, recipe=recipe).exact)


def exact_of(exact: torch.Tensor) -> list[bool]:
    found: list[bool] = exact[:, 0].tolist()
    return found


def longest_exact(texts: list[list[int]], grid: list[int], fit: Fit, together: bool) -> list[int]:
    """For each text the longest N of the grid up to which it is exact; 0 where it never is."""
    longest = [0] * len(texts)
    running = list(range(len(texts)))
    for length in grid:
        fitted = list(range(len(texts))) if together else running
        exact = dict(zip(fitted, fit([texts[t][:length] for t in fitted]), strict=True))
        running = [t for t in running if exact[t]]
        for t in running:
            longest[t] = length
        if not running:
            break
    return longest


if __name__ == "__main__":
    main()
