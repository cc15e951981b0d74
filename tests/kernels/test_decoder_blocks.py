"""All blocks as one C++ op against the loop of blocks, in bfloat16, and both against float64."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import prototok
from against_fp64 import assert_as_close_as_torch, with_gradients
from plans import plan_for
from prototok.common.allocator import keep_freed_memory
from prototok.model.families.body import DecoderBody
from prototok_kernels import packed
from prototok_kernels import plan as planning
from prototok_kernels.backend import this_machine
from prototok_kernels.decoder_blocks import DecoderBlocks, decoder_blocks_ref
from support import run_with_own_memory
from zoo import OWN, made

HAS_PACKED = this_machine().packed is not None
needs_pairs = pytest.mark.skipif(
    not HAS_PACKED,
    reason="no products of bf16 pairs here",
)
COVERED = [name for name in OWN if "qwen3" not in name]


def body_of(name: str, dtype: torch.dtype = torch.bfloat16) -> DecoderBody:
    body = prototok.load(made(OWN[name]), device="cpu", dtype=dtype).body
    assert isinstance(body, DecoderBody)
    return body


def blocks_of(body: DecoderBody) -> DecoderBlocks:
    return DecoderBlocks(body.layers, body.norm, body.norm_bias)


def through(
    blocks: DecoderBlocks, x: Tensor, tables: tuple[Tensor, Tensor], start: int = 0,
    backend: str = "cpu",
) -> Tensor:  # fmt: skip
    plan = plan_for(blocks.layers, len(x), x.shape[1], backend, pair=False)
    return blocks(x, *tables, plan, start)


def stream(texts: int, length: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(texts, length, width, generator=generator).bfloat16()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    planning._plan_of.cache_clear()


@needs_pairs
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize(("texts", "length"), [(3, 19), (1, 70), (5, 1)])
@pytest.mark.parametrize("name", COVERED)
def test_errors_are_no_larger_than_those_of_the_loop(
    name: str, texts: int, length: int, start: int
) -> None:
    body, exact_body = body_of(name), body_of(name, torch.float64)
    blocks, exact_blocks = blocks_of(body), blocks_of(exact_body)
    x, tables = stream(texts, length, body.norm.numel()), body.rotary(length)
    found = with_gradients(lambda x: through(blocks, x, tables, start), [x], torch.bfloat16)
    assert blocks in packed._packed
    loop = with_gradients(
        lambda x: decoder_blocks_ref(blocks, x, *tables, "torch", start), [x], torch.bfloat16
    )
    exact_tables = [t.double() for t in exact_body.rotary(length)]
    exact = with_gradients(
        lambda x: decoder_blocks_ref(exact_blocks, x, *exact_tables, "torch", start),
        [x], torch.float64,
    )  # fmt: skip
    assert_as_close_as_torch(found, loop, exact)
    with torch.no_grad():  # nothing is kept, and nothing else changes
        assert torch.equal(through(blocks, x, tables, start), found[0])


@needs_pairs
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", ["llama, grouped, tied", "gpt-neox, parallel"])
def test_a_text_is_the_same_beside_any_others_on_any_threads(name: str) -> None:
    body = body_of(name)
    blocks, tables = blocks_of(body), body.rotary(13)
    x = stream(9, 13, body.norm.numel())
    run = lambda x: through(blocks, x, tables)  # noqa: E731
    whole = with_gradients(run, [x], torch.bfloat16)
    for count in (2, 3):
        torch.set_num_threads(count)
        for found, expected in zip(with_gradients(run, [x], torch.bfloat16), whole, strict=True):
            assert torch.equal(found, expected)
    torch.set_num_threads(1)
    for part in (slice(0, 1), slice(3, 8)):
        # A probe of its own for each size: outputs only.
        assert torch.equal(run(x[part]), whole[0][part])


@needs_pairs
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("texts", "length"), [(1, 70), (1, 13), (1, 3), (2, 31), (3, 5)])
@pytest.mark.parametrize(
    "name",
    ["llama, grouped, tied", "gpt-neox, parallel", "mistral, window shorter than the text"],
)
def test_threads_that_share_fewer_texts_change_no_bit(name: str, texts: int, length: int) -> None:
    body = body_of(name)
    width, kv_heads, size = body.norm.numel(), body.layers[0].kv_heads, body.layers[0].head_size
    x = stream(texts, length, width)
    front = stream(2 * kv_heads, 3 * size, 1).view(2, kv_heads, 3, size)
    behind = [replace(layer, prefix=front) for layer in body.layers]
    tables = tuple(table[3:] for table in body.rotary(length + 3))
    for blocks in (blocks_of(body), DecoderBlocks(behind, body.norm, body.norm_bias)):
        for start in (0, 1):
            run = lambda x: through(blocks, x, tables, start)  # noqa: B023, E731
            torch.set_num_threads(1)
            alone = with_gradients(run, [x], torch.bfloat16)
            assert blocks in packed._packed
            for count in (2, 3, 4):
                torch.set_num_threads(count)
                found = with_gradients(run, [x], torch.bfloat16)
                for value, expected in zip(found, alone, strict=True):
                    assert torch.equal(value, expected)
                with torch.no_grad():
                    assert torch.equal(run(x), alone[0])


@needs_pairs
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("texts", "length"), [(1, 70), (2, 31), (3, 5)])
def test_threads_that_share_given_projections_change_no_bit(texts: int, length: int) -> None:
    body = body_of("gpt-neox, parallel")
    blocks, tables = blocks_of(body), body.rotary(length)
    first = body.layers[0]
    inputs = [
        stream(texts, length, width) for width in (body.norm.numel(), len(first.qkv), len(first.up))
    ]

    def run(x: Tensor, qkv: Tensor, z: Tensor) -> Tensor:
        plan = plan_for(blocks.layers, texts, length, "cpu", pair=False)
        return blocks(x, *tables, plan, 0, (qkv, z))

    torch.set_num_threads(1)
    alone = with_gradients(run, inputs, torch.bfloat16)
    assert len(alone) == 4 and blocks in packed._packed
    for count in (2, 3, 4):
        torch.set_num_threads(count)
        found = with_gradients(run, inputs, torch.bfloat16)
        assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))


@needs_pairs
@pytest.mark.usefixtures("threads")
def test_gradients_of_a_text_do_not_depend_on_the_others() -> None:
    body = body_of("mistral, window shorter than the text")
    blocks, tables = blocks_of(body), body.rotary(13)
    x, probe = stream(6, 13, body.norm.numel()), stream(6, 13, body.norm.numel()).flip(0)

    def gradient(part: slice) -> Tensor:
        leaf = x[part].clone().requires_grad_()
        return torch.autograd.grad(through(blocks, leaf, tables), leaf, probe[part])[0]

    whole = gradient(slice(None))
    assert torch.equal(gradient(slice(4, 5)), whole[4:5])
    assert torch.equal(gradient(slice(1, 4)), whole[1:4])


@pytest.mark.usefixtures("threads")
def test_what_the_op_is_not_for_takes_the_loop() -> None:
    qwen3, llama = body_of("qwen3, tied"), body_of("llama, grouped, tied")
    single = body_of("llama, grouped, tied", torch.float32)
    cases = [
        (qwen3, torch.bfloat16, "auto"), (single, torch.float32, "auto"),
        (llama, torch.bfloat16, "torch"),
    ]  # fmt: skip
    for body, dtype, backend in cases:
        blocks, tables = blocks_of(body), body.rotary(7)
        x = stream(2, 7, body.norm.numel()).to(dtype)
        found = through(blocks, x, tables, 0, backend)
        assert blocks not in packed._packed
        ops = plan_for(body.layers, 2, 7, backend, pair=False).passes.taken
        assert torch.equal(found, decoder_blocks_ref(blocks, x, *tables, ops))
    torch.set_num_threads(3)  # more than there are texts
    planning._plan_of.cache_clear()
    blocks = blocks_of(llama)
    through(blocks, stream(2, 7, llama.norm.numel()), llama.rotary(7), 0, "auto")
    assert (blocks in packed._packed) == HAS_PACKED


@needs_pairs
@pytest.mark.usefixtures("threads")
def test_a_step_makes_no_fresh_page() -> None:
    keep_freed_memory()
    lm = prototok.load("tiny-llama", device="cpu", dtype=torch.bfloat16)
    body = lm.body
    assert isinstance(body, DecoderBody)
    leaf = stream(8, 64, lm.hidden_size).requires_grad_()
    probe = torch.ones_like(leaf)

    def both_ways() -> None:
        torch.autograd.grad(lm.hidden(leaf), leaf, probe)

    for _ in range(15):  # until the heap has places for all of it
        both_ways()
    faults = []
    for _ in range(3):  # other threads of the process may fault by the way, a step always would
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            both_ways()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults) < 20


@needs_pairs
def test_models_that_it_cannot_take_are_refused() -> None:
    for name, dtype in (("qwen3, tied", torch.bfloat16), ("qwen2", torch.float32)):
        body = body_of(name, dtype)
        with pytest.raises(ValueError, match="model: "):
            blocks_of(body).packed(body.rotary.width)


_RETRY = """
import resource, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import prototok
from kernels.test_decoder_blocks import blocks_of, stream, through

sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
config = LlamaConfig(vocab_size=64, num_hidden_layers=3, **sizes)
model = LlamaForCausalLM(config).bfloat16().eval()
body = prototok.load(model, device="cpu", dtype="bfloat16").body
tables, x = body.rotary(7), stream(1, 7, 512)

def gradient(blocks, limit=None):
    leaf = x.clone().requires_grad_()
    out = through(blocks, leaf, tables)
    if limit is not None:
        with open("/proc/self/statm") as of:
            held = int(of.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + limit, resource.RLIM_INFINITY))
    return torch.autograd.grad(out.float().sum(), leaf)[0]

expected = gradient(blocks_of(body))
again = blocks_of(body)
try:
    gradient(again, limit=20 << 20)  # one block has 8 MiB, three are to be laid out
    sys.exit("there was memory enough")
except MemoryError:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert torch.equal(gradient(again), expected)
"""


@needs_pairs
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_gradients_are_right_after_memory_ran_out_for_their_weights() -> None:
    run_with_own_memory(_RETRY)
