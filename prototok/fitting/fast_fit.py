"""`fast_fit`: find e and m for many texts at once.

Letters: T texts, S seeds, N targets of a text, K leading vectors, d hidden size, G groups.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence

import torch
import transformers
from torch import Tensor

import prototok
from prototok.common.arguments import is_count, require_batch_size, seed_list
from prototok.common.progress import Progress
from prototok.common.world import own_world
from prototok.decoding.decode import decode_vectors, require_length
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.rows import Unit, make_units
from prototok.fitting.engine.run import Finished, FitEvent, run
from prototok.fitting.prior import Prior, shipped_prior
from prototok.fitting.recipe import Recipe, recipe_of
from prototok.model.frozen_lm import FrozenLM, require_frozen
from prototok.results.arrangement import Arrangement
from prototok.results.fit_result import FitInterrupted, FitResult
from prototok.results.proto_tokens import ProtoTokens
from prototok.texts.targets import Texts, targets_of

__all__ = ["FitEvent", "fast_fit"]


@own_world
def fast_fit(
    lm: FrozenLM,
    texts: Texts,
    *,
    length: int | None = None,
    share: str | None = None,
    group_size: int | None = None,
    seeds: int | Sequence[int] = 1,
    arrangement: str = "e m*",
    recipe: str | Recipe = "fast",
    init: Prior | None = None,
    backend: str = "auto",
    batch_size: int | str = "auto",
    progress: bool | None = None,
    callback: Callable[[FitEvent], None] | None = None,
) -> FitResult:
    """Fit proto-tokens: vectors that make the frozen model emit each text in one forward pass.

    Minimises −Σ_i log P(t_i | Z_1 … Z_i) over e and m, where Z = [e, m, …, m] (the paper's eq. 1),
    for all texts × seeds together, and verifies each result by decoding it alone.

    Args:
        lm: the frozen model, from `prototok.load`.
        texts: strings, ragged lists of token ids, or a LongTensor (T, N). A BOS that the tokenizer
            would put in front is dropped.
        length: cut every text to this many tokens.
        share: "m" or "e" to have one vector for all texts of a group and all of their seeds.
        group_size: texts a group, in the order given; None is one group of all.
        seeds: how many initialisations to fit for each text (0 … seeds − 1), or which ones.
        arrangement: where e and m stand, see `prototok.results.arrangement.Arrangement`.
        recipe: "fast", "paper", or a `Recipe`.
        init: where vectors start, from `prototok.learn_shared`; None leaves it to the recipe, and
            "fast" then starts built-in models from the prior they come with.
        backend: which kernels: "torch", "triton" (CUDA), "cpu" (C++), or "auto", the fastest there
            is; what was taken is in `tokens.provenance`.
        batch_size: rows on the device at once; a larger sharing group takes turns inside a step.
        progress: None shows a bar on a terminal; True also prints lines elsewhere; False is quiet.
        callback: called with a `FitEvent` after every look at the device (every step on the CPU).

    Rows do not influence each other: a text's result is that of fitting it alone, up to the
    rounding of the kernels at another batch size.

    Raises:
        ValueError: an argument that cannot be met, named.
        FitInterrupted: Ctrl-C; carries the fits that had ended.
    """
    layout = Arrangement.parse(arrangement)
    settings = recipe_of(recipe)
    require_frozen(lm)
    if share not in (None, "m", "e"):
        raise ValueError(f"share: {share!r} is not None, 'm' or 'e'")
    if share == "m" and not layout.has_m:
        raise ValueError(f"share: 'm' cannot be shared, arrangement {arrangement!r} has none")
    if group_size is not None and (share is None or not is_count(group_size)):
        raise ValueError(f"group_size: {group_size!r} is not a positive integer beside a share")
    if init is not None:
        if not isinstance(init, Prior):
            raise ValueError(f"init: {type(init).__name__} is not a Prior; see learn_shared")
        init.require_model(lm)
    lm.plan(1, 1, backend)  # refuses a backend that cannot be had
    require_batch_size(batch_size)
    chosen = seed_list(seeds)
    targets = targets_of(lm, texts, length)
    for i, ids in enumerate(targets):
        try:
            require_length(len(ids), lm, layout)
        except ValueError as error:
            raise ValueError(f"texts: text {i} is too long; {error}") from None

    units = make_units(targets, chosen, share, group_size)
    total = sum(len(unit.rows) for unit in units)
    verified: dict[int, list[Verified]] = {}  # by unit
    done: list[Finished] = []
    rows = exact = 0

    def observe(event: FitEvent) -> None:
        steps = f"{len(event.rows)} in flight, the oldest at step {int(event.steps.max())}"
        bar.update(rows, f"{exact} exact, {steps}")
        if callback is not None:
            callback(event)

    collected = _Collector(lm, layout, settings, targets, chosen, share, backend)
    try:
        with Progress(total, "fit", progress) as bar:
            fits = fit_units(lm, units, layout, settings, batch_size, backend, observe, init)
            for finished, checks in fits:
                done.append(finished)
                verified[finished.unit.group] = checks
                rows += len(checks)
                exact += sum(c.exact for c in checks)
    except KeyboardInterrupt:
        result, whole = collected.partial(done, verified)
        raise FitInterrupted(result, whole) from None
    return collected.result(list(range(len(targets))), done, verified)


def fit_units(
    lm: FrozenLM,
    units: list[Unit],
    arrangement: Arrangement,
    recipe: Recipe,
    batch_size: int | str,
    backend: str,
    observe: Callable[[FitEvent], None],
    init: Prior | None = None,
) -> Iterator[tuple[Finished, list[Verified]]]:
    """Fit units and yield each as it ends, every row of it decoded alone."""
    verified: dict[int, list[Verified]] = {}

    def confirm(finished: Finished) -> bool:
        checked = [
            _verify(lm, arrangement, row.targets, vectors, backend)
            for row, vectors in zip(finished.unit.rows, vectors_by_row(finished), strict=True)
        ]
        verified[finished.unit.group] = checked
        return all(c.accuracy >= recipe.accuracy for c in checked)

    lm.cast(torch.float32)  # its memory is taken before `run` sizes batches by what is free
    if init is None and recipe.shipped_prior and arrangement.is_pair:
        init = shipped_prior(lm)
    if init is not None:
        recipe = recipe.from_prior(lm.hidden_size)
    inputs = OneForward(arrangement, prior=init)
    for finished in run(lm, units, inputs, recipe, batch_size, backend, confirm, observe):
        yield finished, verified.pop(finished.unit.group)


@dataclasses.dataclass(frozen=True)
class Verified:
    """One row decoded alone, in the model's dtype and in float32; the worse of both."""

    accuracy: float
    correct: int
    margin: float
    loss: float

    @property
    def exact(self) -> bool:
        return self.accuracy == 1.0


def _verify(
    lm: FrozenLM, arrangement: Arrangement, targets: Tensor, vectors: Tensor, backend: str
) -> Verified:
    """Decode one row's vectors (slots, d) at batch 1 and compare with its targets (N,)."""
    correct, margin, loss = len(targets), float("inf"), 0.0
    for model in dict.fromkeys((lm, lm.cast(torch.float32))):
        decoded = decode_vectors(
            model, vectors[None], arrangement, len(targets), targets[None], backend
        )
        correct = min(correct, int((decoded.ids[0] == targets).sum()))
        margin = min(margin, float(decoded.margin.min()))
        loss = float(decoded.loss.mean())
    return Verified(correct / len(targets), correct, margin, loss)


def vectors_by_row(finished: Finished) -> list[Tensor]:
    """(slots, d) for each row of a unit."""
    rows = len(finished.unit.rows)
    parts = [part.expand(rows, -1, -1) if len(part) == 1 else part for part in finished.vectors]
    return list(torch.cat(parts, dim=1))


@dataclasses.dataclass(frozen=True)
class _Collector:
    """Puts finished units into one FitResult, in the order of the texts."""

    lm: FrozenLM
    arrangement: Arrangement
    recipe: Recipe
    targets: list[Tensor]
    seeds: list[int]
    share: str | None
    backend: str

    def partial(
        self, done: list[Finished], verified: dict[int, list[Verified]]
    ) -> tuple[FitResult | None, list[int]]:
        """The texts all of whose seeds have ended."""
        ended = [row.text for finished in done for row in finished.unit.rows]
        whole = sorted({t for t in ended if ended.count(t) == len(self.seeds)})
        return (self.result(whole, done, verified) if whole else None), whole

    def result(
        self, texts: list[int], done: list[Finished], verified: dict[int, list[Verified]]
    ) -> FitResult:
        seeds, width = len(self.seeds), self.lm.hidden_size
        place = {
            (t, seed): (i, s) for i, t in enumerate(texts) for s, seed in enumerate(self.seeds)
        }
        shape = (len(texts), seeds)
        measured = {
            f.name: torch.zeros(shape, dtype=torch.int64 if f.name == "correct" else torch.float32)
            for f in dataclasses.fields(Verified)
        }
        steps = torch.zeros(shape, dtype=torch.int64)
        seconds, in_batch = torch.zeros(shape), torch.zeros(shape)
        inner = {"e": (self.arrangement.leading, width), "m": (width,)}
        kept = [f for f in done if (f.unit.rows[0].text, f.unit.rows[0].seed) in place]
        kept.sort(key=lambda f: f.unit.group)
        stored: dict[str, Tensor] = {
            name: torch.zeros(((len(kept),) if self.share == name else shape) + inner[name])
            for name in ("e", "m")[: 1 + self.arrangement.has_m]
        }
        groups = torch.zeros(len(texts), dtype=torch.int64)
        for g, finished in enumerate(kept):
            for name, vectors in zip(stored, finished.vectors, strict=True):
                if self.share == name:
                    stored[name][g] = vectors[0].view(inner[name])
            for r, row in enumerate(finished.unit.rows):
                at = place[row.text, row.seed]
                check = verified[finished.unit.group][r]
                for name, column in measured.items():
                    column[at] = getattr(check, name)
                steps[at], seconds[at] = finished.steps, finished.seconds
                in_batch[at] = finished.correct[r] / len(row.targets)
                groups[at[0]] = g
                for name, vectors in zip(stored, finished.vectors, strict=True):
                    if self.share != name:
                        stored[name][at] = vectors[r].view(inner[name])
        e = stored["e"]
        tokens = ProtoTokens(
            e=e.squeeze(-2) if self.arrangement.leading == 1 else e,
            m=stored.get("m"),
            lengths=torch.tensor([len(self.targets[t]) for t in texts], dtype=torch.int64),
            arrangement=self.arrangement.name,
            model=self.lm.identity,
            seeds=seeds,
            share=self.share,
            groups=groups if self.share else None,
            provenance=self._provenance(),
        )
        return FitResult(
            tokens=tokens,
            targets=[self.targets[t] for t in texts],
            exact=measured["accuracy"] == 1.0,
            steps=steps,
            seconds=seconds,
            accuracy_in_batch=in_batch,
            **measured,
        )

    def _provenance(self) -> dict[str, str]:
        positions = self.arrangement.input_length(max(len(ids) for ids in self.targets))
        rows = len(self.targets) * len(self.seeds)
        plan = self.lm.plan(rows, positions, self.backend, self.arrangement.is_pair)
        return {
            "recipe": json.dumps(dataclasses.asdict(self.recipe)),
            "seeds": json.dumps(self.seeds),
            "dtype": str(self.lm.dtype).removeprefix("torch."),
            "device": self.lm.device.type,
            "backend": plan.passes.taken,
            "plan": plan.summary(),
            "attention": self.lm.attention,
            **({"dequantised from": self.lm.dequantised} if self.lm.dequantised else {}),
            "family": self.lm.body.family,
            "prototok": prototok.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
