"""`generate`: token after token from [mem] vectors, with transformers' caches or our own decoder.

Letters: R rows, K vectors in front, N tokens, d hidden size.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from prototok.autoregressive.static_kv import StaticDecoder
from prototok.common.arguments import hint, is_count
from prototok.common.per_thread import PerThread
from prototok.common.recent import Recent
from prototok.common.world import own_world
from prototok.decoding.cpu_decoder import cpu_decoder
from prototok.model.families.body import DecoderBody
from prototok.model.frozen_lm import FrozenLM, require_frozen, twin_of
from prototok_kernels.decoder import POSITIONS
from prototok_kernels.layers import inner_projection
from prototok_kernels.plan import Plan

CACHES = ("engine", "dynamic", "static")


@own_world
def generate(
    lm: FrozenLM,
    mem: Tensor,  # (R, K, d); (texts, seeds, K, d) and (K, d) are taken as rows, too
    length: int,
    cache: str = "engine",
    first: Tensor | None = None,  # (R,) int64
    backend: str = "auto",
) -> Tensor:
    """Generate greedily behind [mem_1 … mem_K]: ids (R, N) int64 on the CPU; an EOS stops nothing.

    Args:
        lm: the model that the vectors were fitted on.
        mem: the vectors, rows batched as given; a batch of one is how exactness is verified.
        length: N.
        cache: "engine", our own decoder with a preallocated cache on the families' weights;
            "dynamic" or "static", transformers' `generate`.
        first: t_1 of each row where it is given (Kuratov et al.) rather than predicted; it is the
            first of the N tokens.
        backend: which kernels of "engine": "torch", "triton" (CUDA), "cpu" (C++), or "auto".

    Raises:
        ValueError: an argument that cannot be met; "engine" for a model of the general family.
    """
    require_frozen(lm, sampled=False)  # which would cost a small model some tokens
    if cache not in CACHES:
        raise ValueError(
            f"cache: {cache!r} is not one of {', '.join(map(repr, CACHES))}" + hint(cache, CACHES)
        )
    if not isinstance(mem, Tensor) or mem.ndim < 2 or mem.shape[-1] != lm.hidden_size:
        seen = tuple(mem.shape) if isinstance(mem, Tensor) else type(mem).__name__
        raise ValueError(f"mem: {seen} is not (rows, K, {lm.hidden_size})")
    mem = mem.reshape(-1, *mem.shape[-2:])
    rows, leading = mem.shape[:2]
    if rows == 0 or leading == 0:
        raise ValueError(f"mem: {tuple(mem.shape)} holds no vectors")
    require_room(lm, leading, length)
    if first is not None and not isinstance(first, Tensor):
        raise ValueError(f"first: {type(first).__name__} is not a tensor of token ids")
    if first is not None and (first.shape != (rows,) or first.dtype != torch.int64):
        raise ValueError(f"first: {first.dtype} {tuple(first.shape)} is not int64 ({rows},)")
    if first is not None and not 0 <= int(first.min()) <= int(first.max()) < lm.vocab_size:
        worst = int(first.min()) if int(first.min()) < 0 else int(first.max())
        raise ValueError(f"first: {worst} is not a token id below {lm.vocab_size}")
    if cache == "engine":
        return engine(lm, mem, length, first, backend)
    prompt = mem.to(lm.device, lm.dtype)
    if first is not None:
        prompt = torch.cat([prompt, lm.embed(first)[:, None]], dim=1)
        length -= 1
    front = lm.prefix_vectors
    if front is not None:
        prompt = torch.cat([front.expand(rows, -1, -1), prompt], dim=1)
    ids = (
        first.new_empty(rows, 0)
        if first is not None
        else torch.empty(rows, 0, dtype=torch.int64, device="cpu")
    )
    if length:
        made = greedy(_twin(lm), length, cache, inputs_embeds=prompt)
        ids = made.cpu()
    return ids if first is None else torch.cat([first[:, None].cpu(), ids], dim=1)


def require_room(lm: FrozenLM, leading: int, length: object) -> None:
    """Raise ValueError unless the context has room for `length` tokens behind K vectors."""
    if not is_count(length):
        raise ValueError(f"length: {length!r} is not a positive integer")
    positions = leading + length - 1
    if lm.context is not None and positions > lm.context:
        raise ValueError(
            f"length: {length} tokens behind {leading} vectors need {positions} positions, "
            f"{lm.identity.name} has {lm.context}"
        )


def greedy(model: PreTrainedModel, length: int, cache: str, **prompt: Tensor) -> Tensor:
    """Generate exactly `length` ids with transformers' `generate`, an EOS among them or not.

    `prompt` is input_ids (R, P), which the ids (R, P + N) then start with, or inputs_embeds
    (R, P, d). `model` must be one of `twin_of`'s: its generation config names no EOS.
    """
    (given,) = prompt.values()
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=length, pad_token_id=0,
        cache_implementation="static" if cache == "static" else None,
        # On CUDA transformers would compile a static cache's step for minutes, for every batch
        # and every length anew.
        disable_compile=True,
    )  # fmt: skip
    mask = torch.ones(given.shape[:2], dtype=torch.int64, device=given.device)
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            made: Any = model
            ids: Tensor = made.generate(**prompt, attention_mask=mask, generation_config=settings)
    finally:
        logging.set_verbosity(level)
    return ids


def engine(lm: FrozenLM, mem: Tensor, length: int, first: Tensor | None, backend: str) -> Tensor:
    """Generate ids (R, N) with our own decoder behind mem (R, K, d) and t_1 (R,) where given.

    On the CPU that is the C++ one, a call for the prompt and one for all tokens, where it has the
    model's dtype; on CUDA, and for what C++ does not cover, `StaticDecoder`.
    """
    rows, leading, _ = mem.shape
    plan = lm.plan(rows, 1, backend)  # of one token
    if plan.token.taken != "cpu":
        decoder = _static_decoder(lm, rows, leading + length, plan)
        return decoder.generate(mem, length, first)
    few = cpu_decoder(lm, rows, leading + length, leading)
    ids = torch.empty(length, rows, dtype=torch.int64, device="cpu")
    begin = 0
    if first is not None:
        ids[0], begin = first, 1
    few.pass_(mem.to(lm.dtype), 0)
    few.greedy(ids, begin, leading)
    return ids.T.contiguous()


def matrices(lm: FrozenLM) -> list[Tensor] | None:
    """Return the weights that a position is multiplied with; None in the general family."""
    body = lm.body
    if not isinstance(body, DecoderBody) or body.head is None:
        return None
    return [body.head] + [
        weight
        for layer in body.layers
        for weight in (layer.qkv, layer.o, inner_projection(layer)[0], layer.down)
    ]


def bytes_read(lm: FrozenLM, rows: int, positions: int) -> int:
    """Return the bytes that decoding `positions` tokens one by one must read."""
    cached = 0
    for layer in _body(lm).layers:
        ends = range(layer.prefix_length + 1, layer.prefix_length + 1 + positions)
        seen = sum(min(end, layer.window or end) for end in ends)
        cached += 2 * rows * layer.kv_heads * layer.head_size * lm.dtype.itemsize * seen
    return positions * sum(weight.nbytes for weight in matrices(lm) or []) + cached


def _body(lm: FrozenLM) -> DecoderBody:
    if not isinstance(lm.body, DecoderBody):
        raise ValueError(
            f"cache: 'engine' decodes the llama and gpt_neox families, and {lm.identity.name} is "
            f"{lm.identity.family}; use 'dynamic' or 'static'"
        )
    return lm.body


_twins: WeakKeyDictionary[FrozenLM, PreTrainedModel] = WeakKeyDictionary()
# What a thread's last calls with a model used, by model; the next one, a fit's verification above
# all, is like one of them. Each holds a key-value cache and a CUDA graph; so many bytes of caches.
_decoders = PerThread()
_DECODERS, _CACHES = 4, 1 << 28


def _twin(lm: FrozenLM) -> PreTrainedModel:
    if lm not in _twins:
        _twins[lm] = twin_of(lm, lm.dtype)
    return _twins[lm]


def _static_decoder(lm: FrozenLM, rows: int, positions: int, plan: Plan) -> StaticDecoder:
    """Return a decoder with room for `positions`: that of an earlier call where one fits."""
    body = _body(lm)
    capacity = -(-(body.prefix_length + positions) // POSITIONS) * POSITIONS
    kept: Recent[StaticDecoder] = _decoders.of.setdefault(
        lm, Recent(_DECODERS, _CACHES, lambda decoder: decoder.cache_bytes)
    )
    return kept.get(
        (rows, capacity, plan.passes.taken), lambda: StaticDecoder(body, lm, rows, capacity, plan)
    )
