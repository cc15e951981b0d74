"""Every launch of real steps compiles for three generations of GPUs, and for what it costs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import triton
from rehearsed_tokens import token
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cubin import narrow_loads_in_loops, resource_usage
from prototok.fitting.engine.step import step
from rehearsal import Compilation, frozen_shape, rehearsal, slots_of

SHAPES = (
    ("pythia-160m", 256, 128, 0), ("llama-3.2-1b", 64, 256, 0), ("llama-3.1-8b", 16, 256, 0),
    ("llama-3.2-1b", 64, 256, 1), ("smollm2-135m", 512, 16, 1), ("pythia-160m", 64, 64, 0),
)  # fmt: skip

# Shape, rows and N of decoders; a long cache is read in splits.
TOKENS = (("pythia-160m", 1, 256), ("llama-3.2-1b", 1, 2048), ("llama-3.1-8b", 4, 256))

# Loads of two bytes in loops that may stay. The scan's two bases are one row each beside H rows of
# the span, a column a thread; its backward pass reads one row a head, backwards, in one turn, and
# behind a vector three. That of the logits reads a few heads of q and v, an element a thread, once
# each.
NARROW = {
    "affine_scan_forward_kernel": 2, "scan_backward_kernel": 6, "pair_logits_backward_kernel": 10,
}  # fmt: skip


def compilations(architecture: int) -> list[Compilation]:
    """All that the steps and tokens launch where that is the device's capability."""
    with rehearsal(capability=architecture) as seen:
        for shape, rows, length, prefix in SHAPES:
            lm = frozen_shape(shape, prefix)
            step(lm, slots_of(lm, "e m*", rows, length), rows)
    tokens = [c for one in TOKENS for c in token(*one, capability=architecture).compilations]
    return list(dict.fromkeys([*seen.compilations, *tokens]))


def variants(compilations: list[Compilation]) -> list[Compilation]:
    """One of each kernel for each choice of what is compiled in, whatever the sizes."""

    def choice(c: Compilation) -> tuple[object, ...]:
        chosen = [(k, v) for k, v in c.constants if isinstance(v, str | bool)]
        return c.name, *chosen, tuple(kind for _, kind in c.signature)

    return list({choice(c): c for c in reversed(compilations)}.values())


def compiled(c: Compilation, architecture: int) -> Any:
    names = c.kernel.arg_names
    source = ASTSource(
        c.kernel,
        signature=dict(c.signature),
        constexprs={(names.index(name),): value for name, value in c.constants},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in c.aligned},
    )
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=dict(c.options))


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_launch_compiles(architecture, tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    wrong, names = [], set()
    launched = compilations(architecture)
    most = (99 if architecture < 90 else 227) << 10  # bytes that a program may share
    for c in launched if architecture == 90 else variants(launched):
        binary = compiled(c, architecture)
        names.add(c.name)
        with tempfile.TemporaryDirectory() as folder:
            usage = resource_usage(binary.asm["cubin"], Path(folder))
        if usage is not None and (usage["STACK"] or usage["LOCAL"]):
            wrong.append(f"{c.name} {dict(c.constants)} spills registers: {usage}")
        narrow = narrow_loads_in_loops(binary.asm["ptx"])
        if len(narrow) > NARROW.get(c.name, 0):
            wrong.append(f"{c.name} {dict(c.constants)} loads two bytes at a time: {narrow}")
        if binary.metadata.shared > most:
            wrong.append(f"{c.name} {dict(c.constants)} shares {binary.metadata.shared} bytes")
    assert not wrong, "\n".join(wrong)
    assert len(names) >= 15
