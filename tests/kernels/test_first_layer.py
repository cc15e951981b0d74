"""The collapsed first layer against the general one on the expanded input [e, m, …, m]."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, LlamaConfig, Qwen3Config
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer as HFNeoXLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from plans import plan_for
from prototok_kernels import packed
from prototok_kernels.backend import this_machine, unavailable
from prototok_kernels.layers import DecoderLayer, LlamaLayer, NeoXLayer, decoder_layer, is_parallel
from prototok_kernels.pair import first_layer_cpu
from prototok_kernels.pair.first_layer import first_layer, first_layer_ref

HERE = Path(__file__).parent
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
        "qkv": (hc + 2 * kc, D), "o": (D, hc), "gate_up": (2 * INNER, D), "down": (D, INNER),
        "input_norm": (D,), "post_norm": (D,),
    }  # fmt: skip
    if biases:
        shapes |= {
            "qkv_bias": (hc + 2 * kc,), "o_bias": (D,), "gate_up_bias": (2 * INNER,),
            "down_bias": (D,),
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
        "qkv": (3 * D, D), "qkv_bias": (3 * D,), "o": (D, D), "o_bias": (D,), "up": (INNER, D),
        "up_bias": (INNER,), "down": (D, INNER), "down_bias": (D,), "input_norm": (D,),
        "input_norm_bias": (D,), "post_norm": (D,), "post_norm_bias": (D,),
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


def planned(backend: str, *args: Any) -> Tensor:
    e, _, _, length, layer, *_ = args
    return first_layer(*args, plan_for([layer], len(e), length, backend))


def torch_backend(*args: Any) -> Tensor:
    return planned("torch", *args)


def cpu_backend(*args: Any) -> Tensor:
    return planned("cpu", *args)


needs_cpp = pytest.mark.skipif(
    unavailable("cpu", "cpu") is not None, reason="needs the C++ kernels"
)


# Where Triton runs: on the CPU by its interpreter.
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def triton_backend(*args: Any) -> Tensor:
    """On that device, from and to the CPU; gradients pass through."""
    moved = [a.to(TRITON_DEVICE) if isinstance(a, (Tensor, DecoderLayer)) else a for a in args]
    return planned("triton", *moved).cpu()


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", CASES)
def test_equals_general_layer(case: str, length: int, groups: int | None) -> None:
    layer, tables = CASES[case]
    cos, sin = tables(length)
    e, m, group = vectors(3, groups)
    in_full = decoder_layer(expanded(e, m, group, length), layer, cos, sin, "torch")
    expected = with_gradients(in_full, e, m)
    for implementation in (first_layer_ref, torch_backend):
        found = with_gradients(implementation(e, m, group, length, layer, cos, sin), e, m)
        for f, x in zip(found, expected, strict=True):
            torch.testing.assert_close(f, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("implementation", [first_layer_ref, torch_backend])
@pytest.mark.parametrize("case", ["llama-gqa-biases", "qwen3-qk-norm", "neox-parallel",
                                  "neox-sequential-gelu-tanh"])  # fmt: skip
def test_gradcheck(case: str, implementation: Callable[..., Tensor], groups: int | None) -> None:
    layer, tables = CASES[case]
    length = 9
    plan = plan_for([layer], 2, length, "torch")
    assert is_parallel(layer) or plan.first_mlp.taken == "span"
    e, m, group = vectors(2, groups)
    cos, sin = tables(length)
    assert torch.autograd.gradcheck(
        lambda e, m: implementation(e, m, group, length, layer, cos, sin), (e, m), fast_mode=True
    )


def stacked(modules: list[nn.Module], name: str) -> dict[str, Tensor]:
    """`name` and, where there is one, `name`_bias of several nn.Linear with one input."""
    out = {name: torch.cat([module.weight for module in modules])}
    if modules[0].bias is not None:
        out[f"{name}_bias"] = torch.cat([module.bias for module in modules])
    return out


def hf_attention(attn: nn.Module) -> dict[str, Tensor]:
    out = stacked([attn.q_proj, attn.k_proj, attn.v_proj], "qkv") | stacked([attn.o_proj], "o")
    if hasattr(attn, "q_norm"):
        out |= {"q_norm": attn.q_norm.weight.detach(), "k_norm": attn.k_norm.weight.detach()}
    return out


def hf_llama_like(kind: str) -> tuple[nn.Module, DecoderLayer]:
    sizes: dict[str, Any] = {
        "hidden_size": D, "intermediate_size": INNER, "num_attention_heads": HEADS,
        "num_key_value_heads": 2, "head_dim": HEAD_SIZE, "attn_implementation": "sdpa",
    }  # fmt: skip
    if kind == "llama":
        module: Any = LlamaDecoderLayer(LlamaConfig(**sizes, mlp_bias=True, attention_bias=True), 0)
    else:
        module = Qwen3DecoderLayer(Qwen3Config(**sizes), 0)
    module = randomise(module)
    # Their RMSNorm stops at fp32; torch's own lets the comparison run in fp64.
    for owner, name in [(module, "input_layernorm"), (module, "post_attention_layernorm"),
                        (module.self_attn, "q_norm"), (module.self_attn, "k_norm")]:  # fmt: skip
        if hasattr(owner, name):
            weight = getattr(owner, name).weight
            norm = nn.RMSNorm(weight.shape, eps=1e-6, dtype=torch.float64)
            norm.weight = weight
            setattr(owner, name, norm)
    mlp = module.mlp
    layer = LlamaLayer(
        **hf_attention(module.self_attn), **stacked([mlp.gate_proj, mlp.up_proj], "gate_up"),
        **stacked([mlp.down_proj], "down"),
        input_norm=module.input_layernorm.weight.detach(),
        post_norm=module.post_attention_layernorm.weight.detach(),
        heads=HEADS, kv_heads=2, head_size=HEAD_SIZE, scaling=module.self_attn.scaling,
        eps=1e-6, activation="silu",
    )  # fmt: skip
    return module, layer


def by_kind(stack: Tensor) -> Tensor:
    """From q, k, v of head 1, then of head 2, … to all of q, then all of k, then all of v."""
    split = stack.detach().unflatten(0, (HEADS, 3, HEAD_SIZE))
    return torch.cat([split[:, i].flatten(0, 1) for i in range(3)])


def hf_neox(parallel: bool) -> tuple[nn.Module, DecoderLayer]:
    config = GPTNeoXConfig(
        hidden_size=D, intermediate_size=INNER, num_attention_heads=HEADS, rotary_pct=0.25,
        use_parallel_residual=parallel, hidden_act="gelu", attn_implementation="sdpa",
    )  # fmt: skip
    module: Any = randomise(HFNeoXLayer(config, 0))
    attn, mlp = module.attention, module.mlp
    layer = NeoXLayer(
        qkv=by_kind(attn.query_key_value.weight), qkv_bias=by_kind(attn.query_key_value.bias),
        **stacked([attn.dense], "o"), **stacked([mlp.dense_h_to_4h], "up"),
        **stacked([mlp.dense_4h_to_h], "down"),
        input_norm=module.input_layernorm.weight.detach(),
        input_norm_bias=module.input_layernorm.bias.detach(),
        post_norm=module.post_attention_layernorm.weight.detach(),
        post_norm_bias=module.post_attention_layernorm.bias.detach(),
        heads=HEADS, kv_heads=HEADS, head_size=HEAD_SIZE, scaling=attn.scaling,
        eps=config.layer_norm_eps, activation="gelu", parallel=parallel,
    )  # fmt: skip
    return module, layer


def randomise(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    for parameter in module.double().parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        centre = 1.0 if parameter.ndim == 1 else 0.0
        parameter.data.copy_(centre + 0.2 * noise)
        parameter.requires_grad_(False)
    return module.eval()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "neox-parallel", "neox-sequential"])
def test_equals_transformers(kind: str) -> None:
    neox_kind = kind.startswith("neox")
    module, layer = hf_neox(kind == "neox-parallel") if neox_kind else hf_llama_like(kind)
    length = 17
    cos, sin = rotary_tables(length, 2 if neox_kind else HEAD_SIZE)
    e, m, _ = vectors(3)
    mask = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    x = expanded(e, m, None, length)
    theirs = module(x, attention_mask=mask, position_embeddings=(cos[None], sin[None]))
    expected = with_gradients(theirs, e, m)
    in_full = decoder_layer(expanded(e, m, None, length), layer, cos, sin, "torch")
    general = with_gradients(in_full, e, m)
    found = with_gradients(torch_backend(e, m, None, length, layer, cos, sin), e, m)
    for g, f, x in zip(general, found, expected, strict=True):
        torch.testing.assert_close(g, x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(f, x, rtol=1e-9, atol=1e-9)


def errors_against_fp64(
    layer: DecoderLayer,
    tables: tuple[Tensor, Tensor],
    length: int,
    implementations: dict[str, Callable[..., Tensor]],
    groups: int | None = None,
    size: int = D,
) -> dict[str, list[float]]:
    """Relative errors of h1, ∂e and ∂m for each implementation, e and m in fp32."""
    e, m, group = vectors(3, groups, size)
    e, m = (t.detach().float().requires_grad_() for t in (e, m))
    exact = layer.to(torch.float64)
    x = expanded(e.double(), m.double(), group, length)
    truth = with_gradients(decoder_layer(x, exact, *tables, "torch"), e, m)
    out = {}
    for name, implementation in implementations.items():
        h = implementation(e, m, group, length, layer, *tables)
        assert h.dtype == layer.dtype
        pairs = zip(with_gradients(h, e, m), truth, strict=True)
        out[name] = [
            float((f.double() - t).norm() / t.double().norm().clamp(min=1e-30)) for f, t in pairs
        ]
    return out


def general(*args: Any) -> Tensor:
    e, m, group, length, layer, cos, sin = args
    return decoder_layer(expanded(e, m, group, length).to(layer.dtype), layer, cos, sin, "torch")


def assert_as_good_as_general(errors: dict[str, list[float]], dtype: torch.dtype) -> None:
    floor = torch.finfo(dtype).eps  # a gradient the general layer happens to hit exactly
    for name, found in errors.items():
        for f, plain in zip(found, errors["general"], strict=True):
            assert f <= 3 * max(plain, floor), f"{name}: {errors}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_low_precision_errs_no_more_than_general_layer(case: str, dtype: torch.dtype) -> None:
    layer, tables = CASES[case]
    implementations = {"general": general, "ref": first_layer_ref, "torch": torch_backend}
    errors = errors_against_fp64(layer.to(dtype), tables(70), 70, implementations)
    assert_as_good_as_general(errors, dtype)


@needs_cpp
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("length", [9, 17, 33, 70])
@pytest.mark.parametrize("case", [case for case in CASES if "parallel" not in case])
def test_cpp_errs_no_more_than_general_layer(case: str, length: int, groups: int | None) -> None:
    layer, tables = CASES[case]
    layer = layer.to(torch.bfloat16)
    taken = plan_for([layer], 3, length, "auto").first_layer.taken
    assert (taken == "cpu") == (this_machine().packed is not None)
    implementations = {"general": general, "cpu": cpu_backend}
    errors = errors_against_fp64(layer, tables(length), length, implementations, groups)
    assert_as_good_as_general(errors, torch.bfloat16)


@needs_cpp
def test_cpp_of_many_heads_and_sizes_off_every_vector() -> None:
    """19 heads are two vectors of them; no width is a multiple of 16, and N not of a tile."""
    heads, size, inner, d = 19, 6, 74, 50
    shapes = {
        "qkv": (3 * heads * size, d), "o": (d, heads * size), "gate_up": (2 * inner, d),
        "down": (d, inner), "input_norm": (d,), "post_norm": (d,), "down_bias": (d,),
    }  # fmt: skip
    layer = LlamaLayer(
        **random_tensors(5, **shapes), heads=heads, kv_heads=heads, head_size=size,
        scaling=size**-0.5, eps=1e-5, activation="silu",
    ).to(torch.bfloat16)  # fmt: skip
    implementations = {"general": general, "cpu": cpu_backend}
    errors = errors_against_fp64(layer, rotary_tables(90, size), 90, implementations, size=d)
    assert_as_good_as_general(errors, torch.bfloat16)


@needs_cpp
def test_cpp_gives_the_same_bits_with_any_number_of_threads_and_follows_its_weights() -> None:
    layer, tables = CASES["llama-gqa-biases"]
    layer, tables = layer.to(torch.bfloat16), tables(33)
    before = torch.get_num_threads()

    def found(threads: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(threads)
        e, m, group = vectors(5, 2)
        return with_gradients(cpu_backend(e, m, group, 33, layer, *tables), e, m)

    try:
        one, three = found(1), found(3)
        layer.gate_up.mul_(2)
        changed = found(1)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    assert not torch.equal(one[0], changed[0])


@needs_cpp
@pytest.mark.parametrize("case", ["llama-gqa-biases", "neox-sequential-gelu-tanh"])
def test_cpp_packs_weights_once_and_lets_them_go(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, tables = CASES[case]
    layer, made, held = layer.to(torch.bfloat16), [], len(packed._packed)
    if not this_machine().packed:
        pytest.skip("no products of bf16 pairs here")

    def counted(**arguments: Any) -> Any:
        made.append(real(**arguments))
        return made[-1]

    real = first_layer_cpu._cpu.FirstLayer
    monkeypatch.setattr(first_layer_cpu._cpu, "FirstLayer", counted)
    for _ in range(3):
        e, m, group = vectors(3)
        with_gradients(cpu_backend(e, m, group, 17, layer, *tables(17)), e, m)
    assert len(made) == 1 and len(packed._packed) == held + 1
    del layer
    assert len(packed._packed) == held


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_logits_hundreds_of_nats_apart(backend: str) -> None:
    """Qwen2's key biases; a prefix sum of exp(logit − max) would underflow to log 0."""
    layer, tables = CASES["llama-gqa-biases"]
    bias, values = layer.qkv_bias, layer.kv_heads * HEAD_SIZE
    loud = torch.cat([25 * bias[:-values].sign(), bias[-values:]])
    dtype = torch.bfloat16 if backend == "cpu" else torch.float32  # the C++ takes no other
    layer = dataclasses.replace(layer, qkv_bias=loud).to(dtype)
    if backend == "triton":
        pytest.importorskip("triton")
    if backend == "cpu" and unavailable("cpu", "cpu"):
        pytest.skip("needs the C++ kernels")
    ways = {"torch": torch_backend, "cpu": cpu_backend, "triton": triton_backend}
    implementations = {"general": general, "found": ways[backend]}
    errors = errors_against_fp64(layer, tables(33), 33, implementations)
    assert_as_good_as_general(errors, dtype)


