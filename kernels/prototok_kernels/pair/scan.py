"""Attention of [e, m, m, …, m] as a scan, and the affine combinations that its weights make.

Behind a prefix the scan has P more keys a head, which position 0 sees as well. docs/kernels.md
derives both.

Letters: B rows, G groups of rows that share m, N positions, d hidden size, H heads, c head size, r
rotary size, P vectors of a prefix, S spanning vectors per row: base of m, base of e and one U per
head; behind a prefix H each for e, for m and for every vector of the prefix but the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prototok_kernels.groups import of_group


@dataclass(frozen=True)
class Logits:
    """What the queries of a row give, in fp32 or better.

    of_m        (B, H, N): m to m at distance δ
    of_e        (B, H, N): to e, from m at position i ≥ 1; behind a prefix from e itself at 0
    of_prefix   (B, P, H, N): to each key of the prefix, from e at 0 and from m at i ≥ 1; or None
    """

    of_m: Tensor
    of_e: Tensor
    of_prefix: Tensor | None


def per_row(x: Tensor, group: Tensor | None) -> Tensor:
    """Give each row its group's entry: (G, …) → (B, …)."""
    return x if group is None else of_group(x, group)


def _turned_logits(
    q: Tensor,  # (…, c)
    k: Tensor,  # (…, c), turned
    cos: Tensor,  # (N, r)
    sin: Tensor,  # (N, r)
    scaling: float,
) -> Tensor:  # (…, N): scaling · ⟨R_i q, k⟩ by the rows i of the tables
    """All logits of one query against one key, by the query's position: one product."""
    half = cos.shape[-1] // 2
    q1, q2, q_rest = q.split([half, half, q.shape[-1] - 2 * half], dim=-1)
    k1, k2, k_rest = k.split([half, half, q.shape[-1] - 2 * half], dim=-1)
    feature = torch.cat(
        [q1 * k1 + q2 * k2, q1 * k2 - q2 * k1, (q_rest * k_rest).sum(-1, keepdim=True)], dim=-1
    )
    table = torch.cat([cos[:, :half], sin[:, :half], torch.ones_like(cos[:, :1])], dim=-1)
    return (feature * scaling) @ table.T


def _distance_logits(
    q: Tensor,  # (…, c), at position δ
    k: Tensor,  # (…, c), at position 0
    cos: Tensor,  # (N, r)
    sin: Tensor,  # (N, r)
    scaling: float,
) -> Tensor:  # (…, N): scaling · ⟨R_δ q, R_0 k⟩, δ = 0 … N − 1
    """All logits of one query against one key, by their distance.

    Rotating k by row 0 instead of taking it as it is keeps the attention factor of scaled tables
    (YaRN) right.
    """
    half = cos.shape[-1] // 2
    k1, k2, k_rest = k.split([half, half, k.shape[-1] - 2 * half], dim=-1)
    cos0, sin0 = cos[0, :half], sin[0, :half]
    turned = torch.cat([k1 * cos0 - k2 * sin0, k2 * cos0 + k1 * sin0, k_rest], dim=-1)
    return _turned_logits(q, turned, cos, sin, scaling)


def logits_of(
    q_m: Tensor,  # (G, H, c)
    k_m: Tensor,  # (G, H, c)
    k_e: Tensor,  # (B, H, c)
    group: Tensor | None,
    cos: Tensor,  # (N, r)
    sin: Tensor,  # (N, r)
    scaling: float,
) -> Logits:
    """Logits of the queries by their distance to the keys, in fp32 or better."""
    dtype = torch.promote_types(q_m.dtype, torch.float32)
    q_m, k_m, k_e, cos, sin = (t.to(dtype) for t in (q_m, k_m, k_e, cos, sin))
    a = _distance_logits(q_m, k_m, cos, sin, scaling)
    b = _distance_logits(per_row(q_m, group), k_e, cos, sin, scaling)
    return Logits(per_row(a, group), b, None)


def logits_behind_prefix(
    q: tuple[Tensor, Tensor],  # of m (G, H, c) and of e (B, H, c)
    k: tuple[Tensor, Tensor],  # likewise
    prefix_k: Tensor,  # (P, H, c), rotated
    group: Tensor | None,
    cos: Tensor,  # (P + N, r), row i for position i
    sin: Tensor,  # (P + N, r)
    scaling: float,
) -> Logits:
    """`logits_of` with the keys of a prefix at positions 0 … P − 1; e stands at P."""
    dtype = torch.promote_types(q[0].dtype, torch.float32)
    (q_m, q_e), (k_m, k_e) = (tuple(t.to(dtype) for t in pair) for pair in (q, k))
    prefix_k, cos, sin = (t.to(dtype) for t in (prefix_k, cos, sin))
    front = len(prefix_k)
    plain = logits_of(q_m, k_m, k_e, group, cos[: len(cos) - front], sin[: len(sin) - front],
                      scaling)  # fmt: skip
    itself = _distance_logits(q_e, k_e, cos[:1], sin[:1], scaling)
    of_m = _turned_logits(q_m[:, None], prefix_k, cos[front + 1 :], sin[front + 1 :], scaling)
    at = slice(front, front + 1)
    of_e = _turned_logits(q_e[:, None], prefix_k, cos[at], sin[at], scaling)
    return Logits(
        plain.of_m,
        torch.cat([itself, plain.of_e[..., 1:]], dim=-1),
        torch.cat([of_e, per_row(of_m, group)], dim=-1),
    )


