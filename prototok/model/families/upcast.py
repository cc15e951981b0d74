"""Blocks in a wider dtype without a second copy of a model: each is made when it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from prototok_kernels.layers import DecoderLayer


class Upcast(Sequence[DecoderLayer]):
    """Blocks cast to another dtype one at a time; nothing here holds what it has cast.

    A narrow dtype fits into a wider one exactly, so these are the blocks of a whole copy to the
    bit. They attend by torch: flash-attn computes in 16 bit alone.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],  # without a prefix
        dtype: torch.dtype,
        prefixes: Sequence[Tensor] | None = None,  # of each block, in that dtype
    ) -> None:
        self.layers, self.dtype, self.prefixes = layers, dtype, prefixes

    def __len__(self) -> int:
        return len(self.layers)

    @overload
    def __getitem__(self, index: int) -> DecoderLayer: ...

    @overload
    def __getitem__(self, index: slice) -> Upcast: ...

    def __getitem__(self, index: int | slice) -> DecoderLayer | Upcast:
        if isinstance(index, slice):
            prefixes = None if self.prefixes is None else self.prefixes[index]
            return Upcast(self.layers[index], self.dtype, prefixes)
        wide = self.layers[index].to(self.dtype)
        prefix = None if self.prefixes is None else self.prefixes[index]
        return replace(wide, flash=False, prefix=prefix)

    def behind(self, prefixes: Sequence[Tensor]) -> Upcast:
        """Return the same blocks behind a prefix, given its keys and values in each."""
        return Upcast(self.layers, self.dtype, prefixes)
