"""One forward from the vectors of a text to the ids behind its positions.

In bfloat16 on a CPU with AMX, AVX-512 BF16 or AVX2 that is one C++ call. A small model's products
take so little time there that Python and torch around them took as much.

Letters: B rows, S vectors of a row, N positions, d hidden size, V vocabulary, r rotary size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prototok_kernels.backend import _cpu
from prototok_kernels.decoder_blocks import DecoderBlocks, blocks_tile, decoder_blocks_ref
from prototok_kernels.linear_cross_entropy import packed_head
from prototok_kernels.packed import packed
from prototok_kernels.plan import Plan
from prototok_kernels.views import views


def why_not_one_call(plan: Plan) -> str | None:
    """Return why `PreparedForward` cannot do what this plan says, or None when it can."""
    if plan.blocks.taken != "cpu":
        return "the blocks do not run as one C++ call"
    return None if plan.head.taken == "packed" else "the head is not packed"


class PreparedForward:
    """The forward of texts of one layout: what is the same for all of them is made once."""

    def __init__(
        self,
        blocks: DecoderBlocks,
        head: Tensor,  # (V, d)
        layout: Tensor,  # (N,) int64, the vector at each position
        cos: Tensor,  # (≥ N, r), the halves of a row alike
        sin: Tensor,  # (≥ N, r)
    ) -> None:
        self.length = len(layout)
        self._blocks, self._head, self._layout = blocks, head, layout
        self._tables = cos.float().contiguous(), sin.float().contiguous()
        self._weights = [*blocks.weights, head]
        self._made()

    def __call__(self, vectors: Tensor) -> Tensor:
        """Map vectors (B, S, d), of float32 or bfloat16, to the ids (B, N) of their positions.

        An id is the argmax of the logits, the lowest among equals: that which `blocks` and
        `linear_cross_entropy` give by a plan that `why_not_one_call` says nothing against.

        Raises ValueError for a layout of vectors that are not there.
        """
        rows = vectors.shape[0]
        ids = torch.empty((rows, self.length), dtype=torch.int64, device="cpu")
        self._made().ids(
            **views(vectors=vectors.contiguous(), ids=ids),
            tile=blocks_tile(rows, self.length),
            threads=torch.get_num_threads(),
        )
        return ids

    def _made(self) -> Any:
        return packed(self, self._weights, self._make)

    def _make(self) -> Any:
        cos, sin = self._tables
        constants = views(layout=self._layout, cos=cos, sin=sin, prefix=self._blocks.prefix)
        blocks = self._blocks.packed(cos.shape[1])
        return _cpu.PreparedForward(blocks, packed_head(self._head), **constants)


def one_forward_ref(
    blocks: DecoderBlocks, head: Tensor, vectors: Tensor, layout: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Compute the same block by block, with all logits at once."""
    return (decoder_blocks_ref(blocks, vectors[:, layout], cos, sin) @ head.T).argmax(-1)
