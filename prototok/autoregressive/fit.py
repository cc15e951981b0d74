"""`autoregressive.fit`: [mem] vectors from which a frozen model generates a text token by token.

Letters: T texts, S seeds, N targets of a text, K vectors in front, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prototok.autoregressive.generate import require_room
from prototok.autoregressive.verify import Generated, cache_of, verify
from prototok.common.arguments import (
    batch_size_of,
    hint,
    is_count,
    require_callable,
    seed_list,
)
from prototok.common.world import own_world
from prototok.fitting.driver import EndedRow, Watching, columns_of, fit_all, require_room_for
from prototok.fitting.engine.inputs import TeacherForced
from prototok.fitting.engine.rows import make_groups
from prototok.fitting.engine.run import FitEvent
from prototok.fitting.engine.setup import Setup
from prototok.fitting.front import front_of
from prototok.fitting.recipe import Recipe, recipe_of
from prototok.model.frozen_lm import FrozenLM, require_frozen
from prototok.model.in_front import PrefixLike
from prototok.model.prefix import Prefix
from prototok.results.mem_fit import MemFit
from prototok.results.provenance import provenance_of
from prototok.texts.targets import Texts, targets_of


@own_world
def fit(
    lm: FrozenLM,
    texts: Texts,
    k: int = 1,
    *,
    length: int | None = None,
    seeds: int | Sequence[int] = 1,
    recipe: str | Recipe = "fast",
    first: str = "predicted",
    prefix: PrefixLike | Prefix = "auto",
    backend: str = "auto",
    batch_size: int | str = "auto",
    progress: bool | None = None,
    callback: Callable[[FitEvent], None] | None = None,
) -> MemFit:
    """Fit [mem_1 … mem_K] in front of each text, and verify by generating it from them alone.

    Minimises −Σ_i log P(t_i | mem_1 … mem_K, t_1 … t_{i−1}) over the vectors, the paper's
    autoregressive side (its §4, after Kuratov et al.), for all texts × seeds together. A row ends
    when its vectors *generate* the text at batch 1, in the model's dtype and in float32; one that
    is right only as long as the true text is fed goes on with a higher margin to clear.

    Args:
        lm: the frozen model, from `prototok.load`.
        texts: strings, ragged lists of token ids, or a LongTensor (T, N). A BOS that the tokenizer
            would put in front is dropped.
        k: K, vectors a text.
        length: cut every text to this many tokens.
        seeds: how many initialisations to fit for each text (0 … seeds − 1), or which ones.
        recipe: "fast", "paper", "kuratov" (their settings, see `kuratov`), or a `Recipe`.
        first: "predicted" has mem_K predict t_1; "given" feeds t_1 and scores N − 1 tokens, as
            Kuratov et al. do.
        prefix: what stands in front of mem_1, as in `fast_fit`.
        backend: which kernels: "torch", "triton" (CUDA), "cpu" (C++), or "auto".
        batch_size: rows on the device at once.
        progress: None shows a bar on a terminal; True also prints lines elsewhere; False is quiet.
        callback: called with a `FitEvent` after every look at the device (every step on the CPU).

    Raises:
        ValueError: an argument that cannot be met, named.
        FitInterrupted: Ctrl-C; carries the texts whose fits had ended.
    """
    require_frozen(lm)
    settings = kuratov(lm) if recipe == "kuratov" else recipe_of(recipe)
    if not is_count(k):
        raise ValueError(f"k: {k!r} is not a positive integer")
    if first not in ("predicted", "given"):
        raise ValueError(
            f"first: {first!r} is not 'predicted' or 'given'" + hint(first, ("predicted", "given"))
        )
    require_callable(callback=callback)
    lm.plan(1, 1, backend)  # refuses a backend that cannot be had
    rows_at_once = batch_size_of(batch_size)
    chosen = seed_list(seeds)
    given = int(first == "given")
    targets = targets_of(lm, texts, length)
    for i, ids in enumerate(targets):
        if len(ids) <= given:
            raise ValueError(f"texts: text {i} has one token, and first = 'given' scores none")
    lm, in_front = front_of(lm, prefix, settings)
    require_room_for(targets, lambda n: require_room(lm, k, n))
    setup = teacher_forced(lm, k, settings, backend, rows_at_once, given)

    def collect(rows: list[EndedRow[Generated]]) -> MemFit:
        positions = setup.inputs.input_length(max(len(ids) for ids in targets))
        plan = lm.plan(len(targets) * len(chosen), positions, backend)
        provenance = provenance_of(lm, settings, chosen, plan)
        provenance |= {"verified with": cache_of(lm), "prefix": in_front}
        return mem_fit_of(setup, rows, len(chosen), provenance)

    groups = make_groups(targets, chosen, None, None)
    return fit_all(setup, groups, verify, collect, Watching("fit [mem]", progress, callback))


def teacher_forced(
    lm: FrozenLM, k: int, recipe: Recipe, backend: str, batch_size: int | None, given: int
) -> Setup:
    """Set up fits of K vectors in front of the text; `given` tokens of it are not scored."""
    recipe = replace(recipe, cycle_tokens=None)  # it is for vectors that give all tokens at once
    return Setup(lm, TeacherForced(lm.embedding, k, given), recipe, backend, batch_size)


def mem_fit_of(
    setup: Setup, rows: list[EndedRow[Generated]], seeds: int, provenance: dict[str, str]
) -> MemFit:
    """Put rows, text by text with `seeds` rows each, into a MemFit."""

    def column(
        read: Callable[[EndedRow[Generated]], float], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return columns_of(rows, seeds, read, dtype)

    accuracy = column(lambda one: one.check.accuracy)
    return MemFit(
        mem=torch.stack([one.vectors for one in rows]).unflatten(0, (-1, seeds)),
        targets=[one.row.targets for one in rows[::seeds]],
        first="given" if setup.inputs.given else "predicted",
        model=setup.lm.identity,
        accuracy=accuracy,
        exact=accuracy == 1.0,
        margin=column(lambda one: one.check.margin),
        accuracy_teacher_forced=column(lambda one: one.check.teacher_forced),
        steps=column(lambda one: one.steps, torch.int64),
        seconds=column(lambda one: one.seconds),
        seed=column(lambda one: one.row.seed, torch.int64),
        provenance=provenance,
        prefix=setup.lm.prefix,
    )


def kuratov(lm: FrozenLM) -> Recipe:
    """Return Kuratov et al.'s settings: the paper recipe, started at the embedding matrix's scale.

    AdamW lr 0.01, betas (0.9, 0.9), weight decay 0.01; randn × std(embedding matrix); at most 5000
    steps, and no more than 2000 in a row without a higher accuracy.
    """
    return Recipe(name="kuratov", init_std=float(lm.embedding.float().std()), patience=2000)
