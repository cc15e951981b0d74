"""Published model shapes, for speed measurements where the weights cannot be had."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from prototok.common.arguments import hint
from prototok.model.frozen_lm import FrozenLM
from prototok.model.load import device_of, dtype_of, load

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _pythia(width: int, layers: int, heads: int) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=50304, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=2048, tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
        },
    )  # fmt: skip


def _llama(
    width: int, wide: int, layers: int, heads: int, factor: float, tied: bool
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256, hidden_size=width, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, max_position_embeddings=131072,
        rms_norm_eps=1e-5, tie_word_embeddings=tied, bos_token_id=128000, eos_token_id=128001,
        rope_parameters={**_LLAMA3_ROPE, "factor": factor},
    )  # fmt: skip


def _smollm2() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip


SHAPES = {
    "smollm2-135m": _smollm2,
    "pythia-160m": lambda: _pythia(768, 12, 12),
    "pythia-410m": lambda: _pythia(1024, 24, 16),
    "pythia-1.4b": lambda: _pythia(2048, 24, 16),
    "llama-3.2-1b": lambda: _llama(2048, 8192, 16, 32, 32.0, True),
    "llama-3.2-3b": lambda: _llama(3072, 8192, 28, 24, 32.0, True),
    "llama-3.1-8b": lambda: _llama(4096, 14336, 32, 32, 8.0, False),
    "smoke": lambda: _pythia(64, 2, 2),  # nobody's: to see whether a script runs
}


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Make a model of a published shape with random weights on the device, for speed alone.

    Raises:
        ValueError: an unknown shape.
    """
    if shape not in SHAPES:
        raise ValueError(
            f"shape: {shape!r} is not one of {', '.join(SHAPES)}" + hint(shape, SHAPES)
        )
    config = SHAPES[shape]()
    made: Any = GPTNeoXForCausalLM if isinstance(config, GPTNeoXConfig) else LlamaForCausalLM
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(0)
            model: PreTrainedModel = made(config)
    finally:
        torch.set_default_dtype(previous)
    model.config.name_or_path = f"{shape} (random weights)"
    return model.eval()


def load_shape(
    shape: str, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> FrozenLM:
    """Freeze a `random_model`; device and dtype as in `prototok.load`."""
    device = device_of(device)
    dtype = dtype_of(dtype, device)
    return load(random_model(shape, device, dtype), device, dtype)
