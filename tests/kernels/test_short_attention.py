"""Batched-product attention against rotary and SDPA on the same heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prototok_kernels import layers
from prototok_kernels.layers import causal_attention, rotary
from prototok_kernels.short_attention import LONGEST, short_attention

SCALING = 0.3


def inputs(
    length: int, kv_heads: int, rotary_size: int
) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """q (2, N, 6, 8), k and v (2, N, K, 8), and tables longer than N, with an attention factor."""
    generator = torch.Generator().manual_seed(0)
    qkv = [
        torch.randn(2, length, heads, 8, generator=generator, dtype=torch.float64)
        for heads in (6, kv_heads, kv_heads)
    ]
    frequencies = 100.0 ** (-torch.arange(rotary_size // 2).double() / rotary_size)
    angle = torch.outer(torch.arange(length + 3).double(), frequencies).repeat(1, 2)
    return qkv, (1.2 * angle.cos(), 1.2 * angle.sin())


def reference(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scaling: float) -> Tensor:
    n = q.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    cos, sin = cos[:n].to(q.dtype), sin[:n].to(q.dtype)
    mixed = causal_attention(rotary(q, cos, sin), rotary(k, cos, sin), v, scaling)
    return mixed.unflatten(-1, (6, 8))


def results(function: object, qkv: list[Tensor], tables: tuple[Tensor, Tensor]) -> list[Tensor]:
    qkv = [t.detach().requires_grad_() for t in qkv]
    out = function(*qkv, *tables, SCALING)  # type: ignore[operator]
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, qkv, probe.to(out.dtype))]


@pytest.mark.parametrize("rotary_size", [8, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("length", [1, 2, 17, LONGEST])
def test_equals_sdpa(length: int, kv_heads: int, rotary_size: int) -> None:
    qkv, tables = inputs(length, kv_heads, rotary_size)
    found, expected = (results(f, qkv, tables) for f in (short_attention, reference))
    for f, x in zip(found, expected, strict=True):
        torch.testing.assert_close(f, x, rtol=1e-9, atol=1e-9)


def test_gradcheck() -> None:
    qkv, tables = inputs(5, 2, 4)
    leaves = tuple(t.requires_grad_() for t in qkv)
    assert torch.autograd.gradcheck(
        lambda *leaves: short_attention(*leaves, *tables, SCALING), leaves, fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_errs_no_more_than_sdpa(dtype: torch.dtype) -> None:
    qkv, tables = inputs(64, 2, 8)
    low = [t.to(dtype) for t in qkv]
    truth = results(reference, qkv, tables)
    found, plain = (results(f, low, tables) for f in (short_attention, reference))
    assert found[0].dtype == dtype
    for f, p, t in zip(found, plain, truth, strict=True):
        floor = torch.finfo(dtype).eps * t.norm()
        assert (f.double() - t).norm() <= 3 * max((p.double() - t).norm(), floor)


@pytest.mark.parametrize("window", [None, 9])
def test_a_layer_takes_either_way_to_the_same_result(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(2)
    layer = layers.LlamaLayer(
        **{
            name: torch.randn(shape, generator=generator, dtype=torch.float64) / 5
            for name, shape in {
                "input_norm": (16,), "qkv": (40, 16), "o": (16, 24), "post_norm": (16,),
                "gate_up": (20, 16), "down": (16, 10),
            }.items()
        },
        heads=3, kv_heads=1, head_size=8, scaling=SCALING, eps=1e-5, activation="silu",
        window=window,
    )  # fmt: skip
    _, tables = inputs(12, 1, 8)
    x = torch.randn(2, 12, 16, generator=generator, dtype=torch.float64)
    short = layers.decoder_layer(x, layer, *tables)
    monkeypatch.setattr(layers, "LONGEST", 0)
    torch.testing.assert_close(short, layers.decoder_layer(x, layer, *tables))
    assert window is None or not torch.allclose(
        short, layers.decoder_layer(x, layers.replace(layer, window=None), *tables)
    )
