"""C++ objects that hold frozen weights laid out for their products, as long as those live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# The instructions that products with packed weights are made of.
PACKED = "avx512bf16"

# By the first weight: what was seen of all of them, the object, and those it must keep alive.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed(weights: Sequence[Tensor], make: Callable[[], Any]) -> Any:
    """`make()` when these weights are first seen, or seen to have changed, and kept until then."""
    state = [(weight.data_ptr(), weight._version) for weight in weights]
    known, made, _ = _packed.get(weights[0], (None, None, None))
    if known != state:
        made = make()
        _packed[weights[0]] = state, made, weights[1:]
    return made


def why_unpacked(weights: Sequence[Tensor]) -> str | None:
    """Return why the packed products do not take these weights, or None when they do."""
    for weight in weights:
        if weight.device.type != "cpu":
            return f"a weight is on {weight.device}"
        if weight.dtype != torch.bfloat16:
            return f"a weight is {str(weight.dtype).removeprefix('torch.')}"
        if any(size % 2 for size in weight.shape):
            return f"a weight of {tuple(weight.shape)} has an odd size"
        if not weight.is_contiguous():
            return "a weight is not contiguous"
        if weight.is_inference():
            return "a weight was made in inference mode, so that a change would not be seen"
    return None
