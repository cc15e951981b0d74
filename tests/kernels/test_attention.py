"""Letters: B rows, N positions, H heads, K key-value heads, c head size, r rotary size."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from against_fp64 import assert_as_close_as_torch, with_gradients
from prototok_kernels import attention as module
from prototok_kernels.attention import attention, attention_ref
from prototok_kernels.attention_triton import why_no_tile
from prototok_kernels.backend import capability

SHAPES = [  # (B, N, H, K, c, r): around vectors of 16, tiles of 4 and blocks of 64 queries
    (0, 4, 2, 1, 8, 8),
    (2, 1, 1, 1, 2, 2),
    (2, 5, 6, 2, 8, 4),
    (1, 17, 4, 4, 16, 16),
    (2, 31, 3, 1, 33, 10),
    (1, 64, 6, 2, 32, 32),
    (1, 67, 2, 2, 64, 16),
    (1, 20, 1, 1, 80, 80),
    (1, 131, 2, 1, 16, 16),
    (2, 37, 4, 2, 64, 12),  # this and the next in one Triton launch
    (1, 64, 3, 1, 64, 64),
    (1, 114, 2, 2, 64, 16),  # a tile of keys across the end of a tile of queries and its vectors
]
DTYPES = [torch.float32, torch.bfloat16]


def make(shape, dtype, device):
    rows, length, heads, kv_heads, size, rotary = shape
    generator = torch.Generator().manual_seed(length * 1009 + size)
    qkv = 2 * torch.randn(rows, length, (heads + 2 * kv_heads) * size, generator=generator)
    frequencies = 100.0 ** (-torch.arange(rotary // 2).float() / rotary)
    angle = torch.outer(torch.arange(length + 3).float(), frequencies).repeat(1, 2)
    tables = (1.2 * angle.cos()).to(device), (1.2 * angle.sin()).to(device)
    return qkv.to(dtype).to(device), tables


def three_ways(shape, dtype, device, backend, window, prefix=None):
    qkv, tables = make(shape, dtype, device)
    options = {
        "heads": shape[2], "kv_heads": shape[3], "scaling": 0.7 * shape[4] ** -0.5,
        "window": window,
    }  # fmt: skip

    def way(function, dtype):
        front = None if prefix is None else prefix.to(dtype)
        run = functools.partial(
            function, cos=tables[0], sin=tables[1], prefix=front, **options
        )  # fmt: skip
        return with_gradients(run, [qkv], dtype)

    ours = functools.partial(attention, backend=backend)
    return way(ours, dtype), way(attention_ref, dtype), way(attention_ref, torch.float64)


@pytest.mark.parametrize("window", [None, 9], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_close_to_fp64_as_torch(backend, device, shape, dtype, window):
    assert_as_close_as_torch(*three_ways(shape, dtype, device, backend, window))


@pytest.mark.parametrize("window", [None, 9], ids=str)
@pytest.mark.parametrize("count", [1, 30])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[6], SHAPES[9]], ids=str)
def test_behind_a_prefix_it_is_as_close(backend, device, shape, dtype, count, window):
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("the C++ takes no float16")
    generator = torch.Generator().manual_seed(count)
    prefix = torch.randn(2, shape[3], count, shape[4], generator=generator).to(dtype).to(device)
    assert_as_close_as_torch(*three_ways(shape, dtype, device, backend, window, prefix))


def test_a_short_text_takes_one_launch_each_way(triton_device, monkeypatch):
    """And torch attends to what no tile holds: longer texts, other heads, float32.

    Twice as many keys fit where no heads share them, on GPUs that multiply by 128 threads.
    """
    asked = []

    def attend(q, k, v, **_):
        asked.append(q.shape)
        return torch.zeros_like(q)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    kinds = (torch.bfloat16, 64, 64), (torch.bfloat16, 65, 64), (torch.bfloat16, 20, 80)
    more = [(torch.bfloat16, length, 64, 2) for length in (65, 128, 129)]
    others = (torch.bfloat16, 20, 48), (torch.float32, 20, 64)
    for dtype, length, size, kv_heads in (*((*kind, 1) for kind in (*kinds, *others)), *more):
        qkv, tables = make((1, length, 2, kv_heads, size, size), dtype, triton_device)
        before, stack = len(asked), qkv.clone()
        options = {"heads": 2, "kv_heads": kv_heads, "scaling": 0.3, "backend": "triton"}
        out = attention(qkv, *tables, **options)
        alone = why_no_tile(length, size, dtype, kv_heads == 1, qkv.device) is None
        most = 64 if kv_heads == 1 or capability(qkv.device) in range(1, 90) else 128
        assert alone == (dtype == torch.bfloat16 and length <= most and size == 64)
        assert (len(asked) == before) == alone == bool(out.any()) == torch.equal(qkv, stack)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[4], SHAPES[6]], ids=str)
def test_every_instruction_set(instruction_set, shape, dtype, monkeypatch):
    chosen = functools.partial(module._cpu.attention, instruction_set=instruction_set)
    monkeypatch.setattr(module, "_cpu", SimpleNamespace(attention=chosen))
    assert_as_close_as_torch(*three_ways(shape, dtype, "cpu", "cpu", None))


def test_threads_give_the_same_bits(device, backend):
    if backend != "cpu":
        pytest.skip("the C++ kernels' threads")
    shape = (3, 21, 4, 2, 16, 16)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(three_ways(shape, torch.float32, device, backend, None)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_logits_hundreds_apart(backend, device):
    """Where one key takes all of the weight nothing overflows and the gradient vanishes."""
    qkv, (cos, sin) = make((1, 20, 2, 2, 8, 8), torch.float32, device)
    qkv = (100 * qkv).requires_grad_()
    options = {"heads": 2, "kv_heads": 2, "scaling": 1.0}
    out = attention(qkv * 1, cos, sin, **options, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    wanted = attention_ref(qkv.double(), cos.double(), sin.double(), **options)
    assert grad.isfinite().all()
    torch.testing.assert_close(out.double(), wanted, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("window", [None, 48], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "kv_heads"), [(64, 1), (100, 2)])
def test_keys_that_are_alike_and_large(backend, device, length, kv_heads, dtype, window):
    """As some channels of trained models' are; the gradient of a query is their weighted sum."""
    shape = 1, length, 2, kv_heads, 64, 64
    qkv, tables = make(shape, torch.float32, device)
    stack = 0.05 * qkv.unflatten(2, (2 + 2 * kv_heads, 64))
    stack[:, :, :2, 0], stack[:, :, 2 : 2 + kv_heads, 0] = 1.0, 800.0
    still = torch.ones_like(tables[0])  # no position turns its vectors
    options = {
        "cos": still, "sin": 0 * still, "heads": 2, "kv_heads": kv_heads, "scaling": 0.125,
        "window": window,
    }  # fmt: skip

    def way(function, dtype):
        run = functools.partial(function, **options)
        return with_gradients(run, [stack.flatten(2).to(dtype)], dtype)

    ours = way(functools.partial(attention, backend=backend), dtype)
    assert_as_close_as_torch(ours, way(attention_ref, dtype), way(attention_ref, torch.float64))


