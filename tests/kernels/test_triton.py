"""The Triton kernels without a GPU: run by the interpreter, and compiled for three generations."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="the triton package is not installed")

from prototok_kernels import adamw_rows, linear_cross_entropy  # noqa: E402
from prototok_kernels.backend import TRITON_INTERPRETED  # noqa: E402

HERE = Path(__file__).parent


@pytest.mark.skipif(TRITON_INTERPRETED, reason="this is the process with the interpreter")
def test_interpreted_kernels_pass_the_tests_of_every_backend():
    files = [HERE / "test_linear_cross_entropy.py", HERE / "test_adamw_rows.py"]
    command = [sys.executable, "-m", "pytest"]
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-o", "addopts=", "-k", "[triton", *files],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ passed", run.stdout) and "skipped" not in run.stdout, run.stdout


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
        {"vocabulary": 50304, "HAS_TOKEN_WEIGHT": True, "NEED_GRAD": True, "BLOCK": 4096},
        16,
    )
    for dtype in ("bf16", "fp32")
} | {"adamw": ("adamw", ADAMW, {"D": 2048, "BLOCK": 1024}, 8)}


@pytest.mark.skipif(TRITON_INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_a_gpu(case, architecture, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, signature, constants, num_warps = CASES[case]
    kernel = {"head": linear_cross_entropy, "adamw": adamw_rows}[name]
    kernel = getattr(kernel, f"_{name}_kernel")
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
    assert re.search(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"])
    if architecture == 90:
        usage = resource_usage(compiled.asm["cubin"], tmp_path)
        # Spilled registers live on the stack. 64 registers let two programs share a processor.
        assert usage["STACK"] == 0 and usage["LOCAL"] == 0 and usage["REG"] <= 64, usage


def resource_usage(cubin: bytes, folder: Path) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this triton comes without cuobjdump, which names what a kernel uses")
    (folder / "kernel.cubin").write_bytes(cubin)
    report = subprocess.run(
        [tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return {name: int(count) for name, count in found.items()}
