"""Check a run: every file against its hash, a sample of units by decoding them again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from prototok.sweep.files import sha256_of
from prototok.sweep.run_folder import RunFolder


def verify(run: RunFolder, sample: int, device: str = "auto") -> tuple[int, int, list[str]]:
    """Check a run; return units checked, units decoded again, and what is wrong, in words.

    Every shard is read and its tensors are hashed. Of `sample` units, the same for the same run,
    every row is decoded at batch 1 in the dtype it was fitted in and in float32, and has to give as
    many right tokens as its record says.
    """
    if sample < 0:
        raise ValueError(f"sample: {sample} is negative")
    problems: list[str] = []
    units: dict[str, list[dict[str, Any]]] = {}
    for key, rows in _rows_by_unit(run, problems):
        units[key] = rows
    planned = run.units()
    for key, rows in units.items():
        expected = list(zip(planned[key].texts, planned[key].seeds, strict=True))
        if [(row["text_id"], row["seed"]) for row in rows] != expected:
            problems.append(f"{key}: its rows are not those of its unit")
        path = run.tensors_path(key)
        if not path.exists():
            problems.append(f"{key}: {path} is missing")
        elif sha256_of(path) != rows[0]["tensors_sha256"]:
            problems.append(f"{key}: {path} is not the file that was recorded")
    bad = {problem.partition(":")[0] for problem in problems}
    good = sorted(set(units) - bad)
    chosen = random.Random(0).sample(good, min(sample, len(good)))
    chosen.sort(key=lambda key: (planned[key].model, units[key][0]["dtype"]))
    if chosen:
        from prototok.sweep.models import load_model
        from prototok.sweep.work import recheck

        loaded = None
        for key in chosen:
            wanted = planned[key].model, units[key][0]["dtype"]
            if loaded != wanted:
                lm, loaded = load_model(wanted[0], device, wanted[1]), wanted
            try:
                problems += recheck(run, key, units[key], lm)
            except ValueError as error:
                problems.append(f"{key}: {error}")
    return len(units), len(chosen), problems


def _rows_by_unit(
    run: RunFolder, problems: list[str]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the rows of each unit that is done; what cannot be read is a problem."""
    for key, read in run.shards():
        try:
            table = read()
        except (ValueError, OSError) as error:
            problems.append(f"{key}: its shard could not be read ({error})")
            continue
        rows = table.to_pylist()
        if not rows or {row["key"] for row in rows} != {key}:
            problems.append(f"{key}: its shard holds rows of other units")
        else:
            yield key, sorted(rows, key=lambda row: row["row"])
