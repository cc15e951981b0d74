"""flash-attn when asked for: refused in one sentence where it cannot be, else what torch gives."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import prototok
from prototok.model import load
from prototok.model.families import DecoderBody
from prototok_kernels.backend import unavailable
from support import small_llama


@pytest.mark.parametrize(
    ("attention", "device", "dtype", "says"),
    [
        ("fast", "cpu", torch.float32, "'fast' is not 'auto', 'sdpa' or 'flash'"),
        ("flash", "cpu", torch.bfloat16, "'flash' needs a CUDA device, and this is cpu"),
        ("flash", "cuda:1", torch.float32, "'flash' computes in 16 bit"),
        ("flash", "cuda", torch.bfloat16, "'flash' needs the flash-attn package"),
    ],
)
def test_what_cannot_be_had_is_refused(
    attention: str, device: str, dtype: torch.dtype, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"^attention: {says}"):
        load._require_attention(attention, torch.device(device), dtype)
    if device == "cpu":
        with pytest.raises(ValueError, match=f"^attention: {says}"):
            prototok.load(small_llama(), device=device, dtype=dtype, attention=attention)


def test_the_model_says_what_attends() -> None:
    lm = prototok.load(small_llama(), device="cpu", dtype="float32", attention="sdpa")
    assert lm.attention == "sdpa" and lm.cast(torch.float64).attention == "sdpa"
    fit = prototok.fast_fit(lm, [[1, 2]], recipe=prototok.Recipe(max_steps=2), progress=False)
    assert fit.tokens.provenance["attention"] == "sdpa"


@pytest.mark.parametrize("window", [None, 4])
def test_flash_is_given_what_it_wants(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads behind positions, key heads not repeated, the scaling and the window by its names."""
    seen: list[tuple[int, ...]] = []

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool,
        window_size: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        assert causal
        seen.append((*q.shape, k.shape[2], *window_size))
        n = q.shape[1]
        distance = torch.arange(n)[:, None] - torch.arange(n)
        mask = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=True
        )
        return out.transpose(1, 2)

    module = ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    lm = prototok.load(small_llama(), device="cpu", dtype="float32")
    assert isinstance(lm.body, DecoderBody)
    for layer in lm.body.layers:
        object.__setattr__(layer, "window", window)
    x = torch.randn(2, 7, lm.hidden_size, generator=torch.Generator().manual_seed(0))
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outs = [
        body.hidden(leaf, lm.plan(2, 7, "torch"))
        for body, leaf in zip((lm.body, lm.body.flash()), leaves, strict=True)
    ]
    grads = [torch.autograd.grad(o.square().sum(), x) for o, x in zip(outs, leaves, strict=True)]
    torch.testing.assert_close(outs[1], outs[0])
    torch.testing.assert_close(grads[1], grads[0])
    span = (-1, -1) if window is None else (window - 1, 0)
    assert seen == [(2, 7, 4, 8, 2, *span)] * len(lm.body.layers)
    if unavailable("cpu", "cpu") is None:
        with pytest.raises(ValueError, match="^flash: backend 'cpu' attends by itself"):
            lm.body.flash().hidden(x, lm.plan(2, 7, "cpu"))
