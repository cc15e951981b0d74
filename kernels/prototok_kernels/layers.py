"""Frozen decoder blocks as plain tensors, and the general layer that runs them.

Letters: B rows, N positions, d hidden size, H heads, K key-value heads, c head size, r rotary size
(r ≤ c), I inner size of the MLP. Matrices lie as in `nn.Linear`: (out, in).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Layer = TypeVar("Layer", bound="DecoderLayer")

# Hugging Face's names; gelu_new and gelu_fast are the tanh formula with other roundings.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """What Llama-type and GPT-NeoX-type blocks share. Nothing here is trained."""

    input_norm: Tensor  # (d,): in front of the attention
    q: Tensor  # (H·c, d)
    k: Tensor  # (K·c, d)
    v: Tensor  # (K·c, d)
    o: Tensor  # (d, H·c)
    q_bias: Tensor | None = None  # (H·c,)
    k_bias: Tensor | None = None  # (K·c,)
    v_bias: Tensor | None = None  # (K·c,)
    o_bias: Tensor | None = None  # (d,)
    q_norm: Tensor | None = None  # (c,): RMSNorm over each head before the rotation (Qwen3)
    k_norm: Tensor | None = None  # (c,)
    post_norm: Tensor  # (d,): in front of the MLP
    up: Tensor  # (I, d)
    down: Tensor  # (d, I)
    up_bias: Tensor | None = None  # (I,)
    down_bias: Tensor | None = None  # (d,)
    heads: int
    kv_heads: int
    head_size: int
    scaling: float  # of the attention logits, 1 / √c as a rule
    eps: float  # of every norm in the block
    activation: str  # "silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh" or "relu"

    def __post_init__(self) -> None:
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(_ACTIVATIONS)}, got {self.activation!r}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    @property
    def hidden_size(self) -> int:
        return self.q.shape[1]

    def to(self: Layer, *args: Any, **kwargs: Any) -> Layer:
        """The same block with every tensor moved or cast by `Tensor.to(*args, **kwargs)`."""
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

    Covers Llama, Mistral, Qwen2 (biases on q, k, v) and Qwen3 (norm on each head of q and k).
    """

    gate: Tensor  # (I, d)
    gate_bias: Tensor | None = None  # (I,)


@dataclass(frozen=True, kw_only=True)
class NeoXLayer(DecoderLayer):
    """LayerNorm, biases, partial rotary, MLP without a gate, parallel or sequential residual."""

    input_norm_bias: Tensor  # (d,)
    post_norm_bias: Tensor  # (d,)
    parallel: bool


def activate(x: Tensor, name: str) -> Tensor:
    """The activation called `name` in a Hugging Face configuration."""
    kind = _ACTIVATIONS[name]
    if kind == "silu":
        return F.silu(x)
    if kind == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def activate_backward(grad: Tensor, x: Tensor, name: str) -> Tensor:
    """∂/∂x of `activate(x, name)`, times `grad`."""
    kind = _ACTIVATIONS[name]
    if kind == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    if kind == "relu":
        return torch.ops.aten.threshold_backward(grad, x, 0)
    tanh = "tanh" if kind == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, x, approximate=tanh)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight over the last dimension; statistics in fp32 or better."""
    return F.rms_norm(x, weight.shape, weight, eps)


def rotary(
    x: Tensor,  # (…, N, c)
    cos: Tensor,  # (N, r)
    sin: Tensor,  # (N, r)
) -> Tensor:
    """Rotate the first r coordinates of each head (the two halves of r form the pairs)."""
    r = cos.shape[-1]
    rotated = x if r == x.shape[-1] else x[..., :r]
    low, high = rotated.chunk(2, dim=-1)
    turned = rotated * cos + torch.cat([-high, low], dim=-1) * sin
    return turned if r == x.shape[-1] else torch.cat([turned, x[..., r:]], dim=-1)


def project_heads(
    x: Tensor,  # (…, d)
    weight: Tensor,  # (heads · c, d)
    bias: Tensor | None,
    layer: DecoderLayer,
    norm: Tensor | None = None,  # (c,)
) -> Tensor:  # (…, heads, c)
    """One of q, k, v, with Qwen3's norm over each head where the layer has one."""
    heads = F.linear(x, weight, bias).unflatten(-1, (-1, layer.head_size))
    return heads if norm is None else rms_norm(heads, norm, layer.eps)


