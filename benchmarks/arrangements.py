"""Table 1 of the paper: which arrangement of e and m carries a text.

    python benchmarks/arrangements.py --model ../shared/models/stories3m \
        --text ../shared/corpora/tinystories/valid.txt

fits the same texts in every arrangement at every length and prints mean ± standard deviation over
texts of the token accuracy as decoded. The paper uses Llama-3.2-1B, 50 texts and N up to 1024.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from record import RESULTS, provenance, write

import prototok
from prototok.fitting.recipe import PAPER
from prototok.texts.files import read_text

ARRANGEMENTS = ("e*", "e* m*", "(e m)*", "e m*+1", "e m*")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--text", type=Path, required=True, help="paragraphs are the texts")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--lengths", default="1,2,4,8,16")
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS / "table1.json")
    a = parser.parse_args()
    lengths = [int(n) for n in a.lengths.split(",")]
    lm = prototok.load(a.model)
    recipe = dataclasses.replace(PAPER, max_steps=a.max_steps)
    paragraphs = [lm.encode(part) for part in read_text(a.text).split("\n\n")]
    texts = [ids for ids in paragraphs if len(ids) >= max(lengths)][: a.texts]
    cells = []
    print(f"{lm.identity.name}, {len(texts)} texts, recipe paper, {a.max_steps} steps at most")
    print("arrangement".ljust(12) + "".join(f"N={n}".rjust(14) for n in lengths))
    for arrangement in ARRANGEMENTS:
        row = arrangement.ljust(12)
        for length in lengths:
            fit = prototok.fast_fit(
                lm, texts, length=length, arrangement=arrangement, recipe=recipe, progress=True
            )
            mean, std = float(fit.accuracy.mean()), float(fit.accuracy.std(correction=0))
            cells.append(
                {
                    "arrangement": arrangement,
                    "length": length,
                    "mean": mean,
                    "std": std,
                    "exact": float(fit.exact.float().mean()),
                    "accuracy": fit.accuracy[:, 0].tolist(),
                    "steps": fit.steps[:, 0].tolist(),
                }
            )
            row += f"{mean:.2f}±{std:.2f}".rjust(14)
        print(row, flush=True)
    record = provenance() | {
        "model": lm.identity.name.rsplit("/", 1)[-1],
        "dtype": str(lm.dtype).removeprefix("torch."),
        "texts": len(texts),
        "recipe": dataclasses.asdict(recipe),
        "cells": cells,
    }
    write(record, a.out)
    print(json.dumps([{k: c[k] for k in ("arrangement", "length", "mean")} for c in cells]))


if __name__ == "__main__":
    main()
