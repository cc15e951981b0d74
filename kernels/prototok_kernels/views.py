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
    return {name: _view(name, tensor) for name, tensor in tensors.items()}


def _view(name: str, tensor: Tensor | None) -> View:
    if tensor is None:
        return (name,)
    if not tensor.is_cpu:
        raise ValueError(f"{name}: must be on the CPU, is on {tensor.device}")
    dtype = _DTYPES.get(tensor.dtype) or str(tensor.dtype).removeprefix("torch.")
    return name, tensor, tensor.data_ptr(), dtype, tensor.shape, tensor.stride()
