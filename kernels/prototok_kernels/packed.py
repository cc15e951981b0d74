"""What C++ makes of frozen weights: made anew when one has changed, let go with their owner."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from prototok_kernels.backend import _cpu

Made = TypeVar("Made")

# By owner: what was seen of its weights, and what was made of them.
_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()
_making = threading.Lock()


def packed(owner: object, weights: Sequence[Tensor], make: Callable[[], Made]) -> Made:
    """Return what `make()` made of the owner's weights, made anew when one of them has changed.

    It is kept as long as `owner` lives, by any number of threads, and by those that still use it.
    So it must not hold the owner: of an owner that is itself the weight it holds an alias.
    """
    state = [_state_of(weight) for weight in weights]
    known, made = _packed.get(owner, (None, None))
    if known == state:
        return made
    with _making:  # so that threads that start together make it once
        known, made = _packed.get(owner, (None, None))
        if known != state:
            made = make()
            _packed[owner] = state, made
        return made


def _state_of(weight: Tensor) -> object:
    """Return what differs once a weight is changed in place or given other memory."""
    # A tensor of inference mode counts no versions, and may have changed since any look at it.
    return object() if weight.is_inference() else (weight.data_ptr(), weight._version)


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
