"""The Triton kernels without a GPU: run by the interpreter, and compiled for three generations."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="the triton package is not installed")

from cubin import resource_usage  # noqa: E402
from prototok_kernels import (  # noqa: E402
    activation,
    adamw_rows,
    attention,
    head_triton,
    residual_norm,
)
from prototok_kernels.backend import TRITON_INTERPRETED  # noqa: E402

HERE = Path(__file__).parent


def in_another_process(chosen: str, files: list[Path], interpret: str) -> None:
    """Run tests where triton interprets ("1") or compiles ("0"): that is settled at its import."""
    command = [sys.executable, "-m", "pytest"]
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-o", "addopts=", "-k", chosen, *files],
        env={**os.environ, "TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ passed", run.stdout) and "skipped" not in run.stdout, run.stdout


@pytest.mark.skipif(TRITON_INTERPRETED, reason="this is the process with the interpreter")
def test_interpreted_kernels_pass_the_tests_of_every_backend():
    ops = ("linear_cross_entropy", "adamw_rows", "residual_norm", "activation", "attention")
    in_another_process("[triton", [HERE / f"test_{op}.py" for op in ops], "1")


@pytest.mark.skipif(not TRITON_INTERPRETED, reason="this is the process that compiles")
def test_kernels_compile_without_a_gpu():
    in_another_process("test_compiles_without_a_gpu", [Path(__file__)], "0")


HEAD = {
    "targets": "*i64",
    "token_weight": "*fp32",
    "loss": "*fp32",
    "predicted": "*i64",
    "margin": "*fp32",
    "inverse_temperature": "fp32",
}
ADAMW = dict.fromkeys(("param", "grad", "exp_avg", "exp_avg_sq"), "*fp32") | dict(
    step="*i64",
    lr="*fp32",
    active="*u8",
    **dict.fromkeys(
        ("log_beta1", "log_beta2", "beta2", "one_minus_beta1", "one_minus_beta2", "eps"), "fp32"
    ),
    weight_decay="fp32",
)
CASES = {
    f"head-{dtype}": (
        "head",
        dict(logits=f"*{dtype}", gradient=f"*{dtype}", **HEAD),
        {
            "vocabulary": 50304,
            "HAS_TOKEN_WEIGHT": True,
            "NEED_GRAD": True,
            "BLOCK": 4096,
            "GROUP": 8,
        },
        16,
    )
    for dtype in ("bf16", "fp32")
} | {"adamw": ("adamw", ADAMW, {"D": 2048, "BLOCK": 1024}, 8)}
# The widths of Llama-3.2-1B, bf16, launched as the ops launch them.
STATISTICS = {"statistics": "*fp32"}
CASES |= {
    "residual-norm": (
        "residual_norm",
        dict.fromkeys(("x", "delta", "total", "normed", "weight", "bias", "second_normed",
                       "second_weight", "second_bias"), "*bf16") | STATISTICS | {"eps": "fp32"},
        {"D": 2048, "HAS_DELTA": True, "CENTRED": True, "SECOND": True, "BLOCK": 2048},
        8,
    ),
    "residual-norm-backward": (
        "residual_norm_backward",
        dict.fromkeys(("grad_total", "grad_normed", "grad_second", "total", "weight",
                       "second_weight", "grad"), "*bf16") | STATISTICS,
        {"D": 2048, "HAS_GRAD_TOTAL": True, "CENTRED": True, "SECOND": True, "BLOCK": 2048},
        8,
    ),
    "rotary": (
        "rotary",
        {"x": "*bf16", "out": "*bf16", "cos": "*fp32", "sin": "*fp32"}
        | dict.fromkeys(
            ("x_row", "x_position", "x_head", "out_position", "out_head", "table_row", "length",
             "heads"), "i32",
        ),
        {"DIRECTION": 1, "SIZE": 64, "HALF": 32, "BLOCK_HEADS": 32, "BLOCK_HALF": 32,
         "BLOCK_REST": 1, "COPY_REST": False},
        4,
    ),
} | {
    f"activation-{kind}-{backward}": (
        "activation",
        dict.fromkeys(("grad", "z", "bias", "out"), "*bf16"),
        {"INNER": 8192, "KIND": kind, "GATED": True, "HAS_BIAS": True, "BACKWARD": backward,
         "BLOCK": 1024},
        4,
    )
    for kind, backward in (("silu", False), ("silu", True), ("gelu", True))
}  # fmt: skip
MODULES = {
    "head": head_triton,
    "adamw": adamw_rows,
    "residual_norm": residual_norm,
    "residual_norm_backward": residual_norm,
    "rotary": attention,
    "activation": activation,
}
# Strides are known at launch only, and triton sees for itself which of them 16 divides.
NARROW = {"rotary"}


@pytest.mark.skipif(TRITON_INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_a_gpu(case, architecture, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, signature, constants, num_warps = CASES[case]
    kernel = getattr(MODULES[name], f"_{name}_kernel")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    source = ASTSource(
        kernel,
        signature={argument: signature.get(argument, "constexpr") for argument in kernel.arg_names},
        constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, argument in enumerate(kernel.arg_names)
            if signature.get(argument, "").startswith("*")
        },
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": num_warps, "enable_fp_fusion": True},
    )
    # Neighbouring elements are read together: 16 bytes a thread and instruction.
    assert name in NARROW or re.search(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"])
    if architecture == 90:
        usage = resource_usage(compiled.asm["cubin"], tmp_path)
        if usage is None:
            pytest.skip("this triton comes without cuobjdump, which names what a kernel uses")
        # Spilled registers live on the stack. 64 registers let two programs share a processor.
        assert usage["STACK"] == 0 and usage["LOCAL"] == 0 and usage["REG"] <= 64, usage
