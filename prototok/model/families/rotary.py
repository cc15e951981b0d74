"""Rotary tables from a transformers model. Letters: N positions, r rotated part of a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RotaryTables:
    """cos and sin for the first positions, (N, r), fp32, grown on demand.

    The angles are computed from the model's own inverse frequencies, as transformers does, so that
    every rope scaling with static frequencies comes along.
    """

    def __init__(self, rotary: Any, device: torch.device) -> None:
        self.inv_freq = rotary.inv_freq.detach().float().to(device)
        self.scaling = float(getattr(rotary, "attention_scaling", 1.0))
        self.cos = self.sin = torch.empty(0, 2 * len(self.inv_freq), device=device)

    def __call__(self, length: int) -> tuple[Tensor, Tensor]:
        if len(self.cos) < length:
            position = torch.arange(length, device=self.inv_freq.device, dtype=torch.float32)
            angle = torch.outer(position, self.inv_freq).repeat(1, 2)
            self.cos = angle.cos() * self.scaling
            self.sin = angle.sin() * self.scaling
        return self.cos[:length], self.sin[:length]
