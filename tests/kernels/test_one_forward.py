"""A forward in one C++ call: the ids that its parts give, whatever stands around it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

import prototok
from kernels.test_amx import wide
from prototok.decoding.decode import decode_ids, decode_vectors
from prototok.model.families.body import DecoderBody
from prototok.model.frozen_lm import FrozenLM
from prototok.model.prefix import Prefix
from prototok.results.arrangement import Arrangement
from prototok_kernels import backend
from prototok_kernels.backend import EMULATED, _cpu, this_machine
from prototok_kernels.one_forward import PreparedForward, one_forward_ref, why_not_one_call
from prototok_kernels.views import views
from support import run_with_own_memory
from zoo import OWN, made

pytestmark = pytest.mark.skipif(_cpu is None, reason="installed without the C++ kernels")
NAMES = ["llama, grouped, tied", "gpt-neox, parallel", "mistral, window shorter than the text"]


@pytest.fixture(params=[EMULATED, "own"])
def instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    if request.param == EMULATED:
        with backend.instruction_set(EMULATED):
            yield
    elif this_machine().packed:
        yield
    else:
        pytest.skip("no products of bf16 pairs here")
    torch.set_num_threads(before)


def loaded(name: str) -> FrozenLM:
    """A small model of a covered family, of an even vocabulary, as packed heads are."""
    config = copy.deepcopy(made(OWN[name]).config)
    config.vocab_size = 96
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    return prototok.load(model, device="cpu", dtype=torch.bfloat16)


def vectors_of(lm: FrozenLM, rows: int, slots: int) -> Tensor:
    spread = float(lm.embedding.float().std())
    generator = torch.Generator().manual_seed(5)
    return spread * torch.randn(rows, slots, lm.hidden_size, generator=generator)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("arrangement", ["e m*", "e m*+1", "e*", "(e m)*", "e4 m*+3"])
@pytest.mark.parametrize("name", NAMES)
def test_it_gives_the_ids_of_its_parts(name: str, arrangement: str) -> None:
    bare, of = loaded(name), Arrangement.parse(arrangement)
    vectors = vectors_of(bare, 3, of.slots)
    for lm in (bare, bare.behind(Prefix(bare.embedding[:3].float()))):
        assert isinstance(lm.body, DecoderBody)
        for length in (9, 12):
            plan = lm.plan(3, of.input_length(length))
            assert why_not_one_call(plan) is None
            layout = of.layout(length)
            parts = lm.logits(vectors.bfloat16()[:, layout]).argmax(-1)
            assert torch.equal(lm.body.one_forward(layout)(vectors.bfloat16()), parts)
            found = decode_ids(lm, vectors, of, length, "auto")
            assert torch.equal(found, parts[:, of.offset :])
            scored = decode_vectors(lm, vectors, of, length, None, "auto", as_fitted=True)
            assert torch.equal(found, scored.ids)


@pytest.mark.usefixtures("instructions")
def test_it_gives_the_ids_of_the_reference() -> None:
    """Of logits that stand clear of each other: bf16 rounds the two differently."""
    lm = prototok.load("tiny-llama", device="cpu", dtype=torch.bfloat16)
    assert isinstance(lm.body, DecoderBody)
    ids = torch.tensor(lm.encode("Once upon a time there was a little girl who liked to play."))
    vectors, layout = lm.embed(ids)[None], torch.arange(len(ids))
    tables = lm.body.tables(len(ids))
    found = lm.body.one_forward(layout)(vectors)
    blocks, head = lm.body._blocks, lm.body.head
    assert head is not None
    assert torch.equal(found, one_forward_ref(blocks, head, vectors, layout, *tables))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("name", ["llama, grouped, tied", "gpt-neox, parallel"])
def test_any_number_of_threads_gives_the_same(name: str) -> None:
    """Blocks of 2 MiB and more are shared by outputs, attention by queries of like cost."""
    bare = prototok.load(wide(name), device="cpu", dtype=torch.bfloat16)
    of = Arrangement.parse("e m*")
    front = Prefix(vectors_of(bare, 1, 5)[0])
    for lm in (bare, bare.behind(front)):
        for rows, length in ((1, 70), (1, 3), (2, 41)):
            vectors = vectors_of(lm, rows, 2).bfloat16()[:, of.layout(length)]
            found = []
            for count in (1, 2, 3, 4):
                torch.set_num_threads(count)
                found.append(lm.hidden(vectors))
            assert all(torch.equal(other, found[0]) for other in found[1:])


@pytest.mark.usefixtures("instructions")
def test_a_weight_that_changes_is_seen() -> None:
    lm = loaded(NAMES[0])
    body, of = lm.body, Arrangement.parse("e m*")
    assert isinstance(body, DecoderBody) and body.head is not None
    vectors, layout = vectors_of(lm, 1, 2), of.layout(20)
    forward = body.one_forward(layout)
    before = forward(vectors)
    flipped = replace(body, head=body.head.flip(0).contiguous())
    with torch.no_grad():
        body.head.copy_(flipped.head)
    after = forward(vectors)
    assert torch.equal(after, flipped.one_forward(layout)(vectors))
    assert not torch.equal(after, before)
    with torch.no_grad():
        next(lm.source.parameters()).mul_(2)
    with pytest.raises(ValueError, match="were changed since it was loaded"):
        decode_ids(lm, vectors_of(lm, 1, 2), of, 20, "auto")


_MANY = """
import torch

