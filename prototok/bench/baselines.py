"""The autoregressive baselines that one forward is timed against.

Transformers' `generate` with its two caches, and our own decoder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prototok.autoregressive.generate import bytes_read, engine, greedy
from prototok.model.frozen_lm import FrozenLM, twin_of

CACHES = ("dynamic", "static")


class Generate:
    """Greedy `generate` of exactly N tokens behind one, with a dynamic or a static KV cache."""

    def __init__(self, lm: FrozenLM, dtype: torch.dtype) -> None:
        self.model, self.device = twin_of(lm, dtype), lm.device
        self.first = lm.bos_id or 0

    def __call__(self, length: int, batch: int, cache: str) -> Tensor:
        """Generate (batch, length) int64 ids behind one token, the same in every row."""
        prompt = torch.full((batch, 1), self.first, device=self.device, dtype=torch.int64)
        return greedy(self.model, length, cache, input_ids=prompt)[:, 1:]

    def call(self, length: int, batch: int, cache: str) -> Callable[[], Tensor]:
        """Return the same call, ready to be timed."""
        return lambda: self(length, batch, cache)


class Engine:
    """Our own static-KV decoder: exactly N tokens behind the same one as `Generate`."""

    def __init__(self, lm: FrozenLM, dtype: torch.dtype) -> None:
        self.lm = lm.cast(dtype)
        self.first = torch.tensor([[lm.bos_id or 0]], dtype=torch.int64, device="cpu")

    def __call__(self, length: int, batch: int) -> Tensor:
        """Generate (batch, length) int64 ids behind one token, the same in every row."""
        return engine(
            self.lm, self.lm.embed(self.first).expand(batch, -1, -1), length, None, "auto"
        )

    def call(self, length: int, batch: int) -> Callable[[], Tensor]:
        """Return the same call, ready to be timed."""
        return lambda: self(length, batch)

    def bytes_read(self, length: int, batch: int) -> int:
        """Return the bytes of weights and cache that a call must read."""
        return bytes_read(self.lm, batch, length)
