"""Compile every kernel of first_layer_triton.py for the GPUs named; needs none. Prints JSON lines.

    python compile_first_layer.py 80 90 100

A process of its own: under TRITON_INTERPRET=1, which the tests set, nothing can be compiled.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cubin import resource_usage
from prototok_kernels.pair import first_layer_triton as kernels

POINTERS_TO_WEIGHT_DTYPE = {"span_ptr", "x_ptr", "coef_ptr", "grad_x_ptr", "grad_coef_ptr"}

# As _tiles chooses for Pythia-160M (12 heads, d = 768), Llama-3.2-1B (32, 2048) and 64 heads.
PYTHIA = {"P": 0, "D": 768, "HP": 16, "BN": 64, "BD": 128, "PRECISION": "tf32"}
LLAMA_FP32 = {"P": 0, "D": 2048, "HP": 32, "BN": 32, "BD": 128, "PRECISION": "ieee"}
WIDE_FP32 = {"P": 0, "D": 8192, "HP": 64, "BN": 16, "BD": 64, "PRECISION": "ieee"}
SCAN = {"P": 0, "HAS_GRAD_COEF": True, "BN": 256}
EVERYWHERE = [
    ("affine_scan_forward_kernel", "bf16", PYTHIA),
    ("affine_backward_kernel", "bf16", PYTHIA),
    ("scan_backward_kernel", "bf16", SCAN),
]
EVERYWHERE += [(name, dtype, {**sizes, "P": 1}) for name, dtype, sizes in EVERYWHERE]
ONCE = [
    ("affine_scan_forward_kernel", "fp32", LLAMA_FP32),
    ("affine_backward_kernel", "fp32", WIDE_FP32),
    ("scan_backward_kernel", "bf16", {**SCAN, "HAS_GRAD_COEF": False}),
]
# In fp32 a program has 8 warps, and behind a prefix a tile a quarter of the columns.
ONCE += [
    (name, dtype, {**sizes, "P": 4} | ({"BD": 32} if dtype == "fp32" else {}))
    for name, dtype, sizes in ONCE
]


def source(name: str, dtype: str, constexprs: dict[str, Any]) -> ASTSource:
    kernel = getattr(kernels, name)
    signature, attrs = {}, {}
    for index, argument in enumerate(inspect.signature(kernel.fn).parameters):
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            own = argument in POINTERS_TO_WEIGHT_DTYPE
            signature[argument] = f"*{dtype}" if own else "*fp32"
            attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
    return ASTSource(kernel, signature, constexprs, attrs)


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for name, dtype, constexprs in EVERYWHERE + (ONCE if capability == 90 else []):
            target = GPUTarget("cuda", capability, 32)
            options = {"num_warps": 8 if dtype == "fp32" else 4}
            binary = triton.compile(source(name, dtype, constexprs), target=target, options=options)
            with tempfile.TemporaryDirectory() as folder:
                usage = resource_usage(binary.asm["cubin"], Path(folder))
            case = {"capability": capability, "dtype": dtype, "kernel": name}
            print(json.dumps(case | {"shared": binary.metadata.shared, "usage": usage}))


if __name__ == "__main__":
    main()
