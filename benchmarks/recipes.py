"""Which recipe fits in how few steps, and how long a text it still fits: the study behind `fast`.

    python benchmarks/recipes.py --shared ../shared dev     # choosing: development texts
    python benchmarks/recipes.py --shared ../shared test    # what is reported: test texts
    python benchmarks/recipes.py --unseen FOLDER test       # and a model not used for choosing
    python benchmarks/recipes.py summary                    # tables and the figure from the results

Every cell (part, model, length, recipe) is written to results/recipes.json as soon as it is done,
and one that is there with the same settings is not run again. The test texts are those of
benchmarks/reconstruction.py; the development texts come from the other end of the same source. A
text counts as solved when it comes back whole from a decoding at batch 1, in the model's dtype and
in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from reconstruction import NOVEL, STORIES
from record import RESULTS, provenance

import prototok
from prototok import FrozenLM, Prior, Recipe
from prototok.fitting.fast_fit import FitEvent
from prototok.fitting.recipe import FAST, PAPER
from prototok.model.load import BUILT_IN
from prototok.report.svg import Dot, log_dots
from prototok.report.verdict import Interval, share_of
from prototok.texts.files import read_text

# (model, source of text, mid-range length, lengths around the paper recipe's capacity)
MODELS = {
    "stories260k": (STORIES, 16, (8, 16, 22, 24, 27, 32)),
    "stories3m": (STORIES, 16, (22, 32, 45, 64)),
    "neox4m": (NOVEL, 8, (8, 11, 16, 22)),
    "tiny-llama": ("held_out", 16, (8, 11, 16, 22)),
    "tiny-neox": ("held_out", 8, (8, 11, 16, 22, 32)),
}
# Trained by benchmarks/train_builtin.py at another width, after `fast` was chosen; its folder is
# named by --unseen and holds its held-out text.
UNSEEN = "unseen"


@dataclass(frozen=True)
class Cell:
    part: str  # dev or test
    model: str
    length: int
    recipe: Recipe
    texts: int
    prior: bool = False  # starts from `learn_shared` on texts that the model sampled itself

    @property
    def key(self) -> str:
        name, steps = self.recipe.name, self.recipe.max_steps
        start = " prior" if self.prior else ""
        return f"{self.part} {self.model} {self.length} {name}{start} {steps} {self.texts}"


def candidates() -> Iterator[Recipe]:
    """One change at a time from a common point, and the combinations that looked best."""
    base = Recipe(
        name="base", lr=0.1, betas=(0.9, 0.99), weight_decay=0.1, schedule="cosine", warmup=20,
        init_std=0.3, temperature=0.5, max_steps=400,
    )  # fmt: skip
    yield base
    for name, changes in {
        "no temperature": {"temperature": 1.0},
        "temperature 0.25": {"temperature": 0.25},
        "constant rate": {"schedule": "constant"},
        "cycles from 150": {"cycle": 150},
        "lr 0.05": {"lr": 0.05},
        "lr 0.2": {"lr": 0.2},
        "betas 0.9 0.9": {"betas": (0.9, 0.9)},
        "init 1": {"init_std": 1.0},
        "init 0.1": {"init_std": 0.1},
        "no decay": {"weight_decay": 0.0},
        "eigenbasis": {"eigenbasis": True},
        "eigenbasis, lr 0.2": {"eigenbasis": True, "lr": 0.2},
        "eigenbasis, lr 0.05": {"eigenbasis": True, "lr": 0.05},
        "cycles from 300, 4500 steps": {"cycle": 300, "max_steps": 4500},
    }.items():
        yield dataclasses.replace(base, name=name, **changes)


# `fast` as it was before it went slower from a prior.
BEFORE = dataclasses.replace(
    FAST, name="fast, lr 0.1", lr_width=None, betas=(0.9, 0.99), cycle=300, warmup=20,
    prior_rate=None, max_steps=900, spreads=0.0,
)  # fmt: skip


def dev_cells() -> Iterator[Cell]:
    for model, (_, middle, _) in MODELS.items():
        for recipe in candidates():
            yield Cell("dev", model, middle, recipe, 8)
        yield Cell("dev", model, middle, BEFORE, 16, prior=True)
        for rate in (0.2, 0.3, 0.4, 0.7):
            name = f"fast, prior rate {rate}"
            recipe = dataclasses.replace(FAST, name=name, prior_rate=rate, max_steps=900)
            yield Cell("dev", model, middle, recipe, 16, prior=True)


# `fast` as it was before its rate followed the width.
NARROW = dataclasses.replace(
    FAST, name="fast, before", lr_width=None, prior_rate=0.3, betas=(0.8, 0.99), cooling=1.0,
    spreads=0.0,
)  # fmt: skip


def test_cells() -> Iterator[Cell]:
    """The recipes in turn at each length, so that they share the machine's ups and downs."""
    plain = dataclasses.replace(FAST, shipped_prior=False)
    # `fast` goes on to a margin; this one ends where the paper's does.
    bare = dataclasses.replace(FAST, name="fast, margin 0", margin=0.0, spreads=0.0)
    for texts, middle in ((16, True), (4, False)):
        for model, (_, mid, around) in MODELS.items():
            for length in (mid,) if middle else around:
                yield Cell("test", model, length, PAPER, texts)
                yield Cell("test", model, length, FAST, texts, prior=True)
                if middle:
                    yield Cell("test", model, length, NARROW, texts, prior=True)
                    yield Cell("test", model, length, plain, texts)
                    yield Cell("test", model, length, bare, texts, prior=True)
    yield Cell("test", UNSEEN, 8, PAPER, 16)
    yield Cell("test", UNSEEN, 8, FAST, 16, prior=True)
    yield Cell("test", UNSEEN, 8, plain, 16)
    yield Cell("test", UNSEEN, 8, bare, 16, prior=True)


