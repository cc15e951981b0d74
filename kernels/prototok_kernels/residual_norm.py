"""Residual addition and the norm behind it: one pass forward, one backward.

A GPT-NeoX block with a parallel residual has two norms of one sum, which share that pass.

Letters: R rows (one row = one position of one text), d hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prototok_kernels.backend import _cpu, require
from prototok_kernels.views import views

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


if triton is not None:

    @triton.jit
    def normalised(value, inside, eps, D: tl.constexpr, CENTRED: tl.constexpr):  # type: ignore[no-untyped-def]
        """Mean and inverse deviation of a row, and the row by them; the mean is 0 of an RMSNorm."""
        mean = 0.0
        if CENTRED:
            mean = tl.sum(value, 0) / D
            value = tl.where(inside, value - mean, 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
        return mean, inverse, value * inverse

    @triton.jit
    def scaled(unit, weight, bias, column, inside, CENTRED: tl.constexpr):  # type: ignore[no-untyped-def]
        """What a norm makes of a row that is normalised."""
        value = unit * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        return value

    @triton.jit
    def normalised_backward(g, centred, inverse, D: tl.constexpr, CENTRED: tl.constexpr):  # type: ignore[no-untyped-def]
        """Carry the gradient of a normalised row back to the row; `centred`: less its mean."""
        pull = tl.sum(g * centred, 0) / D * inverse * inverse
        value = g - centred * pull
        if CENTRED:
            value -= tl.sum(g, 0) / D
        return value * inverse

    @triton.jit
    def _residual_norm_kernel(  # type: ignore[no-untyped-def]
        x,  # (R, d), and so are delta, total and normed
        delta,
        total,
        normed,
        weight,  # (d,)
        bias,  # (d,); read only with CENTRED
        second_normed,  # and of a second norm of the same sum; used only with SECOND
        second_weight,
        second_bias,
        statistics,  # (R, 2) fp32: mean and inverse deviation
        eps,
        D: tl.constexpr,
        HAS_DELTA: tl.constexpr,
        CENTRED: tl.constexpr,  # LayerNorm
        SECOND: tl.constexpr,
        BLOCK: tl.constexpr,  # ≥ d
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < D
        value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_DELTA:
            value += tl.load(delta + row * D + column, mask=inside, other=0.0).to(tl.float32)
            # The statistics are those of the sum as it is stored.
            rounded = value.to(total.dtype.element_ty)
            tl.store(total + row * D + column, rounded, mask=inside)
            value = rounded.to(tl.float32)
        mean, inverse, unit = normalised(value, inside, eps, D, CENTRED)
        value = scaled(unit, weight, bias, column, inside, CENTRED)
        tl.store(normed + row * D + column, value.to(normed.dtype.element_ty), mask=inside)
        if SECOND:
            value = scaled(unit, second_weight, second_bias, column, inside, CENTRED)
            to = second_normed + row * D + column
            tl.store(to, value.to(normed.dtype.element_ty), mask=inside)
        tl.store(statistics + 2 * row, mean)
        tl.store(statistics + 2 * row + 1, inverse)

    @triton.jit
    def _residual_norm_backward_kernel(  # type: ignore[no-untyped-def]
        grad_total,  # (R, d); read only with HAS_GRAD_TOTAL
        grad_normed,  # (R, d)
        grad_second,  # (R, d); read only with SECOND
        total,  # (R, d)
        weight,  # (d,)
        second_weight,  # (d,); read only with SECOND
        statistics,  # (R, 2) fp32
        grad,  # (R, d), out
        D: tl.constexpr,
        HAS_GRAD_TOTAL: tl.constexpr,
        CENTRED: tl.constexpr,
        SECOND: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < D
        at = row * D + column
        mean = tl.load(statistics + 2 * row)
        inverse = tl.load(statistics + 2 * row + 1)
        g = tl.load(grad_normed + at, mask=inside, other=0.0).to(tl.float32)
        g *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if SECOND:
            more = tl.load(grad_second + at, mask=inside, other=0.0).to(tl.float32)
            g += more * tl.load(second_weight + column, mask=inside, other=0.0).to(tl.float32)
        centred = tl.load(total + at, mask=inside, other=0.0).to(tl.float32) - mean
        value = normalised_backward(g, centred, inverse, D, CENTRED)
        if HAS_GRAD_TOTAL:
            value += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad + at, value.to(grad.dtype.element_ty), mask=inside)


Norm = tuple[Tensor, Tensor | None]  # weight (d,), and bias (d,) of a LayerNorm


def launch_of_rows(size: int) -> dict[str, int]:
    """Return how a Triton kernel is launched that takes a row of this size a program."""
    block = triton.next_power_of_2(size)
    # Triton's own default of the last differs from version to version.
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256)), "enable_fp_fusion": True}


def _triton_forward(
    x: Tensor, delta: Tensor | None, norms: list[Norm], eps: float
) -> tuple[Tensor, list[Tensor], Tensor]:  # fmt: skip
    """Return the sum (x without delta), its norms, one or two, and what the backward pass needs."""
    x = x.contiguous()
    delta = None if delta is None else delta.contiguous()
    total = x if delta is None else torch.empty_like(x)
    normed = [torch.empty_like(x) for _ in norms]
    size = x.shape[-1]
    rows = x.numel() // max(1, size)
    statistics = x.new_empty(rows, 2, dtype=torch.float32)
    if rows == 0:
        return total, normed, statistics
    (weight, bias), (second_weight, second_bias) = norms[0], norms[-1]
    with torch.cuda.device_of(x):
        _residual_norm_kernel[(rows,)](
            x, x if delta is None else delta, total, normed[0], weight,
            weight if bias is None else bias, normed[-1], second_weight,
            second_weight if second_bias is None else second_bias, statistics, eps,
            D=size, HAS_DELTA=delta is not None, CENTRED=bias is not None, SECOND=len(norms) == 2,
            **launch_of_rows(size),
        )  # fmt: skip
    return total, normed, statistics


def _triton_backward(
    grad_total: Tensor | None, grad_normed: list[Tensor], total: Tensor, weights: list[Tensor],
    statistics: Tensor, centred: bool,
) -> Tensor:  # fmt: skip
    grad = torch.empty_like(total)
    grads = [g.contiguous() for g in grad_normed]
    if len(statistics) == 0:
        return grad
    if grad_total is not None:
        grad_total = grad_total.contiguous()
    size = total.shape[-1]
    with torch.cuda.device_of(total):
        _residual_norm_backward_kernel[(len(statistics),)](
            grads[0] if grad_total is None else grad_total, grads[0], grads[-1], total, weights[0],
            weights[-1], statistics, grad,
            D=size, HAS_GRAD_TOTAL=grad_total is not None, CENTRED=centred, SECOND=len(grads) == 2,
            **launch_of_rows(size),
        )  # fmt: skip
    return grad


class _TritonNorms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, norms: list[Norm], eps: float
    ) -> tuple[Tensor, ...]:
        total, normed, statistics = _triton_forward(x, delta, norms, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, statistics, *(weight for weight, _ in norms))
        ctx.centred, ctx.has_delta = norms[0][1] is not None, delta is not None
        return total, *normed

    @staticmethod
    def backward(
        ctx: Any, grad_total: Tensor | None, *grad_normed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        total, statistics, *weights = ctx.saved_tensors
        used = [(g, w) for g, w in zip(grad_normed, weights, strict=True) if g is not None]
        grad = grad_total
        if used:
            grads, weights = (list(part) for part in zip(*used, strict=True))
            grad = _triton_backward(grad_total, grads, total, weights, statistics, ctx.centred)
        return grad, grad if ctx.has_delta else None, None, None


def _cpu_forward(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum (x without delta), its norm, and what the backward pass needs of each row."""
    x = x.contiguous()
    total = x if delta is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    rows = x.numel() // max(1, x.shape[-1])
    statistics = x.new_empty(rows, 2, dtype=torch.float32)
    if delta is not None:
        delta = delta.contiguous()
    if rows:
        _cpu.residual_norm(
            **views(
                x=x, delta=delta, sum=None if delta is None else total, normed=normed,
                weight=weight, bias=bias, statistics=statistics,
            ),
            eps=eps, threads=torch.get_num_threads(),
        )  # fmt: skip
    return total, normed, statistics