def coefficients(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Lay out coef (B, S, N): position 0 is the base of e, position i base of m + Σ w_ih U_h."""
    rows, heads, later = w.shape
    coef = w.new_zeros(rows, heads + 2, later + 1, dtype=dtype)
    coef[:, 0, 1:] = 1
    coef[:, 1, 0] = 1
    coef[:, 2:, 1:] = w
    return coef


def weights_behind_prefix(logits: Logits) -> tuple[Tensor, Tensor]:
    """Softmax over the prefix's first key, e, all m together and the other keys: (B, 2 + P, H, N).

    And its logits of all m together, (B, H, N): log Σ_{δ<i} exp a_δ, −∞ at position 0.
    """
    assert logits.of_prefix is not None
    of_all_m = F.pad(torch.logcumsumexp(logits.of_m[..., :-1], dim=-1), (1, 0), value=-torch.inf)
    pair = torch.stack([logits.of_e, of_all_m], dim=1)
    first, others = logits.of_prefix[:, :1], logits.of_prefix[:, 1:]
    return torch.softmax(torch.cat([first, pair, others], dim=1), dim=1), of_all_m


def coefficients_behind_prefix(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 2 + P, H, N) → (B, S, N), S = 2 + H (1 + P): the bases, and every weight but the first.

    The bases count the prefix's first vector in full, so that all others are steps away from it.
    """
    rows, _, _, length = weights.shape
    bases = weights.new_zeros(rows, 2, length)
    bases[:, 0, 1:] = bases[:, 1, 0] = 1
    return torch.cat([bases, weights[:, 1:].flatten(1, 2)], dim=1).to(dtype)


class AffineScan(torch.autograd.Function):
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
        coef = coefficients(w, span.dtype)
        ctx.save_for_backward(a, prefix, w, coef, span)
        return combined(coef, span), coef

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_coef: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, prefix, w, coef, span = ctx.saved_tensors
        grad_span = torch.bmm(coef, grad_x)
        grad_w = torch.bmm(span[:, 2:], grad_x[:, 1:].transpose(1, 2)) + grad_coef[:, 2:, 1:]
        z = grad_w.to(w.dtype) * w * (1 - w)
        return _grad_of_m(z, a, prefix), F.pad(z, (1, 0)), grad_span


class ScanBehindPrefix(torch.autograd.Function):
    """`AffineScan` with the keys of a prefix, whose values stand in the span as constants."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,  # (B, H, N)
        b: Tensor,  # (B, H, N)
        u: Tensor,  # (B, P, H, N)
        span: Tensor,  # (B, S, d)
    ) -> tuple[Tensor, Tensor]:  # x (B, N, d), coef (B, S, N)
        weights, of_all_m = weights_behind_prefix(Logits(a, b, u))
        coef = coefficients_behind_prefix(weights, span.dtype)
        ctx.save_for_backward(a, of_all_m, weights, coef, span)
        return combined(coef, span), coef

    @staticmethod
    def backward(
        ctx: Any, grad_x: Tensor, grad_coef: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a, of_all_m, weights, coef, span = ctx.saved_tensors
        heads = a.shape[1]
        grad = torch.bmm(span[:, 2:], grad_x.transpose(1, 2)) + grad_coef[:, 2:]
        of_weights = F.pad(grad.to(weights.dtype), (0, 0, heads, 0)).unflatten(1, (-1, heads))
        slope = weights * (of_weights - (weights * of_weights).sum(1, keepdim=True))
        grad_a = _grad_of_m(-slope[:, 2, :, 1:], a[..., :-1], of_all_m[..., 1:])
        grad_u = torch.cat([slope[:, :1], slope[:, 3:]], dim=1)
        own = 2 + 2 * heads  # the rest are constants
        grad_span = with_constants(torch.bmm(coef[:, :own], grad_x), span)
        return grad_a, slope[:, 1], grad_u, grad_span


def with_constants(
    grad: Tensor,  # (B, ≤ S, d)
    span: Tensor,  # (B, S, d)
) -> Tensor:  # (B, S, d)
    """Lay out the gradient of the span whose last vectors are constants, which get none."""
    return F.pad(grad, (0, 0, 0, span.shape[1] - grad.shape[1]))


def _grad_of_m(
    z: Tensor,  # (B, H, N − 1)
    a: Tensor,  # (B, H, N − 1)
    prefix: Tensor,  # (B, H, N − 1)
) -> Tensor:  # ∂a (B, H, N)
    """∂a_δ = −Σ_{i > δ} z_i exp(a_δ − prefix_{i−1}).

    exp(a_δ − prefix_{i−1}) ≤ 1, but its factors may overflow where logits span hundreds of nats
    (Qwen2's key biases do that), so the suffix sums stay in logarithms, each sign for itself.
    """
    log_z = torch.stack([z, -z]).clamp_(min=0).log_().sub_(prefix)
    suffix = log_z.flip(-1).logcumsumexp(-1).flip(-1).add_(a).exp_()
    return F.pad(suffix[1] - suffix[0], (0, 1))


def combined(
    coef: Tensor,  # (B, S, N)
    vectors: Tensor,  # (B, S, O)
) -> Tensor:  # (B, N, O)
    """Return coefᵀ · vectors."""
    return torch.bmm(coef.transpose(1, 2), vectors)