def attention(
    x: Tensor,  # (B, N, d), normalised
    layer: DecoderLayer,
    cos: Tensor,  # (≥ N, r)
    sin: Tensor,  # (≥ N, r)
) -> Tensor:  # (B, N, d)
    """Causal self-attention with its output projection."""
    n = x.shape[1]
    cos, sin = cos[:n].to(x.dtype), sin[:n].to(x.dtype)
    q = project_heads(x, layer.q, layer.q_bias, layer, layer.q_norm).transpose(1, 2)
    k = project_heads(x, layer.k, layer.k_bias, layer, layer.k_norm).transpose(1, 2)
    v = project_heads(x, layer.v, layer.v_bias, layer).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        rotary(q, cos, sin),
        rotary(k, cos, sin),
        v,
        is_causal=True,
        scale=layer.scaling,
        enable_gqa=layer.heads != layer.kv_heads,
    )
    return F.linear(out.transpose(1, 2).flatten(2), layer.o, layer.o_bias)


def input_norm(x: Tensor, layer: DecoderLayer) -> Tensor:
    """The norm in front of the attention."""
    if isinstance(layer, NeoXLayer):
        weight, bias = layer.input_norm, layer.input_norm_bias
        return F.layer_norm(x, weight.shape, weight, bias, layer.eps)
    assert isinstance(layer, LlamaLayer)
    return rms_norm(x, layer.input_norm, layer.eps)


def mlp(x: Tensor, layer: DecoderLayer) -> Tensor:
    """The MLP with its norm, residual not included; x: (…, d), not normalised."""
    if isinstance(layer, NeoXLayer):
        weight, bias = layer.post_norm, layer.post_norm_bias
        x = F.layer_norm(x, weight.shape, weight, bias, layer.eps)
        inner = activate(F.linear(x, layer.up, layer.up_bias), layer.activation)
    else:
        assert isinstance(layer, LlamaLayer)
        x = rms_norm(x, layer.post_norm, layer.eps)
        inner = activate(F.linear(x, layer.gate, layer.gate_bias), layer.activation)
        inner = inner * F.linear(x, layer.up, layer.up_bias)
    return F.linear(inner, layer.down, layer.down_bias)


def llama_layer(
    x: Tensor,  # (B, N, d)
    layer: LlamaLayer,
    cos: Tensor,  # (≥ N, r)
    sin: Tensor,  # (≥ N, r)
) -> Tensor:  # (B, N, d)
    """One Llama-type block on any input, positions 0 … N − 1, causal."""
    x = x + attention(input_norm(x, layer), layer, cos, sin)
    return x + mlp(x, layer)


def neox_layer(
    x: Tensor,  # (B, N, d)
    layer: NeoXLayer,
    cos: Tensor,  # (≥ N, r)
    sin: Tensor,  # (≥ N, r)
) -> Tensor:  # (B, N, d)
    """One GPT-NeoX-type block on any input, positions 0 … N − 1, causal."""
    attended = attention(input_norm(x, layer), layer, cos, sin)
    if layer.parallel:
        return mlp(x, layer) + attended + x
    x = x + attended
    return x + mlp(x, layer)


def decoder_layer(x: Tensor, layer: DecoderLayer, cos: Tensor, sin: Tensor) -> Tensor:
    """`llama_layer` or `neox_layer`, by the type of `layer`."""
    if isinstance(layer, NeoXLayer):
        return neox_layer(x, layer, cos, sin)
    assert isinstance(layer, LlamaLayer)
    return llama_layer(x, layer, cos, sin)
