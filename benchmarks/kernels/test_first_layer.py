"""The collapsed first layer against the general layer, forward and backward, N = 256.

And the first layer with the products of GPT-NeoX's second that read its span, against the first
layer with those products at every position.

    pytest benchmarks/kernels/test_first_layer.py -s

Every case first checks that the numbers agree, then times the variants in turn, one run of each
per round. The record (extra_info) holds medians and quartiles of both clocks: wall time, and this
process's CPU time, which neighbours on a shared machine disturb less. `flop_ratio` is the bound
that counting floating-point operations sets (of the first layer's autograd form: the counter misses
the in-place product of the other). The last line of each case is JSON.

Letters: B rows, N positions, d hidden size, H heads, K key-value heads, c head size, I inner size.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from prototok.common.allocator import keep_freed_memory
from prototok_kernels import plan as planning
from prototok_kernels.layers import DecoderLayer, LlamaLayer, NeoXLayer, decoder_layer
from prototok_kernels.pair.first_layer import first_layer, first_layer_ref, first_layer_spanned
from prototok_kernels.pair.second_layer import (
    second_layer_projections,
    second_layer_projections_ref,
)
from prototok_kernels.plan import Plan, plan_of

LENGTH, ROUNDS = 256, 7
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Shape:
    d: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    rows: int
    parallel: bool | None  # None: Llama


SHAPES = {
    "pythia-160m": Shape(768, 12, 12, 64, 3072, 8, True),
    "pythia-160m, sequential": Shape(768, 12, 12, 64, 3072, 8, False),
    "llama, d=768": Shape(768, 12, 4, 64, 2048, 8, None),
    "llama-3.2-1b": Shape(2048, 32, 8, 64, 8192, 1, None),
}


def random_layer(s: Shape, dtype: torch.dtype) -> DecoderLayer:
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        scaled = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return scaled.to(DEVICE, dtype)

    hc, kc = s.heads * s.head_size, s.kv_heads * s.head_size
    common: dict[str, Any] = {
        "qkv": tensor(hc + 2 * kc, s.d), "o": tensor(s.d, hc), "down": tensor(s.d, s.inner),
        "input_norm": 1 + tensor(s.d), "post_norm": 1 + tensor(s.d), "heads": s.heads,
        "kv_heads": s.kv_heads, "head_size": s.head_size, "scaling": s.head_size**-0.5, "eps": 1e-5,
    }  # fmt: skip
    if s.parallel is None:
        return LlamaLayer(**common, gate_up=tensor(2 * s.inner, s.d), activation="silu")
    return NeoXLayer(
        **common, qkv_bias=tensor(hc + 2 * kc), o_bias=tensor(s.d), up=tensor(s.inner, s.d),
        up_bias=tensor(s.inner), down_bias=tensor(s.d), input_norm_bias=tensor(s.d),
        post_norm_bias=tensor(s.d), activation="gelu", parallel=s.parallel,
    )  # fmt: skip


def rotary_tables(size: int) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** (-torch.arange(0, size, 2) / size)
    angle = torch.arange(LENGTH)[:, None] * frequencies
    angle = torch.cat([angle, angle], dim=-1).to(DEVICE)
    return angle.cos(), angle.sin()


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def quartiles(milliseconds: list[float]) -> list[float]:
    return [round(q, 3) for q in statistics.quantiles(milliseconds, n=4)]


Results = tuple[Tensor, ...]


def vectors(s: Shape) -> tuple[Tensor, Tensor]:
    """e and m, (B, d)."""
    generator = torch.Generator().manual_seed(1)
    e, m = (torch.randn(s.rows, s.d, generator=generator).to(DEVICE) for _ in range(2))
    return e.requires_grad_(), m.requires_grad_()


def arriving(s: Shape, *widths: int) -> Results:
    """A gradient (B, N, width) for each output, the same in every variant."""
    generator = torch.Generator().manual_seed(2)
    drawn = (torch.randn(s.rows, LENGTH, width, generator=generator) for width in widths)
    return tuple(grad.to(DEVICE) for grad in drawn)


def with_gradients(outs: Results, leaves: Results, grads: Results) -> Results:
    """The outputs, and the gradients of the leaves."""
    of_outs = [grad.to(o.dtype) for o, grad in zip(outs, grads, strict=True)]
    return *(o.detach() for o in outs), *torch.autograd.grad(outs, leaves, of_outs)


def compare(
    benchmark: Any,
    record: dict[str, Any],
    variants: dict[str, Callable[[], Results]],  # "general" first, ours last
    truth: Results,
) -> None:
    errors = {
        v: [float((x.double() - t).norm() / t.norm()) for x, t in zip(run(), truth, strict=True)]
        for v, run in variants.items()
    }
    for v, found in errors.items():
        for f, plain in zip(found, errors["general"], strict=True):
            assert f <= 3 * plain, f"{v} is wrong: {errors}"

    flops = {}
    wall: dict[str, list[float]] = {v: [] for v in variants}
    cpu: dict[str, list[float]] = {v: [] for v in variants}
    for v, run in variants.items():
        with FlopCounterMode(display=False) as counter:
            run()
        flops[v] = counter.get_total_flops()
    for _ in range(ROUNDS):
        for v, run in variants.items():
            synchronize()
            at, cpu_at = time.perf_counter(), time.process_time()
            run()
            synchronize()
            wall[v].append(1e3 * (time.perf_counter() - at))
            cpu[v].append(1e3 * (time.process_time() - cpu_at))
    _, counted, *_ = variants
    *_, ours = variants
    record |= {
        "length": LENGTH, "device": DEVICE,
        "processor": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "flop_ratio": round(flops["general"] / flops[counted], 2),
        "wall_ms": {v: quartiles(t) for v, t in wall.items()},
        "cpu_ms": {v: quartiles(t) for v, t in cpu.items()},
        "relative_errors": {v: [float(f"{x:.2g}") for x in found] for v, found in errors.items()},
    }  # fmt: skip
    for clock, times in (("wall", wall), ("cpu", cpu)):
        general = statistics.median(times["general"])
        record[f"{clock}_ratio"] = round(general / statistics.median(times[ours]), 2)
        if counted != ours:
            autograd = statistics.median(times[counted])
            record[f"{clock}_ratio_of_autograd"] = round(general / autograd, 2)
    benchmark.extra_info.update(record)
    benchmark.pedantic(variants[ours], rounds=3)
    print(json.dumps(record))


def plan_for(layer: DecoderLayer, shape: Shape) -> Plan:
    # On CUDA as of so many rows that the closed form pays, to see where it does.
    rows = shape.rows if DEVICE == "cpu" else 1 << 22
    return plan_of(
        planning.Shape.of([layer], None), rows=rows, length=LENGTH, dtype=layer.dtype,
        device=DEVICE, backend="auto", pair=True,
    )  # fmt: skip


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("name", SHAPES)
def test_first_layer(benchmark: Any, name: str, dtype: torch.dtype) -> None:
    keep_freed_memory()
    s = SHAPES[name]
    layer = random_layer(s, dtype)
    cos, sin = rotary_tables(s.head_size if s.parallel is None else s.head_size // 4)
    e, m = vectors(s)
    grads = arriving(s, s.d)

    def general(layer: DecoderLayer) -> Results:
        x = torch.cat([e[:, None], m[:, None].expand(-1, LENGTH - 1, -1)], dim=1)
        # float64 is the truth, which no kernel computes in.
        backend = plan_for(layer, s).passes.taken
        h = decoder_layer(x.to(layer.dtype), layer, cos, sin, backend)
        return with_gradients((h,), (e, m), grads)

    def collapsed(function: Callable[..., Tensor], *plan: Plan) -> Results:
        h = function(e, m, None, LENGTH, layer, cos, sin, *plan)
        return with_gradients((h,), (e, m), grads)

    variants: dict[str, Callable[[], Results]] = {
        "general": lambda: general(layer),
        "closed form, autograd": lambda: collapsed(first_layer_ref),
        "first_layer": lambda: collapsed(first_layer, plan_for(layer, s)),
    }
    record = {"case": name, "dtype": str(dtype), "rows": s.rows}
    compare(benchmark, record, variants, general(layer.to(torch.float64)))


@DTYPES
def test_second_layer(benchmark: Any, dtype: torch.dtype) -> None:
    """Both variants take the first layer in closed form."""
    keep_freed_memory()
    s = SHAPES["pythia-160m"]
    layer = random_layer(s, dtype)
    cos, sin = rotary_tables(s.head_size // 4)
    e, m = vectors(s)
    grads = arriving(s, len(layer.qkv), s.inner)

    def general(layer: DecoderLayer) -> Results:
        x = first_layer(e, m, None, LENGTH, layer, cos, sin, plan_for(layer, s))
        return with_gradients(second_layer_projections_ref(x, layer), (e, m), grads)

    def collapsed() -> Results:
        plan = plan_for(layer, s)
        x, coef, span = first_layer_spanned(e, m, None, LENGTH, layer, cos, sin, plan)
        return with_gradients(second_layer_projections(x, coef, span, layer), (e, m), grads)

    variants: dict[str, Callable[[], Results]] = {
        "general": lambda: general(layer),
        "second_layer_projections": collapsed,
    }
    record = {"case": "pythia-160m, second layer", "dtype": str(dtype), "rows": s.rows}
    compare(benchmark, record, variants, general(layer.to(torch.float64)))
