"""Make a prefix of what a user gives for one: text, token ids, or vectors.

Letters: P vectors of the prefix, d hidden size.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

import torch
from torch import Tensor

from prototok.common.arguments import is_integer, is_unicode, listed_items
from prototok.model.frozen_lm import FrozenLM
from prototok.model.prefix import Prefix

# What a public function takes: nothing, text, token ids, or vectors (P, d).
PrefixLike = None | str | Sequence[int] | Tensor


def prefix_of(lm: FrozenLM, given: PrefixLike | Prefix) -> Prefix | None:
    """Return the prefix that text, token ids or vectors (P, d) are; None for None.

    A Prefix of tokens, as another model's fit has it, is that of these ids here.

    Raises ValueError for ids outside the vocabulary, vectors of another width or not finite, and
    what leaves no room in the context.
    """
    if given is None:
        return None
    found = given if isinstance(given, Prefix) else _made(lm, given)
    if isinstance(given, Prefix) and given.ids is not None:
        here = _made(lm, given.ids)
        found = given if torch.equal(given.vectors, here.vectors) else here
    if found.vectors.shape[1] != lm.hidden_size:
        raise ValueError(
            f"prefix: its vectors have {found.vectors.shape[1]} coordinates, those of "
            f"{lm.identity.name} {lm.hidden_size}"
        )
    room = lm.bare.context
    if room is not None and len(found) >= room:
        raise ValueError(
            f"prefix: {len(found)} vectors leave no room, {lm.identity.name} has {room} positions"
        )
    return found


def _made(lm: FrozenLM, given: str | Sequence[int] | Tensor) -> Prefix:
    if isinstance(given, Tensor) and given.is_floating_point():
        if given.ndim != 2 or not len(given) or not bool(given.isfinite().all()):
            raise ValueError(
                f"prefix: vectors must be finite and (P, {lm.hidden_size}), saw "
                f"{tuple(given.shape)}"
            )
        return Prefix(given.detach().to("cpu", torch.float32).clone())
    if isinstance(given, str) and not is_unicode(given):
        raise ValueError(f"prefix: {given!r} is not valid Unicode")
    ids = lm.encode(given) if isinstance(given, str) else _listed(given)
    if not ids:
        raise ValueError(f"prefix: {given!r} has no tokens")
    for token in ids:
        if not 0 <= token < lm.vocab_size:
            raise ValueError(f"prefix: {token} is not a token id below {lm.vocab_size}")
    with torch.no_grad():
        rows = lm.cast(torch.float32).embed(torch.tensor(ids, dtype=torch.int64, device="cpu"))
    return Prefix(rows.detach().to("cpu", torch.float32).clone(), tuple(ids))


def _listed(given: Sequence[int] | Tensor) -> list[int]:
    ids = listed_items(given)
    if ids is None or not all(map(is_integer, ids)):
        seen = reprlib.repr(given)  # an array may be long
        raise ValueError(f"prefix: {seen} is not None, text, a list of token ids or vectors (P, d)")
    return [int(token) for token in ids]
