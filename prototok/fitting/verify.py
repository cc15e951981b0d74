"""Decode rows alone, as at batch 1, and in both dtypes: what claims of exactness rest on.

Letters: R rows, N targets, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prototok.common.shown import shapes
from prototok.decoding.decode import Decoded, decode_alone
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.setup import Setup


@dataclass(frozen=True, eq=False)
class Verified:
    """One row decoded alone, in the model's dtype and in float32; every number the worse of both.

    accuracy  share of right tokens; correct: their number
    margin    smallest (target logit − best other logit)
    spread    rms over the row's positions of what rounding does to the margins: those in the
              model's dtype, as fits compute them, against float32; 0 where that is one dtype, or
              the recipe asks for no `spreads`
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


def verify(setup: Setup, rows: Sequence[tuple[Tensor, Tensor]]) -> list[Verified]:
    """Decode rows, each its targets (N,) and vectors (slots, d), alone, and compare them."""
    found: dict[int, Verified] = {}
    for length in {len(targets) for targets, _ in rows}:
        mine = [i for i, (targets, _) in enumerate(rows) if len(targets) == length]
        targets, vectors = (torch.stack([rows[i][part] for i in mine]) for part in (0, 1))
        found |= zip(mine, _of_one_length(setup, targets, vectors), strict=True)
    return [found[i] for i in range(len(rows))]


def _of_one_length(
    setup: Setup,
    targets: Tensor,  # (R, N)
    vectors: Tensor,  # (R, slots, d)
) -> list[Verified]:
    assert isinstance(setup.inputs, OneForward)
    arrangement, length = setup.inputs.arrangement, targets.shape[1]
    both = [
        decode_alone(lm, vectors, arrangement, length, targets, setup.backend)
        for lm in setup.lm.in_both_dtypes()
    ]
    rounded = _rounded(setup, targets, vectors, both[0])
    found = []
    for r, ids in enumerate(targets):
        right = [int((decoded.ids[r] == ids).sum()) for decoded in both]
        margin = [float(decoded.margin[r].min()) for decoded in both]
        worse = both[min(range(len(both)), key=lambda i: (right[i], margin[i]))]
        moved = 0.0
        if rounded is not None:
            moved = float((rounded.margin[r] - both[-1].margin[r]).square().mean().sqrt())
        found.append(
            Verified(
                accuracy=min(right) / length,
                correct=min(right),
                margin=min(margin),
                spread=moved,
                loss=max(float(decoded.loss[r].mean()) for decoded in both),
                ids=worse.ids[r],
                margins=worse.margin[r],
            )
        )
    return found


def _rounded(setup: Setup, targets: Tensor, vectors: Tensor, own: Decoded) -> Decoded | None:
    """Return rows as fits compute them, from which `spread` counts; None where it is 0.

    Fits round after every operation, as transformers does and another implementation may. A decoder
    that rounds less often, as that of `own` may, would make margins look safer than elsewhere.
    """
    assert isinstance(setup.inputs, OneForward)
    lm, arrangement, backend = setup.lm, setup.inputs.arrangement, setup.backend
    if setup.recipe.spreads == 0.0 or lm.dtype == torch.float32:
        return None
    length = targets.shape[1]
    if lm.plan(1, arrangement.input_length(length), backend).decoder.taken != "cpu":
        return own
    return decode_alone(lm, vectors, arrangement, length, targets, backend, as_fitted=True)