def test_a_position_sees_nothing_behind_it(backend, device):
    qkv, (cos, sin) = make((1, 70, 2, 1, 16, 16), torch.float32, device)
    options = {"heads": 2, "kv_heads": 1, "scaling": 0.3, "backend": backend}
    whole = attention(qkv.clone(), cos, sin, **options)
    qkv[:, 40:] *= 50
    torch.testing.assert_close(attention(qkv[:, :40].clone(), cos, sin, **options), whole[:, :40])
    assert torch.equal(attention(qkv, cos, sin, **options)[:, :40], whole[:, :40])


def test_gradcheck_of_the_reference():
    qkv, (cos, sin) = make((1, 4, 2, 1, 4, 2), torch.float64, "cpu")
    run = functools.partial(
        attention_ref, cos=cos.double(), sin=sin.double(), heads=2, kv_heads=1, scaling=0.5,
        window=3,
    )  # fmt: skip
    assert torch.autograd.gradcheck(run, qkv.requires_grad_(), fast_mode=True)


def test_names_what_does_not_fit():
    qkv, (cos, sin) = make((1, 4, 2, 1, 8, 8), torch.float32, "cpu")
    options = {"heads": 2, "kv_heads": 1, "scaling": 0.5, "backend": "torch"}
    with pytest.raises(ValueError, match="qkv: must be"):
        attention(qkv[..., :-1], cos, sin, **options)
    with pytest.raises(ValueError, match="cos: must be"):
        attention(qkv, cos[:3], sin[:3], **options)
    with pytest.raises(ValueError, match="window: must be at least 1"):
        attention(qkv, cos, sin, **options, window=0)


@pytest.mark.parametrize("prefix", [0, 64])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_cudnn_attends_only_where_its_gradient_is_sound(monkeypatch, kv_heads, prefix):
    """On a GPU, under a mask, not for 64 keys beyond a multiple of 128."""
    asked = []

    def attend(q, k, v, *, attn_mask, enable_gqa, **_):
        assert enable_gqa == (k.shape[1] != q.shape[1])
        asked.append((k.shape[2], torch.backends.cuda.cudnn_sdp_enabled(), k.shape[1], v.shape[1]))
        return torch.empty_like(q)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    for device in ("meta", "cpu"):
        front = torch.zeros(2, kv_heads, prefix, 8, device=device) if prefix else None
        for length in (63, 64, 128, 192):
            q, k, v = (torch.empty(1, n, length, 8, device=device) for n in (2, kv_heads, kv_heads))
            for window in (None, 9):
                module.causal_attention(q, k, v, 1.0, window, prefix=front)
                masked = prefix > 0 or window is not None
                unsound = device == "meta" and masked and (prefix + length) % 128 == 64
                shared = 2 if unsound else kv_heads
                assert asked.pop() == (prefix + length, not unsound, shared, shared)
    assert torch.backends.cuda.cudnn_sdp_enabled()
