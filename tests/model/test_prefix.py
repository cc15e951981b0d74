"""A model behind a constant prefix is transformers with the prefix's ids in front."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

import prototok
from model.families.test_against_transformers import GENERAL, relative_error
from prototok.autoregressive.generate import generate
from prototok.decoding.cpu_decoder import cpu_decoder
from prototok.model.families import DecoderBody
from prototok.model.in_front import prefix_of
from prototok.model.prefix import Prefix
from prototok.model.sink import first_position_share, sink_of
from support import DEVICES, small_llama
from zoo import OWN, made

IDS = [5, 17, 9]


def texts_for(vocab_size: int, length: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab_size, (2, length), generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*OWN, *GENERAL])
def test_every_model_is_the_one_with_the_ids_in_front(name: str, device: str) -> None:
    model = made((OWN | GENERAL)[name])
    lm = prototok.load(model, device=device, dtype="float32")
    behind = lm.behind(prefix_of(lm, IDS))
    ids = texts_for(lm.vocab_size)
    whole = torch.cat([torch.tensor(IDS).expand(2, -1), ids], dim=1)
    expected = model(whole).logits[:, len(IDS) :]
    for backend in ("auto", "torch"):
        assert relative_error(behind.logits(behind.embed(ids), backend).cpu(), expected) < 1e-4
    assert behind.bare is lm and behind.behind(None) is lm
    if lm.context is not None:
        assert behind.context == lm.context - len(IDS)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3, 20])
@pytest.mark.parametrize("name", ["llama, grouped, tied", "mistral, window shorter than the text",
                                  "gpt-neox, parallel", "qwen3, tied"])  # fmt: skip
def test_the_decoders_hold_the_prefix_in_their_caches(name: str, count: int) -> None:
    model = made(OWN[name])
    lm = prototok.load(model, device="cpu", dtype="float32")
    ids = torch.arange(count).remainder(lm.vocab_size).tolist()
    behind = lm.behind(prefix_of(lm, ids))
    texts = texts_for(lm.vocab_size)
    whole = torch.cat([torch.tensor(ids).expand(2, -1), texts], dim=1)
    expected = model(whole).logits[:, count:]
    for _ in range(2):  # the second pass finds the prefix where the first did
        decoder = cpu_decoder(behind, 2, 7, 7)
        decoder.pass_(behind.embed(texts), 0)
        assert relative_error(decoder.logits(), expected) < 1e-4
    mem = behind.embed(texts[:, :2])
    greedy = [whole[:, : count + 2]]
    for _ in range(6):
        seen = torch.cat(greedy, dim=1)
        greedy.append(model(seen).logits[:, -1:].argmax(-1))
    wanted = torch.cat(greedy[1:], dim=1)
    for cache, backend in (("engine", "auto"), ("engine", "torch"), ("dynamic", "auto")):
        assert torch.equal(generate(behind, mem, 6, cache, backend=backend), wanted)


@pytest.mark.usefixtures("closed_form")
@pytest.mark.parametrize("name", ["llama, grouped, tied", "gpt-neox, parallel"])
@pytest.mark.parametrize("length", [1, 9, 30])
def test_the_pair_is_the_input_laid_out(name: str, length: int) -> None:
    model = made(OWN[name])
    lm = prototok.load(model, device="cpu", dtype="float64")
    behind = lm.behind(prefix_of(lm, IDS[:1]))
    assert isinstance(behind.body, DecoderBody)
    generator = torch.Generator().manual_seed(3)
    e, m = torch.randn(2, 3, lm.hidden_size, generator=generator, dtype=torch.float64)
    leaves = [e.requires_grad_(), m.requires_grad_()]
    plan = behind.plan(3, length, pair=True)
    assert plan.first_layer.taken == "torch"
    pair = behind.body.hidden_of_pair(e, m, None, length, plan)
    whole = torch.cat([e[:, None], m[:, None].expand(-1, length - 1, -1)], dim=1)
    laid_out = behind.hidden(whole)
    probe = torch.randn(pair.shape, generator=generator, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(h, leaves, probe, allow_unused=True) for h in (pair, laid_out)
    )
    # The models' tables of angles are fp32, and these two read different rows of them.
    torch.testing.assert_close(pair, laid_out, rtol=1e-5, atol=1e-5)
    for f, x in zip(found, expected, strict=True):
        x = torch.zeros_like(e) if x is None else x
        torch.testing.assert_close(torch.zeros_like(e) if f is None else f, x, rtol=1e-5, atol=1e-5)


def test_a_prefix_is_text_ids_or_vectors() -> None:
    lm = prototok.load("tiny-llama", device="cpu")
    text = prefix_of(lm, " the")
    assert text is not None and text.ids == tuple(lm.encode(" the"))
    ids = prefix_of(lm, list(text.ids))
    vectors = prefix_of(lm, lm.cast(torch.float32).embed(torch.tensor(text.ids)))
    assert ids is not None and vectors is not None and vectors.ids is None
    assert torch.equal(text.vectors, ids.vectors) and torch.equal(text.vectors, vectors.vectors)
    assert lm.behind(text) is lm.behind(ids)
    # In bf16 the vectors round to what the model's own table holds.
    x = lm.embed(texts_for(lm.vocab_size))
    assert torch.equal(lm.behind(text).logits(x), lm.behind(vectors).logits(x))
    assert prefix_of(lm, None) is None and prefix_of(lm, text) is text
    assert torch.equal(prefix_of(lm, torch.tensor(text.ids)).vectors, text.vectors)


def test_what_is_no_prefix_is_refused() -> None:
    lm = prototok.load(small_llama(), device="cpu", dtype="float32")
    for given, message in (
        ([], r"prefix: \[\] has no tokens"),
        ([97], "prefix: 97 is not a token id below 97"),
        ([1.5], r"prefix: \[1.5\] is not None, text, a list of token ids or vectors"),
        (torch.zeros(32), r"prefix: vectors must be finite and \(P, 32\), saw \(32,\)"),
        (torch.full((1, 32), torch.nan), "prefix: vectors must be finite"),
        (torch.zeros(2, 31), "prefix: its vectors have 31 coordinates, those of .* 32"),
        ([1] * 40, "prefix: 40 vectors leave no room, .* has 40 positions"),
        ("the", "lm: .* came without a tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            prefix_of(lm, given)


def test_the_float32_twin_stands_behind_the_same_prefix() -> None:
    lm = prototok.load(small_llama(), device="cpu", dtype="bfloat16")
    prefix = prefix_of(lm, IDS)
    assert lm.behind(prefix).cast(torch.float32) is lm.cast(torch.float32).behind(prefix)
    assert lm.behind(prefix).cast(torch.bfloat16) is lm.behind(prefix)


def test_the_latest_prefixes_alone_are_kept() -> None:
    lm = prototok.load(small_llama(), device="cpu", dtype="float32")
    kept = lm.behind(prefix_of(lm, [0]))
    fitted = weakref.ref(lm.behind(prefix_of(lm, [1])))
    prototok.fast_fit(lm, [[3, 4]], prefix=[1], recipe=prototok.Recipe(max_steps=1), progress=False)
    for token in range(2, 12):
        assert lm.behind(kept.prefix) is kept
        lm.behind(prefix_of(lm, [token]))
    gc.collect()
    assert fitted() is None


def test_what_stands_behind_a_prefix_goes_with_its_model() -> None:
    lm = prototok.load(small_llama(), device="cpu", dtype="float32")
    gone = weakref.ref(lm.behind(Prefix(torch.ones(1, 32))))
    del lm
    gc.collect()
    assert gone() is None


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama, grouped, tied", "mistral, window shorter than the text",
                                  "gpt-neox, parallel", "qwen3, tied"])  # fmt: skip
def test_the_share_of_position_0_is_that_of_transformers_attention(name: str) -> None:
    model = made(OWN[name])
    model.set_attn_implementation("eager")
    lm = prototok.load(model, device="cpu", dtype="float32")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.vocab_size, (4, 32), generator=generator)
    maps = model(ids, output_attentions=True).attentions
    later = torch.stack(maps[len(maps) // 2 :])  # (L / 2, B, H, N, N)
    expected = float(later[..., 16:, 0].mean())
    assert first_position_share(lm) == pytest.approx(expected, rel=1e-4)


def test_models_that_transformers_runs_are_not_looked_at() -> None:
    found = sink_of(prototok.load(made(GENERAL["gpt2"]), device="cpu", dtype="float32"))
    assert found.prefix is None and found.share is None
    assert str(found) == "not looked for, transformers runs the model"


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-neox"])
def test_the_tiny_models_have_no_sink(name: str) -> None:
    found = sink_of(prototok.load(name, device="cpu"))
    assert found.prefix is None and found.share is not None and found.share < 0.1
    assert str(found).startswith("no attention sink, position 0 gets 0.0")
