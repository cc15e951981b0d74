"""Greedy decoding on the families' weights with a preallocated key-value cache, in torch.

The position lives on the device and all buffers are made once, so that on CUDA one token is one
replay of a CUDA graph and the host never waits for an id. On the CPU the same runs call by call;
`prototok_kernels.decoder` is the faster way there.

Letters: R rows, N tokens to generate, K vectors in front, T positions of cache, d hidden size,
H heads, H_kv key-value heads, c head size, r rotated part of a head, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prototok.model.families.body import DecoderBody
from prototok.model.frozen_lm import FrozenLM
from prototok_kernels.attention import rotary
from prototok_kernels.layers import (
    DecoderLayer,
    NeoXLayer,
    inner_activation,
    inner_projection,
    input_norm,
    post_norm,
)
from prototok_kernels.residual_norm import residual_norm


class StaticDecoder:
    """A greedy decoder of R rows with room for T positions; `generate` may be called again.

    Its products, norms and attention are those of the family's forward, one position at a time: in
    float32 the ids are those of transformers' greedy `generate`.
    """

    def __init__(
        self, body: DecoderBody, lm: FrozenLM, rows: int, capacity: int, backend: str
    ) -> None:
        first = body.layers[0]
        self.body, self.embedding, self.device = body, lm.embedding, lm.device
        self.rows, self.capacity, self.backend = rows, capacity, backend
        self.parts = [first.heads, first.kv_heads, first.kv_heads]
        size = first.head_size

        def new(*shape: int, dtype: torch.dtype = lm.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=lm.device)

        self.keys = [new(rows, first.kv_heads, capacity, size) for _ in body.layers]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        for layer, keys, values in zip(body.layers, self.keys, self.values, strict=True):
            if layer.prefix is not None:
                keys[:, :, : body.prefix_length] = layer.prefix[0]
                values[:, :, : body.prefix_length] = layer.prefix[1]
        self.x = new(rows, lm.hidden_size)
        self.qkv = new(rows, sum(self.parts) * size)
        self.inner = new(rows, len(inner_projection(first)[0]))
        self.logits = new(rows, lm.vocab_size)
        self.cos, self.sin = (table.to(lm.dtype) for table in body.rotary(capacity))
        self.ids = new(capacity, rows, dtype=torch.int64)
        self.last = new(rows, dtype=torch.int64)
        self.position = new(1, dtype=torch.int64)
        self.written = new(1, dtype=torch.int64)
        self.every_position = torch.arange(capacity, device=lm.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def generate(self, mem: Tensor, length: int, first: Tensor | None = None) -> Tensor:
        """Generate ids (R, N), on the CPU, behind mem (R, K, d) and t_1 (R,) where it is given."""
        prompt = list(mem.to(self.device, self.x.dtype).unbind(1))
        start = 0
        if first is not None:
            self.ids[0] = first.to(self.device)
            prompt.append(self.embedding[self.ids[0]])
            start = 1
        if length > start:
            self.position.fill_(self.body.prefix_length)
            for vector in prompt:
                self.x.copy_(vector)
                self._forward()
            self._predict()
            self.ids[start] = self.last
            self.written.fill_(start + 1)
        if length > start + 1:
            replay = self._captured().replay if self.device.type == "cuda" else self._next
            for _ in range(start + 1, length):
                replay()
        return self.ids[:length].T.cpu().clone()

    def _next(self) -> None:
        """Generate one token without the host: what a CUDA graph captures."""
        torch.index_select(self.embedding, 0, self.last, out=self.x)
        self._forward()
        self._predict()
        self.ids.index_copy_(0, self.written, self.last[None])
        self.written += 1

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Return the graph of `_next`, captured at the first use.

        The warm-up is a real step: what it adds to the cache and to `ids` the first replay writes
        again, from the same state, which is put back.
        """
        if self.graph is None:
            moving = (self.last, self.position, self.written)
            state = [t.clone() for t in moving]
            with torch.cuda.device(self.device):
                stream = torch.cuda.Stream(self.device)
                stream.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(stream):  # libraries set themselves up outside the capture
                    self._next()
                torch.cuda.current_stream(self.device).wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    self._next()
                for tensor, value in zip(moving, state, strict=True):
                    tensor.copy_(value)
            self.graph = graph
        return self.graph

    def _forward(self) -> None:
        """Run `x` (R, d) at `position` through all blocks, in place, and move the position on."""
        cos, sin = (t.index_select(0, self.position) for t in (self.cos, self.sin))  # (1, r)
        past = (self.every_position <= self.position)[None]  # (1, T)
        masks: dict[int | None, Tensor] = {None: past}
        for layer in self.body.layers:
            if layer.window not in masks:
                assert layer.window is not None
                masks[layer.window] = past & (self.every_position > self.position - layer.window)
        for i, layer in enumerate(self.body.layers):
            normed = input_norm(self.x, None, layer, self.backend)[1]
            _linear_(self.qkv, normed, layer.qkv, layer.qkv_bias)
            mixed = self._attend(i, layer, cos, sin, masks[layer.window])
            parallel = isinstance(layer, NeoXLayer) and layer.parallel
            h = post_norm(self.x, None, layer, self.backend)[1] if parallel else None
            _linear_(self.x, mixed, layer.o, layer.o_bias, add=True)
            h = post_norm(self.x, None, layer, self.backend)[1] if h is None else h
            _linear_(self.inner, h, *inner_projection(layer))
            _linear_(
                self.x,
                inner_activation(self.inner, None, layer, self.backend),
                layer.down,
                layer.down_bias,
                add=True,
            )
        self.position += 1

    def _attend(
        self, i: int, layer: DecoderLayer, cos: Tensor, sin: Tensor, mask: Tensor
    ) -> Tensor:  # (R, H c)
        """Put the tokens in `qkv` into the cache and attend to it."""
        q, k, v = self.qkv.view(self.rows, -1, layer.head_size).split(self.parts, dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = F.rms_norm(q, layer.q_norm.shape, layer.q_norm, layer.eps)
            k = F.rms_norm(k, layer.k_norm.shape, layer.k_norm, layer.eps)
        q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        self.keys[i].index_copy_(2, self.position, k[:, :, None])
        self.values[i].index_copy_(2, self.position, v[:, :, None])
        # The heads that share keys are, to the attention, so many positions with one head.
        mixed = F.scaled_dot_product_attention(
            q.unflatten(1, (layer.kv_heads, -1)), self.keys[i], self.values[i], attn_mask=mask,
            scale=layer.scaling,
        )  # fmt: skip
        return mixed.reshape(self.rows, -1)

    def _predict(self) -> None:
        """Put the most likely id behind `x` into `last`."""
        body = self.body
        assert body.head is not None
        eps = body.layers[0].eps
        _, normed = residual_norm(self.x, None, body.norm, body.norm_bias, eps, self.backend)
        torch.mm(normed, body.head.T, out=self.logits)
        torch.argmax(self.logits, dim=-1, out=self.last)


def _linear_(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, add: bool = False
) -> None:
    """Write x @ weight.T + bias into `out`; with `add`, add it to what `out` held."""
    if add:
        out.addmm_(x, weight.T)
        if bias is not None:
            out += bias
    elif bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)
