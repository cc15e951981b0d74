"""The network of an encoder: from the tokens of a text to where e and m should start.

It sees the rows of the frozen head, so nothing in it has the size of the vocabulary. Letters: R
rows, N tokens, P the most tokens it takes, d hidden size, w width of the network.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prototok.fitting.learned.network import ResidualBlock


class EncoderNetwork(nn.Module):
    """A residual MLP over the concatenated tokens, and which of the P places hold one.

    Beside its weights it has, fp32, how far vectors lie from the mean by coordinate, scale (), and
    the spread of the rows of the head, token_scale ().
    """

    scale: Tensor
    token_scale: Tensor

    def __init__(
        self, hidden_size: int, width: int, depth: int, longest: int, device: str = "cpu"
    ) -> None:
        super().__init__()
        self.longest = longest
        here: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.register_buffer("scale", torch.ones((), dtype=torch.float32, device=device))
        scale = torch.ones((), dtype=torch.float32, device=device)
        self.register_buffer("token_scale", scale)
        self.first = nn.Linear(longest * (hidden_size + 1), width, **here)
        self.blocks = nn.ModuleList(ResidualBlock(width, here) for _ in range(depth))
        self.norm = nn.LayerNorm(width, **here)
        self.last = nn.Linear(width, 2 * hidden_size, **here)
        nn.init.normal_(self.last.weight, 0.0, 0.16 / math.sqrt(width))
        nn.init.zeros_(self.last.bias)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return e and m (R, 2, d), fp32, less their mean and in the eigenbasis.

        `tokens` (R, N, d) are rows of the head, `lengths` (R,) how many of each text count.
        """
        rows, most, d = tokens.shape
        there = torch.arange(self.longest, device=tokens.device) < lengths[:, None]
        tokens = tokens.float() / self.token_scale * there[:, :most, None]
        tokens = F.pad(tokens, (0, 0, 0, self.longest - most)).flatten(1)
        x = self.first(torch.cat([tokens, there], dim=1).to(self.first.weight.dtype))
        for block in self.blocks:
            x = block(x)
        return self.scale * self.last(self.norm(x)).float().view(rows, 2, d)
