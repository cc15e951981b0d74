"""The C++ of the collapsed first layer with a sequential residual: scan, combination and MLP.

One call each way in bfloat16 on a CPU with AVX-512 BF16, in which a thread takes a text from its
attention logits to the block's output. docs/kernels.md derives it, first_layer.py has the same in
torch.

Letters: B rows, N positions, d hidden size, H heads, I inner size of the MLP, S = H + 2 spanning
vectors per row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prototok_kernels.backend import _cpu, resolve_backend
from prototok_kernels.layers import ACTIVATIONS, DecoderLayer, LlamaLayer, inner_projection
from prototok_kernels.packed import can_be_packed, packed


def covers(e: Tensor, layer: DecoderLayer, backend: str) -> bool:
    """Whether `affine_layer` is for these rows, e (B, d), of a block with a sequential residual."""
    return (
        resolve_backend(backend, e.device) == "cpu"
        # A text is one thread's: with fewer of them torch's products use more threads.
        and len(e) >= torch.get_num_threads()
        and can_be_packed(layer.down, inner_projection(layer)[0])
    )


def affine_layer(
    a: Tensor,  # (B, H, N) fp32
    b: Tensor,  # (B, H, N) fp32
    span: Tensor,  # (B, S, d) bf16
    bias: Tensor | None,  # (I,), gated (2 I,): in front of the activation
    layer: DecoderLayer,
) -> Tensor:  # (B, N, d)
    """The block's output from its attention logits and its spanning vectors, differentiable."""
    return _AffineLayer.apply(a.contiguous(), b.contiguous(), span.contiguous(), bias, layer)


def _cpp(layer: DecoderLayer) -> Any:
    up, down, norm, down_bias = (
        inner_projection(layer)[0],
        layer.down,
        layer.post_norm,
        layer.down_bias,
    )
    gated = isinstance(layer, LlamaLayer)
    return packed(
        [down, up, norm] + ([] if down_bias is None else [down_bias]),
        lambda: _cpu.AffineLayer(
            norm=norm.data_ptr(), up=up.data_ptr(), down=down.data_ptr(),
            down_bias=_address(down_bias), hidden=layer.hidden_size, heads=layer.heads,
            inner=down.shape[1], activation=ACTIVATIONS[layer.activation], gated=gated,
            centred=not gated, eps=layer.eps,
        ),
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _AffineLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, span: Tensor, bias: Tensor | None, layer: DecoderLayer
    ) -> Tensor:
        rows, _, length = a.shape
        cpp = _cpp(layer)
        saved = torch.empty(rows, cpp.saved_floats(length))
        out = span.new_empty(rows, length, layer.hidden_size)
        cpp.forward(
            a=a.data_ptr(), b=b.data_ptr(), span=span.data_ptr(), bias=_address(bias),
            saved=saved.data_ptr(), out=out.data_ptr(), rows=rows, length=length,
            threads=torch.get_num_threads(),
        )  # fmt: skip
        ctx.cpp, ctx.bias, ctx.shape = cpp, bias, a.shape
        ctx.save_for_backward(span, saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        span, saved = ctx.saved_tensors
        grad, grad_span = grad.contiguous(), torch.empty_like(span)
        grad_a, grad_b = torch.empty(ctx.shape), torch.empty(ctx.shape)
        ctx.cpp.backward(
            span=span.data_ptr(), bias=_address(ctx.bias), saved=saved.data_ptr(),
            grad=grad.data_ptr(), grad_a=grad_a.data_ptr(), grad_b=grad_b.data_ptr(),
            grad_span=grad_span.data_ptr(), rows=len(span), length=ctx.shape[2],
            threads=torch.get_num_threads(),
        )  # fmt: skip
        return grad_a, grad_b, grad_span, None, None
