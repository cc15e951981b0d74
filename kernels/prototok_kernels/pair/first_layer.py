"""The first layer of a frozen decoder for the input [e, m, m, …, m], without N of anything.

Positions 1 … N − 1 carry one vector and differ in their rotary position alone, so attention
collapses to a scan (scan.py) and the block's output to affine combinations of H + 2 vectors per
row; behind a prefix of P vectors, of H more and of H (P − 1) constants of the model.
docs/kernels.md derives it. Exact: the same numbers as `decoder_layer` on the expanded input.

Letters: B rows, G groups of rows that share m, N positions, d hidden size, H heads, K key-value
heads, c head size, r rotary size, I inner size of the MLP, P vectors of a prefix, S spanning
vectors per row: base of m, base of e, one U per head. Behind a prefix each head has one for e, one
for m and one for every vector of the prefix but the first, from which all of them are counted.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prototok_kernels.layers import (
    DecoderLayer,
    LlamaLayer,
    NeoXLayer,
    bias_behind_norm,
    inner_activation,
    inner_activation_backward,
    inner_projection,
    input_norm,
    is_parallel,
    mlp,
    post_norm,
    project_heads,
)
from prototok_kernels.pair import first_layer_cpu
from prototok_kernels.pair.scan import (
    AffineScan,
    Logits,
    ScanBehindPrefix,
    coefficients,
    coefficients_behind_prefix,
    combined,
    logits_behind_prefix,
    logits_of,
    per_row,
    weights_behind_prefix,
    with_constants,
)
from prototok_kernels.plan import Plan


def _span(
    e: Tensor,  # (B, d)
    m: Tensor,  # (G, d)
    group: Tensor | None,  # (B,)
    layer: DecoderLayer,
    cos: Tensor,  # (P + N, r), row i for position i
    sin: Tensor,  # (P + N, r)
    backend: str,
) -> tuple[Logits, Tensor]:
    """Run the two vectors alone through the layer, each weight read once.

    Returns the logits between them and the spanning vectors (B, S, d).
    """
    rows, heads = e.shape[0], layer.heads
    shared = heads // layer.kv_heads
    x = torch.cat([e.to(layer.dtype), m.to(layer.dtype)])  # (B + G, d)
    _, normed = input_norm(x, None, layer, backend)
    asking = normed[rows:] if layer.prefix is None else normed  # e sees itself and a prefix alone
    q = project_heads(asking, layer.q, layer, layer.q_norm)
    k = project_heads(normed, layer.k, layer, layer.k_norm)
    v = project_heads(normed, layer.v, layer)
    if shared > 1:
        k, v = (t.repeat_interleave(shared, dim=1) for t in (k, v))
    o = layer.o.unflatten(1, (heads, layer.head_size)).permute(1, 2, 0)  # (H, c, d)
    if layer.prefix is None:
        base = x + F.linear(v.flatten(1), layer.o, layer.o_bias)
    else:
        keys, values = layer.prefix.repeat_interleave(shared, dim=1).transpose(1, 2)  # (P, H, c)
        base = x + F.linear(values[:1].flatten(1), layer.o, layer.o_bias)
    if is_parallel(layer):
        base = base + mlp(post_norm(x, None, layer, backend)[1], layer, backend)
    bases = torch.stack([per_row(base[rows:], group), base[:rows]], dim=1)
    if layer.prefix is None:
        v_e, v_m = v[:rows], per_row(v[rows:], group)
        u = torch.bmm((v_e - v_m).transpose(0, 1), o).transpose(0, 1)  # (B, H, d)
        logits = logits_of(q, k[rows:], k[:rows], group, cos, sin, layer.scaling)
        return logits, torch.cat([bases, u], dim=1)
    # Of e, of m and of the prefix's other vectors: steps from its first one, (B + G + P − 1, H, d).
    apart = torch.cat([v, values[1:]]) - values[0]
    u = torch.bmm(apart.transpose(0, 1), o).transpose(0, 1)
    u_e, u_m, fixed = u.split([rows, len(m), len(values) - 1])
    fixed = fixed.flatten(0, 1).expand(rows, -1, -1)
    logits = logits_behind_prefix(
        (q[rows:], q[:rows]), (k[rows:], k[:rows]), keys, group, cos, sin, layer.scaling
    )
    return logits, torch.cat([bases, u_e, per_row(u_m, group), fixed], dim=1)


def own_vectors(layer: DecoderLayer) -> int:
    """Return how many of the S vectors are a row's own; those behind them are constants."""
    return 2 + layer.heads * (1 if layer.prefix is None else 2)


