"""Compile every kernel of first_layer_triton.py for three GPUs; needs none. Prints one line each.

A process of its own: under TRITON_INTERPRET=1, which the tests set, nothing can be compiled.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from typing import Any

import triton
from prototok_kernels import first_layer_triton as kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

DTYPES = {"fp32": "ieee", "bf16": "tf32"}  # of the weights → precision of the products
FP32_POINTERS = {"a_ptr", "b_ptr", "w_ptr", "prefix_ptr", "grad_w_ptr", "grad_a_ptr", "grad_b_ptr",
                 "partial_ptr"}  # fmt: skip
AFFINE = [{"D": 768, "HP": 16, "BN": 64, "BD": 128}, {"D": 2048, "HP": 32, "BN": 32, "BD": 128}]
CONSTEXPRS: dict[str, list[dict[str, Any]]] = {
    "affine_scan_forward_kernel": AFFINE,
    "affine_backward_kernel": AFFINE,
    "scan_backward_kernel": [{"HAS_GRAD_COEF": flag, "BN": 256} for flag in (False, True)],
}


def source(name: str, dtype: str, constexprs: dict[str, Any]) -> ASTSource:
    kernel = getattr(kernels, name)
    arguments = list(inspect.signature(kernel.fn).parameters)
    if "PRECISION" in arguments:
        constexprs = {**constexprs, "PRECISION": DTYPES[dtype]}
    signature, attrs = {}, {}
    for index, argument in enumerate(arguments):
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = "*fp32" if argument in FP32_POINTERS else f"*{dtype}"
            attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
    return ASTSource(kernel, signature, constexprs, attrs)


def main() -> None:
    for capability, dtype in itertools.product(map(int, sys.argv[1:]), DTYPES):
        for name, variants in CONSTEXPRS.items():
            for constexprs in variants:
                target = GPUTarget("cuda", capability, 32)
                binary = triton.compile(source(name, dtype, constexprs), target=target)
                print(capability, dtype, name, constexprs, len(binary.asm["cubin"]),
                      binary.metadata.shared)  # fmt: skip


if __name__ == "__main__":
    main()
