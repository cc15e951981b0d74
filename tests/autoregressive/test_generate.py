"""Our decoder gives transformers' greedy tokens, whatever the family's options."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import prototok
from prototok import FrozenLM
from prototok.autoregressive import generate
from prototok.autoregressive.generate import bytes_read
from prototok.autoregressive.static_kv import StaticDecoder
from prototok.model.families.body import DecoderBody
from prototok.model.frozen_lm import twin_of
from prototok_kernels.plan import FEW_POSITIONS
from support import shared, small_llama
from zoo import OWN, made


def loaded(name: str, dtype: str = "float32") -> FrozenLM:
    return prototok.load(made(OWN[name]), device="cpu", dtype=dtype)


def on_static_decoder(lm: FrozenLM, mem: Tensor, length: int) -> Tensor:
    """What a CUDA graph replays, run without one."""
    assert isinstance(lm.body, DecoderBody)
    plan = lm.plan(len(mem), 1, "torch")
    return StaticDecoder(lm.body, lm, len(mem), 64, plan).generate(mem, length)


def vectors(lm: FrozenLM, rows: int, k: int = 2, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, k, lm.hidden_size, generator=generator)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", OWN)
def test_engine_equals_transformers_greedy(name: str, rows: int) -> None:
    lm = loaded(name)
    mem = vectors(lm, rows)
    ids = generate(lm, mem, 30)
    assert ids.shape == (rows, 30) and ids.dtype == torch.int64
    for cache in ("dynamic", "static"):
        assert torch.equal(generate(lm, mem, 30, cache), ids)
    # A decoder stuck on one token would agree too easily; tied weights may well repeat a token.
    assert len(ids.unique()) > 5 or "tied" in name


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", OWN)
def test_what_a_graph_replays_gives_the_same(name: str, rows: int) -> None:
    lm = loaded(name)
    mem = vectors(lm, rows)
    assert torch.equal(on_static_decoder(lm, mem, 30), generate(lm, mem, 30))


def test_more_rows_than_few_and_float64_take_the_torch_decoder() -> None:
    lm = loaded("llama, grouped, tied")
    mem = vectors(lm, FEW_POSITIONS + 1)
    ids = generate(lm, mem, 6)
    assert torch.equal(ids[:3], generate(lm, mem[:3], 6))
    assert torch.equal(generate(lm.cast(torch.float64), mem, 6), ids)


@pytest.mark.parametrize("name", ["qwen3, tied", "gpt-neox, parallel"])
def test_first_token_given(name: str) -> None:
    lm = loaded(name)
    mem, first = vectors(lm, 3), torch.tensor([5, 9, 11])
    ids = {cache: generate(lm, mem, 12, cache, first) for cache in ("engine", "dynamic", "static")}
    assert torch.equal(ids["engine"][:, 0], first)
    assert torch.equal(ids["engine"], ids["dynamic"])
    assert torch.equal(ids["engine"], ids["static"])
    prompt = torch.cat([mem, lm.embed(first)[:, None]], dim=1)
    assert torch.equal(ids["engine"][:, 1:], generate(lm, prompt, 11))
    assert generate(lm, mem, 1, "engine", first).tolist() == [[5], [9], [11]]
    assert generate(lm, mem, 1, "static", first).tolist() == [[5], [9], [11]]


def test_decoders_keep_nothing_of_the_last_call() -> None:
    lm = loaded("llama, grouped, tied")
    one, other = vectors(lm, 2), vectors(lm, 2, seed=4)
    assert isinstance(lm.body, DecoderBody)
    for decode in (
        StaticDecoder(lm.body, lm, 2, 64, lm.plan(2, 1, "torch")).generate,
        functools.partial(generate, lm),
    ):
        expected = decode(one, 20)
        assert not torch.equal(decode(other, 30)[:, :20], expected)
        assert torch.equal(decode(one, 20), expected)


def test_no_cache_stops_at_an_eos() -> None:
    """A text may hold the EOS; every way gives exactly N tokens with it among them."""
    lm = loaded("llama, grouped, tied")
    mem = vectors(lm, 1)
    token = int(generate(lm, mem, 8)[0, 2])
    lm.source.generation_config.eos_token_id = token
    lm.source.config.eos_token_id = token
    fresh = prototok.load(lm.source, device="cpu", dtype="float32")
    ids = [generate(fresh, mem, 8, cache) for cache in ("engine", "dynamic", "static")]
    assert int(ids[0][0, 2]) == token
    assert torch.equal(ids[0], ids[1]) and torch.equal(ids[0], ids[2])


def test_a_fit_is_possible_after_decoding() -> None:
    """Decoding runs in inference mode; no tensor made there may reach autograd."""
    model = small_llama()
    lm = prototok.load(model, device="cpu", dtype="float32")
    generate(lm, vectors(lm, 1), 30)
    recipe = prototok.Recipe(max_steps=2)
    assert prototok.fast_fit(lm, [[3, 4, 5]], recipe=recipe, progress=False).steps.item() == 2


def test_shapes_of_mem() -> None:
    lm = loaded("llama, grouped, tied")
    mem = vectors(lm, 6)
    ids = generate(lm, mem, 4)
    assert torch.equal(generate(lm, mem.view(3, 2, 2, -1), 4), ids)
    assert torch.equal(generate(lm, mem[0], 4), ids[:1])


def test_bytes_read_count_weights_and_cache() -> None:
    lm = loaded("mistral, window shorter than the text")
    d, f, kv = 48, 80, 24
    weights = 4 * (3 * ((d + 2 * kv) * d + d * d + 2 * f * d + d * f) + 97 * d)
    seen = 1 + 2 + 3 + 4 + 5 + 5 + 5
    assert bytes_read(lm, 2, 7) == 7 * weights + seen * 3 * 2 * 2 * kv * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache": "paged"}, "cache: 'paged' is not one of 'engine', 'dynamic', 'static'"),
        ({"length": 0}, "length: 0 is not a positive integer"),
        ({"length": 40}, "length: 40 tokens behind 2 vectors need 41 positions"),
        ({"mem": torch.zeros(1, 2, 7)}, r"mem: \(1, 2, 7\) is not \(rows, K, 32\)"),
        ({"mem": torch.zeros(0, 2, 32)}, r"mem: \(0, 2, 32\) holds no vectors"),
        ({"mem": "x"}, "mem: str is not"),
        ({"first": torch.tensor([1, 2])}, r"first: torch.int64 \(2,\) is not int64 \(1,\)"),
        ({"first": torch.tensor([97])}, "first: 97 is not a token id below 97"),
        ({"lm": 3}, "lm: int is not a FrozenLM"),
    ],
)
def test_bad_input_is_named(small_lm: FrozenLM, arguments: dict, message: str) -> None:
    options = {"lm": small_lm, "mem": vectors(small_lm, 1), "length": 3} | arguments
    with pytest.raises(ValueError, match=message):
        generate(**options)


def test_general_family_has_no_engine_cache() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)).eval()
    lm = prototok.load(model, device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="cache: 'engine' decodes the llama and gpt_neox families"):
        generate(lm, vectors(lm, 1), 4)
    assert generate(lm, vectors(lm, 1), 4, "dynamic").shape == (1, 4)


@pytest.mark.parametrize("name", ["stories3m", "neox4m"])
def test_real_models(name: str) -> None:
    lm = prototok.load(shared("models", name), device="cpu", dtype="float32")
    mem = lm.embed(torch.tensor([[lm.bos_id or 0], [50]]))
    ids = generate(lm, mem, 60)
    assert torch.equal(generate(lm, mem, 60, "static"), ids)
    assert torch.equal(generate(lm, mem[1:], 60), ids[1:])


def test_transformers_compiles_nothing(small_lm, monkeypatch):
    """On CUDA it would, for minutes and for every batch and length, with a static cache."""
    twin, seen = twin_of(small_lm, torch.float32), []
    real = type(twin).generate

    def noting(model, *args, generation_config, **kwargs):
        seen.append(generation_config.disable_compile)
        return real(model, *args, generation_config=generation_config, **kwargs)

    monkeypatch.setattr(type(twin), "generate", noting)
    generate(small_lm, torch.randn(1, 1, small_lm.hidden_size), 3, "static")
    assert seen == [True]
