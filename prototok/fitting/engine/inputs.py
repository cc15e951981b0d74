"""Inputs of the frozen model: a row's vectors, arranged, and where its targets are read.

Letters: R rows, N targets (of the longest row), L input positions, K leading vectors, d hidden
size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from prototok.fitting.prior import Prior
from prototok.results.arrangement import Arrangement


class Inputs(Protocol):
    """One way of building inputs; target i of a row is read at position i + offset."""

    @property
    def leading(self) -> int:
        """Return K, the vectors a row has of its own beside m."""
        ...

    @property
    def has_m(self) -> bool: ...

    @property
    def is_pair(self) -> bool:
        """Return True if the input is [e, m, m, …, m], whose first block has a closed form."""
        ...

    @property
    def offset(self) -> int: ...

    @property
    def given(self) -> int:
        """Return how many targets the input holds at its front; these are not scored."""
        ...

    @property
    def prior(self) -> Prior | None:
        """Return where vectors start and how their coordinates turn; None: see the recipe."""
        ...

    def starting(self, prior: Prior | None) -> Inputs:
        """Return the same inputs with this prior."""
        ...

    def input_length(self, length: int) -> int:
        """Return L for N targets."""
        ...

    def lay_out(self, targets: Tensor, lengths: list[int], dtype: torch.dtype) -> Tensor:
        """Lay out what `embeds` needs of each row, (R, …), from targets (R, N) padded with 0.

        It may lie on the host, where it is made of lengths alone.
        """
        ...

    def embeds(self, vectors: Tensor, layout: Tensor) -> Tensor:
        """Map vectors (R, slots, d) and their rows of the layout to inputs_embeds (R, L, d)."""
        ...


@dataclass(frozen=True)
class OneForward:
    """The paper's input, made of e and m alone: all targets are read in one forward pass."""

    arrangement: Arrangement
    given: int = 0
    prior: Prior | None = None

    def starting(self, prior: Prior | None) -> OneForward:
        return replace(self, prior=prior)

    @property
    def leading(self) -> int:
        return self.arrangement.leading

    @property
    def has_m(self) -> bool:
        return self.arrangement.has_m

    @property
    def is_pair(self) -> bool:
        return self.arrangement.is_pair

    @property
    def offset(self) -> int:
        return self.arrangement.offset

    def input_length(self, length: int) -> int:
        return self.arrangement.input_length(length)

    def lay_out(self, targets: Tensor, lengths: list[int], dtype: torch.dtype) -> Tensor:
        """Return (R, L, slots), one-hot, on the host: the vector at each position."""
        slots, total = self.arrangement.slots, self.input_length(targets.shape[1])
        layout = torch.zeros(len(lengths), total, slots, dtype=dtype, device="cpu")
        layouts = {n: self.arrangement.layout(n) for n in set(lengths)}
        for r, n in enumerate(lengths):
            # Causality: what stands behind a row's own end changes nothing before it.
            index = torch.cat([layouts[n], layouts[n][-1:].expand(total - len(layouts[n]))])
            layout[r] = F.one_hot(index, slots)
        return layout

    def embeds(self, vectors: Tensor, layout: Tensor) -> Tensor:
        # A product with one-hot rows places the vectors exactly, and its backward is a plain
        # product, where that of indexing is a serial accumulation.
        return layout @ vectors.to(layout.dtype)


@dataclass(frozen=True, eq=False)
class TeacherForced:
    """Kuratov et al.'s input [mem_1 … mem_K, emb(t_1) … emb(t_{N−1})]; mem_K predicts t_1."""

    embedding: Tensor  # (V, d)
    leading: int
    given: int = 0  # 1: t_1 is part of the prompt, as in their code
    prior: Prior | None = None

    def starting(self, prior: Prior | None) -> TeacherForced:
        return replace(self, prior=prior)

    @property
    def has_m(self) -> bool:
        return False

    @property
    def is_pair(self) -> bool:
        return False

    @property
    def offset(self) -> int:
        return self.leading - 1

    def input_length(self, length: int) -> int:
        return self.leading + length - 1

    def lay_out(self, targets: Tensor, lengths: list[int], dtype: torch.dtype) -> Tensor:
        """Return (R, N − 1, d), the embedded text that follows the vectors."""
        return self.embedding[targets[:, :-1]].to(dtype)

    def embeds(self, vectors: Tensor, layout: Tensor) -> Tensor:
        return torch.cat([vectors.to(layout.dtype), layout], dim=1)
