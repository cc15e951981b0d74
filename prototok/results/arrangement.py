"""Arrangements of e and m in the input, and of targets over positions (the paper's Table 1).

Letters: N targets, L input positions, K leading vectors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from prototok.common.arguments import hint

_LEADING = re.compile(r"e(?P<k>[1-9]\d?)? m\*(?:\+(?P<offset>\d{1,2}))?")
NAMES = ("e m*", "e m*+1", "e*", "e* m*", "(e m)*", "e4 m*", "e4 m*+3")


@dataclass(frozen=True)
class Arrangement:
    """A pattern of vectors and a target offset: target i is read at input position i + offset.

    | name        | input for N = 4 | the paper's Table 1 |
    |-------------|-----------------|---------------------|
    | `e m*`      | e m m m         | [e] [m]×(N−1), the default |
    | `e m*+1`    | e m m m m       | [e] [m]×N, nothing is read at e |
    | `e*`        | e e e e         | [e]×N |
    | `e* m*`     | e e m m         | [e]×(N/2) [m]×(N/2) |
    | `(e m)*`    | e m e m         | [e, m]×(N/2) |
    | `e4 m*`     | e₁ e₂ e₃ e₄     | K = 4 leading vectors (K up to 99) |
    | `e4 m*+3`   | e₁ e₂ e₃ e₄ m m m | the first target is read at e₄ |
    """

    name: str
    leading: int  # K, the number of different e vectors
    offset: int

    @classmethod
    def parse(cls, name: str) -> Arrangement:
        """Return the arrangement called `name`; ValueError where there is none."""
        if name in ("e*", "e* m*", "(e m)*"):
            return cls(name, 1, 0)
        match = _LEADING.fullmatch(name) if isinstance(name, str) else None
        leading = int(match["k"] or 1) if match else 0
        offset = int(match["offset"] or 0) if match else 0
        if not match or offset > leading:
            raise ValueError(
                f"arrangement: {name!r} is not known; names look like "
                + ", ".join(repr(n) for n in NAMES)
                + " (an offset is at most the number of leading vectors)"
                + hint(name, NAMES)
            )
        return cls(name, leading, offset)

    @property
    def has_m(self) -> bool:
        return self.name != "e*"

    @property
    def is_pair(self) -> bool:
        """Return True if the input is [e, m, …, m] at every length: one e, then m throughout."""
        return self.leading == 1 and _LEADING.fullmatch(self.name) is not None

    @property
    def slots(self) -> int:
        """Return how many vectors a row needs: K, and one more for m."""
        return self.leading + self.has_m

    def input_length(self, length: int) -> int:
        """Return L for N targets."""
        return length + self.offset

    def read_before_m(self, length: int) -> int:
        """Return how many of N targets are read where no m has been: e alone decides them."""
        before = int((self.layout(length) < self.leading).long().cumprod(0).sum())
        return max(0, before - self.offset)

    def begins_alike(self, length: int, other: int) -> bool:
        """Say whether inputs of these two lengths are the same as far as both go."""
        shorter = min(length, other)
        ours, theirs = (self.layout(n)[: self.input_length(shorter)] for n in (length, other))
        return bool(torch.equal(ours, theirs))

    def layout(self, length: int) -> Tensor:
        """Return (L,) int64, the vector at each position: 0 … K−1 for e₁ … e_K, K for m."""
        position = torch.arange(self.input_length(length), device="cpu")
        if self.name == "e*":
            return torch.zeros_like(position)
        if self.name == "e* m*":
            return (position >= (length + 1) // 2).long()
        if self.name == "(e m)*":
            return position % 2
        return position.clamp(max=self.leading)
