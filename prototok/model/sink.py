"""Does position 0 hold an attention sink, and what should then stand there?

A large enough trained model looks at its first position for want of anything better to look at
(Xiao et al., arXiv 2309.17453): it keeps a state there that hardly depends on what the position
holds. Then e, which would be that position, is not heard. One constant token in front takes the
place (docs/kernels.md, "Behind a constant prefix"). Small models have no sink.

Letters: B rows, N positions, H heads, K key-value heads.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from prototok.model.families import DecoderBody
from prototok.model.frozen_lm import FrozenLM
from prototok.model.in_front import prefix_of
from prototok.model.prefix import Prefix
from prototok_kernels.attention import rotary
from prototok_kernels.layers import DecoderLayer, decoder_block, input_norm, stacked_heads

# Share of the attention from which on position 0 is a sink. Evenly spread it would be 0.04 here;
# the models without a sink that were looked at have at most that, SmolLM2-135M has 0.5.
SINK = 0.2

_ROWS, _LENGTH = 4, 32  # random token ids are looked at, the later half of them and of the blocks


@dataclass(frozen=True, eq=False)
class Sink:
    """What was found of a model.

    share   of the attention that position 0 gets, in the later half of the blocks; None where the
            blocks are not known here
    prefix  what takes that place; None where there is no sink
    """

    share: float | None
    prefix: Prefix | None

    def __str__(self) -> str:
        if self.share is None:
            return "not looked for, transformers runs the model"
        found = "an attention sink" if self.prefix else "no attention sink"
        return f"{found}, position 0 gets {self.share:.3f} of the attention"


_known: WeakKeyDictionary[FrozenLM, Sink] = WeakKeyDictionary()
_looking = threading.Lock()


def sink_of(lm: FrozenLM) -> Sink:
    """Return whether the model has a sink and what stands against it, found once a model.

    The prefix is one ordinary token: " the" where the tokenizer has it, else the model's own first
    token.
    """
    bare = lm.bare
    with _looking:  # so that threads that start together look once
        if bare not in _known:
            share = first_position_share(bare)
            there = share is not None and share >= SINK
            _known[bare] = Sink(share, _ordinary_token(bare) if there else None)
        return _known[bare]


@torch.no_grad()
def first_position_share(lm: FrozenLM) -> float | None:
    """Share of attention on position 0, mean over heads, in the later half of the blocks.

    Of the later half of the queries of random token ids, from which there is nothing to be had at
    position 0. None for a model that transformers runs.
    """
    body = lm.body
    if not isinstance(body, DecoderBody):
        return None
    length = min(_LENGTH, lm.context or _LENGTH)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.vocab_size, (_ROWS, length), generator=generator, device="cpu")
    cos, sin = (table.to(lm.dtype) for table in body.rotary(length))
    x, delta = lm.embed(ids), None
    shares = []
    for layer in body.layers:
        shares.append(float(_attention_to_first(x, delta, layer, cos, sin)))
        x, delta = decoder_block(x, delta, layer, cos, sin, "torch")
    later = shares[len(shares) // 2 :]
    return sum(later) / len(later)


def _attention_to_first(
    x: Tensor,  # (B, N, d)
    delta: Tensor | None,
    layer: DecoderLayer,
    cos: Tensor,  # (N, r)
    sin: Tensor,  # (N, r)
) -> Tensor:
    length = x.shape[1]
    heads = stacked_heads(input_norm(x, delta, layer, "torch")[1], layer)
    heads = heads.unflatten(-1, (-1, layer.head_size)).transpose(1, 2)
    q, k, _ = heads.split([layer.heads, layer.kv_heads, layer.kv_heads], dim=1)
    k = k.repeat_interleave(layer.heads // layer.kv_heads, dim=1)
    q, k = rotary(q, cos, sin).float(), rotary(k, cos, sin).float()
    logits = (q @ k.mT) * layer.scaling  # (B, H, N, N)
    position = torch.arange(length, device=x.device)
    distance = position[:, None] - position[None, :]
    hidden = (distance < 0) | (distance >= (layer.window or length))
    weights = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return weights[:, :, length // 2 :, 0].mean()


def _ordinary_token(lm: FrozenLM) -> Prefix | None:
    ids = lm.encode(" the")[:1] if lm.tokenizer is not None else []
    if not ids:
        ids = [lm.bos_id or 0]
    return prefix_of(lm, ids)
