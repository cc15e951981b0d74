"""Letters: R rows, d hidden size, V vocabulary, P candidates."""

from __future__ import annotations

import pytest
import torch

from prototok_kernels import next_token as module
from prototok_kernels import normed_products
from prototok_kernels.next_token import Stream, best_logits, take_next_


def stream_of(rows, d, dtype, device):
    def counters(value):
        return torch.full((rows,), value, device=device)

    return Stream(
        x=torch.zeros(rows, d, dtype=dtype, device=device),
        ids=torch.full((5, rows), -1, device=device), written=counters(2), position=counters(7),
    )  # fmt: skip


def assert_same(found, wanted):
    for name, tensor in vars(found).items():
        assert torch.equal(tensor, getattr(wanted, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 33, 97), (3, 64, 700)], ids=str)
def test_takes_the_token_of_the_largest_logit(triton_device, shape, dtype, monkeypatch):
    monkeypatch.setattr(normed_products, "_PROGRAMS", 1)
    rows, d, vocabulary = shape
    generator = torch.Generator().manual_seed(vocabulary)
    h, weight, embedding = (
        torch.randint(-4, 5, (n, d), generator=generator).to(dtype).to(triton_device)
        for n in (rows, vocabulary, vocabulary)
    )
    logits = h.float() @ weight.float().T  # of whole numbers, so that they are exact, and some tie
    wanted = stream_of(rows, d, dtype, triton_device)
    take_next_(wanted, logits, None, embedding, "torch")
    assert torch.equal(wanted.ids[2], logits.argmax(1)) and int(wanted.position[0]) == 8
    for scores in (best_logits(h, weight), (logits, None), (logits.to(dtype), None)):
        found = stream_of(rows, d, dtype, triton_device)
        take_next_(found, *scores, embedding, "triton")
        if scores[0].dtype == torch.float32:
            assert_same(found, wanted)
        rounded = scores[0].amax(1)
        token = found.ids[2]
        assert torch.equal(logits.to(scores[0].dtype).gather(1, token[:, None])[:, 0], rounded)


def test_of_equal_logits_the_first_is_taken(triton_device):
    h = torch.ones(2, 8, device=triton_device)
    weight = torch.zeros(90, 8, device=triton_device)
    weight[[37, 38, 89]] = 1.0
    found = stream_of(2, 8, torch.float32, triton_device)
    take_next_(found, *best_logits(h, weight), weight, "triton")
    assert found.ids[2].tolist() == [37, 37]


def test_logits_that_are_no_numbers_leave_the_table_alone(triton_device):
    embedding = torch.ones(97, 8, device=triton_device)
    for scores in (torch.full((2, 97), torch.nan), torch.full((2, 97), -torch.inf)):
        found = stream_of(2, 8, torch.float32, triton_device)
        take_next_(found, scores.to(triton_device), None, embedding, "triton")
        assert 0 <= int(found.ids[2].min()) <= int(found.ids[2].max()) < 97
    h = torch.full((2, 8), torch.nan, device=triton_device)
    found = stream_of(2, 8, torch.float32, triton_device)
    take_next_(found, *best_logits(h, embedding), embedding, "triton")
    assert 0 <= int(found.ids[2].max()) < 97


def test_a_head_of_a_published_shape_has_programs_for_all_processors():
    pytest.importorskip("triton")
    for vocabulary, d in ((128256, 2048), (50304, 1024), (49152, 1024)):
        out = normed_products.outputs_a_program(vocabulary, 2 * d)
        assert vocabulary / out / module._TILES >= 264  # two for each


def test_names_what_does_not_fit():
    stream = stream_of(2, 8, torch.float32, "cpu")
    scores, embedding = torch.zeros(2, 9), torch.zeros(9, 8)
    with pytest.raises(ValueError, match="^embedding: must be"):
        take_next_(stream, scores, None, embedding[:, 1:], "torch")
    for name, wrong in (("written", torch.zeros(1)), ("ids", torch.zeros(5, 3))):
        broken = Stream(**vars(stream) | {name: wrong.long()})
        with pytest.raises(ValueError, match=f"^{name}: must be int64 of 2 rows"):
            take_next_(broken, scores, None, embedding, "torch")
