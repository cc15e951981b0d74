"""Greedy decoding on the families' weights with a preallocated key-value cache.

One token is one pass over the weights, and on a small model as much again in the calls that make
it; so a block is few calls, into buffers and views that are made once. On CUDA the position lives
on the device and one token is one replay of a CUDA graph: the host never waits for an id.

Letters: R rows, N tokens to generate, K vectors in front, T positions of cache, d hidden size,
H heads, H_kv key-value heads, c head size, r rotated part of a head, f MLP width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prototok.families.body import DecoderBody
from prototok.families.rotary import RotaryTables
from prototok.frozen_lm import FrozenLM
from prototok_kernels.layers import (
    DecoderLayer,
    LlamaLayer,
    NeoXLayer,
    activate,
    inner_projection,
)
from prototok_kernels.matvec import matvec_

Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Block:
    """A block's weights, the family's own storage; matrices lie as in `nn.Linear`: (out, in)."""

    norm: Norm
    qkv: Tensor  # ((H + 2 H_kv) c, d)
    qkv_bias: Tensor | None
    q_norm: Norm | None
    k_norm: Norm | None
    out: Tensor  # (d, H c)
    out_bias: Tensor | None
    mlp_norm: Norm
    up: Tensor  # (f, d), or (2 f, d) gate and up
    up_bias: Tensor | None
    down: Tensor  # (d, f)
    down_bias: Tensor | None
    window: int | None


@dataclass(frozen=True)
class _Plan:
    """The model's blocks and what is the same in all of them."""

    blocks: list[_Block]
    norm: Norm
    head: Tensor  # (V, d)
    rotary: RotaryTables
    heads: int
    kv_heads: int
    head_size: int
    scaling: float  # of the attention logits
    gated: bool
    parallel: bool  # attention and MLP read the same input
    activation: str


def _norm(weight: Tensor, bias: Tensor | None, eps: float) -> Norm:
    """RMSNorm, or LayerNorm where there is a bias."""
    if bias is not None:
        return lambda x: F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if weight.device.type != "cpu":
        return lambda x: F.rms_norm(x, x.shape[-1:], weight, eps)
    # Torch's RMSNorm on the CPU is a composite of six calls. The LayerNorm of [x, −x], whose mean
    # is 0 and whose variance is the mean of x², is one kernel.
    twice, size = torch.cat([weight, weight]), len(weight)
    return lambda x: F.layer_norm(torch.cat([x, -x], -1), (2 * size,), twice, None, eps)[..., :size]


def _plan_of(lm: FrozenLM) -> _Plan:
    body = lm.body
    if not isinstance(body, DecoderBody):
        raise ValueError(
            f"cache: 'engine' decodes the llama and gpt_neox families, and {lm.identity.name} is "
            f"{lm.identity.family}; use 'dynamic' or 'static'"
        )
    assert body.head is not None
    first = body.layers[0]
    return _Plan(
        [_block(layer) for layer in body.layers], _norm(body.norm, body.norm_bias, first.eps),
        body.head, body.rotary, first.heads, first.kv_heads, first.head_size, first.scaling,
        gated=isinstance(first, LlamaLayer),
        parallel=isinstance(first, NeoXLayer) and first.parallel,
        activation=first.activation,
    )  # fmt: skip


def _block(layer: DecoderLayer) -> _Block:
    norm_bias = mlp_bias = None
    if isinstance(layer, NeoXLayer):
        norm_bias, mlp_bias = layer.input_norm_bias, layer.post_norm_bias
    return _Block(
        _norm(layer.input_norm, norm_bias, layer.eps),
        layer.qkv,
        layer.qkv_bias,
        None if layer.q_norm is None else _norm(layer.q_norm, None, layer.eps),
        None if layer.k_norm is None else _norm(layer.k_norm, None, layer.eps),
        layer.o,
        layer.o_bias,
        _norm(layer.post_norm, mlp_bias, layer.eps),
        *inner_projection(layer),
        layer.down,
        layer.down_bias,
        layer.window,
    )


@dataclass(frozen=True)
class _Place:
    """Where in the text a token stands, layer by layer."""

    cos: Tensor  # (r,)
    sin: Tensor  # (r / 2,), the halves being equal
    key_slots: Sequence[Tensor]  # each (R, H_kv, c): where its keys go; unused with an index
    value_slots: Sequence[Tensor]
    keys: Sequence[Tensor]  # each (R, H_kv, positions it attends to, c)
    values: Sequence[Tensor]
    masks: Sequence[Tensor | None]  # each (1, positions), True where it attends
    index: Tensor | None  # (1,) the position, where only the device knows it


