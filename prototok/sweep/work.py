"""A worker's job: fit units, measure what came of them, commit each as it ends.

Letters: R rows of a unit, N targets, K leading vectors, d hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import traceback
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

import prototok
from prototok import autoregressive
from prototok.autoregressive.generate import generate
from prototok.bench.machine import timed
from prototok.decoding.decode import Decoded, decode_vectors, require_length
from prototok.decoding.information import information
from prototok.fitting.engine.rows import Row
from prototok.fitting.engine.rows import Unit as EngineUnit
from prototok.fitting.engine.run import Finished
from prototok.fitting.fast_fit import fit_units, vectors_by_row
from prototok.model.frozen_lm import FrozenLM
from prototok.results.arrangement import Arrangement
from prototok.results.mem_fit import MemFit
from prototok.results.proto_tokens import ProtoTokens
from prototok.sweep.models import load_model
from prototok.sweep.run_folder import RunFolder, now
from prototok.sweep.settings import recipe_of_unit
from prototok.sweep.unit import Unit


class Worker:
    """Fits units of one run on one device; keeps the last model it loaded."""

    def __init__(
        self, run: RunFolder, device: str = "auto", batch_size: int | str = "auto",
        name: str = "worker",
    ) -> None:  # fmt: skip
        self.run, self.device, self.batch_size, self.name = run, device, batch_size, name
        self.texts: dict[str, dict[str, Any]] = {}
        self.experiments: dict[str, str] = {}
        self._load = functools.lru_cache(maxsize=1)(load_model)
        self._information = functools.lru_cache(maxsize=1 << 16)(self._measure_information)

    def do(self, units: list[Unit]) -> Iterator[tuple[str, bool]]:
        """Fit units of one `group()`; yields (key, whether it is done or else failed).

        A unit that raises is recorded as failed and does not stop the others. What leaves a CUDA
        device unusable is raised: the process has to end, and another to begin.
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
        if units[0].mode == "autoregressive":
            yield from self._fit_autoregressive(lm, units)
        else:
            yield from self._fit_one_forward(lm, units)

    def _fit_one_forward(self, lm: FrozenLM, units: list[Unit]) -> Iterator[str]:
        arrangement = Arrangement.parse(units[0].arrangement)
        for unit in units:
            require_length(unit.length, lm, arrangement)
        recipe = recipe_of_unit(units[0].recipe, units[0].changes)
        shared = {
            "recipe_settings": json.dumps(dataclasses.asdict(recipe)),
            "backend": lm.plan(1, 1).passes.taken,
            **_model_columns(lm),
        }
        rows: list[Row] = []
        queue = []
        for g, unit in enumerate(units):
            own = [
                Row(len(rows) + r, g, seed, self._target(text, unit.length))
                for r, (text, seed) in enumerate(zip(unit.texts, unit.seeds, strict=True))
            ]
            rows += own
            queue.append(EngineUnit(g, tuple(own), unit.share))
        fits = fit_units(
            lm, queue, arrangement, recipe, self.batch_size, "auto", lambda event: None
        )
        for finished, checks in fits:
            unit = units[finished.unit.group]
            vectors = vectors_by_row(finished)
            records = []
            for r, check in enumerate(checks):
                target = finished.unit.rows[r].targets
                worse = _worse_decoding(lm, vectors[r], arrangement, target)
                records.append(
                    shared
                    | self._asked(unit, r)
                    | dataclasses.asdict(check)
                    | {
                        "exact": check.exact,
                        "accuracy_in_batch": finished.correct[r] / unit.length,
                        "steps": finished.steps,
                        "seconds": finished.seconds,
                        "margins": worse.margin[0].tolist(),
                    }
                    | self._texts_columns(lm, unit, r, worse.ids[0])
                )
                if unit.timed and check.exact:
                    call = functools.partial(
                        decode_vectors,
                        lm,
                        vectors[r][None],
                        arrangement,
                        unit.length,
                        None,
                        "auto",
                    )
                    records[-1] |= _timing(lm, call, unit.length, "one forward")
            tokens = _tokens(lm, unit, finished, shared["recipe_settings"])
            self.run.commit(unit.key, records, tokens.save)
            yield unit.key

    def _fit_autoregressive(self, lm: FrozenLM, units: list[Unit]) -> Iterator[str]:
        recipe = recipe_of_unit(units[0].recipe, units[0].changes)
        shared = {
            "recipe_settings": json.dumps(dataclasses.asdict(recipe)),
            "backend": lm.plan(1, 1).passes.taken,
            **_model_columns(lm),
        }
        cache = "dynamic" if lm.body.family == "general" else "engine"
        for seed in sorted({unit.seeds[0] for unit in units}):
            batch = [unit for unit in units if unit.seeds[0] == seed]
            fit = autoregressive.fit(
                lm, [self._target(unit.texts[0], unit.length) for unit in batch],
                batch[0].vectors, seeds=[seed], recipe=recipe, batch_size=self.batch_size,
                progress=False,
            )  # fmt: skip
            for i, unit in enumerate(batch):
                own = _one_text(fit, i)
                mem, target = own.mem[0], own.targets[0]
                made = generate(lm, mem, len(target), cache)[0]
                record = (
                    shared
                    | self._asked(unit, 0)
                    | {
                        "accuracy": float(own.accuracy),
                        "exact": bool(own.exact),
                        "correct": round(float(own.accuracy) * unit.length),
                        "margin": float(own.margin),
                        "accuracy_in_batch": float(own.accuracy_teacher_forced),
                        "steps": int(own.steps),
                        "seconds": float(own.seconds),
                    }
                    | self._texts_columns(lm, unit, 0, made)
                )
                if unit.timed and record["exact"]:
                    call = functools.partial(generate, lm, mem, unit.length, cache)
                    record |= _timing(lm, call, unit.length, f"autoregressive, {cache}")
                self.run.commit(unit.key, [record], own.save)
                yield unit.key

    def _read_plan(self, units: list[Unit]) -> None:
        if any(text not in self.texts for unit in units for text in unit.texts):
            self.texts = {row["text_id"]: row for row in self.run.texts().to_pylist()}
        if any(unit.key not in self.experiments for unit in units):
            plan = self.run.plan()
            names = zip(plan["key"].to_pylist(), plan["experiment"].to_pylist(), strict=True)
            self.experiments = dict(reversed(list(names)))

    def _target(self, text: str, length: int) -> Tensor:
        """(N,) int64: the first tokens of a text of the run."""
        return torch.tensor(self.texts[text]["ids"][:length], dtype=torch.int64, device="cpu")

    def _asked(self, unit: Unit, r: int) -> dict[str, Any]:
        """What row r of a unit was asked to be."""
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
        """Target and decoding, as ids and text, and H_LM of the target."""
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


