"""The C++ of the collapsed first layer with a sequential residual, from e and m to its output.

One call each way in bfloat16 on a CPU with AMX, AVX-512 BF16 or AVX2, in which a thread takes a
text through all of it; what a prefix adds is made once. docs/kernels.md derives it, first_layer.py
has the same in torch.

Letters: B rows, N positions, d hidden size, H heads, c head size, r rotary size, I inner size of
the MLP, P vectors of a prefix.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prototok_kernels.backend import _cpu
from prototok_kernels.layers import (
    ACTIVATIONS,
    DecoderLayer,
    LlamaLayer,
    NeoXLayer,
    bias_behind_norm,
    inner_projection,
)
from prototok_kernels.packed import packed
from prototok_kernels.views import views


def first_layer(
    e: Tensor,  # (B, d)
    m: Tensor,  # (B, d)
    length: int,  # N
    layer: DecoderLayer,
    cos: Tensor,  # (≥ P + N, r), row i for position i
    sin: Tensor,  # (≥ P + N, r)
) -> Tensor:  # (B, N, d) bf16
    """Run the block, the first half of its MLP from the spanning vectors; differentiable."""
    inputs = (t.float().contiguous() for t in (e, m, cos, sin))
    return _FirstLayer.apply(*inputs, length, _cpp(layer))


def _cpp(layer: DecoderLayer) -> Any:
    bare = _without_prefix(layer)
    if layer.prefix is None:
        return bare
    return packed(layer, layer.tensors, lambda: bare.behind(**views(**_constants(layer))))


def _without_prefix(layer: DecoderLayer) -> Any:
    """The block on packed weights, which blocks behind any prefix have in common, as `qkv`."""
    up, _ = inner_projection(layer)
    settings = {
        "heads": layer.heads, "kv_heads": layer.kv_heads, "head_size": layer.head_size,
        "activation": ACTIVATIONS[layer.activation], "gated": isinstance(layer, LlamaLayer),
        "eps": layer.eps, "scaling": layer.scaling,
    }  # fmt: skip

    def make() -> Any:
        weights = {
            "input_norm": layer.input_norm, "qkv": layer.qkv, "qkv_bias": layer.qkv_bias,
            "input_norm_bias": layer.input_norm_bias if isinstance(layer, NeoXLayer) else None,
            "q_norm": layer.q_norm, "k_norm": layer.k_norm, "out": layer.o,
            "out_bias": layer.o_bias, "norm": layer.post_norm, "up": up,
            "up_bias": bias_behind_norm(layer), "down": layer.down, "down_bias": layer.down_bias,
        }  # fmt: skip
        return _cpu.FirstLayer(
            weights=views(**{
                name: None if weight is None else weight.detach().to(layer.dtype).contiguous()
                for name, weight in weights.items()
            }),
            **settings,
        )  # fmt: skip

    weights = [weight for weight in layer.tensors if weight is not layer.prefix]
    return packed(layer.qkv, weights, make, settings)


def _constants(layer: DecoderLayer) -> dict[str, Tensor]:
    """What the prefix is to every row (`FirstLayerPrefix` of the C++), in fp32."""
    assert layer.prefix is not None
    shared = layer.heads // layer.kv_heads
    values = layer.prefix[1].float().repeat_interleave(shared, dim=0).transpose(0, 1)  # (P, H, c)
    out, out_bias = layer.o.float(), None if layer.o_bias is None else layer.o_bias.float()
    steps = (values[1:] - values[0]).transpose(0, 1)  # (H, P − 1, c)
    of_head = out.unflatten(1, (layer.heads, layer.head_size)).permute(1, 2, 0)  # (H, c, d)
    fixed = torch.bmm(steps, of_head).transpose(0, 1).flatten(0, 1)
    centred = fixed - fixed.mean(-1, keepdim=True) if isinstance(layer, NeoXLayer) else fixed
    normed = centred * layer.post_norm.float()
    return {
        "prefix": layer.prefix.contiguous(),
        "shift": F.linear(values[0].flatten(), out, out_bias),
        "fixed": fixed.contiguous(),
        "centred": centred.contiguous(),
        "projected": F.linear(normed, inner_projection(layer)[0].float()),
    }


class _FirstLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, e: Tensor, m: Tensor, cos: Tensor, sin: Tensor, length: int, cpp: Any
    ) -> Tensor:
        rows, width = e.shape
        size = rows, cpp.saved_floats(length=length)
        saved = torch.empty(size, dtype=torch.float32, device="cpu")
        out = torch.empty(rows, length, width, dtype=torch.bfloat16, device="cpu")
        cpp.forward(
            **views(e=e, m=m, saved=saved, cos=cos, sin=sin, out=out),
            threads=torch.get_num_threads(),
        )
        ctx.cpp = cpp
        ctx.save_for_backward(e, m, saved, cos, sin)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        e, m, saved, cos, sin = ctx.saved_tensors
        grad, grad_e, grad_m = grad.contiguous(), torch.empty_like(e), torch.empty_like(m)
        ctx.cpp.backward(
            **views(
                e=e, m=m, saved=saved, cos=cos, sin=sin, grad=grad, grad_e=grad_e, grad_m=grad_m
            ),
            threads=torch.get_num_threads(),
        )
        return grad_e, grad_m, None, None, None, None
