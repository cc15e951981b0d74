"""What the families share: weights out of modules, rotary tables, causal attention.

Letters: B rows, N positions, H heads, c head size, r rotated part of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rope variants whose frequencies do not depend on the length of the input.
STATIC_ROPE = {"default", "linear", "llama3", "yarn"}


def frozen(tensors: list[Tensor | None], device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """The tensors one above the other, detached; None where there are none.

    A single tensor that already has the dtype and device shares its storage with the model's.
    """
    present = [t.detach().to(device, dtype) for t in tensors if t is not None]
    if not present:
        return None
    return present[0] if len(present) == 1 else torch.cat(present)


def fused_linear(
    modules: list[nn.Linear], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of several nn.Linear with one input, as one: one product instead of many."""
    weight = frozen([m.weight for m in modules], device, dtype)
    bias = frozen([m.bias for m in modules], device, dtype)
    assert weight is not None
    return weight, bias


class RotaryTables:
    """cos and sin for the first positions, (N, r), grown on demand.

    The angles are computed in fp32 from the model's own inverse frequencies, as transformers does,
    so that every rope scaling with static frequencies comes along.
    """

    def __init__(self, rotary: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.inv_freq = rotary.inv_freq.detach().float().to(device)
        self.scaling = float(getattr(rotary, "attention_scaling", 1.0))
        self.dtype = dtype
        self.cos = self.sin = torch.empty(0, 2 * len(self.inv_freq), device=device, dtype=dtype)

    def __call__(self, length: int) -> tuple[Tensor, Tensor]:
        if len(self.cos) < length:
            position = torch.arange(length, device=self.inv_freq.device, dtype=torch.float32)
            angle = torch.outer(position, self.inv_freq).repeat(1, 2)
            self.cos = (angle.cos() * self.scaling).to(self.dtype)
            self.sin = (angle.sin() * self.scaling).to(self.dtype)
        return self.cos[:length], self.sin[:length]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of the first r coordinates of each head; x is (B, H, N, c)."""
    size = cos.shape[-1]
    turned, kept = x[..., :size], x[..., size:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return turned if kept.shape[-1] == 0 else torch.cat([turned, kept], dim=-1)


def causal_attention(
    q: Tensor,  # (B, H, N, c)
    k: Tensor,  # (B, H_kv, N, c)
    v: Tensor,  # (B, H_kv, N, c)
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal (sliding-window where given) attention, heads merged: (B, N, H · c)."""
    length, mask, dtype = q.shape[2], None, v.dtype
    if q.device.type == "cpu" and dtype == torch.bfloat16:
        # Torch's bf16 attention backward on the CPU is an order of magnitude slower than its fp32
        # one; casting costs a fraction of the difference (docs/log.md has the figures).
        q, k, v = q.float(), k.float(), v.float()
    if window is not None and window < length:
        position = torch.arange(length, device=q.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).flatten(2).to(dtype)
