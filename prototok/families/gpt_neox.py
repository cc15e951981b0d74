"""The GPT-NeoX family (Pythia).

LayerNorm with bias, partial rotary, and a parallel or sequential residual.

Letters: B rows, N positions, d hidden size, H heads, c head size, f MLP width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from prototok.families.common import (
    STATIC_ROPE,
    RotaryTables,
    causal_attention,
    fused_linear,
    rotate,
)


@dataclass(frozen=True)
class _Norm:
    weight: Tensor  # (d,)
    bias: Tensor  # (d,)
    eps: float

    @classmethod
    def of(cls, module: nn.LayerNorm, device: torch.device, dtype: torch.dtype) -> _Norm:
        weight, bias = module.weight.detach(), module.bias.detach()
        return cls(weight.to(device, dtype), bias.to(device, dtype), module.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class _Block:
    attention_norm: _Norm
    qkv: Tensor  # (3 H c, d), q, k, v interleaved head by head
    qkv_bias: Tensor | None
    out: Tensor  # (d, H c)
    out_bias: Tensor | None
    mlp_norm: _Norm
    up: Tensor  # (f, d)
    up_bias: Tensor
    down: Tensor  # (d, f)
    down_bias: Tensor


class GPTNeoXBody:
    family = "gpt_neox"

    def __init__(
        self, blocks: list[_Block], norm: _Norm, head: Tensor, rotary: RotaryTables,
        config: PreTrainedConfig,
    ) -> None:  # fmt: skip
        self.blocks, self.norm, self.rotary = blocks, norm, rotary
        self.head: Tensor | None = head
        self.heads = config.num_attention_heads
        self.head_size = config.hidden_size // self.heads
        self.parallel = config.use_parallel_residual
        self.activation = ACT2FN[config.hidden_act]

    @staticmethod
    def covers(config: PreTrainedConfig) -> bool:
        rope = getattr(config, "rope_parameters", None) or {}
        return config.model_type == "gpt_neox" and rope.get("rope_type", "default") in STATIC_ROPE

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, device: torch.device, dtype: torch.dtype
    ) -> GPTNeoXBody:
        inner: Any = model.gpt_neox
        blocks = []
        for layer in inner.layers:
            qkv, qkv_bias = fused_linear([layer.attention.query_key_value], device, dtype)
            out, out_bias = fused_linear([layer.attention.dense], device, dtype)
            up, up_bias = fused_linear([layer.mlp.dense_h_to_4h], device, dtype)
            down, down_bias = fused_linear([layer.mlp.dense_4h_to_h], device, dtype)
            assert up_bias is not None and down_bias is not None
            blocks.append(
                _Block(
                    _Norm.of(layer.input_layernorm, device, dtype), qkv, qkv_bias, out, out_bias,
                    _Norm.of(layer.post_attention_layernorm, device, dtype),
                    up, up_bias, down, down_bias,
                )
            )  # fmt: skip
        norm = _Norm.of(inner.final_layer_norm, device, dtype)
        output: Any = model.get_output_embeddings()
        head = output.weight.detach().to(device, dtype)
        rotary = RotaryTables(inner.rotary_emb, device, dtype)
        return cls(blocks, norm, head, rotary, model.config)

    def hidden(self, inputs_embeds: Tensor) -> Tensor:
        x = inputs_embeds
        rows, length, _ = x.shape
        cos, sin = self.rotary(length)
        for block in self.blocks:
            qkv = F.linear(block.attention_norm(x), block.qkv, block.qkv_bias)
            qkv = qkv.view(rows, length, self.heads, 3, self.head_size).permute(3, 0, 2, 1, 4)
            q, k = rotate(qkv[0], cos, sin), rotate(qkv[1], cos, sin)
            mixed = causal_attention(q, k, qkv[2], self.head_size**-0.5)
            attended = F.linear(mixed, block.out, block.out_bias)
            h = block.mlp_norm(x if self.parallel else x + attended)
            h = self.activation(F.linear(h, block.up, block.up_bias))
            x = x + attended + F.linear(h, block.down, block.down_bias)
        return self.norm(x)
