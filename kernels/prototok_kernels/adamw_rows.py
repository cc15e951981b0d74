"""AdamW in which every row keeps its own clock: step count, learning rate and an active flag.

Letters: R rows, D coordinates a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prototok_kernels.backend import _cpu, require
from prototok_kernels.views import views

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


@dataclass(frozen=True)
class AdamWSettings:
    """The constants that all rows share (`torch.optim.AdamW` without amsgrad)."""

    betas: tuple[float, float] = (0.9, 0.9)
    eps: float = 1e-8
    weight_decay: float = 0.01


@dataclass
class AdamWState:
    """First and second moments, (R, D) fp32, and updates done so far, (R,) int64."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor

    @classmethod
    def zeros(cls, param: Tensor) -> AdamWState:
        step = torch.zeros(param.shape[0], dtype=torch.int64, device=param.device)
        return cls(torch.zeros_like(param), torch.zeros_like(param), step)

    def rows(self, index: Tensor) -> AdamWState:
        """Return a copy of the state of the rows named by `index`."""
        return AdamWState(self.exp_avg[index], self.exp_avg_sq[index], self.step[index])

    def extended(self, other: AdamWState) -> AdamWState:
        """Return this state with the rows of `other` behind its own."""
        return AdamWState(
            torch.cat([self.exp_avg, other.exp_avg]),
            torch.cat([self.exp_avg_sq, other.exp_avg_sq]),
            torch.cat([self.step, other.step]),
        )


