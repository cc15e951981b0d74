"""What an m learned jointly on some texts is worth on others: warm-started, slowed down, frozen.

    python benchmarks/transfer.py --shared ../shared
    python benchmarks/transfer.py                      # the built-in models alone

For each model `learn_shared` finds m and the distribution of e on 32 texts of each of four sources:
samples of the model itself, other texts of the source that is tested on, another source, and random
token ids. Fits of unseen texts then start there, with m at the rate of e, at a tenth of it, or left
where it is. With the model's own samples this is done at several lengths, with the other sources at
the model's mid-range length. The test texts are those of benchmarks/recipes.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from recipes import MODELS, Cell, quantile, texts_of
from reconstruction import NOVEL, STORIES
from record import RESULTS, provenance, write

import prototok
from prototok import FrozenLM, Prior
from prototok.fitting.recipe import FAST
from prototok.model.load import BUILT_IN

LEARNED_ON, LEARNED_AT = 32, 16  # texts, tokens
LENGTHS = (8, 16, 22)
ARMS = {"m as fast as e": 1.0, "m at a tenth": 0.1, "m frozen": 0.0}


def sources(lm: FrozenLM, model: str, own: Path, shared: Path | None) -> Iterator[tuple[str, list]]:
    """What m is learned on: a name and the texts, None for the model's own samples."""
    yield "own samples", None
    cell = Cell("dev", model, LEARNED_AT, FAST, LEARNED_ON)
    yield "same source", texts_of(lm, own, cell)
    if shared is not None:
        other = shared / (NOVEL if MODELS[model][0] == STORIES else STORIES)
        yield "other source", texts_of(lm, other, cell)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.vocab_size, (LEARNED_ON, LEARNED_AT), generator=generator)
    yield "random ids", ids.tolist()


@dataclass(frozen=True)
class Start:
    learned_on: str | None
    prior: Prior | None
    m: str  # one of ARMS, or none
    length: int


def starts(lm: FrozenLM, model: str, own: Path, shared: Path | None) -> Iterator[Start]:
    for length in LENGTHS:
        yield Start(None, None, "no prior", length)
    for learned_on, texts in sources(lm, model, own, shared):
        prior = prototok.learn_shared(lm, texts, length=LEARNED_AT, seeds=1, progress=False)
        for length in LENGTHS if texts is None else (MODELS[model][1],):
            for m in ARMS:
                yield Start(learned_on, prior, m, length)


def run(lm: FrozenLM, cell: Cell, own: Path, prior: Prior | None) -> dict:
    texts = texts_of(lm, own, cell)
    fit = prototok.fast_fit(lm, texts, recipe=cell.recipe, init=prior, progress=False)
    exact, steps = fit.exact[:, 0].tolist(), fit.steps[:, 0].tolist()
    censored = [s if e else math.inf for s, e in zip(steps, exact, strict=True)]
    quartiles = [quantile(censored, q) for q in (0.25, 0.5, 0.75)]
    return {
        "texts": len(texts),
        "exact": sum(exact),
        "accuracy": round(float(fit.accuracy.mean()), 4),
        "steps_quartiles": [q if math.isfinite(q) else None for q in quartiles],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, help="folder with models/ and corpora/")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--max-steps", type=int, default=900, help="two cycles of the fast recipe")
    parser.add_argument("--out", type=Path, default=RESULTS / "transfer.json")
    a = parser.parse_args()
    torch.set_num_threads(1)
    cells = []
    for model, (source, _, _) in MODELS.items():
        if model in BUILT_IN:
            folder = Path(prototok.__file__).parent / "models" / model
        elif a.shared is not None:
            folder = a.shared / "models" / model
        else:
            continue
        lm = prototok.load(model if model in BUILT_IN else folder)
        own = folder / "held_out.txt" if source == "held_out" else a.shared / source
        for start in starts(lm, model, own, a.shared):
            recipe = dataclasses.replace(
                FAST, shipped_prior=False, max_steps=a.max_steps, m_rate=ARMS.get(start.m, 1.0)
            )
            row = run(lm, Cell("test", model, start.length, recipe, a.texts), own, start.prior)
            where = {"model": model, "length": start.length}
            cells.append({**where, "learned_on": start.learned_on, "m": start.m, **row})
            print(json.dumps(cells[-1]), flush=True)
    write({**provenance(), "max_steps": a.max_steps, "cells": cells}, a.out)


if __name__ == "__main__":
    main()