from kernels.test_one_forward import NAMES, loaded, vectors_of
from prototok.common.memory import resident
from prototok.decoding.decode import decode_ids
from prototok.results.arrangement import Arrangement

torch.set_num_threads(2)
lm, of = loaded(NAMES[0]), Arrangement.parse("e m*")
many = vectors_of(lm, 20_000, 2)
decode_ids(lm, many, of, 64, "auto")  # what torch keeps of it is not ours
before = resident()
for _ in range(2):
    decode_ids(lm, many, of, 64, "auto")
between = 20_000 * 64 * (2 * 2 * lm.hidden_size + 16)  # bytes
assert resident() - before < between // 2, (before, resident())
"""


@pytest.mark.parametrize("instructions", ["own"], indirect=True)  # emulated it takes minutes
@pytest.mark.usefixtures("instructions")
def test_many_positions_take_no_memory_for_good() -> None:
    run_with_own_memory(_MANY)


@pytest.mark.usefixtures("instructions")
def test_what_a_mode_of_torchs_makes_is_not_kept() -> None:
    lm, of = loaded(NAMES[0]), Arrangement.parse("e m*")
    vectors = vectors_of(lm, 1, 2)
    refused = pytest.raises(ValueError, match="has no memory, as a fake tensor has none")
    with FakeTensorMode(allow_non_fake_inputs=True), refused:
        decode_ids(lm, vectors, of, 29, "auto")
    with torch.inference_mode():
        found = decode_ids(lm, vectors, of, 29, "auto")
    assert torch.equal(decode_ids(lm, vectors, of, 29, "auto"), found)


@pytest.mark.usefixtures("instructions")
def test_what_it_cannot_take_is_named() -> None:
    lm = loaded(NAMES[0])
    body, layout = lm.body, torch.tensor([0, 1, 1])
    assert isinstance(body, DecoderBody) and body.head is not None
    vectors, tables = vectors_of(lm, 2, 2), body.tables(3)
    ids = torch.empty(2, 3, dtype=torch.int64)
    head, blocks = body.head, body._blocks
    for wrong in ([0, 2, 1], [0, -1, 1]):
        with pytest.raises(ValueError, match="layout: must be of vectors that there are"):
            PreparedForward(blocks, head, torch.tensor(wrong), *tables)(vectors)
    with pytest.raises(ValueError, match="vectors: must be of float32 or bfloat16, saw float64"):
        PreparedForward(blocks, head, layout, *tables)(vectors.double())
    with pytest.raises(ValueError, match="vectors: must be .* of float32"):
        PreparedForward(blocks, head, layout, *tables)(vectors[..., 1:])
    with pytest.raises(ValueError, match="cos: must be at least"):
        PreparedForward(blocks, head, layout, *(t[:2] for t in tables))
    other = torch.zeros(8, lm.hidden_size + 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="head: must be of the blocks' hidden size"):
        PreparedForward(blocks, other, layout, *tables)
    cpp, short = PreparedForward(blocks, head, layout, *tables)._made(), ids[:, :2].contiguous()
    with pytest.raises(ValueError, match="ids: must be"):
        cpp.ids(**views(vectors=vectors, ids=short), tile=1, threads=1)
    with pytest.raises(ValueError, match="tile: must be at least 1 text"):
        cpp.ids(**views(vectors=vectors, ids=ids), tile=0, threads=1)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_largest_logit_is_the_first_of_equals(threads: int) -> None:
    """Equal rows of the head in every thread's share, and logits that are no numbers."""
    lm = loaded(NAMES[0])
    body, of = lm.body, Arrangement.parse("e m*")
    assert isinstance(body, DecoderBody) and body.head is not None
    layout, few = of.layout(40), body.head[:4].clone()
    torch.set_num_threads(threads)
    for size in (66, 512, 1028):  # outputs of the head: more panels than threads, and fewer
        head = few.repeat(size // 4 + 1, 1)[:size].contiguous()
        found = replace(body, head=head).one_forward(layout)(vectors_of(lm, 9, 2))
        assert found.max() < 4
        assert torch.equal(found, replace(body, head=few).one_forward(layout)(vectors_of(lm, 9, 2)))
        for nothing in (float("nan"), -float("inf")):
            none = torch.full_like(head, nothing)
            assert not replace(body, head=none).one_forward(layout)(vectors_of(lm, 1, 2)).any()


@pytest.mark.usefixtures("instructions")
def test_vectors_are_rounded_as_torch_rounds_them() -> None:
    lm, of = loaded(NAMES[0]), Arrangement.parse("e m*")
    assert isinstance(lm.body, DecoderBody)
    vectors = vectors_of(lm, 4, 2)
    vectors[0, 0, :3] = torch.tensor([1.00390625, 1.01171875, 1e-39])  # halves, and a denormal
    forward = lm.body.one_forward(of.layout(24))
    assert torch.equal(forward(vectors), forward(vectors.bfloat16()))
    for dtype in (torch.float64, torch.float16):
        found = decode_ids(lm, vectors.to(dtype), of, 24, "auto")
        assert torch.equal(found, forward(vectors.to(dtype).bfloat16()))
