"""A constant prefix in front of every row: its keys and values, made once and read by attention.

What stands in front of a causal decoder's input changes what the input becomes, and nothing changes
it. So P constant vectors are, to the blocks, P more keys and values a head: constants of the model,
as its weights are. The input keeps its N positions, now P … P + N − 1.

Letters: P vectors of the prefix, d hidden size, K key-value heads, c head size, r rotary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prototok_kernels.attention import rotary
from prototok_kernels.layers import DecoderLayer, decoder_block, input_norm, stacked_heads


def behind_prefix(
    layers: Sequence[DecoderLayer],  # without a prefix
    vectors: Tensor,  # (P, d), P ≥ 1
    cos: Tensor,  # (≥ P, r)
    sin: Tensor,  # (≥ P, r)
) -> list[DecoderLayer]:
    """Return the blocks with the keys and values that the vectors have in each, in their dtype.

    The weights are shared, not copied. Raises ValueError for vectors of another width.
    """
    found = keys_and_values(layers, vectors, cos, sin)
    return [replace(layer, prefix=prefix) for layer, prefix in zip(layers, found, strict=True)]


@torch.no_grad()
def keys_and_values(
    layers: Sequence[DecoderLayer],  # without a prefix
    vectors: Tensor,  # (P, d), P ≥ 1
    cos: Tensor,  # (≥ P, r)
    sin: Tensor,  # (≥ P, r)
) -> list[Tensor]:  # (2, K, P, c) of each block
    """Return the keys, rotated, and the values that the vectors have in each block.

    Raises ValueError for vectors of another width.
    """
    width = layers[0].hidden_size
    if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != width:
        raise ValueError(f"vectors: must be (P, {width}) with P ≥ 1, saw {tuple(vectors.shape)}")
    x, delta = vectors[None].to(layers[0].dtype), None
    found = []
    for layer in layers:
        normed = input_norm(x, delta, layer, "torch")[1]
        heads = stacked_heads(normed, layer)[0].unflatten(-1, (-1, layer.head_size))
        _, k, v = heads.transpose(0, 1).split([layer.heads, layer.kv_heads, layer.kv_heads])
        turned = rotary(k, cos[: len(vectors)].to(k.dtype), sin[: len(vectors)].to(k.dtype))
        found.append(torch.stack([turned, v]))
        x, delta = decoder_block(x, delta, layer, cos, sin, "torch")
    return found
