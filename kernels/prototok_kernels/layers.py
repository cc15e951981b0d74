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

from prototok_kernels.short_attention import LONGEST, short_attention

Layer = TypeVar("Layer", bound="DecoderLayer")

# Hugging Face's names of activations; gelu_new and gelu_fast are the tanh formula with other
# roundings.
ACTIVATIONS = {
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
        """Weight (H·c, d) and bias (H·c,)."""
        return self._projection(0, self.heads)

    @property
    def k(self) -> tuple[Tensor, Tensor | None]:
        """Weight (K·c, d) and bias (K·c,)."""
        return self._projection(self.heads, self.kv_heads)

    @property
    def v(self) -> tuple[Tensor, Tensor | None]:
        """Weight (K·c, d) and bias (K·c,)."""
        return self._projection(self.heads + self.kv_heads, self.kv_heads)

    def _projection(self, start: int, heads: int) -> tuple[Tensor, Tensor | None]:
        part = slice(start * self.head_size, (start + heads) * self.head_size)
        return self.qkv[part], None if self.qkv_bias is None else self.qkv_bias[part]

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


def activate(x: Tensor, name: str) -> Tensor:
    """The activation called `name` in a Hugging Face configuration."""
    kind = ACTIVATIONS[name]
    if kind == "silu":
        return F.silu(x)
    if kind == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def activate_backward(grad: Tensor, x: Tensor, name: str) -> Tensor:
    """∂/∂x of `activate(x, name)`, times `grad`."""
    kind = ACTIVATIONS[name]
    if kind == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    if kind == "relu":
        return torch.ops.aten.threshold_backward(grad, x, 0)
    tanh = "tanh" if kind == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, x, approximate=tanh)


def inner_activation(z: Tensor, layer: DecoderLayer) -> Tensor:
    """What `down` reads, (…, I), from the projections in front of it, (…, I) or gated (…, 2 I)."""
    if not isinstance(layer, LlamaLayer):
        return activate(z, layer.activation)
    gate, up = z.chunk(2, dim=-1)
    return activate(gate, layer.activation) * up


def inner_activation_backward(grad: Tensor, z: Tensor, layer: DecoderLayer) -> Tensor:
    """∂/∂z of `inner_activation(z, layer)`, times `grad` (…, I)."""
    if not isinstance(layer, LlamaLayer):
        return activate_backward(grad, z, layer.activation)
    gate, up = z.chunk(2, dim=-1)
    out = torch.empty_like(z)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    torch.mul(grad, activate(gate, layer.activation), out=grad_up)
    grad_gate.copy_(activate_backward(grad * up, gate, layer.activation))
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight over the last dimension; statistics in fp32 or better."""
    return F.rms_norm(x, weight.shape, weight, eps)


def layer_or_rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """GPT-NeoX's LayerNorm, known by its bias, or the Llama family's RMSNorm."""
    if bias is None:
        return rms_norm(x, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


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
    projection: tuple[Tensor, Tensor | None],  # (heads · c, d), (heads · c,)
    layer: DecoderLayer,
    norm: Tensor | None = None,  # (c,)
) -> Tensor:  # (…, heads, c)
    """One of q, k, v, with Qwen3's norm over each head where the layer has one."""
    heads = F.linear(x, *projection).unflatten(-1, (-1, layer.head_size))
    return heads if norm is None else rms_norm(heads, norm, layer.eps)


def causal_attention(
    q: Tensor,  # (B, H, N, c)
    k: Tensor,  # (B, K, N, c)
    v: Tensor,  # (B, K, N, c)
    scaling: float,
    window: int | None = None,
) -> Tensor:  # (B, N, H·c)
    """Causal (sliding-window where given) attention, heads merged."""
    length, mask, dtype = q.shape[2], None, v.dtype
    if q.device.type == "cpu" and dtype == torch.bfloat16:
        # Torch's bf16 attention backward on the CPU is an order of magnitude slower than its fp32
        # one; casting costs a fraction of the difference (docs/log.md has the figures).
        q, k, v = q.float(), k.float(), v.float()
    if window is not None and window < length:
        position = torch.arange(length, device=q.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).flatten(2).to(dtype)


def attention(
    x: Tensor,  # (B, N, d), normalised
    layer: DecoderLayer,
    cos: Tensor,  # (≥ N, r)
    sin: Tensor,  # (≥ N, r)
) -> Tensor:  # (B, N, d)
    """Causal self-attention with its output projection."""
    n = x.shape[1]
    heads = project_heads(x, (layer.qkv, layer.qkv_bias), layer)
    q, k, v = heads.split([layer.heads, layer.kv_heads, layer.kv_heads], dim=2)
    if layer.q_norm is not None:
        q = rms_norm(q, layer.q_norm, layer.eps)
    if layer.k_norm is not None:
        k = rms_norm(k, layer.k_norm, layer.eps)
    if x.device.type == "cpu" and n <= LONGEST and (layer.window is None or layer.window >= n):
        mixed = short_attention(q, k, v, cos, sin, layer.scaling).flatten(2)
    else:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        cos, sin = cos[:n].to(x.dtype), sin[:n].to(x.dtype)
        q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        mixed = causal_attention(q, k, v, layer.scaling, layer.window)
    return F.linear(mixed, layer.o, layer.o_bias)


def input_norm(x: Tensor, layer: DecoderLayer) -> Tensor:
    """The norm in front of the attention."""
    bias = layer.input_norm_bias if isinstance(layer, NeoXLayer) else None
    return layer_or_rms_norm(x, layer.input_norm, bias, layer.eps)


def inner_projection(layer: DecoderLayer) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of what stands between the MLP's norm and its activation."""
    if isinstance(layer, LlamaLayer):
        return layer.gate_up, layer.gate_up_bias
    assert isinstance(layer, NeoXLayer)
    return layer.up, layer.up_bias


def mlp(x: Tensor, layer: DecoderLayer) -> Tensor:
    """The MLP with its norm, residual not included; x: (…, d), not normalised."""
    bias = layer.post_norm_bias if isinstance(layer, NeoXLayer) else None
    normed = layer_or_rms_norm(x, layer.post_norm, bias, layer.eps)
    inner = inner_activation(F.linear(normed, *inner_projection(layer)), layer)
    return F.linear(inner, layer.down, layer.down_bias)


def decoder_layer(
    x: Tensor,  # (B, N, d)
    layer: DecoderLayer,
    cos: Tensor,  # (≥ N, r)
    sin: Tensor,  # (≥ N, r)
) -> Tensor:  # (B, N, d)
    """One block on any input, positions 0 … N − 1, causal."""
    attended = attention(input_norm(x, layer), layer, cos, sin)
    if isinstance(layer, NeoXLayer) and layer.parallel:
        return mlp(x, layer) + attended + x
    x = x + attended
    return x + mlp(x, layer)
