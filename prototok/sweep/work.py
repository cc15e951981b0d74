"""A worker's job: fit units, measure what came of them, commit each as it ends.

Letters: R rows of a unit, N targets, K leading vectors, d hidden size.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prototok.common.arguments import batch_size_of
from prototok.common.clock import timed
from prototok.decoding.information import information
from prototok.fitting.driver import EndedRow, fit_groups
from prototok.fitting.engine.rows import Group, Row
from prototok.fitting.front import front_of
from prototok.model.frozen_lm import FrozenLM
from prototok.results.mem_fit import MemFit
from prototok.results.provenance import arithmetic, as_json, versions
from prototok.sweep.files import RunNotWritable
from prototok.sweep.models import load_model
from prototok.sweep.modes import Mode, mode_of
from prototok.sweep.run_folder import RunFolder, now
from prototok.sweep.settings import recipe_of_unit
from prototok.sweep.unit import Unit


class Worker:
    """Fits units of one run on one device; keeps the last model it loaded."""

    def __init__(
        self, run: RunFolder, device: str = "auto", batch_size: int | str = "auto",
        name: str = "worker",
    ) -> None:  # fmt: skip
        self.run, self.device, self.name = run, device, name
        self.batch_size = batch_size_of(batch_size)
        self.texts: dict[str, dict[str, Any]] = {}
        self.experiments: dict[str, str] = {}
        self._load = functools.lru_cache(maxsize=1)(load_model)
        self._information = functools.lru_cache(maxsize=1 << 16)(self._measure_information)

    def do(self, units: list[Unit]) -> Iterator[tuple[str, bool]]:
        """Fit units of one `group()`; yield (key, True if it is done, False if it failed).

        A unit that raises is recorded as failed and does not stop the others. What leaves a CUDA
        device unusable is raised: the process has to end, and another to begin. A run folder that
        takes no more is raised as RunNotWritable.
        """
        units = [unit for unit in units if not self.run.is_done(unit.key)]
        if not units:
            return
        self._read_plan(units)
        try:
            lm = self._load(units[0].model, self.device, units[0].dtype)
        except ValueError as error:
            for unit in units:
                self.run.fail(unit.key, str(error), 1, traceback.format_exc())
                yield unit.key, False
            return
        batches = [[unit] for unit in units] if units[0].alone else [units]
        for batch in batches:
            yield from self._isolated(lm, batch)

    def _isolated(self, lm: FrozenLM, units: list[Unit]) -> Iterator[tuple[str, bool]]:
        """Fit a batch; if it raises, each unit that was not done on its own."""
        done: set[str] = set()
        try:
            for key in self._fit(lm, units):
                done.add(key)
                yield key, True
        except RunNotWritable:
            raise  # no unit is to blame
        except Exception as error:
            unusable = lm.device.type == "cuda" and not isinstance(
                error, ValueError | torch.OutOfMemoryError
            )
            if unusable:
                raise
            reason, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
            left = [unit for unit in units if unit.key not in done]
            if len(left) == 1:
                self.run.fail(left[0].key, reason, 1, trace)
                yield left[0].key, False
                return
            for unit in left:
                yield from self._isolated(lm, [unit])

    def _fit(self, lm: FrozenLM, units: list[Unit]) -> Iterator[str]:
        recipe = recipe_of_unit(units[0].recipe, units[0].changes)
        lm, in_front = front_of(lm, units[0].prefix, recipe)
        mode = mode_of(lm, units[0], recipe, self.batch_size)
        for unit in units:
            mode.require(unit.length)
        settings = as_json(recipe)
        ran = {**arithmetic(lm), "backend": lm.plan(1, 1).passes.taken}
        same = ran | {
            "recipe_settings": settings,
            "revision": lm.identity.revision,
            "fingerprint": lm.identity.fingerprint,
            "versions": json.dumps(versions()),
        }
        queue = list(self._groups(units))
        for group, rows in fit_groups(mode.setup, queue, mode.verify, lambda event: None):
            unit = units[group.index]
            records = [
                same | self._record(mode, unit, r, one) | self._time(mode, unit, one)
                for r, one in enumerate(rows)
            ]
            provenance = {"unit": unit.spec(), "recipe": settings, "prefix": in_front}
            provenance |= ran | versions()
            self.run.commit(unit.key, records, mode.saving(rows, provenance))
            yield unit.key

    def _groups(self, units: list[Unit]) -> Iterator[Group]:
        """Make the rows of each unit as the engine takes them: every row is a text of its own."""
        numbers = itertools.count()
        for g, unit in enumerate(units):
            rows = [
                Row(index := next(numbers), index, seed, self._target(text, unit.length))
                for text, seed in zip(unit.texts, unit.seeds, strict=True)
            ]
            yield Group(g, tuple(rows), unit.share)

    def _record(self, mode: Mode, unit: Unit, r: int, one: EndedRow) -> dict[str, Any]:
        check = one.check
        measured = {
            "accuracy": check.accuracy,
            "exact": check.exact,
            "correct": check.correct,
            "margin": check.margin,
            "steps": one.steps,
            "seconds": one.seconds,
            **mode.measured(one),
        }
        return (
            self._asked(unit, r)
            | measured
            | self._texts_columns(mode.setup.lm.bare, unit, r, check.ids)
        )

    def _time(self, mode: Mode, unit: Unit, one: EndedRow) -> dict[str, Any]:
        """Time the decoding of an exact row alone, in seconds, where its unit asks for it."""
        if not (unit.timed and one.check.exact):
            return {}
        call = mode.decode(one.vectors, unit.length)
        seconds = statistics.median(timed(call, mode.setup.lm.device))
        return {
            "decode_seconds": seconds,
            "tokens_per_second": unit.length / seconds,
            "decoder": mode.decoder,
        }

    def _read_plan(self, units: list[Unit]) -> None:
        if any(not self._has(text, unit.length) for unit in units for text in unit.texts):
            self.texts = {row["text_id"]: row for row in self.run.texts().to_pylist()}
        if any(unit.key not in self.experiments for unit in units):
            plan = self.run.plan()
            names = zip(plan["key"].to_pylist(), plan["experiment"].to_pylist(), strict=True)
            self.experiments = dict(reversed(list(names)))

    def _has(self, text: str, length: int) -> bool:
        """Say whether a text is here in that length: planned again, it may have grown."""
        return text in self.texts and len(self.texts[text]["ids"]) >= length

    def _target(self, text: str, length: int) -> Tensor:
        """Return (N,) int64: the first tokens of a text of the run."""
        return torch.tensor(self.texts[text]["ids"][:length], dtype=torch.int64, device="cpu")

    def _asked(self, unit: Unit, r: int) -> dict[str, Any]:
        """Return what row r of a unit was asked to be."""
        text = self.texts[unit.texts[r]]
        names = (
            "mode", "model", "source", "length", "share", "group_size", "arrangement", "vectors",
            "recipe",
        )  # fmt: skip
        return {name: getattr(unit, name) for name in names} | {
            "experiment": self.experiments.get(unit.key),
            "text_id": unit.texts[r],
            "number": text["number"],
            "context": text["context"],
            "seed": unit.seeds[r],
            "worker": self.name,
            "finished": now(),
        }

    def _texts_columns(self, lm: FrozenLM, unit: Unit, r: int, decoded: Tensor) -> dict[str, Any]:
        """Return target and decoding, as ids and text, and H_LM of the target."""
        target = self._target(unit.texts[r], unit.length)
        nats, scored = self._information(lm, tuple(target.tolist()))
        has_text = lm.tokenizer is not None
        return {
            "target_ids": target.tolist(),
            "decoded_ids": decoded.tolist(),
            "target_text": lm.decode_ids(target) if has_text else None,
            "decoded_text": lm.decode_ids(decoded) if has_text else None,
            "h_lm": nats,
            "h_lm_tokens": scored,
        }

    def _measure_information(self, lm: FrozenLM, ids: tuple[int, ...]) -> tuple[float, int]:
        found = information(lm, [list(ids)])
        return float(found.nats), int(found.scored)


def recheck(run: RunFolder, key: str, rows: list[dict[str, Any]], lm: FrozenLM) -> list[str]:
    """Verify a unit again from its stored vectors; say what differs from its record."""
    stored = run.tensors(key)
    stored.require_model(lm)
    unit = run.units()[key]
    lm = lm.behind(stored.prefix)
    mode = mode_of(lm, unit, recipe_of_unit(unit.recipe, unit.changes), None)
    problems = []
    for row in rows:
        target = torch.tensor(row["target_ids"], dtype=torch.int64, device="cpu")
        at = row["row"]
        vectors = stored.mem[at, 0] if isinstance(stored, MemFit) else stored.vectors(at)
        (check,) = mode.verify(mode.setup, [(target, vectors)])
        found = check.correct
        if found != row["correct"]:
            problems.append(
                f"{key}, row {at}: {found} of {len(target)} tokens right when decoded again, "
                f"{row['correct']} in the record"
            )
    return problems
