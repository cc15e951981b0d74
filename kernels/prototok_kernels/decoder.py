"""Few positions of few rows through a whole decoder in one C++ call, with a key-value cache.

What a decoding step or one forward over a short text costs is one pass over the weights; a call a
token leaves nothing to pay beside it. In plain torch the same is `layers.decoder_layer`.

Letters: R rows, T positions of the cache, P positions of a pass, d hidden size, r rotary size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prototok_kernels.backend import _cpu, require
from prototok_kernels.layers import (
    ACTIVATIONS,
    DecoderLayer,
    LlamaLayer,
    NeoXLayer,
    inner_projection,
)

POSITIONS = 64  # T is a multiple of this


def decoder_model(
    layers: Sequence[DecoderLayer],
    norm: tuple[Tensor, Tensor | None],  # (d,)
    rotated: int,
    ends: tuple[Tensor, Tensor, Tensor, Tensor] | None,  # head, embedding, cos and sin (T, r / 2)
) -> tuple[Any, list[Tensor]]:
    """A model as C++ knows it, by addresses, and the tensors that must live as long.

    Raises ValueError for weights that are not of one dtype, on the CPU.
    """
    first, dtype = layers[0], norm[0].dtype
    kept: list[Tensor] = []

    def address(tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        if tensor.device.type != "cpu" or tensor.dtype not in (dtype, torch.float32):
            raise ValueError(f"layers: a weight is {tensor.dtype} on {tensor.device}")
        kept.append(tensor.contiguous())
        return kept[-1].data_ptr()

    def weight(tensor: Tensor | None) -> int:
        if tensor is not None and tensor.dtype != dtype:
            raise ValueError(f"layers: a weight is {tensor.dtype} and the norm {dtype}")
        return address(tensor)

    def block(layer: DecoderLayer) -> list[int]:
        norm_bias = mlp_bias = None
        if isinstance(layer, NeoXLayer):
            norm_bias, mlp_bias = layer.input_norm_bias, layer.post_norm_bias
        tensors = (
            layer.input_norm, norm_bias, layer.qkv, layer.qkv_bias, layer.q_norm, layer.k_norm,
            layer.o, layer.o_bias, layer.post_norm, mlp_bias, *inner_projection(layer),
            layer.down, layer.down_bias,
        )  # fmt: skip
        return [*map(weight, tensors), layer.window or 0]

    head, embedding, cos, sin = ends if ends is not None else (None, None, None, None)
    model = _cpu.DecoderModel(
        blocks=[block(layer) for layer in layers],
        norm=weight(norm[0]), norm_bias=weight(norm[1]), head=weight(head),
        embedding=weight(embedding), cos=address(cos), sin=address(sin),
        hidden=first.hidden_size, heads=first.heads, kv_heads=first.kv_heads,
        head_size=first.head_size, rotated=rotated, inner=first.down.shape[1],
        vocabulary=0 if head is None else len(head), scaling=first.scaling, eps=first.eps,
        activation=ACTIVATIONS[first.activation], gated=isinstance(first, LlamaLayer),
        parallel=isinstance(first, NeoXLayer) and first.parallel, is_bf16=dtype == torch.bfloat16,
    )  # fmt: skip
    return model, kept


class Decoder:
    """A frozen decoder over R rows with room for T positions, passes of at most `longest` of them.

    Weights and cache have the model's dtype, float32 or bfloat16; activations and sums are fp32,
    rounded to bfloat16 where they meet a bfloat16 weight. Nothing is allocated behind the
    constructor but the tensors that `logits` and `ids` return.

    Raises ValueError for weights that are not of one such dtype, on the CPU.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        norm: tuple[Tensor, Tensor | None],  # (d,)
        head: Tensor,  # (V, d)
        embedding: Tensor,  # (V, d)
        rotary: tuple[Tensor, Tensor],  # cos and sin, each (≥ T, r)
        shape: tuple[int, int, int],  # R, T, longest
        instruction_set: str = "",
    ) -> None:
        require("cpu", head)
        self.rows, capacity, longest = shape
        self.positions = -(-capacity // POSITIONS) * POSITIONS
        # The halves of a rotary table are the same.
        cos, sin = (t[:, : t.shape[1] // 2].float().contiguous() for t in rotary)
        self.longest, self._vocabulary = longest, len(head)
        model, self._kept = decoder_model(
            layers, norm, 2 * cos.shape[1], (head, embedding, cos, sin)
        )
        self._cpp: Any = _cpu.Decoder(model, self.rows, self.positions, longest, instruction_set)

    def pass_(self, inputs: Tensor, start: int) -> None:
        """Inputs (R, P, d), embeddings of positions start … start + P − 1, through all blocks."""
        inputs = inputs.float().contiguous()
        self._length = inputs.shape[1]
        self._cpp.pass_(inputs.data_ptr(), self._length, start, torch.get_num_threads())

    def logits(self) -> Tensor:
        """(R, P, V) fp32, behind every position of the last pass."""
        out = torch.empty(self.rows, self._length, self._vocabulary)
        self._cpp.logits(out.data_ptr(), torch.get_num_threads())
        return out

    def ids(self) -> Tensor:
        """(R, P) int64, the most likely id behind every position of the last pass."""
        out = torch.empty(self.rows, self._length, dtype=torch.int64)
        self._cpp.predict(out.data_ptr(), True, torch.get_num_threads())
        return out

    def greedy(self, ids: Tensor, begin: int, start: int) -> None:
        """Fill ids (N, R) int64 from row `begin` on, greedily.

        With `begin` > 0 row begin − 1 is given and stands at position `start`; with 0 the first row
        is predicted behind the last pass, which ended in front of `start`.
        """
        threads = torch.get_num_threads()
        if begin == 0:
            self._cpp.predict(ids.data_ptr(), False, threads)
            begin = 1
        self._cpp.generate(ids.data_ptr(), begin, len(ids), start, threads)
