"""Tensors as the C++ takes them: named views that it checks before it reads or writes a byte."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
    torch.uint8: "uint8",
    torch.bool: "bool",
}

# The argument's name, then where it lies: tensor, address, dtype, shape, strides. The tensor is
# there so that it lives as long as the view. A view of None is the name alone.
View = tuple[Any, ...]


def views(**tensors: Tensor | None) -> dict[str, View]:
    """Return a view of each tensor by the name of its argument, None included.

    Raises ValueError for a tensor that is not on the CPU. Dtypes, shapes and contiguity are checked
    by the C++, which knows what each argument must be.
    """
    # One flat loop: a small fit comes here some thousand times a second.
    made: dict[str, View] = {}
    for name, t in tensors.items():
        if t is None:
            made[name] = (name,)
        elif t.is_cpu:
            dtype = _DTYPES.get(t.dtype) or str(t.dtype).removeprefix("torch.")
            made[name] = name, t, t.data_ptr(), dtype, t.shape, t.stride()
        else:
            raise ValueError(f"{name}: must be on the CPU, is on {t.device}")
    return made
