"""Decode proto-tokens: one forward pass, argmax at every position.

Letters: R rows, N targets, L input positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from prototok.common.arguments import is_count
from prototok.common.ranges import named_range
from prototok.common.shown import shapes
from prototok.common.world import own_world
from prototok.decoding.cpu_decoder import cpu_decoder
from prototok.model.frozen_lm import FrozenLM, require_frozen
from prototok.results.arrangement import Arrangement
from prototok.results.fit_result import FitResult
from prototok.results.proto_tokens import ProtoTokens
from prototok_kernels.decoder import Decoder
from prototok_kernels.linear_cross_entropy import HeadOutput, linear_cross_entropy
from prototok_kernels.plan import Plan


@dataclass(frozen=True)
class Decoded:
    """The result of one forward over R rows of one length.

    ids     (R, N) int64, argmax of the logits
    margin  (R, N) fp32, logit of `targets` minus the best other logit; where no targets were given,
            the gap between the best and the second-best logit
    loss    (R, N) fp32, cross-entropy of the same token, nats
    """

    ids: Tensor
    margin: Tensor
    loss: Tensor

    __repr__ = shapes


@torch.no_grad()
def decode_vectors(
    lm: FrozenLM,
    vectors: Tensor,  # (R, slots, d)
    arrangement: Arrangement,
    length: int,
    targets: Tensor | None,  # (R, N) int64
    backend: str,
) -> Decoded:
    """Run one forward for rows of one length; the results are on the CPU."""
    with named_range("decode", lm.device):
        inputs_embeds = _inputs(lm, vectors, arrangement, length)
        plan = lm.plan(inputs_embeds.shape[0], inputs_embeds.shape[1], backend)
        decoder = _passed(lm, inputs_embeds, plan)
        if decoder:
            states, weight, by = decoder.logits(), None, plan.update.taken  # fp32, as these are
        else:
            states, weight, by = lm.hidden(inputs_embeds, backend), lm.body.head, plan.head.taken
        states = states[:, arrangement.offset :][:, :length]
        if targets is None:
            targets = _head(states, weight, None, by).predicted.view(states.shape[:2])
        head = _head(states, weight, targets.to(lm.device), by)
        ids, margin, loss = (
            t.view(targets.shape).cpu() for t in (head.predicted, head.margin, head.loss)
        )
        return Decoded(ids, margin, loss)


@torch.no_grad()
def decode_ids(
    lm: FrozenLM,
    vectors: Tensor,  # (R, slots, d)
    arrangement: Arrangement,
    length: int,
    backend: str,
) -> Tensor:
    """Run the same forward for its ids (R, N) alone, on the CPU."""
    with named_range("decode", lm.device):
        inputs_embeds = _inputs(lm, vectors, arrangement, length)
        plan = lm.plan(inputs_embeds.shape[0], inputs_embeds.shape[1], backend)
        decoder = _passed(lm, inputs_embeds, plan)
        if decoder:
            return decoder.ids()[:, arrangement.offset :][:, :length].cpu()
        states = lm.hidden(inputs_embeds, backend)[:, arrangement.offset :][:, :length]
        head = _head(states, lm.body.head, None, plan.head.taken)
        return head.predicted.view(states.shape[:2]).cpu()


def _inputs(lm: FrozenLM, vectors: Tensor, arrangement: Arrangement, length: int) -> Tensor:
    """Lay the vectors out as inputs (R, L, d)."""
    layout = arrangement.layout(length).to(lm.device)
    return vectors.to(lm.device, lm.dtype)[:, layout]


def _passed(lm: FrozenLM, inputs_embeds: Tensor, plan: Plan) -> Decoder | None:
    """Return the C++ decoder behind its pass over the inputs, where the plan takes it."""
    if plan.decoder.taken != "cpu":
        return None
    rows, length, _ = inputs_embeds.shape
    decoder = cpu_decoder(lm, rows, length, length)
    decoder.pass_(inputs_embeds, 0)
    return decoder


def _head(
    states: Tensor,  # (R, N, d), or logits (R, N, V)
    weight: Tensor | None,  # (V, d); None for logits
    targets: Tensor | None,  # (R, N); None where only `predicted` is wanted
    backend: str,
) -> HeadOutput:
    """Score hidden states with the loss that fits use, so that no logits are kept."""
    flat = states.flatten(0, 1)
    asked = flat.new_zeros(len(flat), dtype=torch.int64) if targets is None else targets.flatten()
    return linear_cross_entropy(flat, weight, asked, need_grad=False, backend=backend)


@overload
def decode(
    lm: FrozenLM, tokens: ProtoTokens | FitResult, length: int | None = None, *,
    batch_size: int = 1, text: Literal[False] = False, backend: str = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def decode(
    lm: FrozenLM, tokens: ProtoTokens | FitResult, length: int | None = None, *,
    batch_size: int = 1, text: Literal[True], backend: str = "auto",
) -> list[str]: ...  # fmt: skip


@own_world
def decode(
    lm: FrozenLM,
    tokens: ProtoTokens | FitResult,
    length: int | None = None,
    *,
    batch_size: int = 1,
    text: bool = False,
    backend: str = "auto",
) -> Tensor | list[str]:
    """Decode proto-tokens to ids (rows, N), rows = texts × seeds, one forward a batch.

    Args:
        lm: the model the vectors were fitted on.
        tokens: what to decode, or a fit whose tokens to decode, behind its own prefix where it has
            one.
        length: read this many tokens of every row instead of its own number.
        batch_size: rows a forward. 1, the default, is how exactness was verified: another batch
            size can round differently and flip a token whose margin is near zero.
        text: return strings.
        backend: which kernels: "torch", "triton" (CUDA), "cpu" (C++), or "auto".

    Rows shorter than the longest are filled with −1.

    Raises:
        ValueError: vectors of another model or tokenizer, or a length that cannot be.
    """
    require_frozen(lm)
    tokens = tokens.tokens if isinstance(tokens, FitResult) else tokens
    if not isinstance(tokens, ProtoTokens):
        raise ValueError(f"tokens: {type(tokens).__name__} is not ProtoTokens or a FitResult")
    tokens.require_model(lm)
    lm = lm.behind(tokens.prefix)
    arrangement = Arrangement.parse(tokens.arrangement)
    if length is not None:
        require_length(length, lm, arrangement)
    if not is_count(batch_size):
        raise ValueError(f"batch_size: {batch_size!r} is not a positive integer")
    if text:
        tokens.require_tokenizer(lm)
    lengths = tokens.lengths.repeat_interleave(tokens.seeds).tolist()
    if length is not None:
        lengths = [length] * len(lengths)
    for size in set(lengths):  # a file may claim any
        require_length(size, lm, arrangement)
    ids = torch.full((len(tokens), max(lengths, default=0)), -1, dtype=torch.int64, device="cpu")
    for size in sorted(set(lengths)):
        rows = [r for r, n in enumerate(lengths) if n == size]
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            vectors = torch.stack([tokens.vectors(r) for r in part])
            ids[part, :size] = decode_ids(lm, vectors, arrangement, size, backend)
    if not text:
        return ids
    return [lm.decode_ids(row[:size]) for row, size in zip(ids, lengths, strict=True)]


def require_length(length: int, lm: FrozenLM, arrangement: Arrangement) -> None:
    """Raise ValueError unless the model's context has room for `length` targets."""
    if not is_count(length):
        raise ValueError(f"length: {length!r} is not a positive integer")
    positions = arrangement.input_length(length)
    if lm.context is not None and positions > lm.context:
        raise ValueError(
            f"length: {length} tokens need {positions} positions, "
            f"{lm.identity.name} has {lm.context}"
        )
