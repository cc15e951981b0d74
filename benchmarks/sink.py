"""What one constant token in front does on a model with an attention sink.

    python benchmarks/get_smollm2.py
    python benchmarks/sink.py --text NOVEL.txt

fits the same texts by the recipes `paper` and `fast`, without and behind a prefix. It prints for
each how many are exact, the steps that those took, and the mean token accuracy. A fit that does not
end is counted as not exact; the median of the steps is over the exact ones alone, so read both.
*confirmed* counts the exact ones that plain transformers decodes, in bfloat16 and in float32.

`--prefix TEXT`, `--ids 7,8` and `--learned P` may each be given more than once, to compare what
stands in front; `none` is nothing. P vectors are learned from the model's own samples, never from
the texts that are fitted behind them; `--learned` also starts fits from what was learned with them.
What stands in the result file for the same texts and steps is kept. With `--seconds` a fit is
stopped in time: texts in flight count as not exact, after the steps that they had ("stopped").
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from get_smollm2 import FOLDER
from record import RESULTS, provenance, write
from transformers import AutoModelForCausalLM

import prototok
from prototok.fitting.fast_fit import FitEvent
from prototok.fitting.front import front_of
from prototok.fitting.learn_shared import own_texts
from prototok.fitting.recipe import Recipe, recipe_of
from prototok.model.load import BUILT_IN, path_of
from prototok.model.sink import sink_of
from prototok.results.arrangement import Arrangement
from prototok.texts.files import chunks, read_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(FOLDER), help="folder or hub id")
    parser.add_argument("--text", type=Path, action="append", required=True, help="in UTF-8")
    parser.add_argument("--texts", type=int, default=8, help="from the beginning of each file")
    parser.add_argument("--skip", type=int, default=0, help="pieces of each file before these")
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--recipes", default="paper,fast")
    parser.add_argument("--arrangement", default="e m*", help="such as '(e m)*'")
    parser.add_argument("--prefix", action="append", default=[], help="text, or none")
    parser.add_argument("--ids", action="append", default=[], help="token ids, with commas")
    parser.add_argument("--learned", action="append", default=[], type=int, metavar="P")
    parser.add_argument("--learn-texts", type=int, default=16)
    parser.add_argument("--learn-steps", type=int, default=200)
    parser.add_argument("--priors", type=Path, default=Path("priors"), help="learned once, kept")
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--cycle", type=int, help="updates of the first cosine of `fast`")
    parser.add_argument("--seconds", type=float, help="stop after so many")
    parser.add_argument("--out", type=Path, default=RESULTS / "sink.json")
    a = parser.parse_args()
    if not Path(a.model).exists() and Path(a.model) == FOLDER:
        sys.exit(f"{FOLDER} is missing; python benchmarks/get_smollm2.py fetches it")
    lm = prototok.load(a.model)
    sink = sink_of(lm)
    print(f"{lm.identity.name}: {sink}")
    most = a.skip + a.texts
    of_path = {path.name: chunks(lm, read_text(path), a.length, most)[a.skip :] for path in a.text}
    pieces = [piece for some in of_path.values() for piece in some]
    settings = {
        "model": lm.identity.name.rsplit("/", 1)[-1],
        "dtype": str(lm.dtype).removeprefix("torch."),
        "share of attention on position 0": sink.share,
        "sources": [name for name, some in of_path.items() if some],
        "texts": len(pieces),
        "skipped": a.skip,
        "length": a.length,
        "max_steps": a.max_steps,
        "arrangement": a.arrangement,
    }
    cells = _kept(a.out, settings)
    started = time.monotonic()
    print(f"{len(pieces)} texts, N = {a.length}, at most {a.max_steps} steps")

    def fits(name: str, **options: Any) -> None:
        if a.seconds is not None and time.monotonic() - started > a.seconds:
            return
        recipe = dataclasses.replace(recipe_of(name), max_steps=a.max_steps)
        if a.cycle is not None and recipe.cycle is not None:
            recipe = dataclasses.replace(recipe, cycle=a.cycle, cycle_tokens=None)
        seen = Seen(pieces, None if a.seconds is None else started + a.seconds)
        try:
            fit = prototok.fast_fit(
                lm, pieces, recipe=recipe, arrangement=a.arrangement, progress=True,
                callback=seen.note, **options,
            )  # fmt: skip
            ended = list(range(len(pieces)))
        except prototok.FitInterrupted as stopped:
            fit, ended = stopped.result, stopped.texts
        front = front_of(lm, options.get("prefix", "auto"), recipe, options.get("init"))[1]
        cells.append(_cell(recipe, front, fit, _confirmed(fit, lm), ended, seen))
        print(_line(cells[-1]), flush=True)
        write(provenance() | settings | {"cells": cells}, a.out)

    fronts: list = [None if text == "none" else text for text in a.prefix]
    fronts += [[int(token) for token in ids.split(",")] for ids in a.ids]
    if not fronts and not a.learned:
        fronts = [None, *([sink.prefix] if sink.prefix else [])]
    for front in fronts:
        for name in a.recipes.split(","):
            fits(name, prefix=front)
    for count in a.learned:
        path = a.priors / f"{settings['model']}-prefix{count}.safetensors"
        if not path.exists():
            own = own_texts(lm, a.learn_texts, a.length)
            prior = prototok.learn_shared(
                lm, own, length=a.length, prefix=count, steps=a.learn_steps, seeds=1, progress=True
            )
            prior.save(path)
        prior = prototok.Prior.load(path)
        print(prior.provenance["prefix"], "accuracy", prior.provenance["accuracy"], flush=True)
        for name in a.recipes.split(","):
            fits(name, init=prior)
            fits(name, prefix=prior.prefix)
    print(json.dumps([{k: c[k] for k in ("recipe", "prefix", "exact")} for c in cells]))


class Seen:
    """What was seen of each text while it was fitted; at `end`, on the monotonic clock, it stops.

    steps  updates made; right: most tokens right so far; first: the step at which all were
    """

    def __init__(self, pieces: list[list[int]], end: float | None) -> None:
        self.lengths, self.end = [len(piece) for piece in pieces], end
        self.steps, self.right = [0] * len(pieces), [0] * len(pieces)
        self.first: list[int | None] = [None] * len(pieces)

    def note(self, event: FitEvent) -> None:
        """Take note of a look at the device."""
        seen = zip(event.rows.tolist(), event.steps.tolist(), event.correct.tolist(), strict=True)
        for row, step, right in seen:
            self.steps[row], self.right[row] = step, max(self.right[row], right)
            if right == self.lengths[row] and self.first[row] is None:
                self.first[row] = step
        if self.end is not None and time.monotonic() > self.end:
            raise KeyboardInterrupt


def _kept(path: Path, settings: dict) -> list[dict]:
    """Return the cells of a result file, where it is of the same texts and steps."""
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    # Records of before there was something to skip, or to arrange, do not say so.
    usual = {"skipped": 0, "arrangement": "e m*"}
    if any((usual | record).get(name) != value for name, value in settings.items()):
        sys.exit(f"{path} is of other texts or steps; name another with --out")
    return record["cells"]


@torch.no_grad()
def _confirmed(fit: prototok.FitResult | None, lm: prototok.FrozenLM) -> dict[str, int]:
    """Count the exact texts that plain transformers decodes from the vectors alone, by dtype."""
    counts = {"bfloat16": 0, "float32": 0}
    for dtype in (torch.bfloat16, torch.float32):
        if fit is None:
            break
        name = lm.identity.name
        folder = path_of(name) if name in BUILT_IN else name
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        front = torch.empty(0, lm.hidden_size)
        if fit.tokens.prefix is not None:
            front = fit.tokens.prefix.vectors
        same, arrangement = 0, Arrangement.parse(fit.tokens.arrangement)
        for row in fit.exact[:, 0].nonzero()[:, 0].tolist():
            layout = arrangement.layout(int(fit.tokens.lengths[row]))
            inputs = torch.cat([front, fit.tokens.vectors(row)[layout]])
            read = len(front) + arrangement.offset
            ids = model(inputs_embeds=inputs.to(dtype)[None]).logits[0, read:].argmax(-1)
            same += torch.equal(ids, fit.targets[row])
        counts[str(dtype).removeprefix("torch.")] = same
    return counts


def _cell(
    recipe: Recipe,
    front: str,
    fit: prototok.FitResult | None,
    confirmed: dict[str, int],
    ended: list[int],
    seen: Seen,
) -> dict:
    """Return what is kept of a fit; a text that was not `ended` is not exact after its steps."""
    steps, margin = list(seen.steps), [None] * len(seen.steps)
    accuracy = [min(right, n - 1) / n for right, n in zip(seen.right, seen.lengths, strict=True)]
    solved = []
    for k, text in enumerate(ended):
        steps[text], accuracy[text] = int(fit.steps[k, 0]), float(fit.accuracy[k, 0])
        margin[text] = round(float(fit.margin[k, 0]), 2)
        if fit.exact[k, 0]:
            solved.append(steps[text])
    return {
        "recipe": recipe.name,
        "prefix": front,
        "settings": dataclasses.asdict(recipe),
        "commit": provenance()["commit"],
        "exact": len(solved),
        "confirmed": confirmed,
        "margin": margin,
        "steps of the exact": sorted(solved),
        "median": statistics.median_low(solved) if solved else None,
        "accuracy": accuracy,
        "steps": steps,
        "first right": seen.first,
        "stopped": [text for text in range(len(steps)) if text not in ended],
    }


def _line(cell: dict) -> str:
    accuracy = sum(cell["accuracy"]) / len(cell["accuracy"])
    median = "–" if cell["median"] is None else f"{cell['median']:.0f}"
    return (
        f"{cell['recipe']}, {cell['prefix']}: {cell['exact']} of {len(cell['steps'])} exact, "
        f"confirmed {cell['confirmed']}, median steps {median}, mean accuracy {accuracy:.2f}"
    )


if __name__ == "__main__":
    main()
