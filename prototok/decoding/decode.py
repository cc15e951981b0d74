"""Decode proto-tokens: one forward pass, argmax at every position.

Letters: R rows, N targets, L input positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from prototok.common.arguments import is_count
from prototok.common.ranges import named_range
from prototok.common.shown import shapes
from prototok.common.world import own_world
from prototok.decoding.cpu_decoder import cpu_decoder
from prototok.decoding.replay import on_the_host
from prototok.model.families import DecoderBody
from prototok.model.frozen_lm import FrozenLM, require_frozen
from prototok.results.arrangement import Arrangement
from prototok.results.fit_result import FitResult
from prototok.results.proto_tokens import ProtoTokens
from prototok_kernels.decoder import Decoder
from prototok_kernels.linear_cross_entropy import HeadOutput, linear_cross_entropy
from prototok_kernels.one_forward import PreparedForward, why_not_one_call
from prototok_kernels.plan import Plan

# Rows that are decoded together where none of them notices: positions, and logits that are kept.
_POSITIONS, _LOGITS = 256, 4 << 20

# Forwards in one call, by model, then by arrangement and length: most decodes are of a few.
_forwards: WeakKeyDictionary[FrozenLM, dict[tuple[Arrangement, int], PreparedForward]]
_forwards = WeakKeyDictionary()
_FORWARDS_KEPT = 1024

Scores = list[Tensor]  # (R, N) each


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
    as_fitted: bool = False,
    plan: Plan | None = None,
) -> Decoded:
    """Run one forward for rows of one length; the results are on the CPU.

    With `as_fitted` by what fits run on: it rounds to the model's dtype after every operation, as
    transformers does, where the C++ decoder, which is quicker for few rows, keeps its sums in fp32.
    With `plan` by that, of another number of rows.
    """
    plan = plan or lm.plan(len(vectors), arrangement.input_length(length), backend)
    given = [] if targets is None else [targets]

    def score(states: Tensor, weight: Tensor | None, by: str, given: Sequence[Tensor]) -> Scores:
        states = _of_targets(states, arrangement, length)
        shape = states.shape[:2]
        targets = given[0] if given else _head(states, weight, None, by).predicted.view(shape)
        head = _head(states, weight, targets, by)
        return [t.view(shape) for t in (head.predicted, head.margin, head.loss)]

    def compute(layout: Tensor, vectors: Tensor, *given: Tensor) -> Scores:
        states = lm.hidden(vectors[:, layout], backend)
        return score(states, lm.body.head, plan.head.taken, given)

    with named_range("decode", lm.device):
        if plan.decoder.taken == "cpu" and not as_fitted:
            logits = _passed(lm, vectors, arrangement, length).logits()  # fp32, as e and m are
            given = [targets.to(lm.device) for targets in given]
            return Decoded(*score(logits, None, plan.update.taken, given))
        key = ("scores", len(given), len(vectors), arrangement, length, backend)
        layout = arrangement.layout(length)
        inputs = [vectors.to(lm.dtype), *given]
        return Decoded(*on_the_host(lm, key, compute, [layout], inputs))


def decode_ids(
    lm: FrozenLM,
    vectors: Tensor,  # (R, slots, d)
    arrangement: Arrangement,
    length: int,
    backend: str,
    plan: Plan | None = None,
) -> Tensor:
    """Run the same forward for its ids (R, N) alone, on the CPU."""
    plan = plan or lm.plan(vectors.shape[0], arrangement.input_length(length), backend)
    with named_range("decode", lm.device):
        if plan.decoder.taken != "cpu" and why_not_one_call(plan) is None:
            # Whatever stands in front of the C++ here is time of a small model's forward.
            lm.require_unchanged()
            if vectors.dtype != torch.float32 or not vectors.is_cpu:
                vectors = vectors.to(lm.device, lm.dtype)
            ids = _in_one_call(lm, arrangement, length)(vectors)
            return _of_targets(ids, arrangement, length)
        return _ids_in_parts(lm, vectors, arrangement, length, backend, plan)


@torch.no_grad()
def _ids_in_parts(
    lm: FrozenLM, vectors: Tensor, arrangement: Arrangement, length: int, backend: str, plan: Plan
) -> Tensor:
    def compute(layout: Tensor, vectors: Tensor) -> Scores:
        states = _of_targets(lm.hidden(vectors[:, layout], backend), arrangement, length)
        head = _head(states, lm.body.head, None, plan.head.taken)
        return [head.predicted.view(states.shape[:2])]

    if plan.decoder.taken == "cpu":
        ids = _passed(lm, vectors, arrangement, length).ids()
        return _of_targets(ids, arrangement, length)
    key = ("ids", len(vectors), arrangement, length, backend)
    layout = arrangement.layout(length)
    return on_the_host(lm, key, compute, [layout], [vectors.to(lm.dtype)])[0]


def alone(
    lm: FrozenLM, arrangement: Arrangement, length: int, backend: str, as_fitted: bool = False
) -> tuple[Plan, int]:
    """Return the plan of one row, and how many rows by it still have the bits of each alone.

    A pass over the weights then serves them all.
    """
    positions = arrangement.input_length(length)
    plan = lm.plan(1, positions, backend)
    most = min(_POSITIONS // positions, _LOGITS // (positions * lm.vocab_size))
    return plan, max(1, most) if plan.by_row(as_fitted) else 1


def decode_alone(
    lm: FrozenLM,
    vectors: Tensor,  # (R, slots, d)
    arrangement: Arrangement,
    length: int,
    targets: Tensor,  # (R, N) int64
    backend: str,
    as_fitted: bool = False,
) -> Decoded:
    """Decode rows of one length, each with the bits of `decode_vectors` of it alone."""
    plan, at_once = alone(lm, arrangement, length, backend, as_fitted)
    parts = [
        decode_vectors(lm, some, arrangement, length, given, backend, as_fitted, plan)
        for some, given in zip(vectors.split(at_once), targets.split(at_once), strict=True)
    ]
    return Decoded(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.margin for part in parts]),
        torch.cat([part.loss for part in parts]),
    )


def _in_one_call(lm: FrozenLM, arrangement: Arrangement, length: int) -> PreparedForward:
    """Return the forward of a length, prepared by the first call."""
    kept = _forwards.get(lm)
    if kept is None:
        kept = _forwards.setdefault(lm, {})
    forward = kept.get((arrangement, length))
    if forward is None:
        assert isinstance(lm.body, DecoderBody)
        forward = lm.body.one_forward(arrangement.layout(length))
        if len(kept) < _FORWARDS_KEPT:
            kept[arrangement, length] = forward
    return forward


def _of_targets(positions: Tensor, arrangement: Arrangement, length: int) -> Tensor:
    """Return the positions that targets are read at, (R, N, …) of (R, L, …)."""
    if positions.shape[1] == length:  # a view of all would cost a small forward some percent
        return positions
    return positions[:, arrangement.offset :][:, :length]


def _passed(lm: FrozenLM, vectors: Tensor, arrangement: Arrangement, length: int) -> Decoder:
    """Return the C++ decoder behind its pass over the inputs."""
    rows, positions = len(vectors), arrangement.input_length(length)
    decoder = cpu_decoder(lm, rows, positions, positions)
    decoder.pass_(vectors.to(lm.device, lm.dtype)[:, arrangement.layout(length)], 0)
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
            size can round differently and flip a token whose margin is near zero. Where C++ gives
            each row the bits that it has alone, 1 still takes several at once.
        text: return strings.
        backend: which kernels: "torch", "triton" (CUDA), "cpu" (C++), or "auto".

    Rows shorter than the longest are filled with −1.

    Raises:
        ValueError: vectors of another model or tokenizer, or a length that cannot be.
    """
    require_frozen(lm, sampled=False)  # which would cost a small model some forwards
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
        for own in set(lengths):
            if not arrangement.begins_alike(own, length):
                raise ValueError(
                    f"length: {length} tokens of {arrangement.name!r} do not begin as {own} do"
                )
        lengths = [length] * len(lengths)
    for size in set(lengths):  # a file may claim any
        require_length(size, lm, arrangement)
    ids = torch.full((len(tokens), max(lengths, default=0)), -1, dtype=torch.int64, device="cpu")
    for size in sorted(set(lengths)):
        rows = [r for r, n in enumerate(lengths) if n == size]
        plan, at_once = None, batch_size
        if batch_size == 1:
            plan, at_once = alone(lm, arrangement, size, backend)
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            vectors = torch.stack([tokens.vectors(r) for r in part])
            ids[part, :size] = decode_ids(lm, vectors, arrangement, size, backend, plan)
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
