"""Our decoder gives transformers' greedy tokens, whatever the family's options."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import prototok
from prototok import FrozenLM
from prototok.autoregressive import generate
from prototok.autoregressive.static_kv import StaticDecoder
from support import shared, small_llama

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip


def neox(rotary: float = 0.5, **changes: object) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**(SIZES | {"rope_parameters": rope} | changes)))


MODELS = {
    "llama, grouped, tied": lambda: small_llama(),
    "llama, one kv head each, untied": lambda: small_llama(
        num_key_value_heads=4, tie_word_embeddings=False
    ),
    "llama, biases, wide heads": lambda: small_llama(
        attention_bias=True, mlp_bias=True, head_dim=16
    ),
    "llama, yarn rope": lambda: small_llama(
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 10,
        }
    ),
    "mistral, window shorter than the text": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5)
    ),
    "qwen2, window in the upper layers": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            **SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=5,
            max_window_layers=1,
        )
    ),
    "qwen3, tied": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=12, tie_word_embeddings=True)
    ),
    "gpt-neox, parallel": lambda: neox(),
    "gpt-neox, sequential": lambda: neox(use_parallel_residual=False),
    "gpt-neox, full rotary, no attention bias": lambda: neox(1.0, attention_bias=False),
    "gpt-neox, tanh gelu": lambda: neox(hidden_act="gelu_new"),
}  # fmt: skip


def loaded(name: str) -> FrozenLM:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases at their trivial values would hide mistakes
                parameter += 0.3 * torch.randn_like(parameter)
    return prototok.load(model, device="cpu", dtype="float32")


def vectors(lm: FrozenLM, rows: int, k: int = 2, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, k, lm.hidden_size, generator=generator)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", MODELS)
def test_engine_equals_transformers_greedy(name: str, rows: int) -> None:
    lm = loaded(name)
    mem = vectors(lm, rows)
    ids = generate(lm, mem, 30)
    assert ids.shape == (rows, 30) and ids.dtype == torch.int64
    for cache in ("dynamic", "static"):
        assert torch.equal(generate(lm, mem, 30, cache), ids)
    assert len(ids.unique()) > 5  # a decoder stuck on one token would agree too easily


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", MODELS)
def test_position_on_the_device_changes_nothing(name: str, rows: int) -> None:
    """What a CUDA graph replays, run without one."""
    lm = loaded(name)
    mem = vectors(lm, rows)
    replayed = StaticDecoder(lm, rows, 40, on_device=True).generate(mem, 30)
    assert torch.equal(replayed, generate(lm, mem, 30))


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


def test_decoder_keeps_nothing_of_the_last_call() -> None:
    lm = loaded("llama, grouped, tied")
    one, other = vectors(lm, 2), vectors(lm, 2, seed=4)
    decoder = StaticDecoder(lm, 2, 40)
    expected = decoder.generate(one, 20)
    assert not torch.equal(decoder.generate(other, 30)[:, :20], expected)
    assert torch.equal(decoder.generate(one, 20), expected)


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
    decoder = StaticDecoder(lm, 2, 8)
    d, f, kv = 48, 80, 24
    weights = 4 * (3 * ((d + 2 * kv) * d + d * d + 2 * f * d + d * f) + 97 * d)
    assert decoder.weight_bytes == weights
    seen = 1 + 2 + 3 + 4 + 5 + 5 + 5
    assert decoder.bytes_read(7) == 7 * weights + seen * 3 * 2 * 2 * kv * 4


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
