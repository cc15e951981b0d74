"""AdamW in which every row keeps its own clock: step count, learning rate and an active flag.

Letters: R rows, D coordinates a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdamWSettings:
    """The constants that all rows share (`torch.optim.AdamW` without amsgrad)."""

    betas: tuple[float, float] = (0.9, 0.9)
    eps: float = 1e-8
    weight_decay: float = 0.01


@dataclass
class AdamWState:
    """First and second moments, (R, D) fp32, and updates done so far, (R,) int64."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor

    @classmethod
    def zeros(cls, param: Tensor) -> AdamWState:
        step = torch.zeros(param.shape[0], dtype=torch.int64, device=param.device)
        return cls(torch.zeros_like(param), torch.zeros_like(param), step)

    def rows(self, index: Tensor) -> AdamWState:
        """The state of the rows named by `index`, copied."""
        return AdamWState(self.exp_avg[index], self.exp_avg_sq[index], self.step[index])

    def extended(self, other: AdamWState) -> AdamWState:
        """This state with the rows of `other` behind its own."""
        return AdamWState(
            torch.cat([self.exp_avg, other.exp_avg]),
            torch.cat([self.exp_avg_sq, other.exp_avg_sq]),
            torch.cat([self.step, other.step]),
        )


def adamw_rows_(
    param: Tensor,  # (R, D) fp32, updated in place
    grad: Tensor,  # (R, D) fp32
    state: AdamWState,  # updated in place
    lr: Tensor,  # (R,) fp32
    active: Tensor,  # (R,) bool; other rows keep every bit of theirs
    settings: AdamWSettings,
) -> None:
    """One decoupled-weight-decay Adam update of the active rows (Loshchilov & Hutter 2019).

    Rows that start together and stay active get what `torch.optim.AdamW` gives, to rounding.
    """
    beta1, beta2 = settings.betas
    state.step += active
    step = state.step.clamp(min=1)[:, None].double()
    rate = lr[:, None]
    exp_avg = torch.lerp(state.exp_avg, grad, 1 - beta1)
    exp_avg_sq = state.exp_avg_sq * beta2 + grad * grad * (1 - beta2)
    denominator = exp_avg_sq.sqrt() / (1 - beta2**step).sqrt().to(param.dtype) + settings.eps
    moved = param * (1 - rate * settings.weight_decay)
    moved -= rate / (1 - beta1**step).to(param.dtype) * exp_avg / denominator
    keep = active[:, None]
    param.copy_(torch.where(keep, moved, param))
    state.exp_avg.copy_(torch.where(keep, exp_avg, state.exp_avg))
    state.exp_avg_sq.copy_(torch.where(keep, exp_avg_sq, state.exp_avg_sq))
