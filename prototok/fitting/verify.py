"""Decode one row alone, at batch 1 and in both dtypes: what its claim of exactness rests on.

Letters: N targets, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prototok.common.shown import shapes
from prototok.decoding.decode import Decoded, decode_vectors
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.setup import Setup


@dataclass(frozen=True, eq=False)
class Verified:
    """One row decoded alone, in the model's dtype and in float32; every number the worse of both.

    accuracy  share of right tokens; correct: their number
    margin    smallest (target logit − best other logit)
    spread    rms over the row's positions of what rounding does to the margins: those of plain
              torch in the model's dtype against float32; 0 where that is one dtype, or the recipe
              asks for no `spreads`
    loss      nats a token, the mean over the row
    ids       (N,) int64, as decoded where fewer tokens are right; margins (N,) fp32 likewise
    """

    accuracy: float
    correct: int
    margin: float
    spread: float
    loss: float
    ids: Tensor
    margins: Tensor

    __repr__ = shapes

    @property
    def exact(self) -> bool:
        return self.accuracy == 1.0

    def as_failed(self) -> Verified:
        """Return what counts of a row whose loss or gradient was not finite: nothing."""
        none, never = float("-inf"), float("inf")
        return replace(self, accuracy=0.0, correct=0, margin=none, loss=never)


def verify(setup: Setup, targets: Tensor, vectors: Tensor) -> Verified:
    """Decode a row's vectors (slots, d) and compare with its targets (N,)."""
    assert isinstance(setup.inputs, OneForward)
    arrangement = setup.inputs.arrangement
    both = [
        decode_vectors(
            lm, vectors[None], arrangement, len(targets), targets[None], setup.backend
        )
        for lm in setup.lm.in_both_dtypes()
    ]  # fmt: skip
    worse = min(both, key=lambda d: (int((d.ids[0] == targets).sum()), float(d.margin.min())))
    correct = int((worse.ids[0] == targets).sum())
    return Verified(
        accuracy=correct / len(targets),
        correct=correct,
        margin=min(float(decoded.margin.min()) for decoded in both),
        spread=_spread(setup, targets, vectors, both[-1]),
        loss=max(float(decoded.loss.mean()) for decoded in both),
        ids=worse.ids[0],
        margins=worse.margin[0],
    )


def _spread(setup: Setup, targets: Tensor, vectors: Tensor, exactly: Decoded) -> float:
    """Return the rms difference between the margins of plain torch and those in float32.

    Plain torch rounds after every operation, as another implementation may. C++ that rounds less
    often would make the margin look safer than it is elsewhere.
    """
    assert isinstance(setup.inputs, OneForward)
    lm = setup.lm
    if setup.recipe.spreads == 0.0 or lm.dtype == torch.float32:
        return 0.0
    plain = decode_vectors(
        lm, vectors[None], setup.inputs.arrangement, len(targets), targets[None], "torch"
    )
    return float((plain.margin - exactly.margin).square().mean().sqrt())
