"""`learn_optimizer`: train a network that fits texts in a handful of updates, once a frozen model.

Letters: N targets, d hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from prototok.common.arguments import is_count, is_integer, listed_items
from prototok.common.progress import Progress
from prototok.common.version import VERSION
from prototok.common.world import own_world
from prototok.decoding.decode import require_length
from prototok.fitting.engine.basis import eigenbasis
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.setup import Setup
from prototok.fitting.front import front_of
from prototok.fitting.learn_shared import SPREAD, learn_shared, own_texts
from prototok.fitting.learned.checkpoint import Checkpoint
from prototok.fitting.learned.network import UpdateNetwork
from prototok.fitting.learned.optimizer import LearnedOptimizer, weights_of
from prototok.fitting.learned.pool import Corpus, Pool
from prototok.fitting.prior import Prior, shipped_prior
from prototok.fitting.recipe import LEARNED
from prototok.model.frozen_lm import FrozenLM, require_frozen
from prototok.model.in_front import PrefixLike
from prototok.model.prefix import Prefix
from prototok.results.arrangement import Arrangement
from prototok.texts.targets import Texts, targets_of

_WIDTH, _DEPTH = 512, 3
_RATE, _WARM_UP = 5e-4, 100  # of the AdamW that trains the network
_KEEP_EVERY = 60.0  # seconds
# Texts that are sampled from the model, and their length; windows are cut from them.
_TEXTS, _LONG = 512, 128
# Fits start this near to the prior's mean, in its own spread: the first gradient then says more of
# the text than of the start, and seeds still differ.
_NEAR = 0.3


@own_world
def learn_optimizer(
    lm: FrozenLM,
    texts: Texts | None = None,
    *,
    lengths: Sequence[int] = (8, 16),
    reach: int | None = None,
    steps: int = 3000,
    prior: Prior | None = None,
    prefix: PrefixLike | Prefix = "auto",
    seed: int = 0,
    checkpoint: str | Path | None = None,
    backend: str = "auto",
    progress: bool | None = None,
) -> LearnedOptimizer:
    """Train a network to update e and m from their gradients, through the frozen model.

    `fast_fit(lm, texts, recipe="learned", init=optimizer)` then fits with it, at any length; where
    its progress stops, `fast` goes on from the best vectors.

    Args:
        lm: the frozen model, from `prototok.load`.
        texts: what windows are cut from to train on, each at least as long as the longest of them;
            None samples 512 texts of up to 128 tokens from the model itself.
        lengths: of the windows, rising; the short ones alone come first.
        reach: positions from the first on of which the network sees the token and its error, beside
            the gradient that sums up all of them; None: up to the longest of `lengths`. Always 0
            for a model of the family "general", which keeps these to itself.
        steps: of training, each a forward and backward of about 1024 positions.
        prior: where fits start, from `learn_shared`; None: what comes with a built-in model, or
            `learn_shared(lm)`.
        prefix: what stands in front of e, as in `fast_fit`, and of the fits with this optimiser.
        seed: of the network's weights and of what it is trained on; the same gives the same.
        checkpoint: a file that training is kept in every minute; where it is there, training goes
            on from it, with fresh texts.
        backend, progress: as in `fast_fit`.

    Raises:
        ValueError: an argument that cannot be met, named.
    """
    require_frozen(lm)
    if not is_count(steps):
        raise ValueError(f"steps: {steps!r} is not a positive integer")
    if not is_integer(seed):
        raise ValueError(f"seed: {seed!r} is not an integer")
    grid = listed_items(lengths)
    if not grid or not all(map(is_count, grid)) or grid != sorted(set(grid)):
        raise ValueError(f"lengths: {lengths!r} is not a rising list of positive integers")
    if reach is not None and not is_count(reach) and reach != 0:
        raise ValueError(f"reach: {reach!r} is not an integer of at least 0")
    if prior is not None:
        prior.require_model(lm)
    lm.plan(1, 1, backend)  # refuses a backend that cannot be had
    writer = lm  # samples are its own, whatever stands in front of fits
    lm, in_front = front_of(lm, prefix, LEARNED, prior)
    layout = Arrangement.parse("e m*")
    require_length(grid[-1], lm, layout)
    corpus = corpus_of(writer, texts, grid[-1], seed)
    start = prior or shipped_prior(lm) or learn_shared(
        lm, prefix=lm.prefix, backend=backend, progress=progress
    )  # fmt: skip
    basis = eigenbasis(lm, backend).cpu() if start.basis is None else start.basis
    start = replace(start, basis=basis, std=_NEAR * start.std)
    recipe = LEARNED.at_width(lm.hidden_size, True)  # that of the fits, temperature included
    reach = 0 if lm.body.head is None else grid[-1] if reach is None else reach
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = UpdateNetwork(lm.hidden_size, _WIDTH, _DEPTH, reach)
    network.mean.copy_(start.mean)
    network.scale.fill_(max(float(start.std[0].mean()) / (_NEAR * SPREAD), 1e-3))
    network.rate.fill_(recipe.lr)
    if lm.body.head is not None:
        network.token_scale.fill_(float(lm.body.head.float().std()))
    network.to(lm.device)
    setup = Setup(lm, OneForward(layout, prior=start), recipe, backend, None, network)
    provenance = {
        "lengths": ", ".join(map(str, grid)),
        "reach": str(reach),
        "steps": str(steps),
        "seed": str(seed),
        "texts": "given" if texts is not None else "sampled from the model",
        "prefix": in_front,
        "prototok": VERSION,
        "torch": torch.__version__,
    }
    kept = None if checkpoint is None else Checkpoint(checkpoint, lm, provenance)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    done = 0 if kept is None else kept.load(network, optimizer)
    generator = torch.Generator("cpu").manual_seed(seed + done)
    pools = [Pool(setup, corpus, n, generator) for n in grid]
    with Progress(steps, "learn optimizer", progress) as bar:
        clock = time.monotonic()
        for step in range(done, steps):
            bar.update(step, _train_step(optimizer, pools, step / steps, step))
            if kept is not None and (time.monotonic() - clock > _KEEP_EVERY or step == steps - 1):
                kept.save(network, optimizer, step + 1)
                clock = time.monotonic()
    # Its model too: a prior of before may know it by an older fingerprint.
    start = replace(start, model=lm.identity, provenance=provenance, prefix=lm.prefix)
    return LearnedOptimizer(start, weights_of(network))


def corpus_of(lm: FrozenLM, texts: Texts | None, longest: int, seed: int) -> Corpus:
    """Return what training windows are cut from: `texts`, or samples of the model."""
    if texts is None:
        room = _LONG if lm.context is None else min(_LONG, lm.context - 1)
        return Corpus(list(own_texts(lm, _TEXTS, max(longest, room), seed)))
    targets = targets_of(lm, texts)
    for i, ids in enumerate(targets):
        if len(ids) < longest:
            raise ValueError(
                f"texts: text {i} has {len(ids)} tokens, fewer than the {longest} of a window"
            )
    return Corpus(targets)


def _train_step(optimizer: torch.optim.Optimizer, pools: list[Pool], part: float, step: int) -> str:
    """Train on the pool whose turn it is, with `part` of the training behind; say how it fares.

    Each pool joins at its share of the first half.
    """
    rate = _RATE * (0.02 + 0.98 * (1 + math.cos(math.pi * part)) / 2)
    for group in optimizer.param_groups:
        group["lr"] = rate * min(1.0, (step + 1) / _WARM_UP)
    pool = pools[step % min(len(pools), 1 + int(2 * len(pools) * part))]
    pool.train_step(optimizer)
    return pool.note()
