"""Rows that share a vector: each reads its group's, and their gradients are summed for it.

Letters: R rows, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _OfGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Tensor) -> Tensor:
        ctx.save_for_backward(group)
        ctx.groups = len(x)
        return x.index_select(0, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (group,) = ctx.saved_tensors
        return sum_by_group(grad, group, ctx.groups), None


def of_group(
    x: Tensor,  # (G, …)
    group: Tensor,  # (R,) int64 in [0, G)
) -> Tensor:  # (R, …)
    """Give each row its group's entry; its gradient is `sum_by_group`, in the same order always."""
    # On the CPU torch adds the rows one after the other.
    return x.index_select(0, group) if x.device.type == "cpu" else _OfGroup.apply(x, group)


def sum_by_group(
    rows: Tensor,  # (R, …)
    group: Tensor,  # (R,) int64 in [0, G)
    groups: int,  # G
) -> Tensor:  # (G, …), in the dtype of rows
    """Sum the rows of each group in at least fp32, in a fixed order: by a product with ones.

    On CUDA `index_add` would add by atomics, in any order and rounded to the dtype each time. What
    is not finite stays in its own group.
    """
    wide = rows.reshape(len(rows), -1).to(torch.promote_types(rows.dtype, torch.float32))
    number = torch.arange(groups, device=group.device)
    member = (number[:, None] == group).to(wide.dtype)  # (G, R)
    finite = wide.isfinite()
    total = member @ wide.where(finite, 0.0)
    total = total.masked_fill(member @ (~finite).to(wide.dtype) > 0, float("nan"))
    return total.to(rows.dtype).view(groups, *rows.shape[1:])
