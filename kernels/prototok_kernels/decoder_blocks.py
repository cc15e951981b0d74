"""Many frozen blocks and the norm behind them as one op, forward and backward to their input.

In bfloat16 on a CPU with AMX, AVX-512 BF16 or AVX2 that is one C++ call each way, in which a thread
takes a text through all blocks before the next one. Everywhere else it is the loop of
`layers.decoder_block`.

The first of the blocks may take its first projections (`layers.parallel_block_end`) instead of
making them: those of GPT-NeoX's second block are cheaper from the first one's span
(second_layer.py). Blocks behind a constant prefix (prefix.py) share the packed weights of those
without.

Letters: B rows, N positions, d hidden size, H heads, c head size, I inner size of the MLP, r rotary
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prototok_kernels.backend import _cpu
from prototok_kernels.decoder import decoder_model
from prototok_kernels.layers import (
    DecoderLayer,
    decoder_block,
    is_parallel,
    parallel_block_end,
)
from prototok_kernels.packed import packed
from prototok_kernels.plan import Plan
from prototok_kernels.residual_norm import residual_norm
from prototok_kernels.views import views


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
        bare: DecoderBlocks | None = None,  # the same without a prefix, whose packed weights serve
    ) -> None:
        self.layers, self.norm, self.norm_bias = layers, norm, norm_bias
        self.eps = layers[0].eps
        self._bare = bare

    @cached_property
    def prefix(self) -> Tensor | None:  # (L, 2, K, P, c)
        fronts = [layer.prefix for layer in self.layers if layer.prefix is not None]
        return torch.stack(fronts) if fronts else None

    @cached_property
    def weights(self) -> list[Tensor]:
        weights = [weight for layer in self.layers for weight in layer.tensors]
        return weights + [self.norm] + ([] if self.norm_bias is None else [self.norm_bias])

    def __call__(
        self,
        x: Tensor,  # (B, N, d)
        cos: Tensor,  # (≥ N, r), the halves of a row alike
        sin: Tensor,  # (≥ N, r)
        plan: Plan,
        start: int = 0,  # the block that x enters
        projected: tuple[Tensor, Tensor] | None = None,  # (B, N, 3 H·c), (B, N, I)
    ) -> Tensor:  # (B, N, d)
        """Take x through the blocks from `start` on and the norm, positions 0 … N − 1, causal.

        Behind a prefix these are positions P … P + N − 1, and cos and sin begin with that of P.
        `projected`: q, k, v and the up-projection of block `start`, which must be a parallel one,
        this one activated where the plan's second layer is "combined"; Triton's passes overwrite
        them.

        Raises ValueError for projections that are not this block's.
        """
        if projected is not None:
            _check(projected, x, self.layers[start])
        if plan.blocks.taken != "cpu":
            activated = plan.second_layer.taken == "combined"
            return decoder_blocks_ref(
                self, x, cos, sin, plan.passes.taken, start, projected, activated
            )
        cpp = self.packed(cos.shape[1])
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
        qkv, z = (None, None) if projected is None else (t.contiguous() for t in projected)
        if torch.is_grad_enabled() and x.requires_grad:
            return _CpuBlocks.apply(x, qkv, z, cos, sin, self.prefix, cpp, start)
        constants = cos, sin, self.prefix
        return _forward((x.contiguous(), qkv, z), None, constants, cpp, _shape(x, start))

    def packed(self, rotated: int) -> Any:
        """Return the C++ blocks, for rotary tables of this width."""
        if self._bare is not None:
            return self._bare.packed(rotated)

        def make() -> Any:
            norm = self.norm, self.norm_bias
            return _cpu.DecoderBlocks(model=decoder_model(self.layers, norm, rotated, None))

        return packed(self, self.weights, make)


def _check(projected: tuple[Tensor, Tensor], x: Tensor, layer: DecoderLayer) -> None:
    if not is_parallel(layer):
        raise ValueError("projected: only a block with a parallel residual takes them")
    for product, weight in zip(projected, (layer.qkv, layer.up), strict=True):
        expected = (*x.shape[:2], len(weight))
        if product.shape != expected or product.dtype != x.dtype:
            raise ValueError(
                f"projected: must be {expected} of {x.dtype}, saw {tuple(product.shape)} of "
                f"{product.dtype}"
            )


def blocks_tile(texts: int, length: int) -> int:
    """Return how many texts of N positions make a tile."""
    threads = torch.get_num_threads()
    share = -(-texts // threads)
    # All of them, which threads share, where whole texts would leave an eighth of threads idle:
    # that is more than they lose by waiting for each other (docs/dev/log.md).
    if 8 * texts <= 7 * share * threads:
        return texts
    return max(1, min(_cpu.BLOCK_POSITIONS // max(1, length), share))


def _shape(x: Tensor, start: int) -> dict[str, int]:
    return {"first": start, "tile": blocks_tile(*x.shape[:2])}


def _forward(
    inputs: tuple[Tensor, Tensor | None, Tensor | None],  # x, and the projections where given
    saved: Tensor | None,
    constants: tuple[Tensor, Tensor, Tensor | None],  # cos, sin and the prefix
    cpp: Any,
    shape: dict[str, int],
) -> Tensor:
    (x, qkv, z), (cos, sin, prefix) = inputs, constants
    out = torch.empty_like(x)
    cpp.forward(
        **views(x=x, qkv=qkv, z=z, out=out, saved=saved, cos=cos, sin=sin, prefix=prefix),
        **shape, threads=torch.get_num_threads(),
    )  # fmt: skip
    return out


class _CpuBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, qkv: Tensor | None, z: Tensor | None, cos: Tensor, sin: Tensor,
        prefix: Tensor | None, cpp: Any, start: int,
    ) -> Tensor:  # fmt: skip
        inputs, shape = (x.contiguous(), qkv, z), _shape(x, start)
        size = cpp.saved_bytes(texts=len(x), length=x.shape[1], **shape)
        saved = torch.empty(size, dtype=torch.uint8, device="cpu")
        out = _forward(inputs, saved, (cos, sin, prefix), cpp, shape)
        ctx.save_for_backward(*inputs, saved, cos, sin, prefix)
        ctx.cpp, ctx.shape = cpp, shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, qkv, z, saved, cos, sin, prefix = ctx.saved_tensors
        grads = [None if t is None else torch.empty_like(t) for t in (x, qkv, z)]
        grad_x, grad_qkv, grad_z = grads
        ctx.cpp.backward(
            **views(
                x=x, qkv=qkv, z=z, grad=grad.contiguous(), grad_x=grad_x, grad_qkv=grad_qkv,
                grad_z=grad_z, saved=saved, cos=cos, sin=sin, prefix=prefix,
            ),
            **ctx.shape, threads=torch.get_num_threads(),
        )  # fmt: skip
        return *grads, None, None, None, None, None


def decoder_blocks_ref(
    blocks: DecoderBlocks, x: Tensor, cos: Tensor, sin: Tensor, backend: str = "torch",
    start: int = 0, projected: tuple[Tensor, Tensor] | None = None, activated: bool = False,
) -> Tensor:  # fmt: skip
    """Run the same block by block, each op by `backend`."""
    delta: Tensor | None = None
    for index, layer in enumerate(blocks.layers[start:]):
        if index == 0 and projected is not None:
            assert is_parallel(layer)
            delta = parallel_block_end(projected, layer, cos, sin, backend, activated)
        else:
            x, delta = decoder_block(x, delta, layer, cos, sin, backend)
    return residual_norm(x, delta, blocks.norm, blocks.norm_bias, blocks.eps, backend)[1]