class StaticDecoder:
    """A greedy decoder of R rows with room for T positions; `generate` may be called again.

    Its products, norms and attention are those of the family's forward, one position at a time: in
    float32 the ids are those of transformers' greedy `generate`.

    Attributes:
        weight_bytes: what one position reads of the weights, head included.
    """

    def __init__(self, lm: FrozenLM, rows: int, capacity: int, on_device: bool | None = None):
        """`on_device`: keep the position on the device; None: on CUDA, where a graph needs it."""
        self.plan = plan = _plan_of(lm)
        self.embedding, self.rows, self.capacity = lm.embedding, rows, capacity
        self.device = lm.device
        self.on_device = lm.device.type == "cuda" if on_device is None else on_device
        self.graph: torch.cuda.CUDAGraph | None = None
        heads, kv_heads, size = plan.heads, plan.kv_heads, plan.head_size

        def new(*shape: int, dtype: torch.dtype = lm.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=lm.device)

        self.keys = new(len(plan.blocks), rows, kv_heads, capacity, size)
        self.values = torch.zeros_like(self.keys)
        self.x = new(rows, lm.hidden_size)
        self.qkv = new(rows, (heads + 2 * kv_heads) * size)
        by_head = self.qkv.view(rows, -1, size)
        turning = by_head[:, : heads + kv_heads]
        q, self.k, self.v = by_head.split([heads, kv_heads, kv_heads], dim=1)
        self.q = q
        # The heads that share keys are, to the attention, so many positions with one head.
        self.grouped_q = q.unflatten(1, (kv_heads, heads // kv_heads))
        self.cos, self.sin = (table.to(lm.dtype) for table in plan.rotary(capacity))
        rotated = self.cos.shape[1]
        self.sin = self.sin[:, : rotated // 2]
        self.turning = turning[..., :rotated]
        self.turning_halves = self.turning.chunk(2, dim=-1)
        self.turned = torch.empty_like(self.turning, memory_format=torch.contiguous_format)
        self.turned_halves = self.turned.chunk(2, dim=-1)
        self.up = new(rows, plan.blocks[0].up.shape[0])
        self.gate, self.inner = self.up.chunk(2, dim=-1) if plan.gated else (self.up, self.up)
        self.logits = new(rows, plan.head.shape[0])
        self.position = new(1, dtype=torch.int64)
        self.ids = new(capacity, rows, dtype=torch.int64)
        self.last = new(rows, dtype=torch.int64)
        self.written = new(1, dtype=torch.int64)
        self.every_position = torch.arange(capacity, device=lm.device)
        matrices = [t for b in plan.blocks for t in (b.qkv, b.out, b.up, b.down)]
        self.weight_bytes = sum(t.nbytes for t in (*matrices, plan.head))

    def bytes_read(self, positions: int) -> int:
        """Bytes of weights and cache that decoding the first `positions` positions must read."""
        per_position = 2 * self.keys[0, :, :, 0].nbytes
        cached = sum(
            min(p + 1, block.window or p + 1)
            for block in self.plan.blocks
            for p in range(positions)
        )
        return positions * self.weight_bytes + cached * per_position

    @torch.inference_mode()
    def _generate(self, prompt: Sequence[Tensor], start: int, length: int) -> None:
        """Fill `ids` from row `start` on behind the prompt's vectors, each (R, d)."""
        self.position.zero_()
        for p, vector in enumerate(prompt):
            self.x.copy_(vector)
            self._forward(self._here() if self.on_device else self._at(p))
            self.position += 1
        if not self.on_device:
            self._predict(self.ids[start])
            for i in range(start + 1, length):
                torch.index_select(self.embedding, 0, self.ids[i - 1], out=self.x)
                self._forward(self._at(len(prompt) + i - start - 1))
                self._predict(self.ids[i])
            return
        self._predict(self.last)
        self.ids[start] = self.last
        self.written.fill_(start + 1)
        replay = self._captured().replay if self.device.type == "cuda" else self._next
        for _ in range(start + 1, length):
            replay()

    def generate(self, mem: Tensor, length: int, first: Tensor | None = None) -> Tensor:
        """Ids (R, N) on the CPU, behind the vectors mem (R, K, d) and, where given, t_1 (R,)."""
        prompt = list(mem.to(self.device, self.x.dtype).unbind(1))
        if first is not None:
            self.ids[0] = first
            prompt.append(self.embedding[self.ids[0]])
        start = 0 if first is None else 1
        if length > start:
            self._generate(prompt, start, length)
        return self.ids[:length].T.cpu().clone()

    def _next(self) -> None:
        """One token with nothing known to the host: the unit of capture."""
        torch.index_select(self.embedding, 0, self.last, out=self.x)
        self._forward(self._here())
        self._predict(self.last)
        self.ids.index_copy_(0, self.written, self.last[None])
        self.position += 1
        self.written += 1

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The graph of `_next`, made at the first use without leaving a trace in the state."""
        if self.graph is None:
            state = [t.clone() for t in (self.last, self.position, self.written)]
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):  # libraries set themselves up outside the capture
                self._next()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            with torch.cuda.graph(graph):
                self._next()
            for tensor, value in zip((self.last, self.position, self.written), state, strict=True):
                tensor.copy_(value)
            self.graph = graph
        return self.graph

    def _at(self, p: int) -> _Place:
        """The place of position p: slices of the cache as long as the text so far."""
        ends = [0 if b.window is None else max(0, p + 1 - b.window) for b in self.plan.blocks]
        if any(ends):
            keys: Sequence[Tensor] = [
                k[:, :, begin : p + 1] for k, begin in zip(self.keys, ends, strict=True)
            ]
            values: Sequence[Tensor] = [
                v[:, :, begin : p + 1] for v, begin in zip(self.values, ends, strict=True)
            ]
        else:
            keys = self.keys[:, :, :, : p + 1].unbind(0)
            values = self.values[:, :, :, : p + 1].unbind(0)
        return _Place(
            self.cos[p], self.sin[p], self.keys[:, :, :, p].unbind(0),
            self.values[:, :, :, p].unbind(0), keys, values, [None] * len(keys), None,
        )  # fmt: skip

    def _here(self) -> _Place:
        """The same with the position on the device: the whole cache, and a mask."""
        past = (self.every_position <= self.position)[None]
        masks = {
            window: past
            if window is None
            else past & (self.every_position > self.position - window)
            for window in {block.window for block in self.plan.blocks}
        }
        return _Place(
            self.cos.index_select(0, self.position)[0], self.sin.index_select(0, self.position)[0],
            (), (), self.keys.unbind(0), self.values.unbind(0),
            [masks[block.window] for block in self.plan.blocks], self.position,
        )  # fmt: skip

    def _forward(self, place: _Place) -> None:
        """`x` (R, d) through all blocks, in place; its keys and values enter the cache."""
        plan, x, qkv = self.plan, self.x, self.qkv
        first, second = self.turning_halves
        turned_first, turned_second = self.turned_halves
        for layer, block in enumerate(plan.blocks):
            matvec_(qkv, block.norm(x), block.qkv, block.qkv_bias)
            if block.q_norm is not None and block.k_norm is not None:
                self.q.copy_(block.q_norm(self.q))
                self.k.copy_(block.k_norm(self.k))
            torch.mul(self.turning, place.cos, out=self.turned)
            turned_first.addcmul_(second, place.sin, value=-1)
            turned_second.addcmul_(first, place.sin)
            self.turning.copy_(self.turned)
            keys, values = place.keys[layer], place.values[layer]
            if place.index is None:
                place.key_slots[layer].copy_(self.k)
                place.value_slots[layer].copy_(self.v)
            else:
                keys.index_copy_(2, place.index, self.k[:, :, None])
                values.index_copy_(2, place.index, self.v[:, :, None])
            mixed = F.scaled_dot_product_attention(
                self.grouped_q, keys, values, attn_mask=place.masks[layer], scale=plan.scaling
            )
            h = block.mlp_norm(x) if plan.parallel else None
            matvec_(x, mixed.reshape(len(x), -1), block.out, block.out_bias, add=True)
            h = block.mlp_norm(x) if h is None else h
            matvec_(self.up, h, block.up, block.up_bias)
            inner = activate(self.gate, plan.activation)
            if plan.gated:
                inner *= self.inner
            matvec_(x, inner, block.down, block.down_bias, add=True)

    def _predict(self, ids: Tensor) -> None:
        """The most likely id behind `x`, into ids (R,)."""
        matvec_(self.logits, self.plan.norm(self.x), self.plan.head)
        torch.argmax(self.logits, dim=-1, out=ids)
