"""A run folder with made-up fits: every experiment planned, some units missing, one failed."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from prototok import ProtoTokens
from prototok.model.identity import ModelIdentity
from prototok.sweep import schema
from prototok.sweep.run_folder import RunFolder
from prototok.sweep.unit import Unit

MODEL = "tiny-llama"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"q\" 'r'"
WIDTH = 16
IDENTITY = ModelIdentity(MODEL, None, "llama", WIDTH, 4096, "f" * 32, "t" * 32)
ARRANGEMENTS = ("e*", "e* m*", "(e m)*", "e m*+1", "e m*")


def make_run(path: Path) -> RunFolder:
    """All experiments of the paper. In table3 one unit is missing and one has failed."""
    run = RunFolder.create(path)
    rng = np.random.default_rng(0)

    def plan(name: str, units: list[Unit], **settings: Any) -> None:
        common = {"models": [MODEL], "sources": [{"name": "novel"}], "texts": 3, "lengths": [4],
                  "seeds": 1, "recipe": "fast", "changes": {"max_steps": 9}}  # fmt: skip
        texts = [
            {"text_id": t, "source": unit.source, "number": 0, "context": None, "origin": "made up",
             "ids": [1, 2], "text": HOSTILE}
            for unit in units for t in unit.texts
        ]  # fmt: skip
        run.add(name, common | settings, units, pa.Table.from_pylist(texts, schema=schema.TEXTS))

    def unit(text: str, length: int, **changes: Any) -> Unit:
        given = {"mode": "one-forward", "source": "novel", "seeds": (0,), "recipe": "fast"}
        texts = changes.pop("texts", (text,))
        return Unit(model=MODEL, texts=texts, length=length, **(given | changes))

    def do(one: Unit, accuracy: float, **more: Any) -> None:
        commit(run, one, accuracy, rng, **more)

    table1 = [
        unit(f"t{i}", n, arrangement=a) for a in ARRANGEMENTS for n in (1, 4, 16) for i in range(3)
    ]
    plan("table1", table1, arrangements=list(ARRANGEMENTS), lengths=[1, 4, 16])
    for one in table1:
        worth = (ARRANGEMENTS.index(one.arrangement) + 1) * 2
        do(one, min(1.0, worth / one.length))

    table2 = [
        unit("", 4, texts=tuple(f"t{j}" for j in range(i, i + size)), seeds=(seed,) * size,
             share=share, group_size=size)
        for share in ("e", "m") for size in (1, 2, 4) for seed in (0, 1)
        for i in range(0, 4, size)
    ]  # fmt: skip
    plan("table2", table2, share=["e", "m"], seeds=2)
    for one in table2:
        do(one, 1.0 if one.seeds[0] == 0 else 0.5)

    table3 = [
        unit(f"{source}{i}", n, source=source, share=None)
        for source in ("novel", "Random") for n in (4, 8, 16) for i in range(3)
    ]  # fmt: skip
    plan("table3", table3, share=[None], lengths=[4, 8, 16])
    for one in table3:
        if one.length == 16 and one.texts == ("novel0",):
            continue  # missing
        if one.length == 16 and one.texts == ("novel1",):
            run.fail(one.key, HOSTILE, 3)
            continue
        held = 16 if one.texts[0].endswith("2") else 8
        do(one, 1.0 if one.length <= held else 0.75)

    modes = [("one-forward", 1, None), ("one-forward", 1, "m"), ("autoregressive", 1, None),
             ("autoregressive", 2, None)]  # fmt: skip
    figure2 = [
        unit(f"t{i}", n, mode=mode, vectors=k, share=share)
        for mode, k, share in modes for n in (4, 8) for i in range(3)
    ]  # fmt: skip
    plan("figure2", figure2)
    for one in figure2:
        do(one, 1.0 if one.length == 4 or one.mode == "autoregressive" else 0.5)

    figure3 = [
        unit(f"t{i}", 8, mode=mode, timed=True)
        for mode in ("one-forward", "autoregressive") for i in range(3)
    ]  # fmt: skip
    plan("figure3", figure3)
    for one in figure3:
        do(one, 1.0, seconds_each=0.001 if one.mode == "one-forward" else 0.01)

    cloud = [f"c{c}-{i}" for c in range(3) for i in range(3)]
    both = [("c0-0", s) for s in (1, 2)] + [(t, 0) for t in cloud]
    figure4 = [unit("", 4, texts=tuple(t for t, _ in both), seeds=tuple(s for _, s in both),
                    share="m")]  # fmt: skip
    for name in ("figure4", "figure5"):
        plan(name, figure4, contexts=3, continuations=3)
    do(figure4[0], 1.0)

    figure6 = [unit("", 4, texts=("t0",) * 3, seeds=(0, 1, 2), share="m")]
    plan("figure6", figure6, seeds=3)
    do(figure6[0], 1.0)

    table4 = [unit(f"t{i}", n, alone=True) for n in (4, 8) for i in range(3)]
    plan("table4", table4)
    for one in table4:
        do(one, 1.0)
    return run


def commit(
    run: RunFolder, one: Unit, accuracy: float, rng: np.random.Generator, seconds_each: float = 0.0
) -> None:
    """Record a unit as done, with that share of right tokens."""
    rows = []
    for text, seed in zip(one.texts, one.seeds, strict=True):
        target = [5 + (hash_of(text) + j) % 4000 for j in range(one.length)]
        right = round(accuracy * one.length)
        decoded = [t if j < right else 4001 for j, t in enumerate(target)]
        margins = [float(rng.uniform(0, 4)) if j < right else -0.5 for j in range(one.length)]
        row = {
            "experiment": None, "mode": one.mode, "model": one.model, "source": one.source,
            "text_id": text, "number": 0,
            "context": text.partition("-")[0] if "-" in text else None,
            "seed": seed, "length": one.length, "share": one.share, "group_size": one.group_size,
            "arrangement": one.arrangement, "vectors": one.vectors, "recipe": one.recipe,
            "fingerprint": "f" * 32, "recipe_settings": "{}", "dtype": "float32", "device": "cpu",
            "backend": "torch", "versions": json.dumps({"torch": "2.13"}),
            "accuracy": right / one.length, "exact": right == one.length, "correct": right,
            "margin": min(margins), "loss": 0.1, "accuracy_in_batch": 1.0, "steps": 7,
            "seconds": 0.1 * one.length, "h_lm": 4.0 * one.length * (1.5 if one.source == "Random"
            else 1), "h_lm_tokens": one.length - 1, "target_ids": target, "decoded_ids": decoded,
            "target_text": f"{HOSTILE} {text}", "decoded_text": HOSTILE,
            "margins": margins if one.mode == "one-forward" else None,
            "worker": "w", "finished": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        }  # fmt: skip
        if seconds_each:
            row |= {"decode_seconds": seconds_each, "tokens_per_second": one.length / seconds_each}
        rows.append(row)
    e = torch.stack(
        [
            torch.from_numpy(
                np.random.default_rng(hash_of(t.partition("-")[0])).normal(size=WIDTH)
                + 0.3 * np.random.default_rng(hash_of(t)).normal(size=WIDTH)
                + 0.05 * np.random.default_rng(s).normal(size=WIDTH)
            ).float()
            for t, s in zip(one.texts, one.seeds, strict=True)
        ]
    )
    shared = one.share == "m"
    tokens = ProtoTokens(
        e=e[:1] if one.share == "e" else e[:, None],
        m=torch.ones(1, WIDTH) if shared else torch.ones(len(e), 1, WIDTH),
        lengths=torch.full((len(e),), one.length), arrangement="e m*", model=IDENTITY, seeds=1,
        share=one.share, groups=torch.zeros(len(e), dtype=torch.int64) if one.share else None,
    )  # fmt: skip
    run.commit(one.key, rows, tokens.save)


def hash_of(text: str) -> int:
    """The same number on every run, unlike `hash`."""
    return sum((i + 1) * ord(c) for i, c in enumerate(text))


# What `prototok report --measure` would leave behind.
PATHS = {
    "groups": [
        {
            "model": MODEL, "source": "novel", "length": 4, "share": "m", "pairs": 3,
            "t": [i / 10 for i in range(11)],
            "settings": {"lr": 0.01, "samples": 8, "max_steps": 100},
            "straight": {"accuracy": [[1.0, 1, 1, 0.75, 0.5, 0.25, 0.5, 0.75, 1, 1, 1]] * 3,
                         "length_ratio": [1.0] * 3, "straight": [9.0] * 3, "steps": [0] * 3},
            "curve": {"accuracy": [[1.0] * 11] * 3, "length_ratio": [1.05, 1.1, 1.15],
                      "straight": [9.0] * 3, "steps": [50] * 3},
        }
    ]
}  # fmt: skip