@pytest.mark.parametrize(
    ("case", "length", "dtype", "groups"),
    [
        (case, length, dtype, groups)
        for case in ("llama-gqa", "neox-parallel-partial-rotary", "neox-sequential-gelu-tanh")
        for length, dtype, groups in [
            (1, torch.float32, None),
            (2, torch.float32, 2),
            (17, torch.float32, None),
            (17, torch.bfloat16, 2),
        ]
    ]
    + [("llama-gqa", 70, torch.float32, 2), ("neox-parallel", 70, torch.bfloat16, None)]
    + [
        (case, 17, torch.float32, None)
        for case in (
            "llama-gqa-biases",
            "qwen3-qk-norm",
            "yarn-attention-factor",
        )
    ],
)
def test_triton(case: str, length: int, dtype: torch.dtype, groups: int | None) -> None:
    pytest.importorskip("triton")
    layer, tables = CASES[case]
    implementations = {"general": general, "triton": triton_backend}
    errors = errors_against_fp64(layer.to(dtype), tables(length), length, implementations, groups)
    assert_as_good_as_general(errors, dtype)


def poison_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what is made to be written with NaN, which stays where nothing is written."""
    for name in ("empty_like", "empty"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=original, **k: f(*a, **k).fill_(torch.nan))
    new_empty = Tensor.new_empty
    monkeypatch.setattr(
        Tensor, "new_empty", lambda self, *a, **k: new_empty(self, *a, **k).fill_(torch.nan)
    )


@pytest.mark.parametrize("front", [0, 1, 3])
def test_triton_writes_every_element(monkeypatch: pytest.MonkeyPatch, front: int) -> None:
    """Sizes off every tile boundary, all workspaces poisoned with NaN."""
    pytest.importorskip("triton")
    from prototok_kernels.pair.first_layer_triton import affine_scan

    poison_workspaces(monkeypatch)
    shapes = ((2, 3, 37), (2, 3, 37), (2, front, 3, 37), (2, 2 + 3 * (1 + front), 19))
    a, b, u, span = (torch.randn(s, device=TRITON_DEVICE, requires_grad=True) for s in shapes)
    x, coef = affine_scan(a, b, u if front else None, span)
    leaves = (a, b, u, span) if front else (a, b, span)
    grads = torch.autograd.grad(x.square().sum() + coef.square().sum(), leaves)
    assert all(t.isfinite().all() for t in (x, coef, *grads))


@pytest.mark.parametrize(("case", "front"), [
    ("qwen3-qk-norm", 0), ("llama-gqa", 2), ("neox-parallel-partial-rotary", 2),
])  # fmt: skip
def test_triton_writes_the_whole_span(
    monkeypatch: pytest.MonkeyPatch, case: str, front: int
) -> None:
    """What the two vectors' kernels leave unwritten would be NaN."""
    pytest.importorskip("triton")
    from prototok_kernels.pair.combined_triton import (
        combined_activation,
        combined_activation_backward,
    )
    from prototok_kernels.pair.span_triton import span_by_triton

    layer, tables = CASES[case]
    layer = layer.to(TRITON_DEVICE, torch.float32)
    if front:
        prefix = torch.randn(2, layer.kv_heads, front, HEAD_SIZE, device=TRITON_DEVICE)
        layer = dataclasses.replace(layer, prefix=prefix)
    cos, sin = (t.to(TRITON_DEVICE, torch.float32) for t in tables(front + 19))
    e, m, _ = (t if t is None else t.detach().to(TRITON_DEVICE).float() for t in vectors(3))
    poison_workspaces(monkeypatch)
    e, m = e.requires_grad_(), m.requires_grad_()
    logits, span = span_by_triton(e, m, layer, cos, sin, "triton")
    outs = [t for t in (logits.of_m, logits.of_e, logits.of_prefix, span) if t is not None]
    grads = torch.autograd.grad(sum(t.square().sum() for t in outs), (e, m))
    coef, wide = (torch.randn(2, 5, n, device=TRITON_DEVICE) for n in (19, 2 * 21))
    inner = combined_activation(coef, wide, None, "silu", True)
    more = combined_activation_backward(inner, coef, wide, None, "silu", True)
    assert more.shape == (2, 19, 42)
    assert all(t.isfinite().all() for t in (*outs, *grads, inner, more))


