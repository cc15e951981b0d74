"""The activation of a block's MLP, gated or not, with the bias in front of it: one pass each way.

Letters: R rows (one row = one position of one text), I inner size of the MLP.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prototok_kernels.backend import TRITON_INTERPRETED, _cpu, require
from prototok_kernels.views import views

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Hugging Face's names of activations; gelu_new and gelu_fast are the tanh formula with other
# roundings.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def activate(x: Tensor, name: str) -> Tensor:
    """Apply the activation that a Hugging Face configuration calls `name`."""
    kind = ACTIVATIONS[name]
    if kind == "silu":
        return F.silu(x)
    if kind == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


if triton is not None:
    _LOG2_E = tl.constexpr(1.4426950408889634)
    _INTERPRETED = tl.constexpr(TRITON_INTERPRETED)

    # Without what takes denormal numbers apart, which is a third of an activation's instructions.
    @triton.jit
    def _exp2(x):  # type: ignore[no-untyped-def]
        if _INTERPRETED:
            return tl.exp2(x)
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def _inverse(x):  # type: ignore[no-untyped-def]
        if _INTERPRETED:
            return 1.0 / x
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def _sigmoid(x):  # type: ignore[no-untyped-def]
        small = _exp2(tl.abs(x) * -_LOG2_E)  # never infinite
        large = _inverse(1.0 + small)
        return tl.where(x < 0.0, small * large, large)

    @triton.jit
    def _value_and_slope(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
        if KIND == "silu":
            s = _sigmoid(x)
            value = x * s
            slope = s + value * (1.0 - s)
        elif KIND == "gelu":
            # The tail 1 − Φ(|x|) is t · q(t) · exp(−x² / 2), of which the slope needs the last. A
            # polynomial of degree 8 for q has a relative error of 1.3e-7. That takes fewer
            # instructions than erf, and below zero it keeps the digits that 1 + erf cancels.
            t = _inverse(1.0 + 0.28284271247461906 * tl.abs(x))
            q = 0.02513763067 * t - 0.09147747593
            q = (q * t + 0.08458737202) * t - 0.002843173967
            q = (q * t + 0.07073544769) * t + 0.08426539752
            q = (q * t + 0.1039221911) * t + 0.1128347415
            q = q * t + 0.1128379322
            bell = _exp2(x * x * (-0.5 * _LOG2_E))
            beyond = t * q * bell
            below = tl.where(x < 0.0, beyond, 1.0 - beyond)
            value = x * below
            slope = below + x * bell * 0.3989422804014327
        elif KIND == "gelu_tanh":
            # (1 + tanh u) / 2 = sigmoid(2 u)
            # Beyond 100 the sigmoid has its limits; the slope must not become 0 times infinity.
            square = tl.minimum(x * x, 1.0e4)
            u = x * (square * 0.07135481627159236 + 1.5957691216057308)
            s = _sigmoid(u)
            value = x * s
            inner = square * 0.21406444881477708 + 1.5957691216057308
            slope = s + value * _sigmoid(-u) * inner
        else:
            value = tl.where(x < 0.0, 0.0, x)  # NaN stays NaN
            slope = tl.where(x > 0.0, 1.0, 0.0)
        return value, slope

    @triton.jit
    def _activation_kernel(  # type: ignore[no-untyped-def]
        grad,  # (R, I); read only with BACKWARD
        z,  # (R, I), gated (R, 2 I)
        bias,  # (I,), gated (2 I,); read only with HAS_BIAS
        out,  # forward (R, I), backward like z
        INNER: tl.constexpr,
        KIND: tl.constexpr,
        GATED: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        BACKWARD: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < INNER
        wide: tl.constexpr = 2 * INNER if GATED else INNER
        x = tl.load(z + row * wide + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        value, slope = _value_and_slope(x, KIND)
        if GATED:
            up = tl.load(z + row * wide + INNER + column, mask=inside, other=0.0).to(tl.float32)
            if HAS_BIAS:
                up += tl.load(bias + INNER + column, mask=inside, other=0.0).to(tl.float32)
        if BACKWARD:
            g = tl.load(grad + row * INNER + column, mask=inside, other=0.0).to(tl.float32)
            to = out + row * wide + column
            if GATED:
                tl.store(to + INNER, (g * value).to(out.dtype.element_ty), mask=inside)
                g *= up
            tl.store(to, (g * slope).to(out.dtype.element_ty), mask=inside)
        else:
            if GATED:
                value *= up
            tl.store(out + row * INNER + column, value.to(out.dtype.element_ty), mask=inside)


def _pass(
    grad: Tensor | None,  # (…, I); None: forward
    z: Tensor,  # (…, I), gated (…, 2 I), contiguous
    bias: Tensor | None,
    kind: str,
    gated: bool,
    backend: str,
) -> Tensor:
    wide = z.shape[-1]
    inner = wide // 2 if gated else wide
    rows = z.numel() // max(1, wide)
    out = torch.empty_like(z) if grad is not None else z.new_empty(*z.shape[:-1], inner)
    if grad is not None:
        grad = grad.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    if rows == 0:
        return out
    if backend == "cpu":
        _cpu.activation(
            **views(grad=grad, z=z, bias=bias, out=out), kind=kind, gated=gated,
            threads=torch.get_num_threads(),
        )  # fmt: skip
        return out
    block = min(1024, triton.next_power_of_2(inner))
    with torch.cuda.device_of(z):
        _activation_kernel[(rows, triton.cdiv(inner, block))](
            z if grad is None else grad, z, z if bias is None else bias, out,
            INNER=inner, KIND=kind, GATED=gated, HAS_BIAS=bias is not None,
            BACKWARD=grad is not None, BLOCK=block, num_warps=max(1, block // 256),
        )  # fmt: skip
    return out


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, bias: Tensor | None, kind: str, gated: bool, backend: str
    ) -> Tensor:
        z = z.contiguous()
        ctx.save_for_backward(z, bias)
        ctx.options = (kind, gated, backend)
        return _pass(None, z, bias, kind, gated, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, bias = ctx.saved_tensors
        return _pass(grad, z, bias, *ctx.options), None, None, None, None


def activation(
    z: Tensor,  # (…, I), gated (…, 2 I): what is activated, then what it multiplies
    bias: Tensor | None,  # (I,), gated (2 I,), frozen; added to z first
    name: str,
    gated: bool,
    backend: str,  # "torch", "triton" or "cpu"
) -> Tensor:  # (…, I)
    """Compute act(z + bias), or act(gate) · up of the two halves of z + bias; differentiable in z.

    `name` is one of ACTIVATIONS. Arithmetic is fp32 and rounded once; only z is kept.

    Raises ValueError for a name, shape, dtype or backend that cannot be met.
    """
    require(backend, z)
    if name not in ACTIVATIONS:
        raise ValueError(f"name: {name!r} is not one of {', '.join(sorted(ACTIVATIONS))}")
    if gated and z.shape[-1] % 2:
        raise ValueError(f"z: a gated row must have two halves, saw {tuple(z.shape)}")
    if bias is not None and (bias.shape != z.shape[-1:] or bias.dtype != z.dtype):
        raise ValueError(
            f"bias: must be ({z.shape[-1]},) of {z.dtype} like z, saw {tuple(bias.shape)} of "
            f"{bias.dtype}"
        )
    if backend == "torch":
        return activation_ref(z, bias, name, gated)
    if torch.is_grad_enabled() and z.requires_grad:
        return _Activation.apply(z, bias, ACTIVATIONS[name], gated, backend)
    return _pass(None, z.contiguous(), bias, ACTIVATIONS[name], gated, backend)


def activation_ref(z: Tensor, bias: Tensor | None, name: str, gated: bool) -> Tensor:
    """Compute the same in plain torch."""
    if bias is not None:
        z = z + bias
    if not gated:
        return activate(z, name)
    gate, up = z.chunk(2, dim=-1)
    return activate(gate, name) * up


def activation_backward(
    grad: Tensor, z: Tensor, bias: Tensor | None, name: str, gated: bool, backend: str
) -> Tensor:
    """Compute grad · ∂/∂z of `activation`, for a backward pass that makes z again; grad (…, I)."""
    require(backend, z)
    if backend != "torch":
        return _pass(grad, z.contiguous(), bias, ACTIVATIONS[name], gated, backend)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        (out,) = torch.autograd.grad(activation_ref(z, bias, name, gated), z, grad)
    return out
