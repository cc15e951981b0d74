"""The Llama family: Llama, Mistral, Qwen2 and Qwen3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from prototok.model.families.body import Ends
from prototok.model.families.frozen import stacked, stacked_linear
from prototok.model.families.rotary import RotaryTables
from prototok.model.families.stock import activation_of, why_not_static
from prototok_kernels.layers import LlamaLayer

NAME = "llama"
CLASSES = {
    f"transformers.models.{kind}.modeling_{kind}.{name}ForCausalLM"
    for kind, name in (
        ("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"),
    )
}  # fmt: skip


def refusal(model: PreTrainedModel) -> str | None:
    """Return why the blocks here are not those of a stock model; None where they are."""
    inner: Any = model.model
    first = inner.layers[0]
    if activation_of(first.mlp.act_fn) is None:
        return f"there is no kernel for its activation, {type(first.mlp.act_fn).__name__}"
    if 2 * len(inner.rotary_emb.inv_freq) != first.self_attn.head_dim:
        return "its rotary covers a part of each head"
    return why_not_static(inner.rotary_emb)


def layers(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype
) -> Iterator[LlamaLayer]:
    """Yield the model's blocks as plain tensors, one at a time."""
    inner: Any = model.model
    for i, module in enumerate(inner.layers):
        yield _layer(module, _window(inner, i), device, dtype)


def ends(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> Ends:
    """Return what stands in front of the blocks and behind them."""
    inner: Any = model.model
    lm_head: Any = model.lm_head
    return Ends(
        embedding=inner.embed_tokens.weight.detach().to(device, dtype),
        rotary=RotaryTables(inner.rotary_emb, device),
        norm=inner.norm.weight.detach().to(device, dtype),
        norm_bias=None,
        head=lm_head.weight.detach().to(device, dtype),
    )


def _layer(module: Any, window: int | None, device: torch.device, dtype: torch.dtype) -> LlamaLayer:
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
    activation = activation_of(mlp.act_fn)
    assert activation is not None
    return LlamaLayer(
        input_norm=module.input_layernorm.weight.detach().to(device, dtype),
        qkv=qkv, qkv_bias=qkv_bias, q_norm=q_norm, k_norm=k_norm, o=o, o_bias=o_bias,
        post_norm=module.post_attention_layernorm.weight.detach().to(device, dtype),
        gate_up=gate_up, gate_up_bias=gate_up_bias, down=down, down_bias=down_bias,
        heads=attention.q_proj.out_features // attention.head_dim,
        kv_heads=attention.k_proj.out_features // attention.head_dim,
        head_size=attention.head_dim, scaling=attention.scaling,
        eps=module.input_layernorm.variance_epsilon, activation=activation, window=window,
    )  # fmt: skip


def _window(inner: Any, layer: int) -> int | None:
    """Return the sliding window that the model masks a layer with.

    Llama never has one, whatever its config says; Mistral has it in all layers, whatever types its
    config gives them; Qwen names the layers that have it.
    """
    kind, config = type(inner).__name__, inner.config
    if kind == "LlamaModel" or config.sliding_window is None:
        return None
    if kind != "MistralModel" and config.layer_types[layer] != "sliding_attention":
        return None
    return int(config.sliding_window)
