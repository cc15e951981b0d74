"""The collapsed first layer against the general one on the expanded input [e, m, …, m]."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTNeoXConfig, LlamaConfig, Qwen3Config
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer as HFNeoXLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from prototok_kernels.first_layer import _low_rank_pays, first_layer, first_layer_ref
from prototok_kernels.layers import DecoderLayer, LlamaLayer, NeoXLayer, decoder_layer

D, INNER, HEADS, HEAD_SIZE = 32, 56, 4, 8
LENGTHS = [1, 2, 3, 17, 64]


def random_tensors(seed: int, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        t = torch.randn(shape, generator=generator, dtype=torch.float64)
        norm_weight = name.endswith("norm")
        tensors[name] = 1 + 0.3 * t if norm_weight else 0.6 * t / (shape[-1] ** 0.5)
    return tensors


def llama(kv_heads: int = 2, biases: bool = False, qk_norm: bool = False) -> LlamaLayer:
    hc, kc = HEADS * HEAD_SIZE, kv_heads * HEAD_SIZE
    shapes: dict[str, tuple[int, ...]] = {
        "q": (hc, D), "k": (kc, D), "v": (kc, D), "o": (D, hc), "gate": (INNER, D),
        "up": (INNER, D), "down": (D, INNER), "input_norm": (D,), "post_norm": (D,),
    }  # fmt: skip
    if biases:
        shapes |= {
            "q_bias": (hc,), "k_bias": (kc,), "v_bias": (kc,), "o_bias": (D,),
            "gate_bias": (INNER,), "up_bias": (INNER,), "down_bias": (D,),
        }  # fmt: skip
    if qk_norm:
        shapes |= {"q_norm": (HEAD_SIZE,), "k_norm": (HEAD_SIZE,)}
    return LlamaLayer(
        **random_tensors(1, **shapes),  # type: ignore[arg-type]
        heads=HEADS, kv_heads=kv_heads, head_size=HEAD_SIZE, scaling=HEAD_SIZE**-0.5,
        eps=1e-5, activation="silu",
    )  # fmt: skip


def neox(parallel: bool, activation: str = "gelu") -> NeoXLayer:
    shapes: dict[str, tuple[int, ...]] = {
        "q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "up": (INNER, D), "down": (D, INNER),
        "q_bias": (D,), "k_bias": (D,), "v_bias": (D,), "o_bias": (D,), "up_bias": (INNER,),
        "down_bias": (D,), "input_norm": (D,), "input_norm_bias": (D,), "post_norm": (D,),
        "post_norm_bias": (D,),
    }  # fmt: skip
    return NeoXLayer(
        **random_tensors(2, **shapes),  # type: ignore[arg-type]
        heads=HEADS, kv_heads=HEADS, head_size=HEAD_SIZE, scaling=HEAD_SIZE**-0.5,
        eps=1e-5, activation=activation, parallel=parallel,
    )  # fmt: skip


def rotary_tables(
    length: int, rotary_size: int = HEAD_SIZE, frequencies: Tensor | None = None, factor: float = 1
) -> tuple[Tensor, Tensor]:
    if frequencies is None:
        frequencies = 10000.0 ** (-torch.arange(0, rotary_size, 2).double() / rotary_size)
    angle = torch.arange(length).double()[:, None] * frequencies.double()
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos() * factor, angle.sin() * factor


def llama3_frequencies() -> Tensor:
    rope = {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=D, num_attention_heads=HEADS, rope_parameters=rope)
    return LlamaRotaryEmbedding(config).inv_freq


# name → (layer, how its cos and sin tables are made)
CASES: dict[str, tuple[DecoderLayer, Callable[[int], tuple[Tensor, Tensor]]]] = {
    "llama-mha": (llama(kv_heads=HEADS), rotary_tables),
    "llama-gqa": (llama(), rotary_tables),
    "llama-gqa-biases": (llama(biases=True), rotary_tables),
    "qwen3-qk-norm": (llama(qk_norm=True), rotary_tables),
    "llama3-scaled-rope": (llama(), lambda n: rotary_tables(n, frequencies=llama3_frequencies())),
    "yarn-attention-factor": (llama(), lambda n: rotary_tables(n, factor=1.3)),
    "neox-parallel": (neox(True), rotary_tables),
    "neox-parallel-partial-rotary": (neox(True), lambda n: rotary_tables(n, 2)),
    "neox-sequential-partial-rotary": (neox(False), lambda n: rotary_tables(n, 4)),
    "neox-sequential-gelu-tanh": (neox(False, "gelu_new"), rotary_tables),
}


def vectors(rows: int, groups: int | None = None, size: int = D, seed: int = 3) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    m = torch.randn(groups or rows, size, generator=generator, dtype=torch.float64)
    group = None if groups is None else torch.arange(rows).mul(7).remainder(groups)
    return e.requires_grad_(), m.requires_grad_(), group


def expanded(e: Tensor, m: Tensor, group: Tensor | None, length: int) -> Tensor:
    m = m if group is None else m[group]
    return torch.cat([e[:, None], m[:, None].expand(-1, length - 1, -1)], dim=1)


def probe(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def with_gradients(h: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    loss = (h * probe(h.shape).to(h.dtype)).sum()
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    filled = (torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True))
    return h.detach(), *filled


def torch_backend(*args: Any) -> Tensor:
    return first_layer(*args, backend="torch")


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("implementation", [first_layer_ref, torch_backend])
@pytest.mark.parametrize("case", CASES)
def test_equals_general_layer(
    case: str, implementation: Callable[..., Tensor], length: int, groups: int | None
) -> None:
    layer, tables = CASES[case]
    cos, sin = tables(length)
    e, m, group = vectors(3, groups)
    expected = with_gradients(
        decoder_layer(expanded(e, m, group, length), layer, cos, sin), e, m
    )
    found = with_gradients(implementation(e, m, group, length, layer, cos, sin), e, m)
    for f, x in zip(found, expected, strict=True):
        torch.testing.assert_close(f, x, rtol=1e-9, atol=1e-9)
