"""What a step and a token should cost on a GPU, estimated by a rehearsal, without one or a clock.

    python benchmarks/rehearse.py                  the tables
    python benchmarks/rehearse.py --docs           and into docs/gpu.md
    python benchmarks/rehearse.py --gemms          only the products, one line of JSON each; on CUDA
                                                   each is measured as well

A launch takes the longer of its bytes over the bandwidth and its FLOPs over the rate that is left
when the tiles of its product do not fill the last wave of processors, and a gap. MFU counts 4·P
FLOPs a token, P all matrix weights with the head, against 989 TF/s. Letters: B rows, N positions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rehearsed_tokens import token_lines

from prototok.common.clock import once
from prototok.fitting.engine.step import step
from prototok_kernels.head_triton import TILES
from prototok_kernels.layers import inner_projection
from rehearsal import Launch, frozen_shape, rehearsal, slots_of

SHAPES = {  # rows, N, and constant vectors in front
    "pythia-160m": (256, 128, 0), "pythia-1.4b": (128, 128, 0), "llama-3.2-1b": (64, 256, 0),
    "llama-3.1-8b": (16, 256, 0), "smollm2-135m": (512, 16, 1),
}  # fmt: skip
PEAK = 989e12  # FLOP/s, dense bf16 of H100 and H200 as declared
DOCS = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
SMALL_BYTES, SMALL_FLOPS = 4e6, 1e9


@dataclass(frozen=True)
class Gpu:
    """Rate of products that fill it, FLOP/s; bandwidth, bytes/s; seconds from launch to launch."""

    rate: float
    bandwidth: float
    gap: float = 1.5e-6
    processors: int = 132

    def __str__(self) -> str:
        return f"{self.rate / 1e12:.0f} TF/s, {self.bandwidth / 1e12:.1f} TB/s"

    def fill(self, launch: Launch) -> float:
        """Share of the processors' time that goes into a product, by its tiles and waves."""
        if launch.shape is None:
            return 1.0
        batch, m, n, _ = launch.shape

        def share(rows: int, columns: int) -> float:
            tiles = batch * -(-m // rows) * -(-n // columns)
            waves = -(-tiles // self.processors)
            return batch * m * n / (waves * self.processors * rows * columns)

        return max(share(*tile) for tile in TILES)

    def seconds(self, launch: Launch) -> float:
        products = launch.flops / (self.rate * self.fill(launch))
        return max(launch.bytes / self.bandwidth, products) + self.gap


GPUS = (Gpu(700e12, 3.8e12), Gpu(600e12, 3.8e12), Gpu(650e12, 2.7e12))

PARTS: dict[str, Callable[[Launch], bool]] = {
    "small launches (< 4 MB, < 1 GFLOP)": lambda one: (
        one.bytes < SMALL_BYTES and one.flops < SMALL_FLOPS
    ),
    "products": lambda one: one.kind == "product",
    "activation": lambda one: one.name == "_activation_kernel",
    "head's pass": lambda one: one.name == "_head_kernel",
    "attention": lambda one: one.kind == "attention" or one.name.startswith("_attention"),
    "norms": lambda one: one.name.startswith("_residual_norm"),
    "rotary": lambda one: one.name == "_rotary_kernel",
    "other": lambda one: True,
}


@dataclass(frozen=True)
class Rehearsed:
    shape: str
    rows: int
    length: int
    prefix: int  # vectors in front
    weights: int  # P
    launches: list[Launch]

    def __str__(self) -> str:
        behind = f" behind {self.prefix}" if self.prefix else ""
        return f"{self.shape} {self.rows} × {self.length}{behind}"

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)

    def seconds(self, gpu: Gpu) -> float:
        return sum(map(gpu.seconds, self.launches))

    def mfu(self, gpu: Gpu) -> float:
        return 4 * self.weights * self.rows * self.length / PEAK / self.seconds(gpu)

    def parts(self) -> dict[str, list[Launch]]:
        found: dict[str, list[Launch]] = {name: [] for name in PARTS}
        for launch in self.launches:
            found[next(name for name, holds in PARTS.items() if holds(launch))].append(launch)
        return found

    def products(self) -> list[tuple[Launch, int]]:
        """The products by what they cost together, each with how often it runs."""
        found: dict[tuple, list[Launch]] = defaultdict(list)
        for launch in self.launches:
            if launch.shape is not None and launch.flops >= SMALL_FLOPS:
                found[launch.part, launch.shape, launch.turned].append(launch)
        alike = sorted(found.values(), key=lambda some: -sum(one.flops for one in some))
        return [(some[0], len(some)) for some in alike]


def rehearsed(shape: str, rows: int, length: int, prefix: int) -> Rehearsed:
    """One step of full slots, input [e, m, …, m]."""
    with rehearsal() as seen:
        lm = frozen_shape(shape, prefix)
        slots = slots_of(lm, "e m*", rows, length)
        lm.body.tables(slots.inputs.input_length(length))  # as a runner does
        step(lm, slots, rows)  # what a model makes once is made here
        seen.launches.clear()
        step(lm, slots, rows)
    matrices = [
        weight
        for layer in lm.body.layers
        for weight in (layer.qkv, layer.o, inner_projection(layer)[0], layer.down)
    ]
    weights = sum(weight.numel() for weight in [*matrices, lm.body.head])
    return Rehearsed(shape, rows, length, prefix, weights, seen.launches)


def rows_of(table: Iterable[Iterable[object]]) -> str:
    head, *body = [[str(cell) for cell in row] for row in table]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def steps_table(steps: list[Rehearsed]) -> str:
    def cost(one: Rehearsed, gpu: Gpu) -> str:
        return f"{1e3 * one.seconds(gpu):.1f} ms, MFU {100 * one.mfu(gpu):.0f} %"

    return rows_of(
        [["step", "launches", "GB", *GPUS]]
        + [
            [one, len(one.launches), f"{one.bytes / 1e9:.1f}",
             *(cost(one, gpu) for gpu in GPUS)]
            for one in steps
        ]
    )  # fmt: skip


def parts_table(steps: list[Rehearsed]) -> str:
    gpu = GPUS[0]

    def cells(one: Rehearsed, name: str) -> str:
        some = one.parts()[name]
        ms = 1e3 * sum(map(gpu.seconds, some))
        return f"{len(some)}, {sum(x.bytes for x in some) / 1e9:.1f} GB, {ms:.2f} ms"

    return rows_of(
        [["part", *(one.shape for one in steps)]]
        + [[name, *(cells(one, name) for one in steps)] for name in PARTS]
    )


def products_table(steps: list[Rehearsed]) -> str:
    gpu = GPUS[0]
    lines: list[list[object]] = [["product", "part", "times", "GFLOP each", "processors busy"]]
    for one in steps:
        for launch, count in one.products()[:8]:
            assert launch.shape is not None
            batch, m, n, k = launch.shape
            size = f"{m} × {k} by {k} × {n}" + (f", {batch} of them" if batch > 1 else "")
            lines.append([f"{one.shape}: {size}", launch.part, count, f"{launch.flops / 1e9:.0f}",
                          f"{100 * gpu.fill(launch):.0f} %"])  # fmt: skip
    return rows_of(lines)


def into_docs(tables: dict[str, str]) -> None:
    text = DOCS.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = ("\n" + rest).partition(end)
        if not found or not closed:
            raise SystemExit(f"{DOCS.name} has no place for the table {name!r}")
        text = before + begin + table + end + after
    DOCS.write_text(text)


def measured(launch: Launch) -> float:
    """FLOP/s of a product on this GPU in bf16: the median of five times ten in a row."""
    assert launch.shape is not None
    batch, m, n, k = launch.shape
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def factor(rows: int, columns: int) -> torch.Tensor:
        shape = (rows, columns) if batch == 1 else (batch, rows, columns)
        return torch.randn(shape, device=device).to(torch.bfloat16)

    a, b = factor(m, k), factor(n, k).mT if launch.turned else factor(k, n)

    def ten() -> None:
        for _ in range(10):
            torch.matmul(a, b)

    ten()
    return 10 * launch.flops / statistics.median(once(ten, device) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    parser.add_argument("--gemms", action="store_true", help="the products alone")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/gpu.md")
    a = parser.parse_args()
    steps = [rehearsed(shape, *SHAPES[shape]) for shape in a.shape or SHAPES]
    if a.gemms:
        for one in steps:
            for launch, count in one.products():
                line = {
                    "shape": one.shape, "part": launch.part, "batch_m_n_k": launch.shape,
                    "times": count, "turned": launch.turned, "gflop": launch.flops / 1e9,
                    "processors_busy": round(GPUS[0].fill(launch), 3),
                }  # fmt: skip
                if torch.cuda.is_available():
                    line["tflops_per_second"] = round(measured(launch) / 1e12, 1)
                print(json.dumps(line), flush=True)
        return
    tables = {
        "steps": steps_table(steps), "parts": parts_table(steps), "products": products_table(steps),
        "tokens": rows_of(token_lines((GPUS[0], GPUS[2]))),
    }  # fmt: skip
    print("\n\n".join(tables.values()))
    if a.docs:
        if a.shape:
            parser.error("--docs writes all shapes")
        into_docs(tables)


if __name__ == "__main__":
    sys.exit(main())
