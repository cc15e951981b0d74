"""Blocks behind a constant prefix, against the same blocks with its vectors in the input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import prototok
from against_fp64 import assert_as_close_as_torch, with_gradients
from kernels.test_first_layer import (
    CASES,
    HEAD_SIZE,
    TRITON_DEVICE,
    D,
    assert_as_good_as_general,
    expanded,
    random_tensors,
    rotary_tables,
    vectors,
)
from kernels.test_first_layer import with_gradients as to_inputs
from plans import plan_for
from prototok.model.families import DecoderBody
from prototok_kernels import packed
from prototok_kernels.attention import attention
from prototok_kernels.backend import this_machine
from prototok_kernels.layers import DecoderLayer, LlamaLayer, decoder_layer
from prototok_kernels.pair import first_layer_cpu
from prototok_kernels.pair.first_layer import first_layer, first_layer_ref, first_layer_spanned
from prototok_kernels.pair.second_layer import (
    second_layer_projections,
    second_layer_projections_ref,
)
from prototok_kernels.prefix import behind_prefix
from zoo import OWN, made

FRONTS = [1, 3, 16]

needs_bf16 = pytest.mark.skipif(
    this_machine().packed is None, reason="needs products of packed weights"
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


# Behind P vectors, and at most as many positions: P = N, P > N, one position, many.
SIZES = [(1, 1), (1, 9), (1, 70), (4, 33), (16, 33), (16, 3)]
SEQUENTIAL = [case for case in CASES if "parallel" not in case]


def planned(backend: str, layer: DecoderLayer, length: int) -> Any:
    """A plan that takes the closed form of a backend at any size."""
    plan = plan_for([layer], 3, length, backend)
    return dataclasses.replace(
        plan, first_layer=dataclasses.replace(plan.first_layer, taken=backend)
    )


def collapsed(backend: str) -> Callable[..., Tensor]:
    """`first_layer` of a backend from and to the CPU; gradients pass through."""

    def run(*args: Any) -> Tensor:
        if backend == "triton":
            args = tuple(
                a.to(TRITON_DEVICE) if isinstance(a, (Tensor, DecoderLayer)) else a for a in args
            )
        _, _, _, length, layer, *_ = args
        return first_layer(*args, planned(backend, layer, length)).cpu()

    return run


def errors_behind(
    layer: DecoderLayer,
    tables: Callable[[int], tuple[Tensor, Tensor]],
    count: int,
    length: int,
    ways: dict[str, Callable[..., Tensor]],
    groups: int | None = None,
) -> dict[str, list[float]]:
    """Relative errors of h1, ∂e and ∂m of each way and of the general layer, in layer's dtype."""
    cos, sin = tables(count + length)
    width = layer.hidden_size
    front = prefix_of_width(width, count).to(layer.dtype)
    e, m, group = vectors(3, groups, width)
    e, m = (t.detach().float().requires_grad_() for t in (e, m))
    (behind,) = behind_prefix([layer], front, cos, sin)

    def general(layer: DecoderLayer) -> Tensor:
        x = expanded(e, m, group, length).to(layer.dtype)
        return in_the_input(x, front.to(layer.dtype), layer, cos, sin)

    found = {"general": to_inputs(general(layer), e, m)}
    for name, way in ways.items():
        h = way(e, m, group, length, behind, cos, sin)
        assert h.dtype == layer.dtype
        found[name] = to_inputs(h, e, m)
    truth = to_inputs(general(layer.to(torch.float64)), e, m)
    return {
        name: [
            float((f.double() - t).norm() / t.double().norm().clamp(min=1e-30))
            for f, t in zip(tensors, truth, strict=True)
        ]
        for name, tensors in found.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count, length", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_torchs_closed_form_errs_no_more_than_the_general_layer(
    case: str, count: int, length: int, dtype: torch.dtype
) -> None:
    layer, tables = CASES[case]
    ways = {"torch": collapsed("torch")}
    assert_as_good_as_general(errors_behind(layer.to(dtype), tables, count, length, ways), dtype)


@needs_bf16
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("count, length", SIZES)
@pytest.mark.parametrize("case", SEQUENTIAL)
def test_the_closed_form_in_cpp_errs_no_more_than_the_general_layer(
    case: str, count: int, length: int, groups: int | None
) -> None:
    layer, tables = CASES[case]
    ways = {"cpu": collapsed("cpu")}
    errors = errors_behind(layer.to(torch.bfloat16), tables, count, length, ways, groups)
    assert_as_good_as_general(errors, torch.bfloat16)


@needs_bf16
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("heads, kv_heads, size", [(19, 19, 6), (18, 6, 10), (2, 1, 128)])
def test_the_closed_form_in_cpp_of_heads_off_every_vector_and_panel(
    heads: int, kv_heads: int, size: int, count: int
) -> None:
    inner, d = 74, 50
    shapes = {
        "qkv": ((heads + 2 * kv_heads) * size, d), "o": (d, heads * size),
        "gate_up": (2 * inner, d), "down": (d, inner), "input_norm": (d,), "post_norm": (d,),
        "o_bias": (d,),
    }  # fmt: skip
    layer = LlamaLayer(
        **random_tensors(5, **shapes), heads=heads, kv_heads=kv_heads, head_size=size,
        scaling=size**-0.5, eps=1e-5, activation="silu",
    ).to(torch.bfloat16)  # fmt: skip
    ways = {"cpu": collapsed("cpu")}
    errors = errors_behind(layer, lambda n: rotary_tables(n, size), count, 37, ways)
    assert_as_good_as_general(errors, torch.bfloat16)