def projected_span(
    span: Tensor,  # (B, S, d)
    weight: Tensor,  # (O, d)
    own: int,  # vectors of a row
) -> Tensor:  # (B, S, O)
    """Project the spanning vectors, those that all rows have in common once."""
    if own == span.shape[1]:
        return F.linear(span, weight)
    common = F.linear(span[:1, own:], weight).expand(len(span), -1, -1)
    return torch.cat([F.linear(span[:, :own], weight), common], dim=1)


def rms_inverse_of(x: Tensor, layer: DecoderLayer) -> Tensor:
    """Return 1 / √(mean x² + eps), about the mean for a LayerNorm; (B, N), in fp32 or better."""
    if isinstance(layer, NeoXLayer) and x.device.type != "cpu" and not torch.is_grad_enabled():
        # One launch in place of eight. Its statistics are in fp32 or better, and have no gradient.
        return torch.native_layer_norm(x, x.shape[-1:], None, None, layer.eps)[2].squeeze(-1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Not var: on the CPU it takes fifteen times as long.
    x = centred_for(x.to(dtype), layer) if isinstance(layer, NeoXLayer) else x
    square = torch.linalg.vector_norm(x, dim=-1, dtype=dtype).square() / x.shape[-1]
    return torch.rsqrt(square + layer.eps)


def centred_for(span: Tensor, layer: DecoderLayer) -> Tensor:
    """Take the mean off the spanning vectors where the layer's norms are LayerNorms."""
    return span - span.mean(-1, keepdim=True) if isinstance(layer, NeoXLayer) else span


def affine_norm_backward(
    grad_scaled: Tensor,  # (B, S, N)
    grad_centred: Tensor,  # (B, ≤ S, d), through the products alone; constants have none
    coef: Tensor,  # (B, S, N)
    rms_inverse: Tensor,  # (B, N), of x = coefᵀ · span
    centred: Tensor,  # (B, S, d)
    layer: DecoderLayer,
) -> tuple[Tensor, Tensor]:  # ∂coef (B, S, N), ∂span (B, S, d)
    """Carry gradients of scaled = coef · rms_inverse and of the centred span back, norm included.

    ⟨coef_i, ∂coef_i⟩ is rms_inverse_i times its gradient; ‖x_i‖² = coef_iᵀ Gram coef_i carries that
    on to coef and span without another look at x.
    """
    grad_coef = grad_scaled * rms_inverse[:, None]
    wide, wide_coef = centred.to(grad_coef.dtype), coef.to(grad_coef.dtype)
    pull = (wide_coef * grad_coef).sum(1, keepdim=True) * rms_inverse[:, None].square()
    pulled = wide_coef * (pull / centred.shape[-1])  # (B, S, N)
    gram = torch.bmm(wide, wide.transpose(1, 2))
    grad_coef = grad_coef - torch.bmm(gram, pulled)
    own = pulled[:, : grad_centred.shape[1]]
    grad_span = grad_centred - torch.bmm(torch.bmm(own, wide_coef.transpose(1, 2)), wide)
    grad_span = centred_for(grad_span, layer).to(centred.dtype)
    return grad_coef.to(coef.dtype), with_constants(grad_span, centred)


class _AffineMLP(torch.autograd.Function):
    """x + mlp(x) for x = coefᵀ · span: inner projections of S vectors a row instead of N.

    Saved are tensors with S in the place of N or of d only; the (B, N, I) activations are made
    again in the backward pass, and x itself is not needed there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (B, N, d)
        coef: Tensor,  # (B, S, N)
        span: Tensor,  # (B, S, d)
        layer: DecoderLayer,
        backend: str,
        combined_at_once: bool,  # by Triton
    ) -> Tensor:  # (B, N, d)
        centred = centred_for(span, layer)
        weight, own = inner_projection(layer)[0], own_vectors(layer)
        projected = projected_span(centred * layer.post_norm, weight, own)
        rms_inverse = rms_inverse_of(x, layer)
        scaled = (coef * rms_inverse[:, None]).to(coef.dtype)
        ctx.layer, ctx.backend, ctx.at_once = layer, backend, combined_at_once
        ctx.save_for_backward(coef, scaled, rms_inverse, centred, projected)
        bias = bias_behind_norm(layer)
        if combined_at_once:
            from prototok_kernels.pair.combined_triton import combined_activation

            gated = isinstance(layer, LlamaLayer)
            inner = combined_activation(scaled, projected, bias, layer.activation, gated)
        else:
            inner = inner_activation(combined(scaled, projected), bias, layer, backend)
        ctx.mark_dirty(x)
        x.flatten(0, 1).addmm_(inner.flatten(0, 1), layer.down.T)
        return x if layer.down_bias is None else x.add_(layer.down_bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer: DecoderLayer = ctx.layer
        coef, scaled, rms_inverse, centred, projected = ctx.saved_tensors
        bias, own, grad_inner = bias_behind_norm(layer), own_vectors(layer), grad @ layer.down
        if ctx.at_once:
            from prototok_kernels.pair.combined_triton import combined_activation_backward

            grad_z = combined_activation_backward(
                grad_inner, scaled, projected, bias, layer.activation,
                isinstance(layer, LlamaLayer),
            )  # fmt: skip
        else:
            z = combined(scaled, projected)
            grad_z = inner_activation_backward(grad_inner, z, bias, layer, ctx.backend)
        grad_scaled = torch.bmm(projected, grad_z.transpose(1, 2))
        grad_projected = torch.bmm(scaled[:, :own], grad_z)
        grad_normed = grad_projected @ inner_projection(layer)[0]
        grad_coef, grad_span = affine_norm_backward(
            grad_scaled, grad_normed * layer.post_norm, coef, rms_inverse, centred, layer
        )
        return grad, grad_coef, grad_span, None, None, None


def first_layer_spanned(
    e: Tensor,  # (B, d)
    m: Tensor,  # (B, d), or (G, d) with `group`
    group: Tensor | None,  # (B,)
    length: int,  # N
    layer: DecoderLayer,
    cos: Tensor,  # (≥ P + N, r)
    sin: Tensor,  # (≥ P + N, r)
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:  # x (B, N, d), coef (B, S, N), span (B, S, d)
    """Run `first_layer` up to where it leaves the span: x = coefᵀ · span, and its two factors.

    x is the output of a parallel block, and what a sequential one hands to its MLP. Arguments and
    errors are those of `first_layer`.
    """
    _check(e, m, group, length, layer, cos)
    seen, backend = layer.prefix_length + length, plan.passes.taken
    tables = cos[:seen], sin[:seen]
    if plan.first_layer.taken == "triton":
        from prototok_kernels.pair.first_layer_triton import affine_scan
        from prototok_kernels.pair.span_triton import span_by_triton

        logits, span = span_by_triton(e, per_row(m, group), layer, *tables, backend)
        x, coef = affine_scan(logits.of_m, logits.of_e, logits.of_prefix, span)
        return x, coef, span
    logits, span = _span(e, m, group, layer, *tables, backend)
    if logits.of_prefix is None:
        x, coef = AffineScan.apply(logits.of_m, logits.of_e, span)
    else:
        x, coef = ScanBehindPrefix.apply(logits.of_m, logits.of_e, logits.of_prefix, span)
    return x, coef, span


def first_layer(
    e: Tensor,  # (B, d)
    m: Tensor,  # (B, d), or (G, d) with `group`
    group: Tensor | None,  # (B,) int64 in [0, G): the row of m each row reads; None = its own
    length: int,  # N ≥ 1
    layer: DecoderLayer,
    cos: Tensor,  # (≥ P + N, r), row i for position i; e stands at P
    sin: Tensor,  # (≥ P + N, r)
    plan: Plan,  # whose first layer is not "in full"
) -> Tensor:  # (B, N, d) in the layer's dtype
    """Run `decoder_layer` on [e, m, …, m] (N positions) in closed form, differentiable in e and m.

    Behind the layer's prefix, where it has one. Neither copies of m nor anything N × N is made. The
    two vectors are cast to the layer's dtype and run through it as the general layer would; logits
    and the scan are at least fp32.

    Raises ValueError for shapes that do not fit.
    """
    _check(e, m, group, length, layer, cos)
    if plan.first_layer.taken == "cpu":
        return first_layer_cpu.first_layer(e, per_row(m, group), length, layer, cos, sin)
    x, coef, span = first_layer_spanned(e, m, group, length, layer, cos, sin, plan)
    if is_parallel(layer):
        return x
    backend = plan.passes.taken
    if plan.first_mlp.taken in ("combined", "span"):
        at_once = plan.first_mlp.taken == "combined"
        return _AffineMLP.apply(x, coef, span, layer, backend, at_once)
    x, normed = post_norm(x, None, layer, backend)
    return x + mlp(normed, layer, backend)


def _check(
    e: Tensor, m: Tensor, group: Tensor | None, length: int, layer: DecoderLayer, cos: Tensor
) -> None:
    if group is None and e.shape != m.shape:
        raise ValueError(
            f"m must have the shape of e unless group is given, got {tuple(m.shape)} and "
            f"{tuple(e.shape)}"
        )
    if group is not None and group.shape != e.shape[:1]:
        raise ValueError(f"group must name one row of m per row of e, got {tuple(group.shape)}")
    room = cos.shape[0] - layer.prefix_length
    if not 1 <= length <= room:
        raise ValueError(
            f"length must lie in 1 … {room} (the rows of cos and sin behind the prefix), "
            f"got {length}"
        )


def first_layer_ref(
    e: Tensor,  # (B, d)
    m: Tensor,  # (B, d) or (G, d)
    group: Tensor | None,  # (B,)
    length: int,
    layer: DecoderLayer,
    cos: Tensor,  # (≥ P + N, r)
    sin: Tensor,  # (≥ P + N, r)
) -> Tensor:  # (B, N, d)
    """Run the same closed form in plain torch, differentiated by autograd."""
    seen = layer.prefix_length + length
    logits, span = _span(e, m, group, layer, cos[:seen], sin[:seen], "torch")
    if logits.of_prefix is None:
        prefix = torch.logcumsumexp(logits.of_m[..., :-1], dim=-1)
        coef = coefficients(torch.sigmoid(logits.of_e[..., 1:] - prefix), span.dtype)
    else:
        coef = coefficients_behind_prefix(weights_behind_prefix(logits)[0], span.dtype)
    x = combined(coef, span)
    if is_parallel(layer):
        return x
    scaled = (coef * rms_inverse_of(x, layer)[:, None]).to(coef.dtype)
    projected = F.linear(centred_for(span, layer) * layer.post_norm, inner_projection(layer)[0])
    z = combined(scaled, projected)
    inner = inner_activation(z, bias_behind_norm(layer), layer, "torch")
    return x + F.linear(inner, layer.down, layer.down_bias)
