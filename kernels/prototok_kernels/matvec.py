"""A linear layer for few rows: what a decoding step is made of.

One pass over the weight is all it costs, and torch's products for many rows do not reach the speed
of memory there, in bfloat16 least of all.

Letters: R rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prototok_kernels.backend import _cpu, resolve_backend

# Rows up to which one pass over the weight is faster than torch's product (docs/log.md).
_CPU_ROWS = {torch.float32: 8, torch.bfloat16: 2}


def matvec_(
    out: Tensor,  # (R, O), written
    x: Tensor,  # (R, I)
    weight: Tensor,  # (O, I), frozen
    bias: Tensor | None = None,  # (O,)
    *,
    add: bool = False,
    backend: str = "auto",
) -> None:
    """out = x @ weight.T + bias, and with `add` what `out` held on top; nothing is allocated.

    `backend` is "torch", "cpu" (C++; fp32 and bf16, sums in fp32) or "auto", the C++ kernel where
    it is the faster one: on the CPU, for up to eight rows in fp32 and two in bf16. No gradient.

    Raises ValueError for a shape, dtype or backend that cannot be met.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0]
    if weight.shape[1] != inputs or out.shape != (rows, outputs):
        raise ValueError(
            f"weight: must be (O, I) for out (R, O) and x (R, I), saw {tuple(weight.shape)}, "
            f"{tuple(out.shape)} and {tuple(x.shape)}"
        )
    if backend == "auto":
        few = rows <= _CPU_ROWS.get(x.dtype, 0)
        usable = few and _cpu is not None and x.device.type == "cpu"
        resolved = "cpu" if usable else "torch"
    else:
        resolved = resolve_backend(backend, x.device)
        if resolved == "triton" or (resolved == "cpu" and x.dtype not in _CPU_ROWS):
            raise ValueError(f"backend: {backend!r} has no matvec for {x.dtype}")
    if resolved == "torch":
        matvec_ref_(out, x, weight, bias, add=add)
        return
    if not (weight.is_contiguous() and x.stride(1) == 1 and out.stride(1) == 1):
        raise ValueError("weight: must be contiguous, and so must be the rows of x and out")
    if not (weight.dtype == out.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)):
        raise ValueError(f"x: {x.dtype} is not the dtype of weight, bias and out")
    _cpu.matvec(
        weight.data_ptr(), x.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(),
        rows, inputs, outputs, x.stride(0), out.stride(0), add, x.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )  # fmt: skip


def matvec_ref_(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, add: bool = False
) -> None:
    """The same in plain torch."""
    if add:
        out.addmm_(x, weight.T)
        if bias is not None:
            out += bias
    elif bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)
