"""Small models made here, and the real ones where a checkout of them stands beside ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import prototok
from prototok import FrozenLM
from prototok.fitting.fast_fit import FitEvent

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
TESTS = Path(__file__).resolve().parent
BENCHMARKS = TESTS.parent / "benchmarks"
SHARED = TESTS.parents[1] / "shared"


def shared(*parts: str) -> Path:
    """A path below the shared folder; the test is skipped where it is missing."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(('shared', *parts))}, which is not part of the project")
    return path


def run_with_own_memory(code: str) -> None:
    """Run code that watches memory in a process of its own, which gives back what it frees.

    Tests before it may have told this one to keep all of that (`keep_freed_memory`), for good.
    """
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    # Large pieces come from the system each time, not from what was let go or set aside before.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, **settings, "PYTHONPATH": path},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def stories(count: int, lm: FrozenLM, length: int) -> list[str]:
    """The first `count` held-out stories of at least `length` tokens."""
    text = shared("corpora", "tinystories", "valid.txt").read_text(encoding="utf-8")
    found = [part for part in text.split("\n\n") if len(lm.encode(part)) >= length]
    return found[:count]


def losses_by_step(lm: FrozenLM, texts: list, **options: object) -> dict[int, dict[int, float]]:
    """Row → updates made → loss, of a fit: every step on the CPU, the last of a burst on CUDA."""
    seen: dict[int, dict[int, float]] = {}

    def note(event: FitEvent) -> None:
        for row, step, loss in zip(
            event.rows.tolist(), event.steps.tolist(), event.loss.tolist(), strict=True
        ):
            seen.setdefault(row, {})[step] = loss

    prototok.fast_fit(lm, texts, callback=note, progress=False, **options)
    return seen


def assert_same_losses(
    found: dict[int, float], wanted: dict[int, float], lm: FrozenLM, cpu: float, cuda: float
) -> None:
    """By step; on CUDA where both looked, for time decides how long a burst is."""
    common = found.keys() & wanted.keys()
    assert common
    rel = cuda
    if lm.device.type == "cpu":
        assert common == found.keys() == wanted.keys()
        rel = cpu
    of = {step: wanted[step] for step in common}
    assert {step: found[step] for step in common} == pytest.approx(of, rel=rel)


def small_llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    options = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40,
        "tie_word_embeddings": True, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(options | changes))).eval()
