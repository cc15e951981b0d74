"""`learn_shared`: what many fits on one model have in common, learned once and used as a start.

Letters: T texts, N targets, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prototok.common.arguments import batch_size_of, is_count, seed_list
from prototok.common.version import VERSION
from prototok.common.world import own_world
from prototok.decoding.decode import require_length
from prototok.fitting.engine.basis import eigenbasis
from prototok.fitting.fast_fit import fast_fit
from prototok.fitting.front import describe, front_of
from prototok.fitting.learned_prefix import Joint, learn_prefix
from prototok.fitting.prior import Prior
from prototok.fitting.recipe import Recipe
from prototok.model.frozen_lm import FrozenLM, require_frozen
from prototok.model.in_front import PrefixLike
from prototok.model.prefix import Prefix
from prototok.model.sample import sample
from prototok.results.arrangement import Arrangement
from prototok.results.provenance import as_json
from prototok.texts.targets import Texts, targets_of

# Where one m cannot carry the texts it says little about what carries one of them.
_LENGTHS, _ENOUGH = (16, 8, 4), 0.9
_TRIAL = 300  # most updates of a fit that a prior is judged by, the recipe's first cycle
SPREAD = 0.3  # of the spread of the learned e: wide enough for seeds to differ, near to the mean


@own_world
def learn_shared(
    lm: FrozenLM,
    texts: Texts | None = None,
    *,
    length: int | None = None,
    steps: int = 300,
    seeds: int | Sequence[int] = 4,
    prefix: PrefixLike | Prefix | int = "auto",
    backend: str = "auto",
    batch_size: int | str = "auto",
    progress: bool | None = None,
) -> Prior:
    """Fit many texts with one m, and keep that m, where their e lie, and the model's eigenbasis.

    `fast_fit(lm, texts, init=prior)` then starts every e near that mean and every m at that m. Both
    go on being fitted; neither is frozen.

    Args:
        lm: the frozen model, from `prototok.load`.
        texts: what to learn from; None samples 32 texts from the model itself.
        length: cut every text to this many tokens; None: to 16, or to 8 or 4 where the joint fit of
            longer ones gets fewer than 0.9 of their tokens right.
        steps: most updates of a joint fit.
        seeds: of the joint fits' noise. What is learned differs from one to the next, and so does
            how soon texts are fitted from it: kept is the one from which `fast` takes the fewest
            updates, on other parts of the samples, or on `texts` themselves.
        prefix: what stands in front of e, as in `fast_fit`, and of the fits that start from here. A
            number P: that many vectors, the same for all texts and learned with e and m. Such a
            prior has no eigenbasis.
        backend, batch_size, progress: as in `fast_fit`.

    Raises:
        ValueError: an argument that cannot be met, named; fewer than two texts among them.
    """
    require_frozen(lm)
    if length is not None:  # before texts of it are sampled
        require_length(length, lm, Arrangement.parse("e m*"))
    chosen = seed_list(seeds)
    lengths = _LENGTHS if length is None else (length,)
    tried = None
    if texts is None:
        texts, tried = _beginnings_and_ends(lm, lengths[0])
    targets = targets_of(lm, texts, lengths[0])
    if len(targets) < 2:
        raise ValueError("texts: one text has nothing in common with others; pass two or more")
    recipe = Recipe(
        name="joint", lr=0.1, betas=(0.9, 0.99), weight_decay=0.1, schedule="cosine", warmup=20,
        init_std=0.3, temperature=0.5, max_steps=steps, against_sink=True,
    )  # fmt: skip
    rows_at_once = batch_size_of(batch_size)
    count, in_front = None, ""  # of vectors to learn in front, which are told of once they are
    if isinstance(prefix, int):
        if not is_count(prefix):
            raise ValueError(f"prefix: {prefix!r} is not a positive number of vectors")
        count = int(prefix)
        lm.plan(1, 1, backend)  # refuses a backend that cannot be had
        recipe = replace(recipe, lr_width=81, betas=(0.9, 0.95)).at_width(lm.hidden_size, False)
    else:
        lm, in_front = front_of(lm, prefix, recipe)

    def joint_of(targets: list[Tensor], seed: int) -> Joint:
        if count is None:
            return _joint_fit(lm, targets, seed, recipe, backend, batch_size, progress)
        return learn_prefix(lm, targets, count, recipe, backend, rows_at_once, progress, seed)

    for length in lengths:
        targets = [ids[:length] for ids in targets]
        joint = joint_of(targets, chosen[0])
        if joint.accuracy >= _ENOUGH:
            break
    joints = [joint, *(joint_of(targets, seed) for seed in chosen[1:])]
    # With a learned prefix nobody has measured what the eigenbasis is worth.
    basis = eigenbasis(lm, backend).cpu() if count is None else None
    if count is not None:
        why = f"learned from {len(targets)} texts of {length} tokens in {steps} steps"
        in_front = f"{describe(lm.behind(joint.prefix), joint.prefix)} ({why})"
    known = {
        "recipe": as_json(recipe), "texts": str(len(targets)), "length": str(length),
        "prefix": in_front,
    }  # fmt: skip
    priors = [_prior_of(joint, lm, basis, known) for joint in joints]
    if len(priors) == 1:
        return priors[0]
    shown = targets if tried is None else [ids[-len(targets[0]) :] for ids in tried]
    found = [_updates_from(prior, lm, shown, backend, batch_size, progress) for prior in priors]
    best = found.index(min(found))
    tries = {
        "seed": str(chosen[best]),
        "updates from each": ", ".join(f"{updates:.1f}" for updates in found),
    }
    return replace(priors[best], provenance=priors[best].provenance | tries)


def _prior_of(joint: Joint, lm: FrozenLM, basis: Tensor | None, known: dict[str, str]) -> Prior:
    """Return what one joint fit says of where fits start, with what is `known` of it."""
    provenance = known | {
        "accuracy": f"{joint.accuracy:.3f}", "prototok": VERSION, "torch": torch.__version__,
    }  # fmt: skip
    e, m = joint.e, joint.m
    mean = torch.stack([e.mean(0), m])
    std = torch.stack([SPREAD * e.std(0), torch.zeros_like(m)])
    return Prior(mean, std, basis, lm.identity, provenance, joint.prefix)


def _joint_fit(
    lm: FrozenLM, targets: list[Tensor], seed: int, recipe: Recipe, backend: str,
    batch_size: int | str, progress: bool | None,
) -> Joint:  # fmt: skip
    """Fit all texts behind the prefix of `lm`, with one m."""
    fit = fast_fit(
        lm, targets, share="m", recipe=recipe, seeds=[seed], backend=backend,
        batch_size=batch_size, prefix=lm.prefix, progress=progress,
    )  # fmt: skip
    assert fit.tokens.m is not None
    return Joint(lm.prefix, fit.tokens.e[:, 0], fit.tokens.m[0], float(fit.accuracy.mean()))


def _updates_from(
    prior: Prior, lm: FrozenLM, targets: list[Tensor], backend: str, batch_size: int | str,
    progress: bool | None,
) -> float:  # fmt: skip
    """Return the geometric mean of the updates in which `fast` fits texts from a prior."""
    fit = fast_fit(
        lm, targets, init=prior, max_steps=_TRIAL, backend=backend, batch_size=batch_size,
        prefix=prior.prefix, progress=progress,
    )  # fmt: skip
    updates = torch.where(fit.exact, fit.steps, _TRIAL).double()
    return float(updates.clamp_min(1).log().mean().exp())


def _beginnings_and_ends(lm: FrozenLM, length: int) -> tuple[Tensor, Tensor]:
    """Return 32 samples' first `length` tokens, and their last, which are of all kinds.

    The first ones of a small model are much alike, so one m carries them, and fits of them say
    little about others.
    """
    room = 3 * length if lm.context is None else min(3 * length, lm.context - 1)
    samples = own_texts(lm, 32, max(length, room))
    return samples[:, :length], samples[:, -length:]


def own_texts(lm: FrozenLM, count: int, length: int, seed: int = 0) -> Tensor:
    """Return (count, length) token ids that the model makes up behind its BOS.

    A model without a BOS starts from one id of its vocabulary a text, drawn evenly, which is not
    part of the text.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(lm.vocab_size, (count, 1), generator=generator, device="cpu")
    if lm.bos_id is not None:
        first = torch.full_like(first, lm.bos_id)
    return sample(lm, first, length, seed)
