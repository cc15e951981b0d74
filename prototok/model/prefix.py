"""A constant prefix: vectors that stand in front of every input and are fitted for none.

`lm.behind(prefix)` is the model with it; whatever runs there runs behind the prefix. Readers of the
literature know it as a soft prompt of P virtual tokens, or of real ones, here frozen.

Letters: P vectors of the prefix, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prototok.common.shown import count


@dataclass(frozen=True, eq=False)
class Prefix:
    """P constant vectors.

    vectors  (P, d) fp32 on the CPU
    ids      the tokens whose embeddings they are; None for vectors that are no tokens'
    """

    vectors: Tensor
    ids: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def __repr__(self) -> str:
        if self.ids is None:
            return f"Prefix({count(len(self), 'vector')})"
        return f"Prefix(ids={list(self.ids)})"

    @property
    def key(self) -> bytes:
        """What is the same for equal prefixes of one model."""
        if self.ids is not None:
            return repr(self.ids).encode()
        return self.vectors.contiguous().numpy().tobytes()