if triton is not None:

    @triton.jit
    def _adamw_kernel(  # type: ignore[no-untyped-def]
        param,  # (R, D) fp32, and so are the next three
        grad,
        exp_avg,
        exp_avg_sq,
        step,  # (R,) int64
        lr,  # (R,) fp32
        active,  # (R,) uint8
        log_beta1,
        log_beta2,
        beta2,
        one_minus_beta1,
        one_minus_beta2,
        eps,
        weight_decay,
        D: tl.constexpr,  # see _head_kernel for why not at run time
        BLOCK: tl.constexpr,
    ):
        # One program a row, so that the row's clock has one reader and one writer.
        row = tl.program_id(0).to(tl.int64)
        if tl.load(active + row) != 0:
            now = tl.load(step + row) + 1
            rate = tl.load(lr + row)
            # In fp64: 1 - beta2^step would lose half of its digits in fp32 at the first steps.
            time = now.to(tl.float64)
            bias1 = (1.0 - tl.exp(time * log_beta1)).to(tl.float32)
            bias2 = (1.0 - tl.exp(time * log_beta2)).to(tl.float32)
            root_bias2 = tl.sqrt(bias2)
            decay = 1.0 - rate * weight_decay
            rate = rate / bias1
            for start in range(0, D, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                inside = columns < D
                at = row * D + columns
                g = tl.load(grad + at, mask=inside, other=0.0)
                m = tl.load(exp_avg + at, mask=inside, other=0.0)
                v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
                p = tl.load(param + at, mask=inside, other=0.0)
                m += one_minus_beta1 * (g - m)
                v = beta2 * v + one_minus_beta2 * g * g
                tl.store(exp_avg + at, m, mask=inside)
                tl.store(exp_avg_sq + at, v, mask=inside)
                p = p * decay - rate * m / (tl.sqrt(v) / root_bias2 + eps)
                tl.store(param + at, p, mask=inside)
            tl.store(step + row, now)


def _adamw_triton(
    param: Tensor,
    grad: Tensor,
    state: AdamWState,
    lr: Tensor,
    active: Tensor,
    settings: AdamWSettings,
) -> None:
    rows, coordinates = param.shape
    if rows == 0:
        return
    beta1, beta2 = settings.betas
    block = min(1024, triton.next_power_of_2(max(1, coordinates)))
    with torch.cuda.device_of(param):
        _adamw_kernel[(rows,)](
            param,
            grad,
            state.exp_avg,
            state.exp_avg_sq,
            state.step,
            lr,
            active.view(torch.uint8),
            _log(beta1),
            _log(beta2),
            beta2,
            1 - beta1,
            1 - beta2,
            settings.eps,
            settings.weight_decay,
            D=coordinates,
            BLOCK=block,
            num_warps=max(1, block // 128),
            enable_fp_fusion=True,  # triton's default differs from version to version
        )


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -1e30  # beta^step is 0, and finite arithmetic stays so


def _adamw_cpu(
    param: Tensor,
    grad: Tensor,
    state: AdamWState,
    lr: Tensor,
    active: Tensor,
    settings: AdamWSettings,
) -> None:
    _cpu.adamw(
        **views(
            param=param,
            grad=grad,
            exp_avg=state.exp_avg,
            exp_avg_sq=state.exp_avg_sq,
            step=state.step,
            lr=lr,
            active=active,
        ),
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        threads=torch.get_num_threads(),
    )


@torch.no_grad()
def adamw_rows_(
    param: Tensor,  # (R, D) fp32, updated in place
    grad: Tensor,  # (R, D) fp32
    state: AdamWState,  # updated in place
    lr: Tensor,  # (R,) fp32
    active: Tensor,  # (R,) bool; other rows keep every bit of theirs
    settings: AdamWSettings,
    *,
    backend: str,
) -> None:
    """Make one AdamW update of the active rows (Loshchilov & Hutter 2019).

    Rows that start together and stay active get what `torch.optim.AdamW` gives, to rounding.
    Steps and learning rates are read on the device: nothing waits for the host.

    `backend` is "torch", "triton" (CUDA) or "cpu" (C++); the last two update fp32 tensors with
    contiguous rows. Raises ValueError for a shape, dtype or backend that cannot be met.
    """
    _check(param, grad, state, lr, active)
    require(backend, param)
    if backend == "torch":
        adamw_rows_ref_(param, grad, state, lr, active, settings)
        return
    updated = {"param": param, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    unfit = [
        name
        for name, tensor in {**updated, "step": state.step}.items()
        if not tensor.is_contiguous() or (name in updated and tensor.dtype != torch.float32)
    ]
    if unfit:
        raise ValueError(f"{unfit[0]}: backend {backend!r} needs contiguous fp32 rows")
    update = _adamw_cpu if backend == "cpu" else _adamw_triton
    rates = lr.to(torch.float32).contiguous()
    update(param, grad.to(torch.float32).contiguous(), state, rates, active.contiguous(), settings)


def _check(param: Tensor, grad: Tensor, state: AdamWState, lr: Tensor, active: Tensor) -> None:
    if param.ndim != 2:
        raise ValueError(f"param: must be (R, D), saw {tuple(param.shape)}")
    whole, clock = param.shape, param.shape[:1]
    for name, tensor, shape in (
        ("grad", grad, whole),
        ("state.exp_avg", state.exp_avg, whole),
        ("state.exp_avg_sq", state.exp_avg_sq, whole),
        ("state.step", state.step, clock),
        ("lr", lr, clock),
        ("active", active, clock),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name}: must be {tuple(shape)}, saw {tuple(tensor.shape)}")
        if tensor.device != param.device:
            raise ValueError(f"{name}: is on {tensor.device}, param is on {param.device}")
    if active.dtype != torch.bool:
        raise ValueError(f"active: must be bool, saw {active.dtype}")
    if state.step.dtype != torch.int64:
        raise ValueError(f"state.step: must be int64, saw {state.step.dtype}")


def adamw_rows_ref_(
    param: Tensor,  # (R, D) fp32, updated in place
    grad: Tensor,  # (R, D) fp32
    state: AdamWState,  # updated in place
    lr: Tensor,  # (R,) fp32
    active: Tensor,  # (R,) bool; other rows keep every bit of theirs
    settings: AdamWSettings,
) -> None:
    """Make the same update in plain torch and in the dtype of `param`: the definition."""
    beta1, beta2 = settings.betas
    state.step += active
    step = state.step.clamp(min=1)[:, None].double()
    rate = lr[:, None]
    exp_avg = torch.lerp(state.exp_avg, grad, 1 - beta1)
    exp_avg_sq = state.exp_avg_sq * beta2 + grad * grad * (1 - beta2)
    denominator = exp_avg_sq.sqrt() / (1 - beta2**step).sqrt().to(param.dtype) + settings.eps
    moved = param * (1 - rate * settings.weight_decay)
    moved -= rate / (1 - beta1**step).to(param.dtype) * exp_avg / denominator
    keep = active[:, None]
    param.copy_(torch.where(keep, moved, param))
    state.exp_avg.copy_(torch.where(keep, exp_avg, state.exp_avg))
    state.exp_avg_sq.copy_(torch.where(keep, exp_avg_sq, state.exp_avg_sq))
