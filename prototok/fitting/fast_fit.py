"""`fast_fit`: find e and m for many texts at once.

Letters: T texts, S seeds, N targets of a text, K leading vectors, d hidden size, G groups.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prototok.common.arguments import batch_size_of, is_count, require_callable, seed_list
from prototok.common.shown import count
from prototok.common.world import own_world
from prototok.decoding.decode import require_length
from prototok.fitting.advice import advice
from prototok.fitting.driver import EndedRow, Watching, columns_of, fit_all, require_room_for
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.rows import Group, make_groups
from prototok.fitting.engine.run import FitEvent
from prototok.fitting.engine.setup import Setup
from prototok.fitting.front import front_of
from prototok.fitting.learned.encoder import Encoder, Init, parted
from prototok.fitting.learned.optimizer import LearnedOptimizer
from prototok.fitting.prior import Prior
from prototok.fitting.recipe import Recipe, recipe_of
from prototok.fitting.shipped import shipped
from prototok.fitting.verify import Verified, verify
from prototok.model.frozen_lm import FrozenLM, require_frozen
from prototok.model.in_front import PrefixLike
from prototok.model.prefix import Prefix
from prototok.results.arrangement import Arrangement
from prototok.results.fit_result import FitResult
from prototok.results.history import Recorder
from prototok.results.proto_tokens import ProtoTokens
from prototok.results.provenance import provenance_of
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
    prefix: PrefixLike | Prefix = "auto",
    recipe: str | Recipe = "fast",
    max_steps: int | None = None,
    init: Init | None = None,
    backend: str = "auto",
    batch_size: int | str = "auto",
    progress: bool | None = None,
    callback: Callable[[FitEvent], None] | None = None,
    on_text: Callable[[int, FitResult], None] | None = None,
    history: bool = False,
) -> FitResult:
    """Fit proto-tokens: vectors that make the frozen model emit each text in one forward pass.

    Minimises −Σ_i log P(t_i | Z_1 … Z_i) over e and m, where Z = [e, m, …, m] (the paper's eq. 1),
    for all texts × seeds together, and verifies each result by decoding it alone.

    Args:
        lm: the frozen model, from `prototok.load`.
        texts: strings, ragged lists of token ids, or a LongTensor (T, N). A BOS that the tokenizer
            would put in front is dropped.
        length: cut every text to this many tokens.
        share: "m" or "e" to have one vector for all texts of a group and all of their seeds. Texts
            that share e must begin with the same token, which is read where there is e alone.
        group_size: texts a group, in the order given; None is one group of all.
        seeds: how many initialisations to fit for each text (0 … seeds − 1), or which ones.
        arrangement: where e and m stand, see `prototok.results.arrangement.Arrangement`.
        prefix: what stands in front of e in every row and is not fitted: text, token ids, vectors
            (P, d), or None for nothing. "auto" leaves it to the recipe: "fast" puts one token in
            front of a model that has an attention sink, "paper" nothing. The result keeps it.
        recipe: "fast", "paper", "learned", or a `Recipe`. With "learned" a network makes the
            first updates, and `fast` takes over where its progress stops.
        max_steps: most updates of a row; None: the recipe's.
        init: where vectors start, from `prototok.learn_shared`; with "learned" the network, from
            `prototok.learn_optimizer`. An encoder, from `prototok.learn_encoder`, starts seed 0 of
            each text at its guess, other seeds near to it, a shared vector at the mean of the
            guesses; with "learned" pass both, (encoder, optimizer). None leaves it to the recipe:
            "fast" starts built-in models from the prior they come with, "learned" takes the
            networks they come with, an encoder for the texts that are not too long for it.
        backend: which kernels: "torch", "triton" (CUDA), "cpu" (C++), or "auto", the fastest there
            is; what was taken is in `tokens.provenance`.
        batch_size: rows on the device at once; a larger sharing group takes turns inside a step.
        progress: None shows a bar on a terminal; True also prints lines elsewhere; False is quiet.
        callback: called with a `FitEvent` after every look at the device (every step on the CPU).
        on_text: called with the place of a text and its result as soon as all of its seeds have
            ended, to keep it; not for texts that share a vector, which end together.
        history: keep what a callback sees as `FitResult.history`, for `FitResult.plot`.

    Rows do not influence each other: a text's result is that of fitting it alone, up to the
    rounding of the kernels at another batch size.

    Raises:
        ValueError: an argument that cannot be met, named.
        FitInterrupted: Ctrl-C; carries the fits that had ended.
    """
    layout = Arrangement.parse(arrangement)
    settings = recipe_of(recipe, max_steps)
    require_frozen(lm)
    require_share(share, layout)
    require_callable(callback=callback, on_text=on_text)
    if group_size is not None and (share is None or not is_count(group_size)):
        raise ValueError(f"group_size: {group_size!r} is not a positive integer beside a share")
    encoder, common = parted(init)
    brought = settings.learned > 0 and init is None  # by a built-in model: for texts that it takes
    if brought:
        encoder = shipped(Encoder, lm)
    has_network = isinstance(common, LearnedOptimizer)
    if settings.learned and not has_network and (init is None or encoder is not None):
        common = shipped(LearnedOptimizer, lm) or common
    start = start_of(common)
    if start is not None:
        start.require_model(lm)
    if encoder is not None and not layout.is_pair and not brought:
        raise ValueError(f"arrangement: an Encoder is for 'e m*', not for {arrangement!r}")
    lm.plan(1, 1, backend)  # refuses a backend that cannot be had
    rows_at_once = batch_size_of(batch_size)
    chosen = seed_list(seeds)
    targets = targets_of(lm, texts, length)
    lm, in_front = front_of(lm, prefix, settings, start)
    require_room_for(targets, lambda n: require_length(n, lm, layout))

    def collect(rows: list[EndedRow[Verified]]) -> FitResult:
        positions = layout.input_length(max(len(ids) for ids in targets))
        plan = lm.plan(len(targets) * len(chosen), positions, backend, layout.is_pair)
        provenance = provenance_of(lm, settings, chosen, plan) | {"prefix": in_front}
        tokens = tokens_of(setup, rows, len(chosen), share, provenance)
        return result_of(tokens, rows)

    setup = one_forward(lm, layout, settings, common, backend, rows_at_once)
    groups = make_groups(targets, chosen, share, group_size)
    if share == "e":
        _warn_of_unlike(groups, layout)
    if encoder is not None:
        groups = encoder.started(lm, groups, shorter=brought)
    what = "fit" if lm.prefix is None else f"fit behind {in_front}"
    recorder = Recorder([len(ids) for ids in targets], len(chosen)) if history else None

    def look(event: FitEvent) -> None:
        if recorder is not None:
            recorder.note(event.rows, event.steps, event.loss, event.correct, event.margin)
        if callback is not None:
            callback(event)

    watching = Watching(what, progress, look, on_text, lambda fit: advice(fit, setup))
    result = fit_all(setup, groups, verify, collect, watching)
    return result if recorder is None else replace(result, history=recorder.history())


def require_share(share: str | None, arrangement: Arrangement) -> None:
    """Raise ValueError unless `share` is None, or a vector that the arrangement has."""
    if share not in (None, "m", "e"):
        raise ValueError(f"share: {share!r} is not None, 'm' or 'e'")
    if share == "m" and not arrangement.has_m:
        raise ValueError(f"share: 'm' cannot be shared, arrangement {arrangement.name!r} has none")


def _warn_of_unlike(groups: list[Group], arrangement: Arrangement) -> None:
    """Warn of groups in which e alone would have to give different tokens."""

    def begins(group: Group) -> set[tuple[int, ...]]:
        alone = min(arrangement.read_before_m(len(row.targets)) for row in group.rows)
        return {tuple(row.targets[:alone].tolist()) for row in group.rows}

    unlike = sum(len(begins(group)) > 1 for group in groups)
    if unlike:
        warnings.warn(
            f"share: with e shared, the texts of a group must begin alike where e alone is read; "
            f"in {unlike} of {count(len(groups), 'group')} they do not, so that some cannot come "
            "back whole",
            stacklevel=4,
        )


def start_of(init: Init | None) -> Prior | None:
    """Return what all fits have in common of where they start; None where nothing is given."""
    _, common = parted(init)
    return common.start if isinstance(common, LearnedOptimizer) else common


def one_forward(
    lm: FrozenLM,
    arrangement: Arrangement,
    recipe: Recipe,
    init: Prior | LearnedOptimizer | None,
    backend: str,
    batch_size: int | None,
) -> Setup:
    """Set up fits of e and m: from `init`, or from what comes with a built-in model.

    Raises:
        ValueError: a recipe with a network and no network, a network and a recipe without, or an
            arrangement that none is for.
    """
    if init is None and recipe.shipped_prior and arrangement.is_pair:
        init = shipped(Prior, lm)
    network = None
    if isinstance(init, LearnedOptimizer):
        if not recipe.learned:
            raise ValueError(
                f"init: a LearnedOptimizer is for recipe 'learned', not for {recipe.name!r}"
            )
        network, init = init.network(lm), init.start
        if network.reach and lm.body.head is None:
            raise ValueError(
                "init: this LearnedOptimizer reads errors at hidden states, which family "
                f"{lm.body.family!r} does not give"
            )
    if recipe.learned and not arrangement.is_pair:
        raise ValueError(
            f"arrangement: recipe {recipe.name!r} is for 'e m*', not for {arrangement.name!r}"
        )
    recipe = recipe.at_width(lm.hidden_size, init is not None)
    return Setup(lm, OneForward(arrangement, prior=init), recipe, backend, batch_size, network)


def tokens_of(
    setup: Setup,
    rows: list[EndedRow[Verified]],
    seeds: int,
    share: str | None,
    provenance: dict[str, str],
) -> ProtoTokens:
    """Put the vectors of rows, text by text with `seeds` rows each, into ProtoTokens."""
    assert isinstance(setup.inputs, OneForward)
    arrangement = setup.inputs.arrangement
    vectors = torch.stack([one.vectors for one in rows]).unflatten(0, (-1, seeds))
    leading = arrangement.leading  # vectors is (T, S, slots, d)
    stored = {"e": vectors[:, :, 0] if leading == 1 else vectors[:, :, :leading]}
    if arrangement.has_m:
        stored["m"] = vectors[:, :, leading]
    first_rows = rows[::seeds]  # of each text
    groups = None
    if share is not None:
        place: dict[int, int] = {}  # of a group among those that are here
        of_text = [place.setdefault(one.group, len(place)) for one in first_rows]
        groups = torch.tensor(of_text, dtype=torch.int64, device="cpu")
        texts = [groups.tolist().index(g) for g in place.values()]
        stored[share] = stored[share][texts, 0]  # the same in all rows of a group
    kept: dict[str, Tensor] = {name: part.contiguous() for name, part in stored.items()}
    return ProtoTokens(
        e=kept["e"],
        m=kept.get("m"),
        lengths=torch.tensor(
            [len(one.row.targets) for one in first_rows], dtype=torch.int64, device="cpu"
        ),
        arrangement=arrangement.name,
        model=setup.lm.identity,
        seeds=seeds,
        share=share,
        groups=groups,
        provenance=provenance,
        prefix=setup.lm.prefix,
    )


def result_of(tokens: ProtoTokens, rows: list[EndedRow[Verified]]) -> FitResult:
    """Put vectors and what their rows measured together, text by text."""
    seeds = tokens.seeds

    def column(read: Callable[[EndedRow[Verified]], float], dtype: torch.dtype) -> Tensor:
        return columns_of(rows, seeds, read, dtype)

    accuracy = column(lambda one: one.check.accuracy, torch.float32)
    return FitResult(
        tokens=tokens,
        targets=[one.row.targets for one in rows[::seeds]],
        accuracy=accuracy,
        exact=accuracy == 1.0,
        margin=column(lambda one: one.check.margin, torch.float32),
        correct=column(lambda one: one.check.correct, torch.int64),
        loss=column(lambda one: one.check.loss, torch.float32),
        steps=column(lambda one: one.steps, torch.int64),
        seconds=column(lambda one: one.seconds, torch.float32),
        accuracy_in_batch=column(lambda one: one.accuracy_in_batch, torch.float32),
        seed=column(lambda one: one.row.seed, torch.int64),
    )
