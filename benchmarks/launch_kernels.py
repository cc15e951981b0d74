"""Launch each Triton kernel once, for tools that watch launches: compute-sanitizer and ncu.

    compute-sanitizer --tool racecheck python benchmarks/launch_kernels.py
    ncu --clock-control none --kernel-name regex:_activation_kernel \\
        python benchmarks/launch_kernels.py --size real

"small" has sizes that are no multiple of any block, with every variant of a kernel; "real" is a
layer and a head of Llama-3.2-1B. `--names` prints the kernels' names and launches nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prototok_kernels.activation import activation
from prototok_kernels.adamw_rows import AdamWSettings, AdamWState, adamw_rows_
from prototok_kernels.added_products import add_products_
from prototok_kernels.attention import attention
from prototok_kernels.cached_attention import Cache, cached_attention
from prototok_kernels.layers import LlamaLayer, NeoXLayer, is_parallel
from prototok_kernels.linear_cross_entropy import linear_cross_entropy
from prototok_kernels.next_token import Stream, best_logits, take_next_
from prototok_kernels.normed_products import NormedProduct, normed_products, products_of
from prototok_kernels.pair.first_layer import first_layer, first_layer_spanned
from prototok_kernels.pair.second_layer import second_layer_projections
from prototok_kernels.plan import Shape, plan_of
from prototok_kernels.residual_norm import residual_norm


@dataclass(frozen=True)
class Size:
    """Letters as in the kernels: B rows, N positions, d, H and K heads of c, I inner, V words."""

    rows: int
    length: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocabulary: int

    @property
    def width(self) -> int:
        return self.heads * self.head_size


SIZES = {
    "small": Size(2, 19, 4, 2, 64, 80, 5003),
    "real": Size(16, 256, 32, 8, 64, 8192, 128256),
}


def normal(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(dtype)


def head(size: Size, device: torch.device, dtype: torch.dtype) -> None:
    rows = size.rows * size.length
    hidden = torch.randn(rows, size.width, device=device).to(dtype)
    weight = normal(size.vocabulary, size.width, device=device, dtype=dtype)
    targets = torch.randint(size.vocabulary, (rows,), device=device)
    some = (torch.arange(rows, device=device) % 3 > 0).float()
    variants = ((some, True), (None, True), (None, False))
    for token_weight, need_grad in variants[:1] if size is SIZES["real"] else variants:
        linear_cross_entropy(
            hidden, weight, targets, token_weight, temperature=0.5, need_grad=need_grad,
            backend="triton",
        )  # fmt: skip


def optimiser(size: Size, device: torch.device, dtype: torch.dtype) -> None:
    param, grad = (torch.randn(size.rows, size.width, device=device) for _ in range(2))
    rate = torch.full((size.rows,), 0.1, device=device)
    active = torch.arange(size.rows, device=device) % 2 == 0
    adamw_rows_(
        param, grad, AdamWState.zeros(param), rate, active, AdamWSettings(), backend="triton"
    )


def block(size: Size, device: torch.device, dtype: torch.dtype) -> None:
    """A Llama block and two parallel GPT-NeoX blocks in closed form."""
    n, d, inner = size.length, size.width, size.inner

    def weight(*shape: int) -> Tensor:
        return normal(*shape, device=device, dtype=dtype)

    ones, zeros = torch.ones(d, device=device, dtype=dtype), weight(d) * 0
    qkv_rows = (size.heads + 2 * size.kv_heads) * size.head_size
    common: dict = {
        "input_norm": ones, "qkv": weight(qkv_rows, d), "o": weight(d, d), "post_norm": ones,
        "down": weight(d, inner), "heads": size.heads, "kv_heads": size.kv_heads,
        "head_size": size.head_size, "scaling": size.head_size**-0.5, "eps": 1e-5,
    }  # fmt: skip
    layers = [
        LlamaLayer(gate_up=weight(2 * inner, d), activation="silu", **common),
        NeoXLayer(
            up=weight(inner, d), input_norm_bias=zeros, post_norm_bias=zeros, parallel=True,
            activation="gelu", **common,
        ),
    ]  # fmt: skip
    angle = torch.outer(
        torch.arange(n, device=device), torch.rand(size.head_size // 2, device=device)
    ).repeat(1, 2)
    for layer in layers:
        e, m = (torch.randn(size.rows, d, device=device, requires_grad=True) for _ in range(2))
        plan = plan_of(
            # As of so many rows that the closed form pays.
            Shape.of([layer], None), rows=1 << 22, length=n, dtype=dtype, device=device,
            backend="triton", pair=True,
        )  # fmt: skip
        pair = e, m, None, n, layer, angle.cos(), angle.sin(), plan
        if is_parallel(layer):  # with what the second block makes of the first one's span
            x, coef, span = first_layer_spanned(*pair)
            outs = [x, *second_layer_projections(x, coef, span, layer, activated=True)]
        else:
            outs = [first_layer(*pair)]
        torch.autograd.grad(outs, (e, m), [torch.randn_like(out) for out in outs])


def passes(size: Size, device: torch.device, dtype: torch.dtype) -> None:
    """The passes between the products of a block, each way."""
    n, d = size.length, size.width

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, requires_grad=True)

    weight, bias = (torch.randn(d, device=device).to(dtype) for _ in range(2))
    for delta, shift in ((leaf(size.rows, n, d), bias), (None, None)):
        x = leaf(size.rows, n, d)
        added = None if delta is None else delta.to(dtype)
        total, normed = residual_norm(x.to(dtype), added, weight, shift, 1e-5, "triton")
        torch.autograd.grad((total.float().square() + normed.float()).sum(), x)
    for name, gated in (("silu", True), ("gelu", False), ("gelu_new", False), ("relu", False)):
        z = leaf(size.rows, n, (1 + gated) * size.inner)
        shift = None if gated else torch.randn(size.inner, device=device).to(dtype)
        out = activation(z.to(dtype), shift, name, gated, "triton")
        torch.autograd.grad(out.float().sum(), z)
    # In a tile, in two halves where heads share no keys, and by torch.
    for length, kv_heads in (
        (min(n, 64), size.kv_heads), (100, size.heads), (max(n, 160), size.kv_heads),
    ):  # fmt: skip
        angle = torch.outer(
            torch.arange(length, device=device), torch.rand(size.head_size // 4, device=device)
        ).repeat(1, 2)  # half of each head is rotated
        qkv = leaf(size.rows, length, (size.heads + 2 * kv_heads) * size.head_size)
        mixed = attention(
            qkv.to(dtype), angle.cos(), angle.sin(), heads=size.heads, kv_heads=kv_heads,
            scaling=size.head_size**-0.5, backend="triton",
        )  # fmt: skip
        torch.autograd.grad(mixed.float().sum(), qkv)


def token(size: Size, device: torch.device, dtype: torch.dtype) -> None:
    """A token of a decoder: both families' products, a cache in splits, and the head."""
    d, inner, heads, kv_heads = size.width, size.inner, size.heads, size.kv_heads

    def weight(*shape: int) -> Tensor:
        return normal(*shape, device=device, dtype=dtype)

    x, zeros, ones = weight(1, d), weight(d) * 0, torch.ones(d, device=device, dtype=dtype)
    qkv_rows = (heads + 2 * kv_heads) * size.head_size
    layer = LlamaLayer(
        input_norm=ones, qkv=weight(qkv_rows, d), o=weight(d, d), post_norm=ones,
        down=weight(d, inner), gate_up=weight(2 * inner, d), heads=heads, kv_heads=kv_heads,
        head_size=size.head_size, scaling=size.head_size**-0.5, eps=1e-5, activation="silu",
    )  # fmt: skip
    before, behind = products_of(layer)
    positions = 1024  # two splits
    keys, values = weight(2, 1, kv_heads, positions, size.head_size)
    angle = torch.outer(
        torch.arange(positions, device=device), torch.rand(size.head_size // 2, device=device)
    ).repeat(1, 2)
    at, written = (torch.full((1,), n, device=device) for n in (positions - 1, 0))
    (qkv,) = normed_products(x, [before], layer.eps)
    cache = Cache(keys, values, at, angle.cos(), angle.sin())
    mixed = cached_attention(qkv, cache, layer, "triton")
    add_products_(x, [(mixed, layer.o, None)])
    (h,) = normed_products(x, [behind], layer.eps)
    add_products_(x, [(h, layer.down, None)])
    # A parallel block: two products in one launch, at its begin and at its end.
    pair = [
        NormedProduct((ones, zeros), layer.qkv, zeros.new_zeros(qkv_rows)),
        NormedProduct((ones, zeros), layer.down.T.contiguous(), None, "gelu"),
    ]
    _, h = normed_products(x, pair, layer.eps)
    add_products_(x, [(mixed, layer.o, zeros), (h, layer.down, zeros)])
    table = weight(size.vocabulary, d)
    scores, index = best_logits(x, table)
    stream = Stream(x, at.new_zeros(1, 1), written, at)
    take_next_(stream, scores, index, table, "triton")


KERNELS: dict[str, Callable[[Size, torch.device, torch.dtype], None]] = {
    "_head_kernel": head,
    "_adamw_kernel": optimiser,
    "pair_input_kernel": block,
    "pair_input_backward_kernel": block,
    "pair_logits_kernel": block,
    "pair_logits_backward_kernel": block,
    "combined_activation_kernel": block,
    "affine_scan_forward_kernel": block,
    "affine_backward_kernel": block,
    "scan_backward_kernel": block,
    "_residual_norm_kernel": passes,
    "_residual_norm_backward_kernel": passes,
    "_activation_kernel": passes,
    "_attention_kernel": passes,
    "_attention_backward_kernel": passes,
    "_attention_halves_kernel": passes,
    "_attention_halves_backward_kernel": passes,
    "_rotary_kernel": passes,
    "_normed_product_kernel": token,
    "_added_product_kernel": token,
    "_cached_attention_kernel": token,
    "_merge_kernel": token,
    "_best_logit_kernel": token,
    "_next_token_kernel": token,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--names", action="store_true")
    a = parser.parse_args()
    if a.names:
        print(*KERNELS, sep="\n")
        return
    device = torch.device(a.device)
    torch.manual_seed(0)
    dtypes = [torch.bfloat16] if a.size == "real" else [torch.bfloat16, torch.float32]
    for launch in dict.fromkeys(KERNELS.values()):
        for dtype in dtypes:
            launch(SIZES[a.size], device, dtype)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(json.dumps({"launched": list(KERNELS), "size": a.size, "device": a.device}))


if __name__ == "__main__":
    main()
