"""What C++ makes of frozen weights: made anew when one has changed, let go with their owner."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Made = TypeVar("Made")

# By owner: what was seen of its weights, and what was made of them.
_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()
_making = threading.RLock()  # what is made may be made of what is made here, too

_address, _version = Tensor.data_ptr, attrgetter("_version")


def packed(
    owner: object, weights: Sequence[Tensor], make: Callable[[], Made], settings: object = None
) -> Made:
    """Return what `make()` made of the owner's weights, made anew when one of them has changed.

    `settings`: what else it is made of, where that is not the owner's alone. What was made is kept
    as long as `owner` lives, by any number of threads, and by those that still use it. So it must
    not hold the owner: of an owner that is itself the weight it holds an alias.
    """
    state = settings, _state_of(weights)
    known, made = _packed.get(owner, (None, None))
    if known == state:
        return made
    with _making:  # so that threads that start together make it once
        known, made = _packed.get(owner, (None, None))
        if known != state:
            made = make()
            _packed[owner] = state, made
        return made


def _state_of(weights: Sequence[Tensor]) -> object:
    """Return what differs once a weight is changed in place or given other memory."""
    # By maps, since every call of a kernel comes here, for some hundred weights.
    try:
        return list(map(_address, weights)), list(map(_version, weights))
    except RuntimeError:
        # A tensor of inference mode counts no versions, and may have changed since any look at it.
        return object()


def why_unpacked(weights: Iterable[Tensor]) -> str | None:
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
