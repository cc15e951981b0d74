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
        self._tables = self._made(0)

    @property
    def width(self) -> int:
        """Return r."""
        return 2 * len(self.inv_freq)

    def __call__(self, length: int) -> tuple[Tensor, Tensor]:
        # Read once and replaced as a pair: another thread may grow them meanwhile.
        cos, sin = self._tables
        if len(cos) < length:
            cos, sin = made = self._made(length)
            if type(cos) is Tensor:  # what one of torch's modes makes is of no use outside of it
                self._tables = made
        if len(cos) == length:
            return cos, sin
        return cos[:length], sin[:length]

    @torch.inference_mode(False)  # an inference tensor could be part of no later graph
    def _made(self, length: int) -> tuple[Tensor, Tensor]:
        position = torch.arange(length, device=self.inv_freq.device, dtype=torch.float32)
        angle = torch.outer(position, self.inv_freq).repeat(1, 2)
        return angle.cos() * self.scaling, angle.sin() * self.scaling
