"""The C++ decoder against float64, at every family's options and this processor's instructions."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import prototok
from prototok import FrozenLM
from prototok.model.families.body import DecoderBody
from prototok_kernels.backend import _cpu, this_machine
from prototok_kernels.decoder import Decoder, decoder_model
from zoo import OWN, made

pytestmark = pytest.mark.skipif(_cpu is None, reason="installed without the C++ kernels")
SETS = _cpu.instruction_sets() if _cpu is not None else []


def loaded(name: str, dtype: torch.dtype = torch.float32) -> FrozenLM:
    return prototok.load(made(OWN[name]), device="cpu", dtype=dtype)


def decoder_of(
    lm: FrozenLM, rows: int, positions: int, longest: int, instruction_set: str = ""
) -> Decoder:
    body = lm.body
    assert isinstance(body, DecoderBody) and body.head is not None
    rotary = body.rotary(-(-positions // 64) * 64)
    norm, ends = (body.norm, body.norm_bias), (body.head, lm.embedding)
    model = decoder_model(body.layers, norm, body.rotary.width, ends)
    return Decoder(model, len(body.head), rotary, (rows, positions, longest), instruction_set)


def inputs_for(lm: FrozenLM, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, length, lm.hidden_size, generator=generator).to(lm.dtype)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OWN)
def test_error_is_no_larger_than_that_of_torch(
    name: str, dtype: torch.dtype, instruction_set: str
) -> None:
    lm = loaded(name, dtype)
    x = inputs_for(lm, 3, 19)
    decoder = decoder_of(lm, 3, 19, 19, instruction_set)
    decoder.pass_(x, 0)
    exact = lm.cast(torch.float64).logits(x.double())
    bound = (lm.logits(x).double() - exact).abs().max()
    logits = decoder.logits()
    assert logits.shape == exact.shape and logits.dtype == torch.float32
    # By AVX2 alone torch sums otherwise, and once erred half as much.
    most = 2 if "avx512" in this_machine().instruction_sets else 3
    assert float((logits - exact).abs().max()) <= most * float(bound)
    assert torch.equal(decoder.ids(), logits.argmax(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OWN)
def test_passes_one_after_another_are_one_pass(name: str, dtype: torch.dtype) -> None:
    lm = loaded(name, dtype)
    x = inputs_for(lm, 2, 30)
    decoder = decoder_of(lm, 2, 30, 30)
    decoder.pass_(x, 0)
    whole = decoder.logits()
    start = 0
    for length in (7, 1, 1, 16, 5):
        decoder.pass_(x[:, start : start + length], start)
        part = whole[:, start : start + length]
        scale = float(whole.abs().max())
        assert float((decoder.logits() - part).abs().max()) <= 4e-6 * scale
        start += length


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OWN)
def test_a_row_has_the_bits_that_it_has_alone(
    name: str, dtype: torch.dtype, instruction_set: str
) -> None:
    lm = loaded(name, dtype)
    for length in (1, 2, 3, 19):
        x = inputs_for(lm, 7, length)
        decoder = decoder_of(lm, 7, length, length, instruction_set)
        decoder.pass_(x, 0)
        together = decoder.logits()
        for rows in (1, 2, 4):  # a decoder has room for more
            for start in range(0, 7 - rows + 1, rows):
                decoder.pass_(x[start : start + rows], 0)
                assert torch.equal(decoder.logits(), together[start : start + rows])
                assert len(decoder.ids()) == rows


def test_greedy_goes_on_with_the_rows_of_the_pass() -> None:
    lm = loaded("qwen3, tied")
    x = inputs_for(lm, 3, 3)
    decoder = decoder_of(lm, 3, 40, 20)
    together = torch.full((17, 3), -1)
    decoder.pass_(x, 0)
    decoder.greedy(together, 0, 3)
    ids = torch.full((17, 2), -1)
    decoder.pass_(x[1:], 0)
    decoder.greedy(ids, 0, 3)
    assert torch.equal(ids, together[:, 1:])


def test_greedy_is_the_argmax_of_passes() -> None:
    lm = loaded("qwen3, tied")
    x = inputs_for(lm, 2, 3)
    decoder = decoder_of(lm, 2, 40, 20)
    ids = torch.full((17, 2), -1)
    decoder.pass_(x, 0)
    decoder.greedy(ids, 0, 3)
    decoder.pass_(torch.cat([x, lm.embed(ids.T[:, :-1])], dim=1), 0)
    assert torch.equal(decoder.ids()[:, 2:], ids.T)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_threads_change_no_bit() -> None:
    lm = prototok.load("tiny-llama", device="cpu", dtype="float32")
    x = inputs_for(lm, 1, 40)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        decoder = decoder_of(lm, 1, 64, 40)
        decoder.pass_(x, 0)
        ids = torch.zeros(20, 1, dtype=torch.int64)
        logits = decoder.logits()
        decoder.greedy(ids, 0, 40)
        found.append((logits, ids))
    for logits, ids in found[1:]:
        assert torch.equal(logits, found[0][0]) and torch.equal(ids, found[0][1])


def test_a_token_allocates_nothing() -> None:
    """Fresh pages are faults; 4,000 tokens of a model of 12 MB make none worth the name."""
    lm = prototok.load("tiny-llama", device="cpu", dtype="float32")
    decoder = decoder_of(lm, 1, 64, 1)
    start, ids = lm.embed(torch.tensor([[1]])), torch.zeros(40, 1, dtype=torch.int64)

    def generate() -> None:
        decoder.pass_(start, 0)
        decoder.greedy(ids, 0, 1)

    generate()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(100):
        generate()
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_minflt - before.ru_minflt < 40
    assert after.ru_maxrss - before.ru_maxrss < 1024  # KiB


def test_what_cannot_be_met_is_named() -> None:
    lm = loaded("llama, grouped, tied")
    decoder = decoder_of(lm, 1, 64, 4)
    with pytest.raises(IndexError, match="length: 5 positions from 0 on do not fit"):
        decoder.pass_(inputs_for(lm, 1, 5), 0)
    with pytest.raises(IndexError, match="length: 4 positions from 61 on do not fit"):
        decoder.pass_(inputs_for(lm, 1, 4), 61)
    with pytest.raises(ValueError, match="instruction_set: this processor does not have 'sse9'"):
        decoder_of(lm, 1, 64, 4, "sse9")
    with pytest.raises(ValueError, match=r"norm: must be of float32 or bfloat16, saw float64"):
        decoder_of(lm.cast(torch.float64), 1, 64, 4)
