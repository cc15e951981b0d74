"""Measures of a reconstruction: token accuracy, and the information in a text.

Letters: T texts, N targets of a text, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prototok.common.shown import shapes
from prototok.common.world import own_world
from prototok.model.frozen_lm import FrozenLM, require_frozen
from prototok.texts.targets import Texts, targets_of
from prototok_kernels.linear_cross_entropy import linear_cross_entropy

SUCCESS = 0.99  # the paper's *successful* reconstruction; *perfect* is 1.0


def token_accuracy(predicted: Sequence[int] | Tensor, targets: Sequence[int] | Tensor) -> float:
    """Return C_tokens / N: the share of positions at which prediction and target agree."""
    a, b = torch.as_tensor(predicted, device="cpu"), torch.as_tensor(targets, device="cpu")
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(
            f"predicted: shape {tuple(a.shape)} does not go with targets of shape {tuple(b.shape)}"
        )
    return float((a == b).double().mean())


@dataclass(frozen=True)
class Information:
    """H_LM of each text under a model.

    nats    (T,) fp64, −Σ log P(t_i | t_<i) over the scored tokens
    scored  (T,) int64, how many tokens the sum runs over: N, or N − 1 without a BOS in front
    bos     "keep" or "drop", the policy it was computed with
    """

    nats: Tensor
    scored: Tensor
    bos: str

    __repr__ = shapes

    @property
    def bits(self) -> Tensor:
        """Return (T,) the same in bits."""
        return self.nats / math.log(2)


@own_world
@torch.no_grad()
def information(
    lm: FrozenLM,
    texts: Texts,
    length: int | None = None,
    bos: str = "drop",
    backend: str = "auto",
) -> Information:
    """Measure the autoregressive cross-entropy H_LM of each text (the paper's §3), in nats.

    Args:
        texts: strings, or token ids (see `fast_fit`).
        length: cut every text to this many tokens.
        bos: "drop" conditions on nothing, so t_1 is given and N − 1 tokens are scored; "keep" puts
            the BOS token in front and scores all N.
        backend: which kernels: "torch", "triton" (CUDA), "cpu" (C++), or "auto".

    The forward runs in the model's dtype, one text at a time; log-probabilities are summed in fp64.
    """
    require_frozen(lm)
    if bos not in ("drop", "keep"):
        raise ValueError(f"bos: {bos!r} is neither 'drop' nor 'keep'")
    if bos == "keep" and lm.bos_id is None:
        raise ValueError(f"bos: {lm.identity.name} has no BOS token to keep")
    rows = targets_of(lm, texts, length)
    nats, scored = [], []
    for ids in rows:
        context = (
            ids
            if bos == "drop"
            else torch.cat([torch.tensor([lm.bos_id], dtype=torch.int64, device="cpu"), ids])
        )
        if lm.context is not None and len(context) - 1 > lm.context:
            raise ValueError(f"texts: {len(context)} tokens do not fit a context of {lm.context}")
        total = 0.0
        if len(context) > 1:
            hidden = lm.hidden_of_ids(context[None, :-1], backend)[0]
            plan = lm.plan(1, len(context) - 1, backend)
            head = linear_cross_entropy(
                hidden,
                lm.body.head,
                context[1:].to(lm.device),
                need_grad=False,
                backend=plan.head.taken,
            )
            total = float(head.loss.double().sum())
        nats.append(total)
        scored.append(len(context) - 1)
    return Information(
        torch.tensor(nats, dtype=torch.float64, device="cpu"),
        torch.tensor(scored, dtype=torch.int64, device="cpu"),
        bos,
    )
