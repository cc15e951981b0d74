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


def _activation(layer: DecoderLayer) -> tuple[Tensor | None, str, bool]:
    """Return bias, name and whether it is gated, of the activation behind the up-projection."""
    assert isinstance(layer, NeoXLayer)
    return layer.up_bias, layer.activation, False


def _products_backward(
    grad: Tensor,  # (B, N, O)
    scaled: Tensor,  # (B, S + 1, N)
    projected: Tensor,  # (B, S + 1, O)
    own: int,
) -> tuple[Tensor, Tensor]:  # (B, S, N), (B, own, O)
    """Carry a combination's gradient to its coefficients and to the vectors that have one."""
    return torch.bmm(projected[:, :-1], grad.transpose(1, 2)), torch.bmm(scaled[:, :own], grad)


class _SecondLayerProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, coef: Tensor, span: Tensor, layer: DecoderLayer, activated: bool
    ) -> tuple[Tensor, ...]:
        rms_inverse, centred = rms_inverse_of(x, layer), centred_for(span, layer)
        scaled = (coef * rms_inverse[:, None]).to(coef.dtype)
        scaled = F.pad(scaled, (0, 0, 0, 1), value=1.0)  # (B, S + 1, N)
        projected = [_projected(centred, part, own_vectors(layer)) for part in _parts(layer)]
        ctx.layer, ctx.activated = layer, activated
        ctx.save_for_backward(coef, scaled, rms_inverse, centred, *projected)
        qkv, up = projected
        if not activated:
            return combined(scaled, qkv), combined(scaled, up)
        from prototok_kernels.pair.combined_triton import combined_activation

        inner = combined_activation(scaled, up, *_activation(layer))
        return combined(scaled, qkv), inner

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer: DecoderLayer = ctx.layer
        coef, scaled, rms_inverse, centred, *projected = ctx.saved_tensors
        own = own_vectors(layer)
        of_qkv, of_up = grads
        if ctx.activated:
            from prototok_kernels.pair.combined_triton import combined_activation_backward

            of_up = combined_activation_backward(of_up, scaled, projected[1], *_activation(layer))
        through = [
            _products_backward(grad, scaled, part, own)
            for grad, part in zip((of_qkv, of_up), projected, strict=True)
        ]
        grad_scaled = torch.zeros_like(coef)
        grad_centred = torch.zeros_like(centred[:, :own])
        for (towards, grad_projected), (norm, _, weight, _) in zip(
            through, _parts(layer), strict=True
        ):
            grad_scaled += towards
            grad_centred += (grad_projected @ weight) * norm
        grad_coef, grad_span = affine_norm_backward(
            grad_scaled, grad_centred, coef, rms_inverse, centred, layer
        )
        return None, grad_coef, grad_span, None, None


def second_layer_projections(
    x: Tensor,  # (B, N, d)
    coef: Tensor,  # (B, S, N)
    span: Tensor,  # (B, S, d)
    layer: DecoderLayer,  # the parallel block that x enters
    activated: bool = False,  # by Triton
) -> tuple[Tensor, Tensor]:  # (B, N, 3 H·c) with its bias, (B, N, I) without
    """Compute the block's stacked q, k, v and its up-projection, each behind its LayerNorm of x.

    x = coefᵀ · span, all three from `first_layer_spanned`. Differentiable in coef and span: x is
    read for its deviation alone, and the gradient of that goes to coef and span as well.
    `activated`: the second is what `down` reads, and what stands before the activation is never
    written.
    """
    return _SecondLayerProducts.apply(x, coef, span, layer, activated)


def second_layer_projections_ref(x: Tensor, layer: NeoXLayer) -> tuple[Tensor, Tensor]:
    """Compute the same products at all N positions in plain torch, differentiable in x."""
    qkv = F.linear(input_norm(x, None, layer, "torch")[1], layer.qkv, layer.qkv_bias)
    return qkv, F.linear(post_norm(x, None, layer, "torch")[1], layer.up)
