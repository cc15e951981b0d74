"""What a fingerprint covers, and that a frozen model is frozen."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

import prototok
from prototok import FrozenLM, ProtoTokens, Recipe
from support import small_llama
from zoo import SIZES, neox


def fingerprint(model: PreTrainedModel) -> str:
    return prototok.load(model, device="cpu", dtype="float32").identity.fingerprint


NAMES = [name for name, _ in small_llama().named_parameters()]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_every_element_of_every_weight_counts(name: str) -> None:
    model = small_llama()
    found = fingerprint(model)
    generator = torch.Generator().manual_seed(NAMES.index(name))
    weight = model.get_parameter(name).flatten()
    for at in torch.randint(weight.numel(), (4,), generator=generator).tolist():
        kept = weight[at].clone()
        weight[at] += 0.125
        assert fingerprint(model) != found
        weight[at] = kept
    assert fingerprint(model) == found


@torch.no_grad()
def test_places_count() -> None:
    model = small_llama()
    found = fingerprint(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight[0, [1, 2]] = weight[0, [2, 1]]
    assert fingerprint(model) != found


def mistral(**changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, **changes))


def seeded(**changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return neox(**changes)


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
THETA = {"rope_type": "default", "rope_theta": 500000.0}


@pytest.mark.parametrize(
    ("build", "changes"),
    [
        (small_llama, {"rope_parameters": LINEAR}),
        (small_llama, {"rope_parameters": THETA}),
        (small_llama, {"rms_norm_eps": 1e-3}),
        (small_llama, {"hidden_act": "gelu"}),
        (mistral, {"sliding_window": 5}),
        (seeded, {"use_parallel_residual": False}),
        (seeded, {"num_attention_heads": 2}),
    ],
)
def test_settings_that_change_the_forward_count(
    build: Callable[..., PreTrainedModel], changes: dict
) -> None:
    one, other = build(), build(**changes)
    assert all(torch.equal(p, other.get_parameter(n)) for n, p in one.named_parameters())
    assert fingerprint(other) != fingerprint(one)


def test_settings_that_change_nothing_do_not_count(tmp_path: Path) -> None:
    found = fingerprint(small_llama())
    quiet = {
        "attention_dropout": 0.1, "use_cache": False, "eos_token_id": 5, "initializer_range": 0.3,
        "name_or_path": "elsewhere",
    }  # fmt: skip
    assert fingerprint(small_llama(**quiet)) == found
    small_llama(**quiet).bfloat16().save_pretrained(tmp_path)
    assert prototok.load(tmp_path, device="cpu").identity.fingerprint == found


def test_what_was_done_to_the_modules_counts() -> None:
    model = small_llama()
    model.model.layers[0].mlp.act_fn = nn.Tanh()
    assert fingerprint(model) != fingerprint(small_llama())


def test_rotary_frequencies_of_ones_own_count() -> None:
    model = small_llama()
    found = fingerprint(model)
    model.model.rotary_emb.inv_freq *= 1.01
    assert fingerprint(model) != found


def test_buffers_that_a_checkpoint_holds_count() -> None:
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=64, n_routed_experts=4, num_experts_per_tok=1, n_group=1,
        topk_group=1, n_shared_experts=1, first_k_dense_replace=1, pad_token_id=0,
    )  # fmt: skip
    model = Glm4MoeForCausalLM(config).eval()
    found = fingerprint(model)
    bias = next(b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    bias += 3.0
    assert fingerprint(model) != found


def test_a_weight_may_lie_apart() -> None:
    model = small_llama()
    found = fingerprint(model)
    apart = torch.stack([model.model.norm.weight.detach()] * 2, dim=1)[:, 0]
    model.model.norm.weight = nn.Parameter(apart)
    assert fingerprint(model) == found and fingerprint(model.bfloat16()) == found


def fitted(lm: FrozenLM) -> ProtoTokens:
    return prototok.fast_fit(lm, [[3, 4]], recipe=Recipe(max_steps=2), progress=False).tokens


def test_files_made_before_are_compared_as_they_were_made(small_lm: FrozenLM) -> None:
    tokens = fitted(small_lm)
    old = "679a359cf851b5955b4b0b267b275c73"  # what the first version made of `small_llama()`
    before = dataclasses.replace(tokens.model, fingerprint=old)
    prototok.decode(small_lm, dataclasses.replace(tokens, model=before))
    other = dataclasses.replace(tokens.model, fingerprint="0" * 32)
    with pytest.raises(ValueError, match="^tokens: fitted on .* 00000000.*, not on "):
        prototok.decode(small_lm, dataclasses.replace(tokens, model=other))


ENTRIES: dict[str, Callable[[FrozenLM, ProtoTokens], object]] = {
    "logits": lambda lm, tokens: lm.logits(torch.zeros(1, 2, 32)),
    "embed": lambda lm, tokens: lm.embed(torch.tensor([1])),
    "cast": lambda lm, tokens: lm.cast(torch.float64),
    "fast_fit": lambda lm, tokens: fitted(lm),
    "decode": lambda lm, tokens: prototok.decode(lm, tokens),
    "information": lambda lm, tokens: prototok.information(lm, [[1, 2, 3]]),
    "mem": lambda lm, tokens: prototok.autoregressive.fit(lm, [[1, 2]], progress=False),
    "generate": lambda lm, tokens: prototok.autoregressive.generate(lm, torch.zeros(1, 1, 32), 2),
    "capacity": lambda lm, tokens: prototok.capacity(
        lm, [[1, 2, 3, 4] * 3], recipe=Recipe(max_steps=2), progress=False
    ),
}


@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_model_trained_since_it_was_loaded_is_refused(entry: str, settings: dict) -> None:
    model = small_llama()
    lm = prototok.load(model, device="cpu", dtype="float32")
    tokens = fitted(lm)
    ENTRIES[entry](lm, tokens)
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, **settings).step()
    with pytest.raises(ValueError, match="^lm: the weights of LlamaForCausalLM were changed since"):
        ENTRIES[entry](lm, tokens)


def test_changes_behind_torchs_back_are_seen_before_weights_are_read_again() -> None:
    model = small_llama()
    lm = prototok.load(model, device="cpu", dtype="float32")
    model.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    with pytest.raises(ValueError, match="were changed since it was loaded"):
        lm.cast(torch.bfloat16)


def test_what_leaves_the_weights_alone_is_no_change() -> None:
    model = small_llama()
    lm = prototok.load(model, device="cpu", dtype="float32")
    x = torch.randn(1, 5, 32)
    before = lm.logits(x)
    model.train().requires_grad_(False).zero_grad()
    model.compile(backend="eager")
    model.bfloat16()
    assert torch.equal(lm.logits(x), before) and lm.cast(torch.float64) is not lm
    prototok.load(model, device="cpu")


def test_modules_changed_since_change_nothing() -> None:
    model = small_llama()
    lm = prototok.load(model, device="cpu", dtype="float32")
    x = torch.randn(1, 5, 32)
    before, exact = lm.logits(x), copy.deepcopy(model).double()(inputs_embeds=x.double()).logits
    model.model.layers[0].register_forward_hook(lambda module, args, out: 2 * out)
    model.model.norm = nn.Identity()
    model.config.num_hidden_layers = 1
    model.lm_head.weight = nn.Parameter(torch.zeros(97, 32))
    torch.testing.assert_close(lm.logits(x), before, rtol=0, atol=0)
    torch.testing.assert_close(
        lm.cast(torch.float64).logits(x.double()), exact, rtol=1e-4, atol=1e-4
    )
    assert lm.cast(torch.float64).body.family == "llama"


def test_a_change_that_torch_does_not_count_is_noticed_where_a_fit_begins() -> None:
    model = small_llama()
    lm = prototok.load(model, device="cpu", dtype="float32")
    model.model.norm.weight.data.mul_(2.0)
    with pytest.raises(ValueError, match="^lm: the weights of LlamaForCausalLM were changed since"):
        fitted(lm)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda lm: pickle.loads(pickle.dumps(lm))])
def test_a_copy_is_a_model_of_its_own(how: Callable[[FrozenLM], FrozenLM]) -> None:
    model = small_llama()
    model.model.norm.weight.data.mul_(1.0)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.0)  # a count that no copy begins with
    lm = prototok.load(model, device="cpu", dtype="float32")
    other, x = how(lm), torch.randn(1, 3, 32)
    assert torch.equal(other.logits(x), lm.logits(x))
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)
    other.logits(x)
    with pytest.raises(ValueError, match="were changed since"):
        lm.logits(x)
