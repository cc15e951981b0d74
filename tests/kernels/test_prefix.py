"""Blocks behind a constant prefix, against the same blocks with its vectors in the input."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import prototok
from against_fp64 import assert_as_close_as_torch, with_gradients
from kernels.test_first_layer import CASES, D, expanded, rotary_tables, vectors
from kernels.test_first_layer import with_gradients as to_inputs
from plans import plan_for
from prototok.model.families import DecoderBody
from prototok_kernels.attention import attention
from prototok_kernels.backend import this_machine
from prototok_kernels.layers import DecoderLayer, decoder_layer
from prototok_kernels.packed import PACKED
from prototok_kernels.pair.first_layer import first_layer, first_layer_ref
from prototok_kernels.prefix import behind_prefix
from zoo import OWN, made

FRONTS = [1, 3, 16]

needs_bf16 = pytest.mark.skipif(
    PACKED not in this_machine().instruction_sets, reason=f"needs {PACKED}"
)


def prefix_of(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, D, generator=generator, dtype=torch.float64)


def prefix_of_width(width: int, count: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(7))


def in_the_input(x: Tensor, front: Tensor, layer: DecoderLayer, cos: Tensor, sin: Tensor) -> Tensor:
    """What the block gives of x (B, N, d) behind vectors (P, d), all of them its input."""
    whole = torch.cat([front.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
    return decoder_layer(whole, layer, cos, sin, "torch")[:, len(front) :]


@pytest.mark.parametrize("count", FRONTS)
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("case", CASES)
def test_a_prefix_is_what_its_vectors_in_the_input_are(
    case: str, window: int | None, count: int
) -> None:
    layer, tables = CASES[case]
    layer = dataclasses.replace(layer, window=window)
    cos, sin = tables(count + 9)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 9, D, generator=generator, dtype=torch.float64, requires_grad=True)
    (behind,) = behind_prefix([layer], prefix_of(count), cos, sin)
    assert behind.prefix_length == count and behind.qkv is layer.qkv
    found = to_inputs(decoder_layer(x, behind, cos[count:], sin[count:], "torch"), x)
    expected = to_inputs(in_the_input(x, prefix_of(count), layer, cos, sin), x)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("length", [1, 2, 17])
@pytest.mark.parametrize("count", FRONTS)
@pytest.mark.parametrize("case", CASES)
def test_the_closed_form_equals_the_general_layer(
    case: str, count: int, length: int, groups: int | None, implementation: str
) -> None:
    layer, tables = CASES[case]
    cos, sin = tables(count + length)
    e, m, group = vectors(3, groups)
    (behind,) = behind_prefix([layer], prefix_of(count), cos, sin)
    arguments: tuple[Any, ...] = e, m, group, length, behind, cos, sin
    if implementation == "torch":
        plan = plan_for([behind], 3, length, "torch")
        h = first_layer(*arguments, plan)
    else:
        h = first_layer_ref(*arguments)
    x = expanded(e, m, group, length)
    expected = to_inputs(in_the_input(x, prefix_of(count), layer, cos, sin), e, m)
    for f, t in zip(to_inputs(h, e, m), expected, strict=True):
        torch.testing.assert_close(f, t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mlp", ["span", "positions"])
def test_the_closed_form_of_many_positions_takes_either_mlp(mlp: str) -> None:
    layer, tables = CASES["llama-gqa-biases"]
    cos, sin = tables(2 + 70)
    (behind,) = behind_prefix([layer], prefix_of(2), cos, sin)
    plan = plan_for([behind], 3, 70, "torch")
    plan = dataclasses.replace(plan, first_mlp=dataclasses.replace(plan.first_mlp, taken=mlp))
    e, m, _ = vectors(3)
    found = to_inputs(first_layer(e, m, None, 70, behind, cos, sin, plan), e, m)
    x = expanded(e, m, None, 70)
    expected = to_inputs(in_the_input(x, prefix_of(2), layer, cos, sin), e, m)
    for f, t in zip(found, expected, strict=True):
        torch.testing.assert_close(f, t, rtol=1e-9, atol=1e-9)


def test_logits_of_the_prefix_that_span_hundreds_of_nats_stay_finite() -> None:
    layer, tables = CASES["llama-gqa-biases"]
    assert layer.qkv_bias is not None
    bias = layer.qkv_bias.clone()
    bias[: 6 * 8] *= 300  # of queries and keys
    layer = dataclasses.replace(layer, qkv_bias=bias).to(torch.float32)
    cos, sin = tables(3 + 33)
    (behind,) = behind_prefix([layer], prefix_of(3), cos, sin)
    e, m, _ = vectors(3)
    plan = plan_for([behind], 3, 33, "torch")
    for value in to_inputs(first_layer(e, m, None, 33, behind, cos, sin, plan), e, m):
        assert value.isfinite().all()


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("heads, kv_heads, size, rotated", [(4, 2, 8, 8), (3, 3, 20, 6)])
# Together 16 and 80 keys: what is rounded up to vectors has no room for another.
@pytest.mark.parametrize("length, count", [(1, 1), (5, 3), (15, 1), (13, 3), (70, 17), (63, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_errs_no_more_than_torch(
    backend_and_device: tuple[str, str], dtype: torch.dtype, length: int, count: int, heads: int,
    kv_heads: int, size: int, rotated: int, window: int | None,
) -> None:  # fmt: skip
    backend, device = backend_and_device
    cos, sin = (t[count:].float().to(device) for t in rotary_tables(count + length, rotated))
    generator = torch.Generator().manual_seed(4)
    width = (heads + 2 * kv_heads) * size
    qkv = torch.randn(3, length, width, generator=generator).to(dtype).to(device)
    front = torch.randn(2, kv_heads, count, size, generator=generator).to(dtype).to(device)

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        def attend(qkv: Tensor) -> Tensor:
            return attention(
                qkv, cos.to(dtype), sin.to(dtype), heads=heads, kv_heads=kv_heads,
                scaling=size**-0.5, window=window, prefix=front.to(dtype), backend=backend,
            )  # fmt: skip

        return with_gradients(attend, [qkv], dtype)

    exact = run(torch.float64, "torch")
    assert_as_close_as_torch(run(dtype, backend), run(dtype, "torch"), exact)


@needs_bf16
@pytest.mark.parametrize(
    "count, length, texts", [(1, 16, 5), (1, 15, 3), (3, 9, 3), (17, 63, 2), (64, 1, 3)]
)
@pytest.mark.parametrize("name", [n for n in OWN if not n.startswith("qwen3")])
def test_blocks_in_cpp_err_no_more_than_torch(
    name: str, count: int, length: int, texts: int
) -> None:
    bare = prototok.load(made(OWN[name]), device="cpu", dtype="bfloat16")
    front = prefix_of_width(bare.hidden_size, count)
    body = bare.body.behind(front.bfloat16())
    cos, sin = (t[count:] for t in body.tables(length))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(texts, length, bare.hidden_size, generator=generator).bfloat16()

    def run(body: DecoderBody, dtype: torch.dtype, backend: str) -> list[Tensor]:
        blocks = body._blocks
        plan = plan_for(blocks.layers, texts, length, backend, pair=False)
        assert plan.blocks.taken == ("cpu" if backend == "cpu" else "one by one")
        return with_gradients(lambda x: blocks(x, cos, sin, plan), [x], dtype)

    wide = bare.cast(torch.float64).body.behind(front.bfloat16().double())
    exact = run(wide, torch.float64, "torch")
    found, torchs = run(body, torch.bfloat16, "cpu"), run(body, torch.bfloat16, "torch")
    assert_as_close_as_torch(found, torchs, exact)
    # In tiles of several texts and of one, a text is the same.
    blocks = body._blocks
    plan = plan_for(blocks.layers, texts, length, "cpu", pair=False)
    alone = torch.cat([blocks(row[None], cos, sin, plan) for row in x])
    assert torch.equal(alone, found[0])


@needs_bf16
def test_blocks_behind_a_prefix_share_the_packed_weights() -> None:
    bare = prototok.load(made(OWN["llama, grouped, tied"]), device="cpu", dtype="bfloat16").body
    assert isinstance(bare, DecoderBody)
    behind = bare.behind(prefix_of_width(32, 2).bfloat16())
    rotated = bare.rotary.width
    assert behind._blocks._packed(rotated) is bare._blocks._packed(rotated)


def test_vectors_and_keys_of_other_shapes_are_refused() -> None:
    layer, tables = CASES["llama-gqa"]
    for bad in (torch.randn(D), torch.randn(0, D), torch.randn(2, D + 1)):
        with pytest.raises(ValueError, match=r"^vectors: must be \(P, 32\) with P ≥ 1, saw"):
            behind_prefix([layer], bad, *tables(4))
    qkv, front = torch.randn(1, 3, 64), torch.randn(2, 2, 3, 7)
    with pytest.raises(ValueError, match=r"^prefix: must be torch.float32 \(2, 2, P, 8\)"):
        attention(
            qkv, *(t.float() for t in tables(3)), heads=4, kv_heads=2, scaling=1.0,
            prefix=front, backend="torch",
        )  # fmt: skip
