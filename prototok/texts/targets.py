"""Texts to target ids, checked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prototok.common.arguments import is_count, is_unicode, listed_items
from prototok.model.frozen_lm import FrozenLM

# A column of numpy, pandas or Arrow is taken as well; none of these is imported for its type.
Texts = Sequence[str] | Sequence[Sequence[int]] | Sequence[Tensor] | Tensor | Any


def targets_of(lm: FrozenLM, texts: Texts, length: int | None = None) -> list[Tensor]:
    """Return each text's target ids, (N,) int64 on the CPU, cut to `length` where it is given.

    Args:
        texts: strings, ragged lists of token ids, or a LongTensor (texts, N); a numpy array, a
            pandas Series or an Arrow column of such. A tokenizer's BOS is dropped.
        length: N for every text; a shorter text is refused, not padded.

    Raises:
        ValueError: nothing to fit, ids outside the vocabulary, or a text too short or too long.
    """
    if length is not None and not is_count(length):
        raise ValueError(f"length: {length!r} is not a positive integer")
    if isinstance(texts, str):
        raise ValueError("texts: one string was passed; pass a list of strings")
    listed = list(texts) if isinstance(texts, Tensor) and texts.ndim else listed_items(texts)
    if listed is None:
        raise ValueError(f"texts: {type(texts).__name__} is not a list, a column or a tensor")
    if not listed:
        raise ValueError("texts: the list is empty")
    cut = None if length is None else int(length)
    return [target_of(lm, i, text, cut) for i, text in enumerate(listed)]


def text_id(ids: Sequence[int]) -> str:
    """Hash token ids to 16 hexadecimal digits: what records call a text."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]


def target_of(lm: FrozenLM, i: int, text: object, length: int | None) -> Tensor:
    """Return the target ids of text `i` as `targets_of` does, or raise ValueError that names it."""
    if isinstance(text, str):
        if not text:
            raise ValueError(f"texts: text {i} is empty")
        if not is_unicode(text):
            raise ValueError(f"texts: text {i} is not valid Unicode")
        ids = torch.tensor(lm.encode(text), dtype=torch.int64, device="cpu")
    else:
        try:
            raw = torch.as_tensor(text, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"texts: text {i} is {type(text).__name__}, not token ids") from None
        whole = not (raw.is_floating_point() or raw.is_complex() or raw.dtype == torch.bool)
        if raw.ndim != 1 or not (whole or raw.numel() == 0):
            raise ValueError(
                f"texts: text {i} is {raw.dtype} of shape {tuple(raw.shape)}, "
                "not a row of token ids"
            )
        ids = raw.to("cpu", torch.int64)
    if len(ids) == 0:
        raise ValueError(f"texts: text {i} has no tokens")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= lm.vocab_size:
        raise ValueError(
            f"texts: text {i} holds token id {low if low < 0 else high}, "
            f"outside the vocabulary of {lm.vocab_size}"
        )
    if length is not None:
        if len(ids) < length:
            raise ValueError(f"texts: text {i} has {len(ids)} tokens, fewer than length = {length}")
        ids = ids[:length]
    return ids.clone()
