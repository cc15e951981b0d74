"""What the trainings of an optimiser and of an encoder have in common.

Letters: d hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from prototok.common.arguments import is_count, listed_items, require_seed
from prototok.common.memory import held
from prototok.common.progress import Progress
from prototok.common.version import VERSION
from prototok.decoding.decode import require_length
from prototok.fitting.engine.basis import eigenbasis
from prototok.fitting.front import front_of
from prototok.fitting.learn_shared import SPREAD, learn_shared, own_texts
from prototok.fitting.learned.checkpoint import Checkpoint
from prototok.fitting.learned.kept import KeptNetwork
from prototok.fitting.learned.pool import Corpus
from prototok.fitting.prior import Prior, require_prior
from prototok.fitting.recipe import Recipe
from prototok.fitting.shipped import shipped
from prototok.model.frozen_lm import FrozenLM, require_frozen
from prototok.model.in_front import PrefixLike
from prototok.model.prefix import Prefix
from prototok.results.arrangement import Arrangement
from prototok.texts.targets import Texts, targets_of

_KEEP_EVERY = 60.0  # seconds
_WARM_UP = 100  # of the AdamW that trains a network
# Texts that are sampled from the model, and their length; windows are cut from them.
_TEXTS, _LONG = 512, 128
# Fits start this near to the prior's mean, in its own spread: the first gradient then says more of
# the text than of the start, and seeds still differ.
_NEAR = 0.3

# Makes a step of this number with an optimiser, and returns what says how training fares.
Step = Callable[[torch.optim.Optimizer, int], Callable[[], str]]


@dataclass(frozen=True)
class Prepared:
    """What a training needs, checked and made: `prepared`.

    lm        the model behind its prefix
    lengths   that are trained at, rising
    seed      of everything that is drawn
    layout    of what is fitted
    corpus    what windows are cut from
    start     where vectors start, with an eigenbasis
    spread    how far good vectors lie from its mean, by coordinate
    made_by   what a file says of the training
    """

    lm: FrozenLM
    lengths: list[int]
    seed: int
    layout: Arrangement
    corpus: Corpus
    start: Prior
    spread: float
    made_by: dict[str, str]

    def finished(self, **more: str) -> Prior:
        """Return the start as a file keeps it, with `more` that it says of the training."""
        # Its model too: a prior of before may know it by an older fingerprint.
        return replace(
            self.start, model=self.lm.identity, provenance=self.made_by | more,
            prefix=self.lm.prefix,
        )  # fmt: skip


def prepared(
    lm: FrozenLM, texts: Texts | None, lengths: Sequence[int], steps: int, seed: int,
    prior: Prior | None, prefix: PrefixLike | Prefix, recipe: Recipe, backend: str,
    progress: bool | None, trained: KeptNetwork | None = None,
) -> Prepared:  # fmt: skip
    """Check what `learn_optimizer` and `learn_encoder` are given, and make what both need.

    A training that begins with a `trained` network has its start too, unless there is a prior.

    Raises:
        ValueError: an argument that cannot be met, named.
    """
    require_frozen(lm)
    grid = require_training(lengths, steps, seed)
    seed = int(seed)  # torch takes no integer of numpy
    if trained is not None:
        trained.start.require_model(lm)
        prior = trained.start if prior is None else prior
    if prior is not None:
        require_prior("prior", prior, lm)
    lm.plan(1, 1, backend)  # refuses a backend that cannot be had
    behind, in_front = front_of(lm, prefix, recipe, prior)
    layout = Arrangement.parse("e m*")
    require_length(grid[-1], behind, layout)
    # Samples are the model's own, whatever stands in front of vectors.
    corpus = corpus_of(lm, texts, grid[-1], seed)
    if trained is None:
        start, spread = start_for(behind, prior, backend, progress)
    else:
        assert prior is not None
        start, spread = trained.start, float(trained.weights["scale"])  # its weights count in that
        if prior is not start:
            start, _ = start_for(behind, prior, backend, progress)
    made = made_by(grid, steps, seed, texts, in_front)
    return Prepared(behind, grid, seed, layout, corpus, start, spread, made)


def require_training(lengths: Sequence[int], steps: int, seed: int) -> list[int]:
    """Return the lengths that are trained at; ValueError where one of these cannot be."""
    if not is_count(steps):
        raise ValueError(f"steps: {steps!r} is not a positive integer")
    require_seed(seed)
    grid = listed_items(lengths)
    if not grid or not all(map(is_count, grid)) or grid != sorted(set(grid)):
        raise ValueError(f"lengths: {lengths!r} is not a rising list of positive integers")
    return [int(length) for length in grid]


def start_for(
    lm: FrozenLM, prior: Prior | None, backend: str, progress: bool | None
) -> tuple[Prior, float]:
    """Return where fits start, with an eigenbasis, and how far good vectors lie from its mean.

    `lm` is the model behind its prefix. The distance is by coordinate.
    """
    start = prior or shipped(Prior, lm) or learn_shared(
        lm, prefix=lm.prefix, backend=backend, progress=progress
    )  # fmt: skip
    basis = eigenbasis(lm, backend).cpu() if start.basis is None else start.basis
    spread = max(float(start.std[0].mean()) / SPREAD, 1e-3)
    return replace(start, basis=basis, std=_NEAR * start.std), spread


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


def train(
    what: str,
    network: nn.Module,
    steps: int,
    rate: float,
    kept: Checkpoint | None,
    begin: Callable[[int], Step],
    progress: bool | None,
) -> None:
    """Train a network, from where its checkpoint is, and keep it there; `rate` is AdamW's peak.

    `begin` gets the steps that are behind and returns what makes a step; `what` names the bar.
    """
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    done = 0 if kept is None else kept.load(network, optimizer)
    make = begin(done)
    device = next(network.parameters()).device

    def note() -> str:
        return f"{fared()}, {held(device) / 1e9:.1f} GB"

    with Progress(steps, what, progress, steady=True) as bar:
        clock = time.monotonic()
        for step in range(done, steps):
            falling = rate * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
            for group in optimizer.param_groups:
                group["lr"] = falling * min(1.0, (step + 1) / _WARM_UP)
            fared = make(optimizer, step)
            bar.update(step, note)
            if kept is not None and (time.monotonic() - clock > _KEEP_EVERY or step == steps - 1):
                kept.save(network, optimizer, step + 1)
                clock = time.monotonic()


def joined(count: int, part: float) -> int:
    """Count the lengths that are trained at, with `part` of the training behind.

    The first is there from the beginning, each other joins at its share of the first half.
    """
    return min(count, 1 + int(2 * count * part))


def made_by(
    lengths: Sequence[int], steps: int, seed: int, texts: Texts | None, in_front: str
) -> dict[str, str]:
    """Return what a file says of its training."""
    return {
        "lengths": ", ".join(map(str, lengths)),
        "steps": str(steps),
        "seed": str(seed),
        "texts": "given" if texts is not None else "sampled from the model",
        "prefix": in_front,
        "prototok": VERSION,
        "torch": torch.__version__,
    }
