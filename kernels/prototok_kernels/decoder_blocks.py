"""Many frozen blocks and the norm behind them as one op, forward and backward to their input.

In bfloat16 on a CPU with AVX-512 BF16 that is one C++ call each way, in which a thread takes a text
through all blocks before the next one. Everywhere else it is the loop of `layers.decoder_block`.

Letters: B rows, N positions, d hidden size, r rotary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prototok_kernels.backend import _cpu, resolve_for
from prototok_kernels.decoder import decoder_model
from prototok_kernels.layers import DecoderLayer, decoder_block
from prototok_kernels.residual_norm import residual_norm

# Positions a thread takes through the blocks at a time, where texts are shorter than that.
_TILE = 64


class DecoderBlocks:
    """The blocks of a model, and the norm behind the last.

    The C++ packs the weights once in the order of each direction's products: the first call costs
    that, and with gradients the weights lie in memory three times.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        norm: Tensor,  # (d,)
        norm_bias: Tensor | None,  # (d,); None: RMSNorm
    ) -> None:
        self.layers, self.norm, self.norm_bias = list(layers), norm, norm_bias
        self._cpp: Any = None

    def __call__(
        self,
        x: Tensor,  # (B, N, d)
        cos: Tensor,  # (≥ N, r), the halves of a row alike
        sin: Tensor,  # (≥ N, r)
        start: int = 0,  # the block that x enters
        backend: str = "auto",
    ) -> Tensor:  # (B, N, d)
        """x through the blocks from `start` on and the norm, positions 0 … N − 1, causal."""
        if not self._covers(x, backend):
            return decoder_blocks_ref(self, x, cos, sin, start, backend)
        if self._cpp is None:
            self._cpp, self._kept = _packed(self.layers, self.norm, self.norm_bias, cos.shape[1])
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
        if torch.is_grad_enabled() and x.requires_grad:
            return _CpuBlocks.apply(x, cos, sin, self._cpp, start)
        return _forward(x.contiguous(), None, cos, sin, self._cpp, _shape(x, start))

    def _covers(self, x: Tensor, backend: str) -> bool:
        return (
            resolve_for(backend, x) == "cpu"
            and x.dtype == torch.bfloat16
            and x.numel() > 0
            # A text is one thread's: with fewer of them torch's products use more threads.
            and len(x) >= torch.get_num_threads()
            and "avx512bf16" in _cpu.instruction_sets()
            and all(_plain(layer) for layer in self.layers)
        )


def _plain(layer: DecoderLayer) -> bool:
    sizes = (*layer.qkv.shape, *layer.o.shape, *layer.down.shape)
    return layer.q_norm is None and not layer.flash and not any(size % 2 for size in sizes)


def _packed(
    layers: Sequence[DecoderLayer], norm: Tensor, norm_bias: Tensor | None, rotated: int
) -> tuple[Any, list[Tensor]]:
    model, kept = decoder_model(layers, (norm, norm_bias), rotated, None)
    return _cpu.DecoderBlocks(model), kept


def _shape(x: Tensor, start: int) -> list[int]:
    """Texts, their length, the first block and texts a tile."""
    texts, length, _ = x.shape
    share = -(-texts // torch.get_num_threads())
    return [texts, length, start, max(1, min(_TILE // length, share))]


def _forward(
    x: Tensor, saved: Tensor | None, cos: Tensor, sin: Tensor, cpp: Any, shape: list[int]
) -> Tensor:
    out = torch.empty_like(x)
    cpp.forward(
        x.data_ptr(), out.data_ptr(), 0 if saved is None else saved.data_ptr(), shape,
        cos.data_ptr(), sin.data_ptr(), cos.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return out


class _CpuBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, cpp: Any, start: int) -> Tensor:
        x, shape = x.contiguous(), _shape(x, start)
        saved = torch.empty(cpp.saved_bytes(shape), dtype=torch.uint8)
        out = _forward(x, saved, cos, sin, cpp, shape)
        ctx.save_for_backward(x, saved, cos, sin)
        ctx.cpp, ctx.shape = cpp, shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, saved, cos, sin = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        ctx.cpp.backward(
            x.data_ptr(), grad.data_ptr(), grad_x.data_ptr(), saved.data_ptr(), ctx.shape,
            cos.data_ptr(), sin.data_ptr(), cos.shape[1], torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, None, None, None, None


def decoder_blocks_ref(
    blocks: DecoderBlocks, x: Tensor, cos: Tensor, sin: Tensor, start: int = 0,
    backend: str = "torch",
) -> Tensor:  # fmt: skip
    """The same block by block, each of its ops by `backend`."""
    delta: Tensor | None = None
    for layer in blocks.layers[start:]:
        x, delta = decoder_block(x, delta, layer, cos, sin, backend)
    eps = blocks.layers[0].eps
    return residual_norm(x, delta, blocks.norm, blocks.norm_bias, eps, backend)[1]
