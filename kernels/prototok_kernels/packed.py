"""C++ objects that hold frozen weights laid out for their products, as long as those live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from prototok_kernels.backend import _cpu

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


# N d² up to which one thread with packed weights beats torch's products on two (docs/log.md).
_SMALL_TEXT = 1 << 24


def thread_a_text(texts: int, length: int, hidden_size: int) -> bool:
    """Whether texts that are one thread's each are quicker than products shared by all threads."""
    return texts >= torch.get_num_threads() or length * hidden_size**2 < _SMALL_TEXT


def can_be_packed(*weights: Tensor) -> bool:
    """Whether the C++ products take these: bf16 of even sizes, and the instructions are there."""
    return (
        _cpu is not None
        and "avx512bf16" in _cpu.instruction_sets()
        and all(
            weight.dtype == torch.bfloat16
            and weight.device.type == "cpu"
            and weight.is_contiguous()
            and not weight.is_inference()  # has no version
            and not any(size % 2 for size in weight.shape)
            for weight in weights
        )
    )
