"""What only a GPU can show, ready for the first one."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import prototok
from against_fp64 import assert_as_close_as_torch, with_gradients
from in_flight import buffers, filled
from prototok import FrozenLM, Recipe
from prototok.autoregressive.generate import greedy
from prototok.autoregressive.static_kv import StaticDecoder
from prototok.fitting.engine import step as step_module
from prototok.fitting.engine.buckets import _FULL, rows_that_fit
from prototok.fitting.engine.inputs import Inputs, OneForward, TeacherForced
from prototok.fitting.engine.runner import CapturedStep, StepRunner
from prototok.fitting.engine.setup import Setup
from prototok.fitting.engine.slots import Slots
from prototok.fitting.engine.step import step
from prototok.model.frozen_lm import twin_of
from prototok.results.arrangement import Arrangement
from prototok_kernels.attention import attention, attention_ref
from prototok_kernels.backend import unavailable
from support import small_llama
from zoo import OWN, made

PAIR = OneForward(Arrangement.parse("e m*"))
FAST = Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=400)


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    )


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": small_llama,
    "mistral": OWN["mistral, window shorter than the text"],
    "gpt-neox": OWN["gpt-neox, parallel"],
    "gpt-neox, sequential": OWN["gpt-neox, sequential"],
    "general": gpt2,
}


def random_ids(lm: FrozenLM, *shape: int) -> torch.Tensor:
    return torch.randint(lm.vocab_size, shape, generator=torch.Generator().manual_seed(0))


# ---- the decoder ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama, grouped, tied", "gpt-neox, parallel", "qwen3, tied"])
def test_the_static_decoder_generates_what_transformers_does(where, name):
    """Through its graph, twice, and after a change of capacity."""
    lm = prototok.load(made(OWN[name]), device=where.device, dtype="float32")
    mem = torch.randn(2, 1, lm.hidden_size, generator=torch.Generator().manual_seed(0))
    mem = mem.to(where.device)
    wanted = greedy(twin_of(lm, torch.float32), 12, "dynamic", inputs_embeds=mem).cpu()
    assert len(set(wanted.flatten().tolist())) > 4
    for capacity in (16, 16, 32):
        decoder = StaticDecoder(lm.body, lm, 2, capacity, lm.plan(2, 1, where.backend))
        for _ in range(2):
            assert torch.equal(decoder.generate(mem, 12), wanted)
        assert decoder.graph is not None


# ---- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("length", [64, 192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_attention_within_a_window(where, dtype, length, kv_heads):
    """Finite and near fp64, where every logit is so low that a padded one would overflow."""
    missing = unavailable("triton", where.device)
    if missing:
        pytest.skip(missing)
    heads, size = 2, 64
    generator = torch.Generator().manual_seed(length)
    qkv = 0.1 * torch.randn(1, length, heads + 2 * kv_heads, size, generator=generator)
    qkv[:, :, :heads, 0] = 1.0
    qkv[:, :, heads : heads + kv_heads, 0] = -120 * math.sqrt(size)
    qkv = qkv.flatten(2).to(where.device, dtype)
    # No position turns its vectors, so that all logits stay near -120.
    cos = torch.ones(length, size, device=where.device)
    options = {
        "cos": cos, "sin": 0 * cos, "heads": heads, "kv_heads": kv_heads,
        "scaling": size**-0.5, "window": 48,
    }  # fmt: skip

    def way(function, dtype):
        return with_gradients(functools.partial(function, **options), [qkv], dtype)

    ours = way(functools.partial(attention, backend="triton"), dtype)
    assert all(t.isfinite().all() for t in ours)
    assert_as_close_as_torch(ours, way(attention_ref, dtype), way(attention_ref, torch.float64))


# ---- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inputs", ["e m*", "e* m*", "[mem]"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replays_are_the_eager_steps_bit_by_bit(where, family, inputs, dtype):
    """Through admissions and releases, and with no warning that a step could not be captured."""
    lm = prototok.load(made(FAMILIES[family]), device=where.device, dtype=dtype)
    what: Inputs = (
        TeacherForced(lm.embedding, 2)
        if inputs == "[mem]"
        else OneForward(Arrangement.parse(inputs))
    )
    found = []
    for kind in (StepRunner, CapturedStep):
        slots, waiting = filled(lm, None, what, backend=where.backend)
        runner = kind(lm, slots, 8)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the step runs without a CUDA graph")
            for _ in range(3):
                runner.advance(6)
                with runner.changing():
                    slots.release([2])
                    slots.admit([waiting.pop()])
            runner.advance(6)
        runner.finish()
        torch.cuda.synchronize()
        if isinstance(runner, CapturedStep):
            assert runner.capturing and len(runner.graphs) == 1
        found.append(dict(buffers(slots)))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_waits_for_the_device(where, family):
    lm = prototok.load(made(FAMILIES[family]), device=where.device, dtype="bfloat16")
    slots, _ = filled(lm, None, PAIR, backend=where.backend)
    step(lm, slots, 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):  # or nothing would be shown
            bool(slots.done.any())
        step(lm, slots, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_model_that_waits_is_found_out_before_a_capture(where):
    lm = prototok.load(made(gpt2), device=where.device, dtype="float32")
    found = []

    def read(module: object, args: object) -> None:
        assert not slots.done.all().item()

    lm.body.model.register_forward_pre_hook(read)
    for kind in (StepRunner, CapturedStep):
        slots, _ = filled(lm, None, PAIR, backend=where.backend)
        runner = kind(lm, slots, 8)
        if kind is CapturedStep:
            with pytest.warns(UserWarning, match="runs without a CUDA graph, slower"):
                runner.advance(4)
            assert not runner.capturing and not runner.graphs
        else:
            runner.advance(4)
        runner.finish()
        torch.cuda.synchronize()
        assert torch.cuda.get_sync_debug_mode() == 0
        found.append(slots.loss.clone())
    assert torch.equal(*found)


# ---- fits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [None, "m", "e"])
def test_a_fit_goes_through_graphs_to_its_end(where, share, monkeypatch):
    captured: list[object] = []
    capture = CapturedStep._capture

    def counted(self: CapturedStep, key: object) -> None:
        capture(self, key)  # type: ignore[arg-type]
        captured.extend(self.graphs)
        assert self.capturing

    monkeypatch.setattr(CapturedStep, "_capture", counted)
    lm = prototok.load(small_llama(), device=where.device, dtype="float32")
    ids = random_ids(lm, 10, 2)
    options = {
        "share": share, "group_size": 2 if share else None, "batch_size": 4,
        "recipe": replace(FAST, max_steps=100 if share else 400), "backend": where.backend,
        "progress": False,
    }  # fmt: skip
    fit = prototok.fast_fit(lm, ids, **options)
    assert captured
    assert float(fit.accuracy.mean()) >= 0.5  # two texts that share a vector are hard here
    if share is None:
        single = prototok.fast_fit(lm, ids[:2], **options)
        assert torch.equal(single.exact, fit.exact[:2])
        assert int(fit.exact.sum()) >= 8


def test_a_capture_that_runs_out_of_memory_loses_no_row(where, monkeypatch):
    forward, refused = step_module.forward_backward, []

    def limited(lm: FrozenLM, slots: Slots, leaves: list, part: slice) -> object:
        if torch.cuda.is_current_stream_capturing() and part.stop - part.start > 2:
            refused.append(part)
            raise torch.OutOfMemoryError("no room")
        return forward(lm, slots, leaves, part)

    monkeypatch.setattr(step_module, "forward_backward", limited)
    lm = prototok.load(small_llama(), device=where.device, dtype="float32")
    fit = prototok.fast_fit(
        lm, random_ids(lm, 7, 2), batch_size=7, recipe=FAST, backend=where.backend, progress=False
    )
    assert refused
    assert int(fit.exact.sum()) >= 5


@pytest.mark.parametrize("share", ["m", "e"])
def test_sharing_gives_the_same_bits_again(where, share):
    lm = prototok.load(small_llama(), device=where.device, dtype="bfloat16")
    options = {
        "share": share, "group_size": 4, "recipe": Recipe(lr=0.1, max_steps=50),
        "backend": where.backend, "progress": False,
    }  # fmt: skip
    one, two = (prototok.fast_fit(lm, random_ids(lm, 8, 4), **options) for _ in range(2))
    assert torch.equal(one.tokens.m, two.tokens.m) and torch.equal(one.tokens.e, two.tokens.e)


def test_rows_that_fit_are_measured(where):
    lm = prototok.load(small_llama(), device=where.device, dtype="bfloat16")
    rows = rows_that_fit(Setup(lm, PAIR, FAST, where.backend, None), 32)
    assert 64 <= rows <= _FULL[where.device] // 32


# ---- what ends a process -------------------------------------------------------------------------


def test_a_target_outside_the_vocabulary_ends_its_process_alone(where):
    """On CUDA torch's gather asserts on the device, which ends all use of CUDA in its process."""
    program = (
        "import torch; from prototok_kernels.linear_cross_entropy import linear_cross_entropy\n"
        f"h, w = (torch.randn(n, 8, device='{where.device}') for n in (3, 30))\n"
        f"t = torch.tensor([0, TARGET, 1], device='{where.device}')\n"
        "print(linear_cross_entropy(h, w, t, backend='torch').loss.tolist())"
    )

    def run(target: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program.replace("TARGET", str(target))]
        return subprocess.run(command, capture_output=True, text=True)

    assert run(29).returncode == 0
    for target in (30, -1):
        ended = run(target)
        assert ended.returncode != 0 and not ended.stdout
        wanted = "device-side assert" if where.device == "cuda" else "out of bounds"
        assert wanted in ended.stderr
    assert torch.ones(3, device=where.device).sum().item() == 3