def _model_columns(lm: FrozenLM) -> dict[str, Any]:
    return {
        "revision": lm.identity.revision,
        "fingerprint": lm.identity.fingerprint,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": lm.device.type,
        "versions": json.dumps(
            {
                "prototok": prototok.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        ),
    }


def _worse_decoding(
    lm: FrozenLM, vectors: Tensor, arrangement: Arrangement, target: Tensor
) -> Decoded:
    """One row alone in the model's dtype and in float32; the one with fewer tokens right."""
    found = [
        decode_vectors(model, vectors[None], arrangement, len(target), target[None], "auto")
        for model in dict.fromkeys((lm, lm.cast(torch.float32)))
    ]
    return min(found, key=lambda d: (int((d.ids[0] == target).sum()), float(d.margin.min())))


def _timing(lm: FrozenLM, call: Any, length: int, decoder: str) -> dict[str, Any]:
    seconds = statistics.median(timed(call, lm.device))
    return {
        "decode_seconds": seconds, "tokens_per_second": length / seconds, "decoder": decoder,
    }  # fmt: skip


def _tokens(lm: FrozenLM, unit: Unit, finished: Finished, recipe: str) -> ProtoTokens:
    """The vectors of a unit: each of its rows is a text with one seed."""
    rows, width = len(unit.texts), lm.hidden_size
    e = finished.vectors[0]  # (n_e, K, d)
    m = finished.vectors[1] if len(finished.vectors) > 1 else None  # (n_m, 1, d)
    inner = () if e.shape[1] == 1 else (e.shape[1],)
    return ProtoTokens(
        e=e.view(1, *inner, width) if unit.share == "e" else e.view(rows, 1, *inner, width),
        m=None if m is None else m.view(*((1,) if unit.share == "m" else (rows, 1)), width),
        lengths=torch.full((rows,), unit.length, dtype=torch.int64, device="cpu"),
        arrangement=unit.arrangement,
        model=lm.identity,
        seeds=1,
        share=unit.share,
        groups=torch.zeros(rows, dtype=torch.int64, device="cpu") if unit.share else None,
        provenance={"unit": unit.spec(), "recipe": recipe, "prototok": prototok.__version__},
    )


def _one_text(fit: MemFit, i: int) -> MemFit:
    """Text i of a fit with one seed."""
    names = ("mem", "accuracy", "exact", "margin", "accuracy_teacher_forced", "steps", "seconds")
    return dataclasses.replace(
        fit,
        targets=[fit.targets[i]],
        **{name: getattr(fit, name)[i : i + 1] for name in names},
    )


def recheck(run: RunFolder, key: str, rows: list[dict[str, Any]], lm: FrozenLM) -> list[str]:
    """Decode a unit again from its stored vectors; what differs from its record, in words."""
    stored = run.tensors(key)
    stored.require_model(lm)
    problems = []
    for row in rows:
        target = torch.tensor(row["target_ids"], dtype=torch.int64, device="cpu")
        if isinstance(stored, MemFit):
            cache = "dynamic" if lm.body.family == "general" else "engine"
            found = min(
                int(
                    (generate(model, stored.mem[row["row"]], len(target), cache)[0] == target).sum()
                )
                for model in dict.fromkeys((lm, lm.cast(torch.float32)))
            )
        else:
            arrangement = Arrangement.parse(stored.arrangement)
            decoded = _worse_decoding(lm, stored.vectors(row["row"]), arrangement, target)
            found = int((decoded.ids[0] == target).sum())
        if found != row["correct"]:
            problems.append(
                f"{key}, row {row['row']}: {found} of {len(target)} tokens right when decoded "
                f"again, {row['correct']} in the record"
            )
    return problems
