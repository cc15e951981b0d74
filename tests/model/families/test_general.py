"""The general body feeds and casts a model as transformers itself does."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import prototok
from prototok.model.families.general import masked_logits, takes_mask

SIZES = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OLD = {"vocab_size": 101, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
PER_LAYER = {
    "vocab_size_per_layer_input": 101, "hidden_size_per_layer_input": 8, "laurel_rank": 8,
    "num_kv_shared_layers": 0, "head_dim": 8, "activation_sparsity_pattern": [0.0, 0.0],
}  # fmt: skip

# Module, class stem, config class, settings: models that scale what they embed, and two others.
EMBED = {
    "gemma": ("gemma", "Gemma", "GemmaConfig", SIZES | {"head_dim": 8}),
    "gemma2": ("gemma2", "Gemma2", "Gemma2Config", SIZES | {"head_dim": 8}),
    "gemma3": ("gemma3", "Gemma3", "Gemma3TextConfig", SIZES | {"head_dim": 8}),
    "vaultgemma": ("vaultgemma", "VaultGemma", "VaultGemmaConfig", SIZES | {"head_dim": 8}),
    "minicpm3": ("minicpm3", "MiniCPM3", "MiniCPM3Config", SIZES | LATENT | {"scale_emb": 12.0}),
    "falcon_h1, scaled outside its embedding": (
        "falcon_h1", "FalconH1", "FalconH1Config", SIZES | MAMBA | {"embedding_multiplier": 5.65},
    ),
    "biogpt": ("biogpt", "BioGpt", "BioGptConfig", SIZES | {"scale_embedding": True}),
    "xglm": ("xglm", "XGLM", "XGLMConfig", OLD | {"scale_embedding": True}),
    "granite, which scales vectors too": (
        "granite", "Granite", "GraniteConfig", SIZES | {"embedding_multiplier": 3.0},
    ),
    "qwen2_moe": (
        "qwen2_moe", "Qwen2Moe", "Qwen2MoeConfig",
        SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                 "shared_expert_intermediate_size": 16},
    ),
}  # fmt: skip


def build(module: str, stem: str, config: str, settings: dict) -> PreTrainedModel:
    home = pytest.importorskip(f"transformers.models.{module}")
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(home, f"{stem}ForCausalLM")(getattr(home, config)(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def gemma3n() -> PreTrainedModel:
    return build("gemma3n", "Gemma3n", "Gemma3nTextConfig", SIZES | PER_LAYER)


IDS = torch.tensor([[5, 17, 3, 99, 42, 5, 8, 63], [1, 2, 90, 4, 77, 6, 11, 12]])


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", EMBED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ids_are_embedded_as_the_model_embeds_them(name: str, dtype: torch.dtype) -> None:
    model = build(*EMBED[name])
    lm = prototok.load(model, device="cpu", dtype=dtype)
    assert lm.body.family == "general"
    plain = as_loaded(model, dtype)
    theirs = plain(input_ids=IDS, use_cache=False).logits
    assert relative_error(lm.logits(lm.embed(IDS)), theirs) < 1e-5
    torch.testing.assert_close(lm.embedding[IDS], lm.embed(IDS), rtol=0, atol=0)
    assert lm.embedding.shape == (lm.vocab_size, lm.hidden_size)


def nats_of(model: PreTrainedModel, ids: Tensor) -> float:
    log = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
    return -float(log[:-1].gather(1, ids[1:, None]).sum())


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: build(*EMBED["gemma3"]), gemma3n], ids=["3", "3n"])
def test_information_is_that_of_the_ids(make: Callable[[], PreTrainedModel]) -> None:
    """Gemma 3n, too, which looks ids up once more in every block."""
    model = make()
    lm = prototok.load(model, device="cpu", dtype="float32")
    found = prototok.information(lm, IDS)
    expected = [nats_of(model, ids) for ids in IDS]
    torch.testing.assert_close(found.nats, torch.tensor(expected, dtype=torch.float64))


@torch.no_grad()
def test_gemma3n_is_fed_its_scaled_rows() -> None:
    model = gemma3n()
    lm = prototok.load(model, device="cpu", dtype="float32")
    torch.testing.assert_close(lm.embed(IDS), model.get_input_embeddings()(IDS))


def test_mem_fits_see_the_text_as_the_model_does() -> None:
    """A scale left out would have them trained on vectors that the model never reads."""
    model = build(*EMBED["gemma"])
    lm = prototok.load(model, device="cpu", dtype="float32")
    recipe = prototok.Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=400)
    fit = prototok.autoregressive.fit(lm, [[5, 9]], k=2, seeds=4, recipe=recipe, progress=False)
    assert bool(fit.exact.any()) and torch.equal(fit.exact, fit.accuracy_teacher_forced == 1)


class Squared(GPT2LMHeadModel):
    """A model whose vectors cannot follow its ids by any factor."""

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **more):
        if input_ids is not None:
            inputs_embeds = self.transformer.wte(input_ids).square()
        return super().forward(inputs_embeds=inputs_embeds, **more)


def test_an_embedding_that_vectors_cannot_follow_is_refused_where_it_matters() -> None:
    sizes = {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    lm = prototok.load(Squared(GPT2Config(**sizes)), device="cpu", dtype="float32")
    prototok.fast_fit(lm, [[3]], recipe=prototok.Recipe(max_steps=2), progress=False)
    with pytest.raises(ValueError, match="^lm: Squared does not feed its blocks a multiple of"):
        lm.embed(IDS)


def as_loaded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """What `from_pretrained(dtype=…)` makes of it."""
    loaded = type(model).from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), dtype=dtype
    )
    return loaded.eval()


LONG = SIZES | {"max_position_embeddings": 1024, "hidden_size": 64, "vocab_size": 301}
CAST = {
    "smollm3": ("smollm3", "SmolLM3", "SmolLM3Config", LONG),
    "phi3": ("phi3", "Phi3", "Phi3Config", LONG),
    "gemma2": ("gemma2", "Gemma2", "Gemma2Config", LONG | {"head_dim": 16}),
    "olmo2": ("olmo2", "Olmo2", "Olmo2Config", LONG),
    "xglm, whose buffers are cast": (
        "xglm", "XGLM", "XGLMConfig", OLD | {"max_position_embeddings": 1024},
    ),
    "deepseek_v3, whose router stays fp32": (
        "deepseek_v3", "DeepseekV3", "DeepseekV3Config",
        LONG | LATENT | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
                         "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
                         "hidden_size": 32},
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", CAST)
def test_bf16_is_cast_as_from_pretrained_casts(name: str) -> None:
    """Rotary frequencies stay fp32: rounded, they are off by whole turns at position 500."""
    model = build(*CAST[name])
    lm = prototok.load(model, device="cpu", dtype="bfloat16")
    plain = as_loaded(model, torch.bfloat16)
    for part in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(lm.body.model, part)()), dict(getattr(plain, part)())
        assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    x = torch.randn(1, 600, lm.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(
        lm.logits(x), plain(inputs_embeds=x, use_cache=False).logits, rtol=0, atol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["smollm3", "phi3", "gemma2", "olmo2"])
def test_late_positions_are_as_precise_as_plain_bf16(name: str) -> None:
    model = build(*CAST[name])
    x = torch.randn(1, 600, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    exact = model(inputs_embeds=x, use_cache=False).logits[:, 500:]
    lm = prototok.load(model, device="cpu", dtype="bfloat16")
    errors = [
        float((logits[:, 500:].float() - exact).square().mean().sqrt())
        for logits in (
            lm.logits(x.bfloat16()),
            as_loaded(model, torch.bfloat16)(inputs_embeds=x.bfloat16(), use_cache=False).logits,
        )
    ]
    assert errors[0] <= 1.1 * errors[1]


def test_what_scales_its_input_in_place_leaves_the_callers_alone() -> None:
    settings = {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48}
    home = importlib.import_module("transformers.models.ctrl")
    model = home.CTRLLMHeadModel(home.CTRLConfig(**settings))
    lm = prototok.load(model, device="cpu", dtype="float32")
    x = torch.randn(1, 4, 32)
    before = x.clone()
    first = lm.logits(x)
    assert torch.equal(x, before) and torch.equal(lm.logits(x.requires_grad_()), first)


def test_rwkv_does_not_scale_the_users_weights() -> None:
    home = importlib.import_module("transformers.models.rwkv")
    sizes = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 4, "rescale_every": 2}
    model = home.RwkvForCausalLM(home.RwkvConfig(**sizes)).eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    lm = prototok.load(model, device="cpu", dtype="float32")
    lm.logits(torch.randn(1, 4, 32))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


MASKED = {
    "opt": ("opt", "OPT", "OPTConfig", {"vocab_size": 101, "hidden_size": 32, "ffn_dim": 48,
                                        "num_hidden_layers": 2, "num_attention_heads": 4,
                                        "word_embed_proj_dim": 32}),
    "bloom, which has no positions but slopes": (
        "bloom", "Bloom", "BloomConfig", {"vocab_size": 101, "hidden_size": 32, "n_layer": 2,
                                          "n_head": 4}),
    "mamba, which has no attention": (
        "mamba", "Mamba", "MambaConfig", {"vocab_size": 101, "hidden_size": 32,
                                          "num_hidden_layers": 2, "state_size": 4}),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", EMBED | MASKED)
def test_a_ready_mask_is_given_only_where_it_changes_nothing(name: str) -> None:
    model = build(*(EMBED | MASKED)[name])
    taken = takes_mask(model)
    assert taken or name not in ("gemma", "biogpt", "qwen2_moe")
    assert not taken or name not in ("gemma2", "gemma3", "mamba, which has no attention")
    if taken:
        embedded = model.get_input_embeddings()(torch.randint(101, (3, 30)))
        plain = model(inputs_embeds=embedded.clone(), use_cache=False).logits
        assert relative_error(masked_logits(model, embedded.clone()), plain) < 1e-5
