"""The C++ of the collapsed first layer with a sequential residual, from e and m to its output.

One call each way in bfloat16 on a CPU with AVX-512 BF16, in which a thread takes a text through all
of it. docs/kernels.md derives it; first_layer.py has the same in torch.

Letters: B rows, N positions, d hidden size, r rotary size, I inner size of the MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prototok_kernels.backend import _cpu, resolve_backend
from prototok_kernels.layers import (
    ACTIVATIONS,
    DecoderLayer,
    LlamaLayer,
    NeoXLayer,
    bias_behind_norm,
    inner_projection,
    is_parallel,
)
from prototok_kernels.packed import can_be_packed, packed, thread_a_text


def covers(e: Tensor, length: int, layer: DecoderLayer, backend: str) -> bool:
    """Whether `first_layer` is for these rows, e (B, d), N positions and this block."""
    return (
        resolve_backend(backend, e.device) == "cpu"
        and not is_parallel(layer)
        and thread_a_text(len(e), length, layer.hidden_size)
        and layer.head_size % 2 == 0
        and can_be_packed(layer.qkv, layer.o, inner_projection(layer)[0], layer.down)
    )


def first_layer(
    e: Tensor,  # (B, d)
    m: Tensor,  # (B, d)
    length: int,  # N
    layer: DecoderLayer,
    cos: Tensor,  # (≥ N, r)
    sin: Tensor,  # (≥ N, r)
) -> Tensor:  # (B, N, d) bf16
    """The block's output, the first half of its MLP from the spanning vectors; differentiable."""
    inputs = (t.float().contiguous() for t in (e, m, cos, sin))
    return _FirstLayer.apply(*inputs, length, _cpp(layer))


def _cpp(layer: DecoderLayer) -> Any:
    norm_bias = post_norm_bias = None
    if isinstance(layer, NeoXLayer):
        norm_bias, post_norm_bias = layer.input_norm_bias, layer.post_norm_bias
    up, up_bias = inner_projection(layer)
    before_bias = [
        layer.input_norm, norm_bias, layer.qkv, layer.qkv_bias, layer.q_norm, layer.k_norm, layer.o,
        layer.o_bias, layer.post_norm, up,
    ]  # fmt: skip

    def make() -> tuple[Any, list[Tensor | None]]:
        all_weights = [*before_bias, bias_behind_norm(layer), layer.down, layer.down_bias]
        weights = [None if w is None else w.to(layer.dtype).contiguous() for w in all_weights]
        cpp = _cpu.FirstLayer(
            weights=[0 if w is None else w.data_ptr() for w in weights],
            sizes=[
                layer.hidden_size, layer.heads, layer.kv_heads, layer.head_size,
                layer.down.shape[1],
            ],
            activation=ACTIVATIONS[layer.activation], gated=isinstance(layer, LlamaLayer),
            eps=layer.eps, scaling=layer.scaling,
        )  # fmt: skip
        # Which it must not outlive; `down` is the one whose life it follows.
        return cpp, [w for w in weights if w is not layer.down]

    others = [*before_bias, up_bias, post_norm_bias, layer.down_bias]
    cpp, _ = packed([layer.down, *(w for w in others if w is not None)], make)
    return cpp


class _FirstLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, e: Tensor, m: Tensor, cos: Tensor, sin: Tensor, length: int, cpp: Any
    ) -> Tensor:
        rows = len(e)
        saved = torch.empty(rows, cpp.saved_floats(length))
        out = torch.empty(rows, length, e.shape[1], dtype=torch.bfloat16)
        tensors = (e, m, saved, cos, sin)
        cpp.forward(
            *(t.data_ptr() for t in tensors), cos.shape[1], out.data_ptr(), rows, length,
            torch.get_num_threads(),
        )  # fmt: skip
        ctx.cpp = cpp
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        e, m, *_, cos, _ = tensors = ctx.saved_tensors
        grad, grad_e, grad_m = grad.contiguous(), torch.empty_like(e), torch.empty_like(m)
        ctx.cpp.backward(
            *(t.data_ptr() for t in tensors), cos.shape[1], grad.data_ptr(), grad_e.data_ptr(),
            grad_m.data_ptr(), *grad.shape[:2], torch.get_num_threads(),
        )  # fmt: skip
        return grad_e, grad_m, None, None, None, None
