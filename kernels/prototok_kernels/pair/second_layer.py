"""The products in front of GPT-NeoX's second block, from the span of the first one's output.

A parallel first block of [e, m, m, …, m] gives x = coefᵀ · span (first_layer.py), and a LayerNorm
of that is a shift and a scale per position. So the second block's q, k, v and its up-projection are
combinations of S projected vectors a row, instead of products at N positions. docs/kernels.md
derives it.

Letters: B rows, N positions, d hidden size, H heads, c head size, I inner size of the MLP,
S spanning vectors per row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prototok_kernels.layers import DecoderLayer, NeoXLayer, input_norm, post_norm
from prototok_kernels.pair.first_layer import (
    affine_norm_backward,
    centred_for,
    own_vectors,
    projected_span,
    rms_inverse_of,
)
from prototok_kernels.pair.scan import combined

# Weight and bias of a LayerNorm, weight and bias of the product behind it.
_Part = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _parts(layer: DecoderLayer) -> list[_Part]:
    """List the parts: q, k, v, and the up-projection, whose bias the activation adds itself."""
    assert isinstance(layer, NeoXLayer)
    return [
        (layer.input_norm, layer.input_norm_bias, layer.qkv, layer.qkv_bias),
        (layer.post_norm, layer.post_norm_bias, layer.up, None),
    ]


def _projected(centred: Tensor, part: _Part, own: int) -> Tensor:
    """Project (B, S, d) to (B, S + 1, O): each spanning vector's share, and every position's."""
    norm, norm_bias, weight, bias = part
    everywhere = norm_bias.expand(len(centred), 1, -1)
    vectors = torch.cat([centred * norm, everywhere], dim=1)
    # Where the span has no constants, one product is cheaper than one more for the last vector.
    out = projected_span(vectors, weight, own if own < centred.shape[1] else vectors.shape[1])
    if bias is not None:
        out[:, -1] += bias
    return out


class _SecondLayerProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, coef: Tensor, span: Tensor, layer: DecoderLayer
    ) -> tuple[Tensor, ...]:
        rms_inverse, centred = rms_inverse_of(x, layer), centred_for(span, layer)
        scaled = (coef * rms_inverse[:, None]).to(coef.dtype)
        scaled = F.pad(scaled, (0, 0, 0, 1), value=1.0)  # (B, S + 1, N)
        projected = [_projected(centred, part, own_vectors(layer)) for part in _parts(layer)]
        ctx.layer = layer
        ctx.save_for_backward(coef, scaled, rms_inverse, centred, *projected)
        return tuple(combined(scaled, p) for p in projected)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer: DecoderLayer = ctx.layer
        coef, scaled, rms_inverse, centred, *projected = ctx.saved_tensors
        scaled, own = scaled[:, :-1], own_vectors(layer)
        grad_scaled, grad_centred = torch.zeros_like(scaled), torch.zeros_like(centred[:, :own])
        for grad, p, (norm, _, weight, _) in zip(grads, projected, _parts(layer), strict=True):
            grad_scaled += torch.bmm(p[:, :-1], grad.transpose(1, 2))
            grad_centred += (torch.bmm(scaled[:, :own], grad) @ weight) * norm
        grad_coef, grad_span = affine_norm_backward(
            grad_scaled, grad_centred, coef, rms_inverse, centred, layer
        )
        return None, grad_coef, grad_span, None


def second_layer_projections(
    x: Tensor,  # (B, N, d)
    coef: Tensor,  # (B, S, N)
    span: Tensor,  # (B, S, d)
    layer: DecoderLayer,  # the parallel block that x enters
) -> tuple[Tensor, Tensor]:  # (B, N, 3 H·c) with its bias, (B, N, I) without
    """Compute the block's stacked q, k, v and its up-projection, each behind its LayerNorm of x.

    x = coefᵀ · span, all three from `first_layer_spanned`. Differentiable in coef and span: x is
    read for its deviation alone, and the gradient of that goes to coef and span as well.
    """
    return _SecondLayerProducts.apply(x, coef, span, layer)


def second_layer_projections_ref(x: Tensor, layer: NeoXLayer) -> tuple[Tensor, Tensor]:
    """Compute the same products at all N positions in plain torch, differentiable in x."""
    qkv = F.linear(input_norm(x, None, layer, "torch")[1], layer.qkv, layer.qkv_bias)
    return qkv, F.linear(post_norm(x, None, layer, "torch")[1], layer.up)
