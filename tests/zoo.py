"""One small model of every family and option that has a forward of its own here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from support import small_llama

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip


def neox(**changes: object) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**(SIZES | {"rope_parameters": rope} | changes)))


OWN = {
    "llama, grouped, tied": lambda: small_llama(),
    "llama, one kv head each, untied": lambda: small_llama(
        num_key_value_heads=4, tie_word_embeddings=False
    ),
    "llama, biases, wide heads": lambda: small_llama(
        attention_bias=True, mlp_bias=True, head_dim=16
    ),
    "llama, llama3 rope": lambda: small_llama(rope_parameters=LLAMA3),
    "llama, linear rope": lambda: small_llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "llama, yarn rope": lambda: small_llama(
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    ),
    "mistral, window shorter than the text": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "qwen2, window in the upper layers": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            **SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=5,
            max_window_layers=1,
        )
    ),
    "qwen3, tied": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=12, tie_word_embeddings=True)
    ),
    "gpt-neox, parallel": lambda: neox(),
    "gpt-neox, sequential": lambda: neox(use_parallel_residual=False),
    "gpt-neox, full rotary, tied, no attention bias": lambda: neox(
        attention_bias=False, tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
        },
    ),
    "gpt-neox, tanh gelu": lambda: neox(hidden_act="gelu_new"),
}  # fmt: skip


def made(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The model, built always alike, with norms and biases away from one and zero."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases at their trivial values would hide mistakes
                parameter += 0.3 * torch.randn_like(parameter)
    return model
