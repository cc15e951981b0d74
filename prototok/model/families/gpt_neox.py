"""The GPT-NeoX family (Pythia)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prototok.model.families.body import Ends
from prototok.model.families.frozen import stacked_linear
from prototok.model.families.rotary import RotaryTables
from prototok.model.families.stock import activation_of, why_not_static
from prototok_kernels.layers import NeoXLayer

NAME = "gpt_neox"
CLASSES = {"transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXForCausalLM"}


def refusal(model: PreTrainedModel) -> str | None:
    """Return why the blocks here are not those of a stock model; None where they are."""
    inner: Any = model.gpt_neox
    act = inner.layers[0].mlp.act
    if activation_of(act) is None:
        return f"there is no kernel for its activation, {type(act).__name__}"
    return why_not_static(inner.rotary_emb)


def layers(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> Iterator[NeoXLayer]:
    """Yield the model's blocks as plain tensors, one at a time."""
    inner: Any = model.gpt_neox
    for module in inner.layers:
        yield _layer(module, device, dtype)


def ends(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> Ends:
    """Return what stands in front of the blocks and behind them."""
    inner: Any = model.gpt_neox
    lm_head: Any = model.lm_head
    return Ends(
        embedding=inner.embed_in.weight.detach().to(device, dtype),
        rotary=RotaryTables(inner.rotary_emb, device),
        norm=inner.final_layer_norm.weight.detach().to(device, dtype),
        norm_bias=inner.final_layer_norm.bias.detach().to(device, dtype),
        head=lm_head.weight.detach().to(device, dtype),
    )


def _layer(module: Any, device: torch.device, dtype: torch.dtype) -> NeoXLayer:
    attention, mlp = module.attention, module.mlp
    head_size = attention.head_size
    heads = attention.query_key_value.out_features // (3 * head_size)
    qkv, qkv_bias = stacked_linear([attention.query_key_value], device, dtype)
    o, o_bias = stacked_linear([attention.dense], device, dtype)
    up, up_bias = stacked_linear([mlp.dense_h_to_4h], device, dtype)
    down, down_bias = stacked_linear([mlp.dense_4h_to_h], device, dtype)
    before, behind = (
        [t.detach().to(device, dtype) for t in (norm.weight, norm.bias)]
        for norm in (module.input_layernorm, module.post_attention_layernorm)
    )
    activation = activation_of(mlp.act)
    assert activation is not None
    return NeoXLayer(
        input_norm=before[0], input_norm_bias=before[1],
        qkv=_by_kind(qkv, heads), qkv_bias=None if qkv_bias is None else _by_kind(qkv_bias, heads),
        o=o, o_bias=o_bias, post_norm=behind[0], post_norm_bias=behind[1],
        up=up, up_bias=up_bias, down=down, down_bias=down_bias,
        heads=heads, kv_heads=heads, head_size=head_size, scaling=attention.scaling,
        eps=module.input_layernorm.eps, activation=activation,
        parallel=module.use_parallel_residual,
    )  # fmt: skip


def _by_kind(stack: Tensor, heads: int) -> Tensor:
    """Sort q, k, v of head 1, then of head 2, …, into all of q, then all of k, then all of v."""
    return stack.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
