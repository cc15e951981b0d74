"""Greedy decoding on the families' weights with a preallocated key-value cache.

The position lives on the device and all buffers are made once, so that on CUDA one token is one
replay of a CUDA graph and the host never waits for an id. On the CPU the same runs call by call;
`prototok_kernels.decoder` is the faster way there.

Few rows read every weight once, in few launches (`normed_products`, `add_products_`,
`best_logits`); many go through torch's products. Attention is one launch for either.

Letters: R rows, N tokens to generate, K vectors in front, T positions of cache, d hidden size,
H heads, H_kv key-value heads, c head size, r rotated part of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from prototok.common.graphs import captured
from prototok.common.urgent import on_cuda, urgent
from prototok.model.families.body import DecoderBody
from prototok.model.frozen_lm import FrozenLM
from prototok_kernels.added_products import add_products_, add_products_ref_
from prototok_kernels.cached_attention import Cache, cached_attention
from prototok_kernels.layers import is_parallel
from prototok_kernels.next_token import Stream, best_logits, take_next_
from prototok_kernels.normed_products import normed_products, normed_products_ref, products_of
from prototok_kernels.plan import Plan
from prototok_kernels.residual_norm import residual_norm


class StaticDecoder:
    """A greedy decoder of R rows with room for T positions; `generate` may be called again.

    Its products, norms and attention are those of the family's forward, one position at a time: in
    float32 the ids are those of transformers' greedy `generate`.
    """

    def __init__(
        self, body: DecoderBody, lm: FrozenLM, rows: int, capacity: int, plan: Plan
    ) -> None:
        first = body.layers[0]
        self.body, self.embedding, self.device = body, lm.embedding, lm.device
        self.passes, self.fused = plan.passes.taken, plan.token.taken == "fused"
        # The C++ attends to whole texts only.
        self.attends = "triton" if self.passes == "triton" else "torch"
        self.eps = first.eps
        self.norm = body.norm, body.norm_bias

        def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=lm.device)

        # Read once: tables that grow for others are replaced.
        tables = [table.float().contiguous() for table in body.rotary(capacity)]
        shape = rows, first.kv_heads, capacity, first.head_size
        self.stream = Stream(
            x=new(rows, lm.hidden_size, dtype=lm.dtype), ids=new(capacity, rows),
            written=new(rows), position=new(rows),
        )  # fmt: skip
        self.caches = []
        for layer in body.layers:
            keys, values = (new(*shape, dtype=lm.dtype) for _ in range(2))
            if layer.prefix is not None:
                keys[:, :, : body.prefix_length] = layer.prefix[0]
                values[:, :, : body.prefix_length] = layer.prefix[1]
            self.caches.append(Cache(keys, values, self.stream.position, *tables))
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def cache_bytes(self) -> int:
        """Return the bytes that keys and values take."""
        return sum(cache.keys.nbytes + cache.values.nbytes for cache in self.caches)

    @torch.no_grad()
    def generate(self, mem: Tensor, length: int, first: Tensor | None = None) -> Tensor:
        """Generate ids (R, N), on the CPU, behind mem (R, K, d) and t_1 (R,) where it is given."""
        with urgent(self.device):
            return self._generate(mem, length, first)

    def _generate(self, mem: Tensor, length: int, first: Tensor | None) -> Tensor:
        stream = self.stream
        prompt = list(mem.to(self.device, stream.x.dtype).unbind(1))
        start = 0
        if first is not None:
            stream.ids[0] = first.to(self.device)
            prompt.append(self.embedding[stream.ids[0]])
            start = 1
        stream.position.fill_(self.body.prefix_length)
        stream.written.fill_(start)
        *earlier, last = prompt
        for vector in earlier:
            stream.x.copy_(vector)
            self._forward()
            stream.position.add_(1)
        stream.x.copy_(last)
        token = self._next
        if on_cuda(self.device) and length > start:
            token = self._captured().replay
        for _ in range(start, length):
            token()
        return stream.ids[:length].T.cpu().clone()

    def _next(self) -> None:
        """Take `x` through the model to the next token, without the host: what a graph captures."""
        self._forward()
        self._predict()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Return the graph of `_next`, captured at the first use.

        The warm-up is a real step: what it adds to the cache and to `ids` the first replay writes
        again, from the same state, which is put back.
        """
        if self.graph is None:
            moving = (self.stream.x, self.stream.position, self.stream.written)
            state = [t.clone() for t in moving]
            self._next()  # libraries set themselves up, and kernels are compiled
            self.graph = captured(self._next, self.device)
            for tensor, value in zip(moving, state, strict=True):
                tensor.copy_(value)
        return self.graph

    def _forward(self) -> None:
        """Run `x` (R, d) at `position` through all blocks, in place."""
        x = self.stream.x
        project: Callable[..., list[Tensor]] = normed_products
        add_ = add_products_
        if not self.fused:
            project = partial(normed_products_ref, passes=self.passes)
            add_ = add_products_ref_
        for layer, cache in zip(self.body.layers, self.caches, strict=True):
            before, behind = products_of(layer)
            if is_parallel(layer):
                qkv, inner = project(x, (before, behind), self.eps)
                mixed = cached_attention(qkv, cache, layer, self.attends)
                add_(x, ((mixed, layer.o, layer.o_bias), (inner, layer.down, layer.down_bias)))
                continue
            (qkv,) = project(x, (before,), self.eps)
            mixed = cached_attention(qkv, cache, layer, self.attends)
            add_(x, ((mixed, layer.o, layer.o_bias),))
            (inner,) = project(x, (behind,), self.eps)
            add_(x, ((inner, layer.down, layer.down_bias),))

    def _predict(self) -> None:
        """Put the most likely id behind `x` into `ids`, and its embedding into `x`."""
        head = self.body.head
        assert head is not None
        normed = residual_norm(self.stream.x, None, *self.norm, self.eps, self.passes)[1]
        scores, index = best_logits(normed, head) if self.fused else (normed @ head.T, None)
        take_next_(self.stream, scores, index, self.embedding, self.attends)
