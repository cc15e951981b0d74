"""`learn_optimizer`: train a network that fits texts in a handful of updates, once a frozen model.

Letters: N targets, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from prototok.common.arguments import is_count, is_number
from prototok.common.world import own_world
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.setup import Setup
from prototok.fitting.learned.checkpoint import Checkpoint
from prototok.fitting.learned.encoder import Encoder, parted
from prototok.fitting.learned.kept import weights_of
from prototok.fitting.learned.network import UpdateNetwork
from prototok.fitting.learned.optimizer import LearnedOptimizer
from prototok.fitting.learned.pool import Pool
from prototok.fitting.learned.training import Step, joined, prepared, train
from prototok.fitting.prior import Prior
from prototok.fitting.recipe import LEARNED
from prototok.model.frozen_lm import FrozenLM
from prototok.model.in_front import PrefixLike
from prototok.model.prefix import Prefix
from prototok.texts.targets import Texts

_WIDTH, _DEPTH = 512, 3
_RATE = 5e-4  # of the AdamW that trains the network


@own_world
def learn_optimizer(
    lm: FrozenLM,
    texts: Texts | None = None,
    *,
    lengths: Sequence[int] = (8, 16),
    reach: int | None = None,
    steps: int = 3000,
    positions: int | None = None,
    horizon: int | None = None,
    rate: float | None = None,
    near: float | None = None,
    prior: Prior | None = None,
    init: Encoder | LearnedOptimizer | tuple[Encoder, LearnedOptimizer] | None = None,
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
        steps: of training, each a forward and backward of about `positions`.
        positions: texts under way times their tokens; None: 1024, which is few for long texts, that
            stay for many updates.
        horizon: updates that a text is granted in training; None: 16, or N² / 4 where that is more.
        rate: of the AdamW that trains the network, at its peak; None: 5e-4. Half of it is better
            where few rows are under way.
        near: weight, in the loss of training, of the mean square of how far vectors lie from where
            fits start, by coordinate and in spreads; None: 0. An update by itself is the better the
            further out it leads, but from there AdamW finds it hard to go on. So it helps where the
            network by itself solves next to none and a good fit ends near by, as 2 does at 16
            tokens on a model of a few million weights; elsewhere it costs updates.
        prior: where fits start, from `learn_shared`; None: where those of an optimiser in init do,
            or what comes with a built-in model, or `learn_shared(lm)`.
        init: what training begins with, in the form in which `fast_fit` takes it. An optimiser: it
            goes on from its weights, with its start, where there is no prior, and at least its
            reach, so several calls make a curriculum. An encoder: every other text starts at its
            guess, where it takes texts of that length, so that the optimiser is good from there and
            from the prior.
        prefix: what stands in front of e, as in `fast_fit`, and of the fits with this optimiser.
        seed: of the network's weights and of what it is trained on; the same gives the same.
        checkpoint: a file that training is kept in every minute; where it is there, training goes
            on from it, with fresh texts.
        backend, progress: as in `fast_fit`.

    Raises:
        ValueError: an argument that cannot be met, named.
    """
    if reach is not None and not is_count(reach) and reach != 0:
        raise ValueError(f"reach: {reach!r} is not an integer of at least 0")
    for name, value in (("positions", positions), ("horizon", horizon)):
        if value is not None and not is_count(value):
            raise ValueError(f"{name}: {value!r} is not a positive integer")
    if rate is not None and not (is_number(rate) and rate > 0):
        raise ValueError(f"rate: {rate!r} is not a positive number")
    if near is not None and not (is_number(near) and near >= 0):
        raise ValueError(f"near: {near!r} is negative or not a number")
    encoder, trained = parted(init)
    if isinstance(trained, Prior):
        if encoder is None:
            raise ValueError("init: a Prior is given as prior")
        trained = None
    if encoder is not None:
        encoder.start.require_model(lm)
    given = prepared(
        lm, texts, lengths, steps, seed, prior, prefix, LEARNED, backend, progress, trained
    )  # fmt: skip
    lm, grid, seed = given.lm, given.lengths, given.seed
    recipe = LEARNED.at_width(lm.hidden_size, True)  # that of the fits, temperature included
    before = 0 if trained is None else trained.reach
    reach = 0 if lm.body.head is None else max(before, grid[-1]) if reach is None else reach
    if reach < before:
        raise ValueError(f"reach: {reach} is less than the {before} of the optimiser in init")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = UpdateNetwork(lm.hidden_size, _WIDTH, _DEPTH, reach)
    network.scale.fill_(given.spread)
    network.rate.fill_(recipe.lr)
    if lm.body.head is not None:
        network.token_scale.fill_(float(lm.body.head.float().std()))
    if trained is not None:
        trained.begin(network)
    network.mean.copy_(given.start.mean)
    network.to(lm.device)
    inputs = OneForward(given.layout, prior=given.start)
    setup = Setup(lm, inputs, recipe, backend, None, network)
    asked = {"positions": positions, "horizon": horizon, "rate": rate, "near": near}
    made = {name: str(value) for name, value in asked.items() if value is not None}
    begun = [part for part in (encoder, trained) if part is not None]
    if begun:
        made["init"] = "; ".join(f"{type(part).__name__} {part.training}" for part in begun)
    start = given.finished(reach=str(reach), **made)
    kept = None if checkpoint is None else Checkpoint(checkpoint, lm, start.provenance)

    def begin(done: int) -> Step:
        generator = torch.Generator("cpu").manual_seed(seed + done)
        pools = [
            Pool(setup, given.corpus, n, generator, encoder, positions, horizon, near or 0.0)
            for n in grid
        ]

        def make(optimizer: torch.optim.Optimizer, step: int) -> Callable[[], str]:
            pool = pools[step % joined(len(pools), step / steps)]
            pool.train_step(optimizer)
            return pool.note

        return make

    train("learn optimizer", network, steps, rate or _RATE, kept, begin, progress)
    return LearnedOptimizer(start, weights_of(network))
