"""The first layer of a frozen decoder for the input [e, m, m, …, m], without N of anything.

Positions 1 … N − 1 carry one vector and differ in their rotary position alone, so attention
collapses to a prefix scan and the block's output to affine combinations of H + 2 vectors per row.
docs/kernels.md derives it. Exact: the same numbers as `decoder_layer` on the expanded input.

Letters: B rows, G groups of rows that share m, N positions, d hidden size, H heads, K key-value
heads, c head size, r rotary size, I inner size of the MLP, S = H + 2 spanning vectors per row:
base of m, base of e, one U per head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prototok_kernels.layers import (
    DecoderLayer,
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
from prototok_kernels.plan import Plan


def _span(
    e: Tensor,  # (B, d)
    m: Tensor,  # (G, d)
    group: Tensor | None,  # (B,)
    layer: DecoderLayer,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the layer makes of the two vectors alone, each weight read once.

    Returns q_m (G, H, c), k_m (G, H, c), k_e (B, H, c) and the spanning vectors (B, S, d).
    """
    rows, heads = e.shape[0], layer.heads
    x = torch.cat([e.to(layer.dtype), m.to(layer.dtype)])  # (B + G, d)
    _, normed = input_norm(x, None, layer, backend)
    q_m = project_heads(normed[rows:], layer.q, layer, layer.q_norm)
    k = project_heads(normed, layer.k, layer, layer.k_norm)
    v = project_heads(normed, layer.v, layer)
    if layer.kv_heads != heads:
        k, v = (t.repeat_interleave(heads // layer.kv_heads, dim=1) for t in (k, v))
    base = x + F.linear(v.flatten(1), layer.o, layer.o_bias)
    if is_parallel(layer):
        base = base + mlp(post_norm(x, None, layer, backend)[1], layer, backend)
    v_e, v_m = v[:rows], _per_row(v[rows:], group)
    o = layer.o.unflatten(1, (heads, layer.head_size)).permute(1, 2, 0)  # (H, c, d)
    u = torch.bmm((v_e - v_m).transpose(0, 1), o).transpose(0, 1)  # (B, H, d)
    base_m = _per_row(base[rows:], group)
    span = torch.cat([base_m[:, None], base[:rows, None], u], dim=1)
    return q_m, k[rows:], k[:rows], span


def _per_row(x: Tensor, group: Tensor | None) -> Tensor:
    """(G, …) → (B, …)."""
    return x if group is None else x.index_select(0, group)


def _distance_logits(
    q: Tensor,  # (…, c), at position δ
    k: Tensor,  # (…, c), at position 0
    cos: Tensor,  # (N, r)
    sin: Tensor,  # (N, r)
    scaling: float,
) -> Tensor:  # (…, N): scaling · ⟨R_δ q, R_0 k⟩, δ = 0 … N − 1
    """All logits of one query against one key, by their distance: one product with the table.

    Rotating k by row 0 instead of taking it as it is keeps the attention factor of scaled tables
    (YaRN) right.
    """
    half = cos.shape[-1] // 2
    q1, q2, q_rest = q.split([half, half, q.shape[-1] - 2 * half], dim=-1)
    k1, k2, k_rest = k.split([half, half, q.shape[-1] - 2 * half], dim=-1)
    cos0, sin0 = cos[0, :half], sin[0, :half]
    k1, k2 = k1 * cos0 - k2 * sin0, k2 * cos0 + k1 * sin0
    feature = torch.cat(
        [q1 * k1 + q2 * k2, q1 * k2 - q2 * k1, (q_rest * k_rest).sum(-1, keepdim=True)], dim=-1
    )
    table = torch.cat([cos[:, :half], sin[:, :half], torch.ones_like(cos[:, :1])], dim=-1)
    return (feature * scaling) @ table.T


def _logits(
    q_m: Tensor,  # (G, H, c)
    k_m: Tensor,  # (G, H, c)
    k_e: Tensor,  # (B, H, c)
    group: Tensor | None,
    cos: Tensor,  # (N, r)
    sin: Tensor,  # (N, r)
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """a (G, H, N): m to m at distance δ; b (B, H, N): m at position i to e. At least fp32."""
    dtype = torch.promote_types(q_m.dtype, torch.float32)
    q_m, k_m, k_e, cos, sin = (t.to(dtype) for t in (q_m, k_m, k_e, cos, sin))
    a = _distance_logits(q_m, k_m, cos, sin, scaling)
    return a, _distance_logits(_per_row(q_m, group), k_e, cos, sin, scaling)


def _coefficients(w: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, N − 1) → (B, S, N): position 0 is the base of e, position i base of m + Σ w_ih U_h."""
    rows, heads, later = w.shape
    coef = w.new_zeros(rows, heads + 2, later + 1, dtype=dtype)
    coef[:, 0, 1:] = 1
    coef[:, 1, 0] = 1
    coef[:, 2:, 1:] = w
    return coef


class _AffineScan(torch.autograd.Function):
    """Logits → weights w → x = coefᵀ · span, the hand-derived way (docs/kernels.md)."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,  # (B, H, N)
        b: Tensor,  # (B, H, N)
        span: Tensor,  # (B, S, d)
    ) -> tuple[Tensor, Tensor]:  # x (B, N, d), coef (B, S, N)
        a = a[..., :-1]
        prefix = torch.logcumsumexp(a, dim=-1)
        w = torch.sigmoid(b[..., 1:] - prefix)
        coef = _coefficients(w, span.dtype)
        ctx.save_for_backward(a, prefix, w, coef, span)
        return combined(coef, span), coef

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_coef: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, prefix, w, coef, span = ctx.saved_tensors
        grad_span = torch.bmm(coef, grad_x)
        grad_w = torch.bmm(span[:, 2:], grad_x[:, 1:].transpose(1, 2)) + grad_coef[:, 2:, 1:]
        grad_a, grad_b = _scan_backward(grad_w.to(w.dtype), a, prefix, w)
        return grad_a, grad_b, grad_span


def _scan_backward(
    grad_w: Tensor,  # (B, H, N − 1)
    a: Tensor,  # (B, H, N − 1)
    prefix: Tensor,  # (B, H, N − 1)
    w: Tensor,  # (B, H, N − 1)
) -> tuple[Tensor, Tensor]:  # ∂a, ∂b (B, H, N)
    """∂b = z, ∂a_δ = −Σ_{i > δ} z_i exp(a_δ − prefix_{i−1}) with z = ∂w · w (1 − w).

    exp(a_δ − prefix_{i−1}) ≤ 1, but its factors may overflow where logits span hundreds of nats
    (Qwen2's key biases do that), so the suffix sums stay in logarithms, each sign for itself.
    """
    z = grad_w * w * (1 - w)
    log_z = torch.stack([z, -z]).clamp_(min=0).log_().sub_(prefix)
    suffix = log_z.flip(-1).logcumsumexp(-1).flip(-1).add_(a).exp_()
    return F.pad(suffix[1] - suffix[0], (0, 1)), F.pad(z, (1, 0))


def combined(
    coef: Tensor,  # (B, S, N)
    vectors: Tensor,  # (B, S, O)
) -> Tensor:  # (B, N, O)
    """coefᵀ · vectors."""
    return torch.bmm(coef.transpose(1, 2), vectors)


def rms_inverse_of(x: Tensor, layer: DecoderLayer) -> Tensor:
    """1 / √(mean x² + eps) (about the mean for a LayerNorm), (B, N), in fp32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Not var: on the CPU it takes fifteen times as long.
    x = centred_for(x.to(dtype), layer) if isinstance(layer, NeoXLayer) else x
    square = torch.linalg.vector_norm(x, dim=-1, dtype=dtype).square() / x.shape[-1]
    return torch.rsqrt(square + layer.eps)


def centred_for(span: Tensor, layer: DecoderLayer) -> Tensor:
    """What the layer's norms scale of the spanning vectors: a LayerNorm takes their mean off."""
    return span - span.mean(-1, keepdim=True) if isinstance(layer, NeoXLayer) else span


def affine_norm_backward(
    grad_scaled: Tensor,  # (B, S, N)
    grad_centred: Tensor,  # (B, S, d), through the products alone
    coef: Tensor,  # (B, S, N)
    rms_inverse: Tensor,  # (B, N), of x = coefᵀ · span
    centred: Tensor,  # (B, S, d)
    layer: DecoderLayer,
) -> tuple[Tensor, Tensor]:  # ∂coef (B, S, N), ∂span (B, S, d)
    """From the gradients of scaled = coef · rms_inverse and of the centred span, x's norm included.

    ⟨coef_i, ∂coef_i⟩ is rms_inverse_i times its gradient; ‖x_i‖² = coef_iᵀ Gram coef_i carries that
    on to coef and span without another look at x.
    """
    grad_coef = grad_scaled * rms_inverse[:, None]
    wide, wide_coef = centred.to(grad_coef.dtype), coef.to(grad_coef.dtype)
    pull = (wide_coef * grad_coef).sum(1, keepdim=True) * rms_inverse[:, None].square()
    pulled = wide_coef * (pull / centred.shape[-1])  # (B, S, N)
    gram = torch.bmm(wide, wide.transpose(1, 2))
    grad_coef = grad_coef - torch.bmm(gram, pulled)
    grad_span = grad_centred - torch.bmm(torch.bmm(pulled, wide_coef.transpose(1, 2)), wide)
    return grad_coef.to(coef.dtype), centred_for(grad_span, layer).to(centred.dtype)


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
    ) -> Tensor:  # (B, N, d)
        centred = centred_for(span, layer)
        projected = F.linear(centred * layer.post_norm, inner_projection(layer)[0])
        rms_inverse = rms_inverse_of(x, layer)
        scaled = (coef * rms_inverse[:, None]).to(coef.dtype)
        ctx.layer, ctx.backend = layer, backend
        ctx.save_for_backward(coef, scaled, rms_inverse, centred, projected)
        inner = inner_activation(
            combined(scaled, projected), bias_behind_norm(layer), layer, backend
        )
        ctx.mark_dirty(x)
        x.flatten(0, 1).addmm_(inner.flatten(0, 1), layer.down.T)
        return x if layer.down_bias is None else x.add_(layer.down_bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        layer: DecoderLayer = ctx.layer
        coef, scaled, rms_inverse, centred, projected = ctx.saved_tensors
        z, bias = combined(scaled, projected), bias_behind_norm(layer)
        grad_z = inner_activation_backward(grad @ layer.down, z, bias, layer, ctx.backend)
        grad_scaled = torch.bmm(projected, grad_z.transpose(1, 2))
        grad_normed = torch.bmm(scaled, grad_z) @ inner_projection(layer)[0]
        grad_coef, grad_span = affine_norm_backward(
            grad_scaled, grad_normed * layer.post_norm, coef, rms_inverse, centred, layer
        )
        return grad, grad_coef, grad_span, None, None


def first_layer_spanned(
    e: Tensor,  # (B, d)
    m: Tensor,  # (B, d), or (G, d) with `group`
    group: Tensor | None,  # (B,)
    length: int,  # N
    layer: DecoderLayer,
    cos: Tensor,  # (≥ N, r)
    sin: Tensor,  # (≥ N, r)
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:  # x (B, N, d), coef (B, S, N), span (B, S, d)
    """`first_layer` up to where it leaves the span: x = coefᵀ · span, and its two factors.

    x is the output of a parallel block, and what a sequential one hands to its MLP. Arguments and
    errors are those of `first_layer`.
    """
    _check(e, m, group, length, cos)
    if plan.first_layer.taken == "triton":
        from prototok_kernels.pair.first_layer_triton import affine_scan
    else:
        affine_scan = _AffineScan.apply
    q_m, k_m, k_e, span = _span(e, m, group, layer, plan.passes.taken)
    a, b = _logits(q_m, k_m, k_e, group, cos[:length], sin[:length], layer.scaling)
    x, coef = affine_scan(_per_row(a, group), b, span)
    return x, coef, span


def first_layer(
    e: Tensor,  # (B, d)
    m: Tensor,  # (B, d), or (G, d) with `group`
    group: Tensor | None,  # (B,) int64 in [0, G): the row of m each row reads; None = its own
    length: int,  # N ≥ 1
    layer: DecoderLayer,
    cos: Tensor,  # (≥ N, r), row i for position i
    sin: Tensor,  # (≥ N, r)
    plan: Plan,  # whose first layer is not "in full"
) -> Tensor:  # (B, N, d) in the layer's dtype
    """`decoder_layer` of the input [e, m, …, m] (N positions), differentiable in e and m.

    Neither copies of m nor anything N × N is made. The two vectors are cast to the layer's dtype
    and run through it as the general layer would; logits and the scan are at least fp32.

    Raises ValueError for shapes that do not fit.
    """
    _check(e, m, group, length, cos)
    if plan.first_layer.taken == "cpu":
        return first_layer_cpu.first_layer(e, _per_row(m, group), length, layer, cos, sin)
    x, coef, span = first_layer_spanned(e, m, group, length, layer, cos, sin, plan)
    if is_parallel(layer):
        return x
    backend = plan.passes.taken
    if plan.first_mlp.taken == "span":
        return _AffineMLP.apply(x, coef, span, layer, backend)
    x, normed = post_norm(x, None, layer, backend)
    return x + mlp(normed, layer, backend)


def _check(e: Tensor, m: Tensor, group: Tensor | None, length: int, cos: Tensor) -> None:
    if group is None and e.shape != m.shape:
        raise ValueError(
            f"m must have the shape of e unless group is given, got {tuple(m.shape)} and "
            f"{tuple(e.shape)}"
        )
    if group is not None and group.shape != e.shape[:1]:
        raise ValueError(f"group must name one row of m per row of e, got {tuple(group.shape)}")
    if not 1 <= length <= cos.shape[0]:
        raise ValueError(
            f"length must lie in 1 … {cos.shape[0]} (the rows of cos and sin), got {length}"
        )


def first_layer_ref(
    e: Tensor,  # (B, d)
    m: Tensor,  # (B, d) or (G, d)
    group: Tensor | None,  # (B,)
    length: int,
    layer: DecoderLayer,
    cos: Tensor,  # (≥ N, r)
    sin: Tensor,  # (≥ N, r)
) -> Tensor:  # (B, N, d)
    """The same closed form in plain torch, differentiated by autograd."""
    q_m, k_m, k_e, span = _span(e, m, group, layer, "torch")
    a, b = _logits(q_m, k_m, k_e, group, cos[:length], sin[:length], layer.scaling)
    prefix = _per_row(torch.logcumsumexp(a[..., :-1], dim=-1), group)
    coef = _coefficients(torch.sigmoid(b[..., 1:] - prefix), span.dtype)
    x = combined(coef, span)
    if is_parallel(layer):
        return x
    scaled = (coef * rms_inverse_of(x, layer)[:, None]).to(coef.dtype)
    projected = F.linear(centred_for(span, layer) * layer.post_norm, inner_projection(layer)[0])
    z = combined(scaled, projected)
    inner = inner_activation(z, bias_behind_norm(layer), layer, "torch")
    return x + F.linear(inner, layer.down, layer.down_bias)