def test_triton_compiles_without_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_first_layer.py"), "80", "90", "100"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {(case["capability"], case["kernel"]) for case in cases} == {
        (capability, f"{name}_kernel")
        for capability in (80, 90, 100)
        for name in ("affine_scan_forward", "affine_backward", "scan_backward")
    }
    assert all(case["shared"] <= 99 << 10 for case in cases)  # bytes
    for case in cases:  # spilled registers would lie on the stack
        if case["usage"] is not None:
            assert case["usage"]["STACK"] == case["usage"]["LOCAL"] == 0, case


class Outputs(TorchDispatchMode):
    """Element counts of everything computed (views left out)."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in inputs:
                self.counts.append(t.numel())
        return out


def test_nothing_of_size_n_but_the_output() -> None:
    """GPT-NeoX: one (B, N, d) tensor forward, none backward; nothing N × N (N > d here)."""
    rows, length = 2, 300
    layer, tables = CASES["neox-parallel"]
    cos, sin = tables(length)
    e, m, _ = vectors(rows)
    full = rows * length * D

    def large(implementation: Callable[..., Tensor]) -> tuple[int, int]:
        with Outputs() as forward:
            h = implementation(e, m, None, length, layer, cos, sin)
        grad = torch.ones_like(h)
        with Outputs() as backward:
            torch.autograd.grad(h, (e, m), grad)
        return tuple(sum(c >= full // 2 for c in o.counts) for o in (forward, backward))

    assert large(torch_backend) == (1, 0)
    assert min(large(general)) > 10  # the count does see copies where there are some


def saved_elements(implementation: Callable[..., Tensor], case: str, length: int) -> int:
    layer, tables = CASES[case]
    weights = {t.data_ptr() for t in vars(layer).values() if isinstance(t, Tensor)}
    cos, sin = tables(length)
    e, m, _ = vectors(2)
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in weights:
            saved[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        h = implementation(e, m, None, length, layer, cos, sin)
        total = sum(saved.values())
    assert h.requires_grad
    return total


@pytest.mark.parametrize("case", ["llama-gqa", "neox-sequential-gelu-tanh"])
def test_backward_keeps_no_activations(case: str) -> None:
    length = 300
    inner_tensor = 2 * length * INNER
    assert saved_elements(torch_backend, case, length) < inner_tensor
    assert saved_elements(first_layer_ref, case, length) > 2 * inner_tensor


def test_work_does_not_grow_with_rows_that_share_m() -> None:
    layer, tables = CASES["neox-parallel"]
    cos, sin = tables(64)

    def flops(implementation: Callable[..., Tensor], groups: int | None) -> int:
        e, m, group = vectors(16, groups)
        with FlopCounterMode(display=False) as counter:
            implementation(e, m, group, 64, layer, cos, sin).sum().backward()
        return counter.get_total_flops()

    per_vector = 2 * sum(getattr(layer, n).numel() for n in ("qkv", "o", "up", "down"))
    saved = flops(torch_backend, None) - flops(torch_backend, 1)
    assert saved >= 2 * 15 * per_vector  # forward and backward of 15 vectors
    assert flops(general, None) > 5 * flops(torch_backend, None)


def test_inputs_and_weights_are_left_alone() -> None:
    layer, tables = CASES["llama-gqa"]
    before = copy.deepcopy(layer)
    e, m, _ = vectors(2)
    torch_backend(e, m, None, 40, layer, *tables(40)).sum().backward()
    assert e.grad is not None and m.grad is not None
    for field in dataclasses.fields(layer):
        old, new = getattr(before, field.name), getattr(layer, field.name)
        if isinstance(new, Tensor):
            assert torch.equal(old, new) and new.grad is None


def test_refuses_what_does_not_fit() -> None:
    layer, tables = CASES["llama-gqa"]
    cos, sin = tables(8)
    e, m, _ = vectors(3)
    with pytest.raises(ValueError, match="backend"):
        planned("cuda", e, m, None, 8, layer, cos, sin)
    with pytest.raises(ValueError, match="length"):
        torch_backend(e, m, None, 9, layer, cos, sin)
    with pytest.raises(ValueError, match="length"):
        torch_backend(e, m, None, 0, layer, cos, sin)
    with pytest.raises(ValueError, match="m must"):
        torch_backend(e, m[:2], None, 8, layer, cos, sin)
    with pytest.raises(ValueError, match="group"):
        torch_backend(e, m[:2], torch.zeros(2, dtype=torch.int64), 8, layer, cos, sin)
    with pytest.raises(ValueError, match="activation"):
        dataclasses.replace(layer, activation="swishy")


def test_triton_refuses_fp64() -> None:
    pytest.importorskip("triton")
    layer, tables = CASES["neox-parallel"]
    e, m, _ = vectors(2)
    with pytest.raises(ValueError, match="float64"):
        triton_backend(e, m, None, 8, layer, *tables(8))
