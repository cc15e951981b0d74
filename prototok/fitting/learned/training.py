"""What the trainings of an optimiser and of an encoder have in common.

Letters: d hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from prototok.common.arguments import is_count, is_integer, listed_items
from prototok.common.memory import held
from prototok.common.progress import Progress
from prototok.common.version import VERSION
from prototok.fitting.engine.basis import eigenbasis
from prototok.fitting.learn_shared import SPREAD, learn_shared, own_texts
from prototok.fitting.learned.checkpoint import Checkpoint
from prototok.fitting.learned.pool import Corpus
from prototok.fitting.prior import Prior, shipped_prior
from prototok.model.frozen_lm import FrozenLM
from prototok.texts.targets import Texts, targets_of

_KEEP_EVERY = 60.0  # seconds
_WARM_UP = 100  # of the AdamW that trains a network
# Texts that are sampled from the model, and their length; windows are cut from them.
_TEXTS, _LONG = 512, 128
# Fits start this near to the prior's mean, in its own spread: the first gradient then says more of
# the text than of the start, and seeds still differ.
_NEAR = 0.3

Step = Callable[[torch.optim.Optimizer, int], str | Callable[[], str]]


def require_training(lengths: Sequence[int], steps: int, seed: int) -> list[int]:
    """Return the lengths that are trained at; ValueError where one of these cannot be."""
    if not is_count(steps):
        raise ValueError(f"steps: {steps!r} is not a positive integer")
    if not is_integer(seed):
        raise ValueError(f"seed: {seed!r} is not an integer")
    grid = listed_items(lengths)
    if not grid or not all(map(is_count, grid)) or grid != sorted(set(grid)):
        raise ValueError(f"lengths: {lengths!r} is not a rising list of positive integers")
    return grid


def start_for(
    lm: FrozenLM, prior: Prior | None, backend: str, progress: bool | None
) -> tuple[Prior, float]:
    """Return where fits start, with an eigenbasis, and how far good vectors lie from its mean.

    `lm` is the model behind its prefix. The distance is by coordinate.
    """
    start = prior or shipped_prior(lm) or learn_shared(
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

    `begin` gets the steps that are behind and returns what makes a step: it takes the optimiser and
    the step's number, and returns a note for the bar, of name `what`.
    """
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    done = 0 if kept is None else kept.load(network, optimizer)
    make = begin(done)
    device = next(network.parameters()).device
    with Progress(steps, what, progress, steady=True) as bar:
        clock = time.monotonic()
        for step in range(done, steps):
            falling = rate * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
            for group in optimizer.param_groups:
                group["lr"] = falling * min(1.0, (step + 1) / _WARM_UP)
            bar.update(step, f"{make(optimizer, step)}, {held(device) / 1e9:.1f} GB")
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
