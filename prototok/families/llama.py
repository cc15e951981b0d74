"""The Llama family: Llama, Mistral, Qwen2 and Qwen3.

Pre-norm blocks with RMSNorm, grouped-query attention, rotary positions over the whole head and a
gated MLP. Mistral adds a sliding window, Qwen2 biases on q, k, v, Qwen3 a norm on each head of q
and k.

Letters: B rows, N positions, d hidden size, H heads, c head size, f MLP width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from prototok.families.common import (
    STATIC_ROPE,
    RotaryTables,
    causal_attention,
    frozen,
    fused_linear,
    rotate,
)


@dataclass(frozen=True)
class _Block:
    attention_norm: Tensor  # (d,)
    qkv: Tensor  # ((H + 2 H_kv) c, d)
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # (c,)
    k_norm: Tensor | None  # (c,)
    out: Tensor  # (d, H c)
    out_bias: Tensor | None
    mlp_norm: Tensor  # (d,)
    gate_up: Tensor  # (2 f, d)
    gate_up_bias: Tensor | None
    down: Tensor  # (d, f)
    down_bias: Tensor | None
    window: int | None


class LlamaBody:
    family = "llama"

    def __init__(
        self, blocks: list[_Block], norm: Tensor, head: Tensor, rotary: RotaryTables,
        config: PreTrainedConfig,
    ) -> None:  # fmt: skip
        self.blocks, self.norm, self.rotary = blocks, norm, rotary
        self.head: Tensor | None = head
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.activation = ACT2FN[config.hidden_act]

    @staticmethod
    def covers(config: PreTrainedConfig) -> bool:
        rope = getattr(config, "rope_parameters", None) or {}
        return (
            config.model_type in ("llama", "mistral", "qwen2", "qwen3")
            and rope.get("rope_type", "default") in STATIC_ROPE
            and rope.get("partial_rotary_factor", 1.0) == 1.0
        )

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, device: torch.device, dtype: torch.dtype
    ) -> LlamaBody:
        config = model.config
        inner: Any = model.model
        lm_head: Any = model.lm_head
        blocks = []
        for layer in inner.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv, qkv_bias = fused_linear(
                [attention.q_proj, attention.k_proj, attention.v_proj], device, dtype
            )
            out, out_bias = fused_linear([attention.o_proj], device, dtype)
            gate_up, gate_up_bias = fused_linear([mlp.gate_proj, mlp.up_proj], device, dtype)
            down, down_bias = fused_linear([mlp.down_proj], device, dtype)
            q_norm, k_norm = (
                frozen([getattr(getattr(attention, name, None), "weight", None)], device, dtype)
                for name in ("q_norm", "k_norm")
            )
            blocks.append(
                _Block(
                    layer.input_layernorm.weight.detach().to(device, dtype),
                    qkv, qkv_bias, q_norm, k_norm, out, out_bias,
                    layer.post_attention_layernorm.weight.detach().to(device, dtype),
                    gate_up, gate_up_bias, down, down_bias,
                    _window(config, attention.layer_idx),
                )
            )  # fmt: skip
        norm = inner.norm.weight.detach().to(device, dtype)
        head = lm_head.weight.detach().to(device, dtype)
        return cls(blocks, norm, head, RotaryTables(inner.rotary_emb, device, dtype), config)

    def hidden(self, inputs_embeds: Tensor) -> Tensor:
        x = inputs_embeds
        rows, length, width = x.shape
        cos, sin = self.rotary(length)
        q_size, kv_size = self.heads * self.head_size, self.kv_heads * self.head_size
        for block in self.blocks:
            h = F.rms_norm(x, (width,), block.attention_norm, self.eps)
            qkv = F.linear(h, block.qkv, block.qkv_bias)
            q, k, v = (
                part.view(rows, length, -1, self.head_size)
                for part in qkv.split([q_size, kv_size, kv_size], dim=-1)
            )
            if block.q_norm is not None:
                q = F.rms_norm(q, (self.head_size,), block.q_norm, self.eps)
                k = F.rms_norm(k, (self.head_size,), block.k_norm, self.eps)
            q = rotate(q.transpose(1, 2), cos, sin)
            k = rotate(k.transpose(1, 2), cos, sin)
            mixed = causal_attention(q, k, v.transpose(1, 2), self.head_size**-0.5, block.window)
            x = x + F.linear(mixed, block.out, block.out_bias)
            h = F.rms_norm(x, (width,), block.mlp_norm, self.eps)
            gate, up = F.linear(h, block.gate_up, block.gate_up_bias).chunk(2, dim=-1)
            x = x + F.linear(self.activation(gate) * up, block.down, block.down_bias)
        return F.rms_norm(x, (width,), self.norm, self.eps)


def _window(config: PreTrainedConfig, layer: int) -> int | None:
    """The layer's sliding window; Qwen names the layers that have one, Mistral has it in all."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window is None or (types is not None and types[layer] != "sliding_attention"):
        return None
    return int(window)