def texts_of(lm: FrozenLM, path: Path, cell: Cell) -> list[list[int]]:
    """Test: as benchmarks/reconstruction.py has them. Development: from the other end."""
    text, n = read_text(path), cell.length
    if path.name == Path(STORIES).name:
        stories = text.split("\n\n")
        found: list[list[int]] = []
        for story in stories if cell.part == "test" else reversed(stories):
            ids = lm.encode(story)
            if len(ids) >= n:
                found.append(ids[:n])
            if len(found) == cell.texts:
                break
        return found
    ids = lm.encode(text[len(text) // (20 if cell.part == "test" else 2) :])
    return [ids[i : i + n] for i in range(0, cell.texts * n, n)]


def run_cell(lm: FrozenLM, cell: Cell, path: Path, init: Prior | None) -> dict:
    texts = texts_of(lm, path, cell)
    first = [-1] * len(texts)  # the step at which all tokens were right in the batch

    def note(event: FitEvent) -> None:
        for row, step, right in zip(
            event.rows.tolist(), event.steps.tolist(), event.correct.tolist(), strict=True
        ):
            if right == cell.length and first[row] < 0:
                first[row] = step

    fit = prototok.fast_fit(lm, texts, recipe=cell.recipe, init=init, progress=True, callback=note)
    return {
        "part": cell.part,
        "model": cell.model,
        "length": cell.length,
        "recipe": dataclasses.asdict(cell.recipe),
        "prior": cell.prior,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "exact": fit.exact[:, 0].tolist(),
        "accuracy": [round(a, 4) for a in fit.accuracy[:, 0].tolist()],
        "steps": fit.steps[:, 0].tolist(),
        "first_right": first,
        "margin": [round(m, 3) for m in fit.margin[:, 0].tolist()],
        "seconds": [round(s, 3) for s in fit.seconds[:, 0].tolist()],
        "commit": provenance()["commit"],
    }


def prior_of(lm: FrozenLM, path: Path, cell: Cell) -> Prior | None:
    """Learned from 32 texts that the model sampled itself, once, and kept in a file."""
    if not cell.prior:
        return None
    if not path.exists():
        prototok.learn_shared(lm, seeds=1, progress=True).save(path)
    return Prior.load(path)


def rounded(interval: Interval) -> list[float]:
    return [round(interval.low, 3), round(interval.high, 3)]


def quantile(values: list[float], share: float) -> float:
    """Of values in which a censored one is inf."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median_interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(quantile(generator.choices(values, k=len(values)), 0.5) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def summary_of(row: dict) -> dict:
    """What is reported of a cell; steps of unsolved texts count as infinite (None)."""
    censored = [s if e else math.inf for s, e in zip(row["steps"], row["exact"], strict=True)]
    right = [f if f >= 0 else math.inf for f in row["first_right"]]
    seconds = [s if e else math.inf for s, e in zip(row["seconds"], row["exact"], strict=True)]

    def shown(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "part": row["part"],
        "model": row["model"],
        "length": row["length"],
        "recipe": row["recipe"]["name"] + (" + prior" if row["prior"] else ""),
        "max_steps": row["recipe"]["max_steps"],
        "texts": len(censored),
        "exact": sum(row["exact"]),
        "exact_interval": rounded(share_of(sum(row["exact"]), len(censored))),
        "at_099": sum(a >= 0.99 for a in row["accuracy"]),
        "accuracy": sum(row["accuracy"]) / len(censored),
        "steps_quartiles": [shown(quantile(censored, q)) for q in (0.25, 0.5, 0.75)],
        "first_right_quartiles": [shown(quantile(right, q)) for q in (0.25, 0.5, 0.75)],
        "steps_interval": [shown(x) for x in median_interval(censored)],
        "seconds_median": shown(quantile(seconds, 0.5)),
    }


def load(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {"cells": {}}


def is_known(cell: Cell, record: dict) -> bool:
    """Whether it was run with these settings; those it does not name did not exist then."""
    if cell.key not in record["cells"]:
        return False
    settings = json.loads(json.dumps(dataclasses.asdict(cell.recipe)))
    return all(settings.get(k) == v for k, v in record["cells"][cell.key]["recipe"].items())


def save(record: dict, path: Path) -> None:
    record |= provenance()
    record["summary"] = [summary_of(row) for row in record["cells"].values()]
    temporary = path.with_suffix(".tmp")
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in record["cells"].items()]
    rest = json.dumps({k: v for k, v in record.items() if k != "cells"}, indent=1)
    temporary.write_text(rest[:-2] + ',\n "cells": {\n' + ",\n".join(lines) + "\n }\n}\n")
    os.replace(temporary, path)


def figure(record: dict) -> str:
    """Draw the steps to exact of all 16-text cells; the shorter ones are in the table alone."""
    cells = [s for s in record["summary"] if s["part"] == "test" and s["texts"] >= 16]
    order = {key: i for i, key in enumerate(dict.fromkeys(map(group_of, cells)))}
    dots = []
    for s in sorted(cells, key=lambda s: (order[group_of(s)], s["steps_quartiles"][1] or math.inf)):
        low, middle, high = s["steps_quartiles"]
        exact = f"{s['exact']}/{s['texts']} exact"
        none = f"no median, {exact} in {s['max_steps']:,}"
        note = none if middle is None else f"{middle:,.0f}, {exact}"
        dots.append(Dot(group_of(s), s["recipe"], s["recipe"], middle, note, low, high or math.inf))
    about = (
        "Median and quartiles over 16 test texts at a middle length. Lengths tried with 4 texts: "
        "recipes.json."
    )
    return log_dots("Steps to exact", about, "updates", dots)


def group_of(cell: dict) -> str:
    return f"{cell['model']}, N = {cell['length']}"


def show(record: dict) -> None:
    print(f"{'part':<5}{'model':<13}{'N':>3}  {'recipe':<30}{'exact':>7} {'≥0.99':>6}  steps")
    for s in record["summary"]:
        steps = "/".join("–" if q is None else f"{q:.0f}" for q in s["steps_quartiles"])
        print(
            f"{s['part']:<5}{s['model']:<13}{s['length']:>3}  {s['recipe']:<30}"
            f"{s['exact']:>3}/{s['texts']:<3} {s['at_099']:>6}  {steps} of {s['max_steps']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["dev", "test", "summary"])
    parser.add_argument("--shared", type=Path, help="folder with models/ and corpora/")
    parser.add_argument("--unseen", type=Path, help="a model folder with its held_out.txt")
    parser.add_argument("--only", default="", help="cells whose key holds this")
    parser.add_argument("--priors", type=Path, default=Path("priors"), help="learned once, kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "recipes.json")
    a = parser.parse_args()
    torch.set_num_threads(1)
    built_in = Path(prototok.__file__).parent / "models"
    models: dict[str, FrozenLM] = {}
    cells = [] if a.part == "summary" else dev_cells() if a.part == "dev" else test_cells()
    for cell in cells:
        record = load(a.out)
        if a.only not in cell.key or is_known(cell, record):
            continue
        own = cell.model in BUILT_IN
        if own:
            folder = built_in / cell.model
        elif cell.model == UNSEEN and a.unseen is not None:
            folder = a.unseen
        elif cell.model in MODELS and a.shared is not None:
            folder = a.shared / "models" / cell.model
        else:
            continue
        if cell.model not in models:
            models[cell.model] = prototok.load(cell.model if own else folder)
        source = MODELS[cell.model][0] if cell.model in MODELS else "held_out"
        path = folder / "held_out.txt" if source == "held_out" else a.shared / source
        init = prior_of(models[cell.model], a.priors / f"{cell.model}.safetensors", cell)
        row = run_cell(models[cell.model], cell, path, init)
        record = load(a.out)
        record["cells"][cell.key] = row
        save(record, a.out)
        s = summary_of(row)
        print(cell.key, f"{s['exact']}/{s['texts']}", s["steps_quartiles"], flush=True)
    record = load(a.out)
    if record["cells"]:
        save(record, a.out)
        a.out.with_suffix(".svg").write_text(figure(record), encoding="utf-8")
        show(record)


if __name__ == "__main__":
    main()