class _CpuNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, normed, statistics = _cpu_forward(x, delta, weight, bias, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, statistics)
        ctx.centred, ctx.has_delta = bias is not None, delta is not None
        return total, normed

    @staticmethod
    def backward(
        ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad = grad_total
        if grad_normed is not None:
            total, weight, statistics = ctx.saved_tensors
            grad = torch.empty_like(total)
            if grad_total is not None:
                grad_total = grad_total.contiguous()
            if len(statistics):
                _cpu.residual_norm_backward(
                    **views(
                        grad_sum=grad_total, grad_normed=grad_normed.contiguous(), sum=total,
                        weight=weight, statistics=statistics, grad=grad,
                    ),
                    centred=ctx.centred, threads=torch.get_num_threads(),
                )  # fmt: skip
        return grad, grad if ctx.has_delta else None, None, None, None


def residual_norm(
    x: Tensor,  # (…, d), the stream
    delta: Tensor | None,  # (…, d), what is added to it; None = nothing
    weight: Tensor,  # (d,), frozen
    bias: Tensor | None,  # (d,), frozen
    eps: float,
    backend: str,  # "torch", "triton" or "cpu"
) -> tuple[Tensor, Tensor]:  # (…, d) each
    """Return x + delta and its norm: LayerNorm where there is a bias, RMSNorm where there is none.

    Differentiable in x and delta; their gradient is one tensor, for which the one backward pass
    reads both incoming gradients. Carry the returned stream on even where delta is None (it is x
    then): the gradients that meet there are added in that pass. Arithmetic is fp32; the norm is
    that of the sum as it is stored.

    Raises ValueError for a shape, dtype or backend that cannot be met.
    """
    require(backend, x)
    _check(x, delta, weight, bias)
    if backend == "torch":
        return residual_norm_ref(x, delta, weight, bias, eps)
    if backend == "triton":
        total, normed = _by_triton(x, delta, [(weight, bias)], eps)
        return total, normed
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    if _needs_grad(x, delta):
        return _CpuNorm.apply(x, delta, weight, bias, eps)
    total, normed, _ = _cpu_forward(x, delta, weight, bias, eps)
    return total, normed


def two_residual_norms(
    x: Tensor,  # (…, d), the stream
    delta: Tensor | None,  # (…, d), what is added to it; None = nothing
    first: Norm,
    second: Norm,
    eps: float,
    backend: str,  # "torch", "triton" or "cpu"
) -> tuple[Tensor, Tensor, Tensor]:  # (…, d) each
    """Return x + delta and two norms of it, both LayerNorms or both RMSNorms.

    As `residual_norm` in all else; with "triton" one pass each way reads the stream once for both.
    """
    if backend != "triton":
        x, one = residual_norm(x, delta, *first, eps, backend)
        x, two = residual_norm(x, None, *second, eps, backend)
        return x, one, two
    require(backend, x)
    for norm in (first, second):
        _check(x, delta, *norm)
    if (first[1] is None) != (second[1] is None):
        raise ValueError("second: must be a LayerNorm where the first is one, and else an RMSNorm")
    total, one, two = _by_triton(x, delta, [first, second], eps)
    return total, one, two


def _by_triton(
    x: Tensor, delta: Tensor | None, norms: list[Norm], eps: float
) -> tuple[Tensor, ...]:
    norms = [(w.contiguous(), None if b is None else b.contiguous()) for w, b in norms]
    if _needs_grad(x, delta):
        return _TritonNorms.apply(x, delta, norms, eps)
    total, normed, _ = _triton_forward(x, delta, norms, eps)
    return total, *normed


def _needs_grad(x: Tensor, delta: Tensor | None) -> bool:
    given = x.requires_grad or (delta is not None and delta.requires_grad)
    return torch.is_grad_enabled() and given


def _check(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    size = x.shape[-1:]
    if delta is not None and (delta.shape != x.shape or delta.dtype != x.dtype):
        raise ValueError(
            f"delta: must be {tuple(x.shape)} of {x.dtype} like x, saw {tuple(delta.shape)} of "
            f"{delta.dtype}"
        )
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and (vector.shape != size or vector.dtype != x.dtype):
            raise ValueError(
                f"{name}: must be {tuple(size)} of {x.dtype} like x, saw {tuple(vector.shape)} of "
                f"{vector.dtype}"
            )


def residual_norm_ref(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute the same in plain torch."""
    total = x if delta is None else x + delta
    if bias is None:
        return total, F.rms_norm(total, weight.shape, weight, eps)
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)
