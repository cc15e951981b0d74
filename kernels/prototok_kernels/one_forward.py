"""One forward from the vectors of a text to the ids behind its positions.

In bfloat16 on a CPU with AMX or AVX-512 BF16 that is one C++ call. A small model's products take so
little time there that Python and torch around them took as much.

Letters: B rows, S vectors of a row, N positions, d hidden size, V vocabulary, r rotary size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prototok_kernels.decoder_blocks import DecoderBlocks, blocks_tile, decoder_blocks_ref
from prototok_kernels.linear_cross_entropy import packed_head
from prototok_kernels.plan import Plan
from prototok_kernels.views import views


def why_not_one_call(plan: Plan) -> str | None:
    """Return why `one_forward` cannot do what this plan says, or None when it can."""
    if plan.blocks.taken != "cpu":
        return "the blocks do not run as one C++ call"
    return None if plan.head.taken == "packed" else "the head is not packed"


@torch.no_grad()
def one_forward(
    blocks: DecoderBlocks,
    head: Tensor,  # (V, d)
    vectors: Tensor,  # (B, S, d)
    layout: Tensor,  # (N,) int64 in [0, S), the vector at each position
    cos: Tensor,  # (≥ N, r), the halves of a row alike
    sin: Tensor,  # (≥ N, r)
    plan: Plan,
) -> Tensor:  # (B, N) int64
    """Return the argmax of the logits behind every position, the lowest id among equals.

    They are the ids that `blocks` and `linear_cross_entropy` give by the same plan.

    Raises ValueError for a plan that it cannot follow (`why_not_one_call`), and for a layout of
    vectors that are not there.
    """
    why = why_not_one_call(plan)
    if why is not None:
        raise ValueError(f"plan: {why}")
    ids = torch.empty(len(vectors), len(layout), dtype=torch.int64, device="cpu")
    cpp, threads = blocks.packed(cos.shape[1]), torch.get_num_threads()
    cpp.one_forward(
        packed_head(head),
        **views(
            vectors=vectors.contiguous(), layout=layout, ids=ids,
            cos=cos.float().contiguous(), sin=sin.float().contiguous(), prefix=blocks.prefix,
        ),
        tile=blocks_tile(*ids.shape), threads=threads,
    )  # fmt: skip
    return ids


def one_forward_ref(
    blocks: DecoderBlocks, head: Tensor, vectors: Tensor, layout: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Compute the same block by block, with all logits at once."""
    return (decoder_blocks_ref(blocks, vectors[:, layout], cos, sin) @ head.T).argmax(-1)
