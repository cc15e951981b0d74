"""The GPT-NeoX family (Pythia)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from prototok.model.families.body import DecoderBody
from prototok.model.families.frozen import stacked_linear
from prototok.model.families.rotary import RotaryTables, has_static_rope
from prototok_kernels.activation import ACTIVATIONS
from prototok_kernels.layers import NeoXLayer


def covers(config: PreTrainedConfig) -> bool:
    """Return True if `body` gives what transformers would."""
    return (
        config.model_type == "gpt_neox"
        and has_static_rope(config)
        and config.hidden_act in ACTIVATIONS
    )


def body(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> DecoderBody:
    """Return the model's decoder as plain tensors."""
    inner: Any = model.gpt_neox
    output: Any = model.get_output_embeddings()
    return DecoderBody(
        family="gpt_neox",
        layers=[_layer(module, model.config, device, dtype) for module in inner.layers],
        norm=inner.final_layer_norm.weight.detach().to(device, dtype),
        norm_bias=inner.final_layer_norm.bias.detach().to(device, dtype),
        head=output.weight.detach().to(device, dtype),
        rotary=RotaryTables(inner.rotary_emb, device),
    )


def _layer(
    module: Any, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> NeoXLayer:
    attention, mlp = module.attention, module.mlp
    heads = config.num_attention_heads
    qkv, qkv_bias = stacked_linear([attention.query_key_value], device, dtype)
    o, o_bias = stacked_linear([attention.dense], device, dtype)
    up, up_bias = stacked_linear([mlp.dense_h_to_4h], device, dtype)
    down, down_bias = stacked_linear([mlp.dense_4h_to_h], device, dtype)
    before, behind = (
        [t.detach().to(device, dtype) for t in (norm.weight, norm.bias)]
        for norm in (module.input_layernorm, module.post_attention_layernorm)
    )
    head_size = config.hidden_size // heads
    return NeoXLayer(
        input_norm=before[0], input_norm_bias=before[1],
        qkv=_by_kind(qkv, heads), qkv_bias=None if qkv_bias is None else _by_kind(qkv_bias, heads),
        o=o, o_bias=o_bias, post_norm=behind[0], post_norm_bias=behind[1],
        up=up, up_bias=up_bias, down=down, down_bias=down_bias,
        heads=heads, kv_heads=heads, head_size=head_size, scaling=head_size**-0.5,
        eps=config.layer_norm_eps, activation=config.hidden_act,
        parallel=config.use_parallel_residual,
    )  # fmt: skip


def _by_kind(stack: Tensor, heads: int) -> Tensor:
    """Sort q, k, v of head 1, then of head 2, …, into all of q, then all of k, then all of v."""
    return stack.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
