"""Letters: R rows, T positions of the cache, H heads, K key-value heads, c head size, r rotary."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from against_fp64 import assert_as_close_as_torch
from prototok_kernels import cached_attention as module
from prototok_kernels.cached_attention import Cache, cached_attention, cached_attention_ref
from prototok_kernels.layers import LlamaLayer

# (R, H, K, c, r, T), positions taken, window, norms on q and k
CASES = [
    ((1, 4, 2, 8, 8, 64), 0, None, False),
    ((3, 4, 2, 24, 12, 80), 79, None, True),
    ((2, 3, 3, 64, 16, 64), 63, 5, False),
    ((2, 8, 1, 32, 32, 192), 100, 40, True),
    ((1, 18, 1, 16, 4, 33), 17, None, False),
]
NAMES = ["the first token", "norms", "window", "many heads a key", "more than a tile of heads"]


def layer_of(shape, dtype, device, window, normed):
    _, heads, kv_heads, size, _, _ = shape
    generator = torch.Generator().manual_seed(1)

    def number(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    return LlamaLayer(
        input_norm=number(4), qkv=number((heads + 2 * kv_heads) * size, 4),
        o=number(4, heads * size), post_norm=number(4), down=number(4, 2), gate_up=number(4, 4),
        heads=heads, kv_heads=kv_heads, head_size=size, scaling=0.8 * size**-0.5, eps=1e-5,
        activation="silu", window=window, q_norm=number(size) if normed else None,
        k_norm=number(size) if normed else None,
    )  # fmt: skip


def make(case, dtype, device):
    shape, taken, window, normed = case
    rows, heads, kv_heads, size, rotated, positions = shape
    generator = torch.Generator().manual_seed(0)

    def number(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    keys, values = (number(rows, kv_heads, positions, size) for _ in range(2))
    keys[:, :, taken:] = values[:, :, taken:] = torch.nan  # nobody may read them
    frequencies = 100.0 ** (-torch.arange(rotated // 2).float() / rotated)
    angle = torch.outer(torch.arange(positions + 2).float(), frequencies).repeat(1, 2).to(device)
    position = torch.full((rows,), taken, device=device)
    cache = Cache(keys, values, position, 1.2 * angle.cos(), 1.2 * angle.sin())
    qkv = 2 * number(rows, (heads + 2 * kv_heads) * size)
    return qkv, cache, layer_of(shape, dtype, device, window, normed)


def by_torch(qkv, cache, layer, dtype):
    """In plain torch, which multiplies what its mask hides; and what the cache is then."""
    keys, values = (t.to(dtype).nan_to_num() for t in (cache.keys, cache.values))
    cache = replace(cache, keys=keys, values=values)
    found = cached_attention_ref(qkv.to(dtype), cache, layer.to(dtype))
    return [t.cpu() for t in (found, *new_of(cache))]


def new_of(cache):
    at = int(cache.position[0])
    return cache.keys[:, :, at], cache.values[:, :, at]


@pytest.mark.parametrize("split", [16, 512], ids=["split", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_is_as_close_to_fp64_as_torch(triton_device, case, dtype, split, monkeypatch):
    monkeypatch.setattr(module, "_SPLIT", split)
    qkv, cache, layer = make(case, dtype, triton_device)
    torchs = by_torch(qkv, cache, layer, dtype)
    exact = by_torch(qkv, cache, layer, torch.float64)
    before = cache.keys.clone()
    found = cached_attention(qkv, cache, layer, "triton")
    assert_as_close_as_torch([t.cpu() for t in (found, *new_of(cache))], torchs, exact)
    # No other place of the cache was written.
    before[:, :, case[1]] = cache.keys[:, :, case[1]]
    assert torch.equal(before.nan_to_num(), cache.keys.nan_to_num())


def test_a_long_cache_is_split_where_few_programs_would_read_it():
    pytest.importorskip("triton")
    assert module._splits(320, 8, 128) == (1, 512)
    assert module._splits(2048, 8, 128) == (4, 512)
    assert module._splits(131072, 8, 128) == (32, 4096)
    assert module._splits(2048, 128, 128) == (1, 2048)
    for positions in range(1, 5000, 37):
        splits, span = module._splits(positions, 1, 64)
        assert splits * span >= positions > (splits - 1) * span and splits <= 32


def test_rows_are_their_own(triton_device):
    qkv, cache, layer = make(CASES[1], torch.bfloat16, triton_device)
    together = cached_attention(qkv, cache, layer, "triton")
    _, cache, _ = make(CASES[1], torch.bfloat16, triton_device)
    one = replace(
        cache, keys=cache.keys[1:2].clone(), values=cache.values[1:2].clone(),
        position=cache.position[1:2].clone(),
    )  # fmt: skip
    assert torch.equal(cached_attention(qkv[1:2].clone(), one, layer, "triton"), together[1:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": torch.zeros(3, 2, 80, 23)}, r"^keys: must be contiguous \(3, 2, 80, 24\)"),
        ({"values": torch.zeros(3, 2, 79, 24)}, "^values: must be contiguous"),
        ({"cos": torch.zeros(79, 12)}, "^cos: must be contiguous float32"),
        ({"sin": torch.zeros(82, 12).double()}, "^sin: must be contiguous float32"),
        ({"position": torch.zeros(1, dtype=torch.int64)}, r"^position: must be int64 \(3,\)"),
    ],
)
def test_names_what_does_not_fit(changes, message):
    qkv, cache, layer = make(CASES[1], torch.float32, "cpu")
    with pytest.raises(ValueError, match=message):
        cached_attention(qkv, replace(cache, **changes), layer, "torch")
    with pytest.raises(ValueError, match="^qkv: must hold 4 heads"):
        cached_attention(qkv[:, 1:], cache, layer, "torch")
