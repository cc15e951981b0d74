"""Frozen decoder blocks as plain tensors, and the general layer that runs them.

Letters: B rows, N positions, d hidden size, H heads, K key-value heads, c head size, r rotary size
(r ≤ c), I inner size of the MLP, P vectors of a prefix (prefix.py). Matrices lie as in `nn.Linear`:
(out, in).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prototok_kernels.activation import ACTIVATIONS, activation, activation_backward
from prototok_kernels.attention import attention
from prototok_kernels.residual_norm import residual_norm, two_residual_norms

Layer = TypeVar("Layer", bound="DecoderLayer")


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """What Llama-type and GPT-NeoX-type blocks share. Nothing here is trained.

    Matrices that read the same input lie one above the other, for one product instead of many;
    `q`, `k` and `v` are views of their stack.
    """

    input_norm: Tensor  # (d,): in front of the attention
    qkv: Tensor  # ((H + 2 K)·c, d)
    qkv_bias: Tensor | None = None  # ((H + 2 K)·c,)
    q_norm: Tensor | None = None  # (c,): RMSNorm over each head before the rotation (Qwen3)
    k_norm: Tensor | None = None  # (c,)
    o: Tensor  # (d, H·c)
    o_bias: Tensor | None = None  # (d,)
    post_norm: Tensor  # (d,): in front of the MLP
    down: Tensor  # (d, I)
    down_bias: Tensor | None = None  # (d,)
    heads: int
    kv_heads: int
    head_size: int
    scaling: float  # of the attention logits, 1 / √c as a rule
    eps: float  # of every norm in the block
    activation: str  # one of ACTIVATIONS
    window: int | None = None  # positions a query sees, its own included; None: all before it
    flash: bool = False  # attend by the flash-attn package
    prefix: Tensor | None = None  # (2, K, P, c): keys, rotated to 0 … P − 1, and values of a prefix

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(ACTIVATIONS)}, got {self.activation!r}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )

    @property
    def dtype(self) -> torch.dtype:
        return self.qkv.dtype

    @property
    def hidden_size(self) -> int:
        return self.qkv.shape[1]

    @property
    def q(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (H·c, d) and bias (H·c,)."""
        return self._projection(0, self.heads)

    @property
    def k(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (K·c, d) and bias (K·c,)."""
        return self._projection(self.heads, self.kv_heads)

    @property
    def v(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (K·c, d) and bias (K·c,)."""
        return self._projection(self.heads + self.kv_heads, self.kv_heads)

    @property
    def prefix_length(self) -> int:
        """P; 0 without a prefix."""
        return 0 if self.prefix is None else self.prefix.shape[2]

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Return every weight of the block."""
        values = (getattr(self, f.name) for f in fields(self))
        return [value for value in values if isinstance(value, Tensor)]

    @cached_property
    def constant_vectors(self) -> tuple[Tensor | None, Tensor]:
        """Return what the closed form of a first block adds everywhere, and its constant vectors.

        (d,), or None for nothing: the biases, and the values of the prefix's first position. And
        (H (P − 1), d): by how much the values of its other positions differ from those.
        """
        o = self.o.unflatten(1, (self.heads, -1))  # (d, H, c)
        none = o.new_empty(0, len(o))
        if self.prefix is None:
            return self._end_bias, none
        values = self.prefix[1].repeat_interleave(self.heads // self.kv_heads, dim=0)  # (H, P, c)
        first = values[:, 0].flatten() @ self.o.T
        end = first if self._end_bias is None else first + self._end_bias
        if self.prefix_length == 1:
            return end, none
        steps = values[:, 1:] - values[:, :1]
        return end, torch.einsum("hpc,dhc->phd", steps, o).flatten(0, 1)

    @property
    def _end_bias(self) -> Tensor | None:
        """Return (d,) what is added to the stream at every position in front of the MLP's norm."""
        return self.o_bias

    def _projection(self, start: int, heads: int) -> tuple[Tensor, Tensor | None]:
        part = slice(start * self.head_size, (start + heads) * self.head_size)
        return self.qkv[part], None if self.qkv_bias is None else self.qkv_bias[part]

    def to(self: Layer, *args: Any, **kwargs: Any) -> Layer:
        """Return the block with every tensor moved or cast by `Tensor.to(*args, **kwargs)`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(*args, **kwargs)
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class LlamaLayer(DecoderLayer):
    """RMSNorm, grouped-query attention, sequential residual, gated MLP.

    Covers Llama, Mistral (sliding window), Qwen2 (biases on q, k, v) and Qwen3 (norm on each head
    of q and k).
    """

    gate_up: Tensor  # (2 I, d): the half that is activated, then the half it multiplies
    gate_up_bias: Tensor | None = None  # (2 I,)


@dataclass(frozen=True, kw_only=True)
class NeoXLayer(DecoderLayer):
    """LayerNorm, biases, partial rotary, MLP without a gate, parallel or sequential residual."""

    up: Tensor  # (I, d)
    up_bias: Tensor | None = None  # (I,)
    input_norm_bias: Tensor  # (d,)
    post_norm_bias: Tensor  # (d,)
    parallel: bool

    @property
    def _end_bias(self) -> Tensor | None:
        return self.end_bias if self.parallel else self.o_bias

    @cached_property
    def end_bias(self) -> Tensor | None:
        """Return (d,) what a parallel block adds at every position: the biases of o and down."""
        if self.o_bias is None or self.down_bias is None:
            return self.down_bias if self.o_bias is None else self.o_bias
        return self.o_bias + self.down_bias


def is_parallel(layer: DecoderLayer) -> TypeGuard[NeoXLayer]:
    """Return True if attention and MLP both read the block's input."""
    return isinstance(layer, NeoXLayer) and layer.parallel


def inner_activation(z: Tensor, bias: Tensor | None, layer: DecoderLayer, backend: str) -> Tensor:
    """Return what `down` reads, (…, I), from what is projected, (…, I) or gated (…, 2 I)."""
    return activation(z, bias, layer.activation, isinstance(layer, LlamaLayer), backend)


def inner_activation_backward(
    grad: Tensor, z: Tensor, bias: Tensor | None, layer: DecoderLayer, backend: str
) -> Tensor:
    """Compute grad · ∂/∂z of `inner_activation`; grad (…, I)."""
    gated = isinstance(layer, LlamaLayer)
    return activation_backward(grad, z, bias, layer.activation, gated, backend)


def project_heads(
    x: Tensor,  # (…, d)
    projection: tuple[Tensor, Tensor | None],  # (heads · c, d), (heads · c,)
    layer: DecoderLayer,
    norm: Tensor | None = None,  # (c,)
) -> Tensor:  # (…, heads, c)
    """Project to one of q, k, v, with Qwen3's norm over each head where the layer has one."""
    heads = F.linear(x, *projection).unflatten(-1, (-1, layer.head_size))
    return heads if norm is None else F.rms_norm(heads, norm.shape, norm, layer.eps)


def input_norm(
    x: Tensor, delta: Tensor | None, layer: DecoderLayer, backend: str
) -> tuple[Tensor, Tensor]:
    """Return x + delta, and the norm in front of the attention."""
    bias = layer.input_norm_bias if isinstance(layer, NeoXLayer) else None
    return residual_norm(x, delta, layer.input_norm, bias, layer.eps, backend)


def post_norm(
    x: Tensor, delta: Tensor | None, layer: DecoderLayer, backend: str
) -> tuple[Tensor, Tensor]:
    """Return x + delta, and the norm in front of the MLP."""
    bias = layer.post_norm_bias if isinstance(layer, NeoXLayer) else None
    return residual_norm(x, delta, layer.post_norm, bias, layer.eps, backend)


def stacked_heads(normed: Tensor, layer: DecoderLayer) -> Tensor:
    """q, k and v of normed (B, N, d), norms over heads included: (B, N, (H + 2 K)·c)."""
    qkv = F.linear(normed, layer.qkv, layer.qkv_bias)
    if layer.q_norm is None or layer.k_norm is None:
        return qkv
    q, k, v = qkv.unflatten(-1, (-1, layer.head_size)).split(
        [layer.heads, layer.kv_heads, layer.kv_heads], dim=2
    )
    q = F.rms_norm(q, layer.q_norm.shape, layer.q_norm, layer.eps)
    k = F.rms_norm(k, layer.k_norm.shape, layer.k_norm, layer.eps)
    return torch.cat([q, k, v], dim=2).flatten(2)


def self_attention(
    normed: Tensor,  # (B, N, d)
    layer: DecoderLayer,
    cos: Tensor,  # (≥ N, r)
    sin: Tensor,  # (≥ N, r)
    backend: str,
) -> Tensor:  # (B, N, d)
    """Run causal self-attention with its input and output projections."""
    return _attended(stacked_heads(normed, layer), layer, cos, sin, backend)


def _attended(
    qkv: Tensor,  # (B, N, (H + 2 K)·c)
    layer: DecoderLayer,
    cos: Tensor,  # (≥ N, r)
    sin: Tensor,  # (≥ N, r)
    backend: str,
) -> Tensor:  # (B, N, d)
    """Run self-attention behind its input projections."""
    return F.linear(_mixed(qkv, layer, cos, sin, backend), layer.o, layer.o_bias)


def _mixed(
    qkv: Tensor, layer: DecoderLayer, cos: Tensor, sin: Tensor, backend: str
) -> Tensor:  # (B, N, H·c)
    """Mix the values by attention, heads side by side."""
    return attention(
        qkv, cos, sin, heads=layer.heads, kv_heads=layer.kv_heads, scaling=layer.scaling,
        window=layer.window, flash=layer.flash, prefix=layer.prefix, backend=backend,
    )  # fmt: skip


def inner_projection(layer: DecoderLayer) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of the projection between the MLP's norm and its activation."""
    if isinstance(layer, LlamaLayer):
        return layer.gate_up, layer.gate_up_bias
    assert isinstance(layer, NeoXLayer)
    return layer.up, layer.up_bias


def bias_behind_norm(layer: DecoderLayer) -> Tensor | None:
    """Return what is added before the MLP's activation at every position, (I,) or gated (2 I,).

    A LayerNorm's own bias passes through the projection unscaled, so it joins that one's bias.
    """
    weight, bias = inner_projection(layer)
    return F.linear(layer.post_norm_bias, weight, bias) if isinstance(layer, NeoXLayer) else bias


def mlp(normed: Tensor, layer: DecoderLayer, backend: str) -> Tensor:
    """Run the MLP behind its norm, without the residual; (…, d)."""
    return _mlp_end(inner_product(normed, layer), layer, backend)


def inner_product(normed: Tensor, layer: DecoderLayer) -> Tensor:
    """Return the MLP's first product, (…, I) or gated (…, 2 I), bias not yet added."""
    return F.linear(normed, inner_projection(layer)[0])


def _mlp_end(z: Tensor, layer: DecoderLayer, backend: str) -> Tensor:
    """Run the MLP behind its first product z, (…, I) or gated (…, 2 I), bias not yet added."""
    inner = inner_activation(z, inner_projection(layer)[1], layer, backend)
    return F.linear(inner, layer.down, layer.down_bias)


def decoder_block(
    x: Tensor,  # (B, N, d)
    delta: Tensor | None,  # (B, N, d), still to be added to x
    layer: DecoderLayer,
    cos: Tensor,  # (≥ N, r)
    sin: Tensor,  # (≥ N, r)
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Run one block on the stream x + delta, positions 0 … N − 1, causal.

    Behind a prefix these are positions P … P + N − 1, and cos and sin begin with that of P.
    What a block adds to the stream is left for the next norm, which adds and normalises in one
    pass: the result is the pair of a new stream and what is still to be added to it.
    """
    if is_parallel(layer):
        before, behind = (
            (layer.input_norm, layer.input_norm_bias), (layer.post_norm, layer.post_norm_bias),
        )  # fmt: skip
        x, normed, again = two_residual_norms(x, delta, before, behind, layer.eps, backend)
        qkv = stacked_heads(normed, layer)
        return x, parallel_block_end((qkv, inner_product(again, layer)), layer, cos, sin, backend)
    x, normed = input_norm(x, delta, layer, backend)
    attended = self_attention(normed, layer, cos, sin, backend)
    x, normed = post_norm(x, attended, layer, backend)
    return x, mlp(normed, layer, backend)


def parallel_block_end(
    projected: tuple[Tensor, Tensor],  # (B, N, (H + 2 K)·c) with its bias, (B, N, I) without
    layer: NeoXLayer,
    cos: Tensor,  # (≥ N, r)
    sin: Tensor,  # (≥ N, r)
    backend: str,
    activated: bool = False,  # the second of `projected` is what `down` reads; "triton" alone
) -> Tensor:  # (B, N, d)
    """Return what a parallel block adds to the stream, from its q, k, v and up-projection."""
    qkv, z = projected
    if backend != "triton":
        return _mlp_end(z, layer, backend) + _attended(qkv, layer, cos, sin, backend)
    # The MLP's product adds itself to what was attended, and its bias stands in that one's.
    inner = z if activated else inner_activation(z, inner_projection(layer)[1], layer, backend)
    mixed = _mixed(qkv, layer, cos, sin, backend)
    added = F.linear(mixed.flatten(0, 1), layer.o, layer.end_bias)
    added.addmm_(inner.flatten(0, 1), layer.down.T)
    return added.unflatten(0, mixed.shape[:2])


def decoder_layer(
    x: Tensor,  # (B, N, d)
    layer: DecoderLayer,
    cos: Tensor,  # (≥ N, r)
    sin: Tensor,  # (≥ N, r)
    backend: str,
) -> Tensor:  # (B, N, d)
    """Run one block by itself on any input, positions 0 … N − 1, causal."""
    x, delta = decoder_block(x, None, layer, cos, sin, backend)
    return x + delta
