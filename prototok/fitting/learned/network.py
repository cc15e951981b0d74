"""The network of a learned optimiser: from what a row knows after a backward pass to its update.

One network serves all lengths, and nothing in it has the size of the vocabulary. Of the first
positions of a text it also sees the tokens and their errors. Letters: R rows, d hidden size, w
width of the network, P positions it sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prototok.model.frozen_lm import FrozenLM

_SCALARS = 7
_NARROW = 64  # most coordinates that a token, or its error, is brought down to
# Bounds, so that AdamW can come back from wherever a network leads on texts unlike those it saw:
_FREE = 3.0  # on the free update of a coordinate, in spreads
_GAIN = 4.0  # on the logarithm of what it makes of Adam's step


@dataclass(frozen=True)
class Seen:
    """What the network sees of rows after a forward and a backward pass.

    vectors    (R, 2, d) fp32, e and m
    grad       (R, 2, d) fp32, of the row's summed loss, in the eigenbasis
    direction  (R, 2, d) fp32, Adam's step at rate 1, in the eigenbasis; it leads downhill
    step       (R,) int64, updates made
    length     (R,) int64, tokens
    loss       (R,) fp32, nats a token at the recipe's temperature
    right      (R,) fp32, share of tokens that are right
    margin     (R,) fp32, the smallest
    tokens     (R, P, d), rows of the frozen head; zero behind the end of a text
    errors     (R, P, d), gradient of a position's loss at its hidden state; likewise
    margins    (R, P) fp32; likewise
    """

    vectors: Tensor
    grad: Tensor
    direction: Tensor
    step: Tensor
    length: Tensor
    loss: Tensor
    right: Tensor
    margin: Tensor
    tokens: Tensor
    errors: Tensor
    margins: Tensor


class UpdateNetwork(nn.Module):
    """A residual MLP: a free update of (e, m), and a gain for each coordinate of Adam's step.

    Beside its weights it has, all fp32, where fits start, mean (2, d); how far vectors lie from
    there by coordinate, scale (); the rate () of Adam's step where the gain is one; and the spread
    of the rows of the head, token_scale ().
    """

    mean: Tensor
    scale: Tensor
    rate: Tensor
    token_scale: Tensor

    def __init__(
        self, hidden_size: int, width: int, depth: int, reach: int, device: str = "cpu"
    ) -> None:
        super().__init__()
        narrow = min(_NARROW, hidden_size)
        self.reach = reach
        here: dict[str, Any] = {"device": device, "dtype": torch.float32}

        def full(value: float, *shape: int) -> Tensor:
            return torch.full(shape, value, device=device, dtype=torch.float32)

        self.register_buffer("mean", full(0.0, 2, hidden_size))
        self.register_buffer("scale", full(1.0))
        self.register_buffer("rate", full(1.0))
        self.register_buffer("token_scale", full(1.0))
        if reach:
            self.token = nn.Linear(hidden_size, narrow, **here)
            self.error = nn.Linear(hidden_size, narrow, **here)
            self.along = nn.Linear(reach * (2 * narrow + 2), width, bias=False, **here)
        self.first = nn.Linear(6 * hidden_size + _SCALARS, width, **here)
        self.blocks = nn.ModuleList(ResidualBlock(width, here) for _ in range(depth))
        self.norm = nn.LayerNorm(width, **here)
        self.last = nn.Linear(width, 4 * hidden_size, **here)
        nn.init.normal_(self.last.weight, 0.0, 0.003)
        nn.init.zeros_(self.last.bias)

    def forward(self, seen: Seen) -> Tensor:
        """Return the updates (R, 2, d), fp32 and in the eigenbasis."""
        x = self.first(self._features(seen).to(self.first.weight.dtype))
        if self.reach:
            x = x + self.along(self._positions(seen))
        for block in self.blocks:
            x = block(x)
        free, gain = self.last(self.norm(x)).float().chunk(2, dim=1)
        adam = seen.direction.flatten(1) * gain.clamp(-_GAIN, _GAIN).exp()
        return (self.scale * free.clamp(-_FREE, _FREE) + self.rate * adam).view_as(seen.direction)

    def _features(self, seen: Seen) -> Tensor:
        """Return (R, 6 d + 7) fp32, each of about unit size."""
        norms = seen.grad.norm(dim=2).clamp_min(1e-20)  # (R, 2)
        unit = seen.grad * (math.sqrt(2 * seen.grad.shape[2]) / norms.norm(dim=1))[:, None, None]
        scalars = [
            torch.log1p(seen.step.float()),
            *norms.log().clamp(-12, 12).unbind(1),
            seen.loss.clamp_min(1e-6).log(),
            seen.right,
            seen.margin.clamp(-8, 8) / 4,
            seen.length.float().log(),
        ]
        wide = [(seen.vectors - self.mean) / self.scale, unit, seen.direction]
        return torch.cat([*(part.flatten(1) for part in wide), torch.stack(scalars, 1)], dim=1)

    def _positions(self, seen: Seen) -> Tensor:
        """Return (R, P · 2 (n + 1)), of each position a token, its error and its margin."""
        dtype = self.token.weight.dtype
        size = seen.errors.float().norm(dim=2)  # (R, P)
        # By the mean over the row, so that positions that are solved stay small.
        unit = math.sqrt(seen.errors.shape[2]) / size.mean(1).clamp_min(1e-20)
        tokens = self.token((seen.tokens.float() / self.token_scale).to(dtype))
        errors = self.error((seen.errors.float() * unit[:, None, None]).to(dtype))
        margins = seen.margins.clamp(-8, 8)[:, :, None] / 4
        right = (seen.margins > 0)[:, :, None]
        return torch.cat([tokens, errors, margins.to(dtype), right.to(dtype)], dim=2).flatten(1)


class ResidualBlock(nn.Module):
    """Two layers of one width beside what comes in; at first they add nothing."""

    def __init__(self, width: int, here: dict[str, Any]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, **here)
        self.up = nn.Linear(width, width, **here)
        self.down = nn.Linear(width, width, **here)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return out


def token_rows(lm: FrozenLM) -> Tensor:
    """Return what stands for tokens, (V, d): the head, or the embedding where it is not known."""
    return lm.embedding if lm.body.head is None else lm.body.head
