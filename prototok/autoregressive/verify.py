"""Generate rows' texts alone, at batch 1 and in both dtypes: what makes a [mem] fit exact.

Letters: K vectors in front, N targets, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prototok.autoregressive.generate import generate
from prototok.common.shown import shapes
from prototok.decoding.replay import on_the_host
from prototok.fitting.engine.setup import Setup
from prototok.model.frozen_lm import FrozenLM


@dataclass(frozen=True, eq=False)
class Generated:
    """One row generated alone, in the model's dtype and in float32; every number the worse of both.

    accuracy        share of the scored tokens that are right; correct: their number
    margin          smallest (target logit − best other logit) up to the first wrong token; at most
                    0 where there is one
    teacher_forced  share of right tokens with the text before each given
    ids             (N,) int64, as generated where fewer tokens are right
    spread          rms of the difference between the margins in the two dtypes, with the text
                    before each token given; 0 where there is one dtype
    """

    accuracy: float
    correct: int
    margin: float
    teacher_forced: float
    ids: Tensor
    spread: float = 0.0

    __repr__ = shapes

    @property
    def exact(self) -> bool:
        return self.accuracy == 1.0

    def as_failed(self) -> Generated:
        """Return what counts of a row whose loss or gradient was not finite: nothing."""
        none = float("-inf")
        return replace(self, accuracy=0.0, correct=0, margin=none, teacher_forced=0.0)


def verify(setup: Setup, rows: Sequence[tuple[Tensor, Tensor]]) -> list[Generated]:
    """Generate from each row's vectors (K, d) and compare with its targets (N,)."""
    return [_verified(setup, targets, mem) for targets, mem in rows]


def _verified(setup: Setup, targets: Tensor, mem: Tensor) -> Generated:
    models = setup.lm.in_both_dtypes()
    margins = [_margins(lm, targets, mem, setup.backend)[setup.inputs.given :] for lm in models]
    both = [
        _in_one_dtype(lm, setup, targets, mem, own) for lm, own in zip(models, margins, strict=True)
    ]
    worse = min(both, key=lambda found: found.correct)
    return replace(
        worse,
        margin=min(found.margin for found in both),
        teacher_forced=min(found.teacher_forced for found in both),
        spread=float((margins[0] - margins[-1]).square().mean().sqrt()),
    )


def _in_one_dtype(
    lm: FrozenLM, setup: Setup, targets: Tensor, mem: Tensor, margins: Tensor
) -> Generated:
    given = setup.inputs.given
    first = targets[:1] if given else None
    ids = generate(lm, mem[None], len(targets), cache_of(lm), first, setup.backend)[0]
    right = (ids == targets)[given:]
    # Up to its first wrong token the generation has read the text itself.
    sound = int(right.long().cumprod(0).sum())
    margin = float(margins[: sound + 1].min())
    return Generated(
        accuracy=float(right.double().mean()),
        correct=int(right.sum()),
        margin=margin if sound == len(right) else min(margin, 0.0),
        teacher_forced=float((margins > 0).double().mean()),
        ids=ids,
    )


@torch.no_grad()
def _margins(lm: FrozenLM, targets: Tensor, mem: Tensor, backend: str) -> Tensor:
    """Return (N,) target logit − best other logit, with the text before each target given."""

    def compute(vectors: Tensor, ids: Tensor) -> list[Tensor]:
        inputs_embeds = torch.cat([vectors, lm.embed(ids[:-1])[None]], dim=1)
        logits = lm.logits(inputs_embeds, backend)[0, len(mem) - 1 :].float()  # (N, V)
        own = logits.gather(1, ids[:, None])
        best_other = logits.scatter(1, ids[:, None], float("-inf")).amax(dim=1)
        return [own[:, 0] - best_other]

    key = ("margins with the text given", len(mem), len(targets), backend)
    return on_the_host(lm, key, compute, [], [mem[None].to(lm.dtype), targets])[0]


def cache_of(lm: FrozenLM) -> str:
    """Return the cache that verification generates with: our own decoder's where there is one."""
    return "dynamic" if lm.body.family == "general" else "engine"
