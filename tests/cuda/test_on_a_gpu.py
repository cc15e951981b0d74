"""What only a GPU can show, ready for the first one: each test is skipped without."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

import prototok
from prototok import FrozenLM, Recipe
from prototok.autoregressive.generate import greedy
from prototok.autoregressive.static_kv import StaticDecoder
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.rows import make_groups
from prototok.fitting.engine.runner import CapturedStep, StepRunner
from prototok.fitting.engine.setup import Setup
from prototok.fitting.engine.slots import Room, Slots
from prototok.fitting.engine.step import step
from prototok.model.frozen_lm import twin_of
from prototok.results.arrangement import Arrangement
from prototok_kernels.attention import attention
from support import small_llama
from zoo import OWN, SIZES, made

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no CUDA device, and only one can show this"
)


def slots_of(lm: FrozenLM, rows: int = 4, length: int = 6) -> Slots:
    recipe = Recipe(lr=0.1, margin=1e9, max_steps=10**6)
    setup = Setup(lm, OneForward(Arrangement.parse("e m*")), recipe, "auto", rows)
    ids = torch.randint(lm.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    slots = Slots(setup, Room(rows, rows, length))
    slots.admit(make_groups(list(ids), [0], None, None))
    return slots


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ).eval()


@pytest.mark.parametrize("name", ["llama, grouped, tied", "gpt-neox, parallel", "qwen3, tied"])
def test_the_static_decoder_generates_what_transformers_does(name: str) -> None:
    """Through its graph, twice, and after a change of capacity."""
    lm = prototok.load(made(OWN[name]), device="cuda", dtype="float32")
    mem = torch.randn(2, 1, lm.hidden_size, generator=torch.Generator().manual_seed(0)).cuda()
    for capacity in (16, 16, 32):
        wanted = greedy(twin_of(lm, torch.float32), 12, "dynamic", inputs_embeds=mem).cpu()
        decoder = StaticDecoder(lm.body, lm, 2, capacity, lm.plan(2, 1))
        for _ in range(2):
            assert torch.equal(decoder.generate(mem, 12), wanted)
        assert decoder.graph is not None


@pytest.mark.parametrize("length", [64, 192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_attention_within_a_window_are_finite(length: int, dtype: torch.dtype) -> None:
    """Some cuDNN give NaN for an explicit mask where N % 128 = 64."""
    heads, size = 4, 64
    qkv = torch.randn(2, length, 3 * heads * size, device="cuda", dtype=dtype, requires_grad=True)
    angle = torch.outer(torch.arange(length), torch.rand(size // 2)).repeat(1, 2).cuda()
    out = attention(
        qkv.clone(), angle.cos(), angle.sin(), heads=heads, kv_heads=heads, scaling=0.125,
        window=48, backend="triton",
    )  # fmt: skip
    out.float().square().sum().backward()
    assert qkv.grad.isfinite().all()


def test_a_captured_step_of_the_general_family_is_the_eager_one() -> None:
    lm = prototok.load(gpt2(), device="cuda", dtype="float32")
    losses = []
    for kind in (StepRunner, CapturedStep):
        slots = slots_of(lm)
        runner = kind(lm, slots, 4)
        runner.advance(8)
        runner.finish()
        torch.cuda.synchronize()
        losses.append(slots.loss.clone())
    assert runner.graphs and torch.equal(*losses)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt-neox", "general"])
def test_no_step_waits_for_the_device(family: str) -> None:
    models = {
        "llama": small_llama, "gpt-neox": OWN["gpt-neox, parallel"], "general": gpt2,
        "mistral": lambda: MistralForCausalLM(
            MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5)
        ),
    }  # fmt: skip
    lm = prototok.load(made(models[family]), device="cuda", dtype="bfloat16")
    slots = slots_of(lm)
    step(lm, slots, 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(lm, slots, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_sharing_gives_the_same_bits_again() -> None:
    lm = prototok.load(small_llama(), device="cuda", dtype="bfloat16")
    ids = torch.randint(97, (8, 4), generator=torch.Generator().manual_seed(0))
    options = {"share": "m", "group_size": 4, "recipe": Recipe(lr=0.1, max_steps=50)}
    one, two = (prototok.fast_fit(lm, ids, progress=False, **options) for _ in range(2))
    assert torch.equal(one.tokens.m, two.tokens.m) and torch.equal(one.tokens.e, two.tokens.e)