@needs_bf16
def test_the_closed_form_in_cpp_gives_the_same_bits_by_any_number_of_threads() -> None:
    layer, tables = CASES["llama-gqa-biases"]
    cos, sin = tables(2 + 33)
    (behind,) = behind_prefix([layer.to(torch.bfloat16)], prefix_of(2).bfloat16(), cos, sin)
    before = torch.get_num_threads()

    def found(threads: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(threads)
        e, m, group = vectors(5, 2)
        return to_inputs(collapsed("cpu")(e, m, group, 33, behind, cos, sin), e, m)

    try:
        one, three = found(1), found(3)
        behind.gate_up.mul_(2)  # type: ignore[attr-defined]
        changed = found(1)
        behind.prefix.mul_(2)  # type: ignore[union-attr]
        moved = found(1)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    assert not torch.equal(one[0], changed[0]) and not torch.equal(changed[0], moved[0])


@needs_bf16
def test_first_layers_behind_prefixes_share_the_packed_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, tables = CASES["llama-gqa-biases"]
    layer, made, held = layer.to(torch.bfloat16), [], len(packed._packed)
    cos, sin = tables(20)

    def counted(**arguments: Any) -> Any:
        made.append(real(**arguments))
        return made[-1]

    real = first_layer_cpu._cpu.FirstLayer
    monkeypatch.setattr(first_layer_cpu._cpu, "FirstLayer", counted)

    def run(layer: DecoderLayer) -> Tensor:
        e, m, _ = vectors(3)
        return collapsed("cpu")(e, m, None, 17, layer, cos, sin).detach()

    behind = [behind_prefix([layer], prefix_of(n).bfloat16(), cos, sin)[0] for n in (1, 3)]
    found = [[run(each) for each in (layer, *behind)] for _ in range(2)]
    assert len(made) == 1 and len(packed._packed) == held + 3
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    # The same weights with other settings are another block.
    louder = dataclasses.replace(layer, scaling=2 * layer.scaling)
    assert not torch.equal(run(louder), found[0][0]) and len(made) == 2
    del layer, louder, behind
    made.clear()
    assert len(packed._packed) == held


@pytest.mark.parametrize(
    "case, count, length, dtype, groups",
    [
        (case, *sizes)
        for case in ("llama-gqa", "neox-parallel-partial-rotary", "neox-sequential-gelu-tanh")
        for sizes in [
            (1, 1, torch.float32, None),
            (3, 2, torch.float32, 2),
            (1, 17, torch.bfloat16, 2),
            (4, 17, torch.float32, None),
        ]
    ]
    + [("llama-gqa", 1, 70, torch.float32, 2), ("neox-parallel", 16, 70, torch.bfloat16, None)],
)
def test_the_closed_form_in_triton_errs_no_more_than_the_general_layer(
    case: str, count: int, length: int, dtype: torch.dtype, groups: int | None
) -> None:
    pytest.importorskip("triton")
    layer, tables = CASES[case]
    ways = {"triton": collapsed("triton")}
    errors = errors_behind(layer.to(dtype), tables, count, length, ways, groups)
    assert_as_good_as_general(errors, dtype)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_logits_of_the_prefix_hundreds_of_nats_apart(backend: str, count: int) -> None:
    """Qwen2's key biases, on the prefix as well."""
    layer, tables = CASES["llama-gqa-biases"]
    assert layer.qkv_bias is not None
    values = layer.kv_heads * HEAD_SIZE
    loud = torch.cat([25 * layer.qkv_bias[:-values].sign(), layer.qkv_bias[-values:]])
    dtype = torch.bfloat16 if backend == "cpu" else torch.float32  # the C++ takes no other
    if backend == "triton":
        pytest.importorskip("triton")
    if backend == "cpu" and this_machine().packed is None:
        pytest.skip("needs products of packed weights")
    layer = dataclasses.replace(layer, qkv_bias=loud).to(dtype)
    errors = errors_behind(layer, tables, count, 33, {"found": collapsed(backend)})
    assert_as_good_as_general(errors, dtype)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_products_of_the_second_layer_read_the_wider_span(count: int, backend: str) -> None:
    first, second = CASES["neox-parallel"][0], CASES["neox-parallel-partial-rotary"][0]
    dtype = torch.float64 if backend == "torch" else torch.float32
    if backend == "triton":
        pytest.importorskip("triton")
    device = "cpu" if backend == "torch" else TRITON_DEVICE
    cos, sin = (t.to(device) for t in rotary_tables(count + 60))
    front = prefix_of(count).to(device)
    layers = behind_prefix([layer.to(device) for layer in (first, second)], front, cos, sin)
    layers = [layer.to(dtype) for layer in layers]
    e, m, group = (t.to(device) for t in vectors(3, 2))
    pair = (e, m, group, 60, layers[0], cos, sin, planned(backend, layers[0], 60))
    x, coef, span = first_layer_spanned(*pair)
    found = *second_layer_projections(x, coef, span, layers[1]), x
    expected = *second_layer_projections_ref(x, layers[1]), x
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for f, w in zip(found, expected, strict=True):
        torch.testing.assert_close(f, w, rtol=tolerance, atol=tolerance)
    probes = [torch.ones_like(t).cumsum(-1) / t.shape[-1] for t in expected]
    of_found, of_expected = (
        torch.autograd.grad(both, (e, m), probes, retain_graph=True) for both in (found, expected)
    )
    for f, w in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(f, w, rtol=tolerance, atol=tolerance * float(w.abs().max()))


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
    assert behind._blocks.packed(rotated) is bare._blocks.packed(rotated)


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
