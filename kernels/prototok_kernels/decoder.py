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

from prototok_kernels.backend import _cpu
from prototok_kernels.layers import (
    ACTIVATIONS,
    DecoderLayer,
    LlamaLayer,
    NeoXLayer,
    inner_projection,
)
from prototok_kernels.views import View, views

POSITIONS = 64  # T is a multiple of this


def decoder_model(
    layers: Sequence[DecoderLayer],
    norm: tuple[Tensor, Tensor | None],  # (d,)
    rotated: int,
    ends: tuple[Tensor, Tensor] | None,  # head and embedding, each (V, d)
) -> Any:
    """Return the weights of a model as C++ knows them; it keeps them alive and copies none.

    Any number of threads may read it. A weight that is not contiguous is read from a copy.
    Raises ValueError for weights that are not of one dtype and the shapes of one model, on the CPU.
    """
    first = layers[0]

    def block(layer: DecoderLayer) -> tuple[dict[str, View], int]:
        norm_bias = mlp_bias = None
        if isinstance(layer, NeoXLayer):
            norm_bias, mlp_bias = layer.input_norm_bias, layer.post_norm_bias
        up, up_bias = inner_projection(layer)
        weights = _contiguous(
            norm=layer.input_norm, norm_bias=norm_bias, qkv=layer.qkv, qkv_bias=layer.qkv_bias,
            q_norm=layer.q_norm, k_norm=layer.k_norm, out=layer.o, out_bias=layer.o_bias,
            mlp_norm=layer.post_norm, mlp_norm_bias=mlp_bias, up=up, up_bias=up_bias,
            down=layer.down, down_bias=layer.down_bias,
        )  # fmt: skip
        return weights, layer.window or 0

    head, embedding = (None, None) if ends is None else ends
    return _cpu.DecoderModel(
        blocks=[block(layer) for layer in layers],
        **_contiguous(norm=norm[0], norm_bias=norm[1], head=head, embedding=embedding),
        heads=first.heads, kv_heads=first.kv_heads, head_size=first.head_size, rotated=rotated,
        scaling=first.scaling, eps=first.eps, activation=ACTIVATIONS[first.activation],
        gated=isinstance(first, LlamaLayer),
        parallel=isinstance(first, NeoXLayer) and first.parallel,
    )  # fmt: skip


def _contiguous(**weights: Tensor | None) -> dict[str, View]:
    return views(**{k: None if w is None else w.contiguous() for k, w in weights.items()})


class Decoder:
    """What one thread decodes with: a cache of so many rows and T positions, and room for a pass.

    Weights and cache have the model's dtype, float32 or bfloat16; activations and sums are fp32,
    rounded to bfloat16 where they meet a bfloat16 weight. Nothing is allocated behind the
    constructor but the tensors that `logits` and `ids` return.
    """

    def __init__(
        self,
        model: Any,  # of `decoder_model`, with its ends
        vocabulary: int,  # V
        rotary: tuple[Tensor, Tensor],  # cos and sin, each (≥ T, r)
        shape: tuple[int, int, int],  # most rows, T, longest
        instruction_set: str = "",
        prefix: Tensor | None = None,  # (F, d), what stands in front of every row, within T
    ) -> None:
        self.model, self._vocabulary = model, vocabulary
        self.most_rows, capacity, self.longest = shape
        self._front = 0 if prefix is None else len(prefix)
        self.positions = -(-capacity // POSITIONS) * POSITIONS
        cos, sin = (table.float().contiguous() for table in rotary)
        self._cpp: Any = _cpu.Decoder(
            model=model, rows=self.most_rows, positions=self.positions, longest_pass=self.longest,
            **views(cos=cos, sin=sin), instruction_set=instruction_set,
        )  # fmt: skip
        # Nothing writes these positions of the cache again.
        for start in range(0, self._front, self.longest):
            assert prefix is not None
            part = prefix[start : start + self.longest].expand(self.most_rows, -1, -1)
            self._pass(part, start)

    def pass_(self, inputs: Tensor, start: int) -> None:
        """Take inputs (R, P, d), at positions start … start + P − 1 of R rows, through all blocks.

        Positions are counted behind the prefix. What a row gives does not depend on the others.
        """
        self._pass(inputs, self._front + start)

    def _pass(self, inputs: Tensor, start: int) -> None:
        inputs = inputs.float().contiguous()
        self._rows, self._length, _ = inputs.shape
        self._cpp.pass_(**views(inputs=inputs), start=start, threads=torch.get_num_threads())

    def logits(self) -> Tensor:
        """Return logits (R, P, V) fp32, behind every position of the last pass."""
        shape = self._rows, self._length, self._vocabulary
        out = torch.empty(shape, dtype=torch.float32, device="cpu")
        self._cpp.logits(**views(out=out), threads=torch.get_num_threads())
        return out

    def ids(self) -> Tensor:
        """Return the most likely id behind every position of the last pass, (R, P) int64."""
        ids = torch.empty(self._rows, self._length, dtype=torch.int64, device="cpu")
        self._cpp.predict(**views(ids=ids), threads=torch.get_num_threads())
        return ids

    def greedy(self, ids: Tensor, begin: int, start: int) -> None:
        """Fill ids (N, R) int64 from row `begin` on, greedily.

        With `begin` > 0 row begin − 1 is given and stands at position `start`; with 0 the first row
        is predicted behind the last pass, which ended in front of `start`.
        """
        threads = torch.get_num_threads()
        if begin == 0:
            self._cpp.predict(**views(ids=ids[0]), threads=threads)
            begin = 1
        start += self._front
        self._cpp.generate(**views(ids=ids), begin=begin, start=start, threads=threads)
        if begin < len(ids):
            self._length = 1  # of the last pass
