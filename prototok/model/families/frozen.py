"""Weights out of the user's modules, detached and cast; the modules themselves never change."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def stacked(
    tensors: list[Tensor | None], device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """Stack tensors one above the other; None where there are none.

    A single tensor that already has the dtype and device shares its storage with the model's.
    """
    present = [t.detach().to(device, dtype) for t in tensors if t is not None]
    if not present:
        return None
    return present[0] if len(present) == 1 else torch.cat(present)


def stacked_linear(
    modules: list[nn.Linear], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Join the weights and biases of several nn.Linear with one input."""
    weight = stacked([m.weight for m in modules], device, dtype)
    assert weight is not None
    return weight, stacked([m.bias for m in modules], device, dtype)
