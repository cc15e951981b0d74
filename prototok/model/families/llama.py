"""The Llama family: Llama, Mistral, Qwen2 and Qwen3."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from prototok.model.families.body import DecoderBody
from prototok.model.families.frozen import stacked, stacked_linear
from prototok.model.families.rotary import RotaryTables, has_static_rope
from prototok_kernels.activation import ACTIVATIONS
from prototok_kernels.layers import LlamaLayer


def covers(config: PreTrainedConfig) -> bool:
    """Return True if `body` gives what transformers would."""
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in ("llama", "mistral", "qwen2", "qwen3")
        and has_static_rope(config)
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and config.hidden_act in ACTIVATIONS
    )


def body(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> DecoderBody:
    """Return the model's decoder as plain tensors."""
    inner: Any = model.model
    lm_head: Any = model.lm_head
    return DecoderBody(
        family="llama",
        layers=[_layer(module, model.config, device, dtype) for module in inner.layers],
        norm=inner.norm.weight.detach().to(device, dtype),
        norm_bias=None,
        head=lm_head.weight.detach().to(device, dtype),
        rotary=RotaryTables(inner.rotary_emb, device),
    )


def _layer(
    module: Any, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> LlamaLayer:
    attention, mlp = module.self_attn, module.mlp
    qkv, qkv_bias = stacked_linear(
        [attention.q_proj, attention.k_proj, attention.v_proj], device, dtype
    )
    o, o_bias = stacked_linear([attention.o_proj], device, dtype)
    gate_up, gate_up_bias = stacked_linear([mlp.gate_proj, mlp.up_proj], device, dtype)
    down, down_bias = stacked_linear([mlp.down_proj], device, dtype)
    q_norm, k_norm = (
        stacked([getattr(getattr(attention, name, None), "weight", None)], device, dtype)
        for name in ("q_norm", "k_norm")
    )
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return LlamaLayer(
        input_norm=module.input_layernorm.weight.detach().to(device, dtype),
        qkv=qkv, qkv_bias=qkv_bias, q_norm=q_norm, k_norm=k_norm, o=o, o_bias=o_bias,
        post_norm=module.post_attention_layernorm.weight.detach().to(device, dtype),
        gate_up=gate_up, gate_up_bias=gate_up_bias, down=down, down_bias=down_bias,
        heads=heads, kv_heads=config.num_key_value_heads, head_size=head_size,
        scaling=head_size**-0.5, eps=config.rms_norm_eps, activation=config.hidden_act,
        window=_window(config, attention.layer_idx),
    )  # fmt: skip


def _window(config: PreTrainedConfig, layer: int) -> int | None:
    """Return the layer's window; Qwen names the layers that have one, Mistral has it in all."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window is None or (types is not None and types[layer] != "sliding_attention"):
        return None
    return int(window)
