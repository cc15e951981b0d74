"""Each family's forward is the transformers forward, in fp32 and in a float64 run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

import prototok
from support import DEVICES, shared, small_llama
from zoo import OWN, made

GENERAL = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
            word_embed_proj_dim=24, max_position_embeddings=64,
        )
    ),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
    "llama, dynamic rope": lambda: small_llama(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    ),
}  # fmt: skip


def embeds_for(model: PreTrainedModel, dtype: torch.dtype) -> Tensor:
    width = model.get_input_embeddings().weight.shape[1]
    return torch.randn(2, 19, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture
def double_norms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers rounds every RMSNorm through fp32 even in a float64 run; lift that here."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return (
            self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        )

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)
    yield


# Tables of rotary positions are float32, as transformers has them, and CUDA rounds its own.
FP64 = {"cpu": 1e-9, "cuda": 1e-6}


@torch.no_grad()
@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("device", DEVICES)
def test_own_family_equals_transformers_in_fp32(name: str, device: str) -> None:
    model = made(OWN[name])
    lm = prototok.load(model, device=device, dtype="float32")
    assert lm.body.family in ("llama", "gpt_neox")
    embeds = embeds_for(model, torch.float32)
    ours, theirs = lm.logits(embeds.to(device)).cpu(), model(inputs_embeds=embeds).logits
    assert relative_error(ours, theirs) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("device", DEVICES)
def test_own_family_equals_transformers_in_fp64(name: str, device: str, double_norms: None) -> None:
    model = made(OWN[name]).double()
    lm = prototok.load(model, device=device, dtype="float64")
    embeds = embeds_for(model, torch.float64)
    ours, theirs = lm.logits(embeds.to(device)).cpu(), model(inputs_embeds=embeds).logits
    assert relative_error(ours, theirs) < FP64[device]


@torch.no_grad()
@pytest.mark.parametrize("name", GENERAL)
@pytest.mark.parametrize("device", DEVICES)
def test_other_models_go_the_general_way(name: str, device: str) -> None:
    model = made(GENERAL[name])
    lm = prototok.load(model, device=device, dtype="float32")
    assert lm.body.family == "general"
    embeds = embeds_for(model, torch.float32)
    bounds = {} if device == "cpu" else {"rtol": 1e-4, "atol": 1e-4}
    ours, theirs = lm.logits(embeds.to(device)).cpu(), model(inputs_embeds=embeds).logits
    torch.testing.assert_close(ours, theirs, **bounds)


@pytest.mark.parametrize("name", ["gpt2", "opt", "mamba"])
@pytest.mark.parametrize("device", DEVICES)
def test_general_models_can_be_fitted(name: str, device: str) -> None:
    torch.manual_seed(0)
    lm = prototok.load(GENERAL[name](), device=device, dtype="float32")
    recipe = prototok.Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=300)
    fit = prototok.fast_fit(lm, [[5, 9], [7, 3]], seeds=4, recipe=recipe).best()
    assert bool(fit.exact.all())
    assert prototok.decode(lm, fit.tokens).tolist() == [[5, 9], [7, 3]]


@torch.no_grad()
@pytest.mark.parametrize("name", ["stories3m", "stories260k", "neox4m"])
def test_real_models_equal_transformers(name: str, double_norms: None) -> None:
    path = shared("models", name)
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        lm = prototok.load(path, device="cpu", dtype=dtype)
        embeds = embeds_for(model, dtype)
        assert relative_error(lm.logits(embeds), model(inputs_embeds=embeds).logits) < bound


@pytest.mark.parametrize("name", ["llama, grouped, tied", "gpt-neox, parallel"])
@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_the_embeddings_equals_transformers(
    name: str, device: str, double_norms: None
) -> None:
    model = made(OWN[name]).double()
    lm = prototok.load(model, device=device, dtype="float64")
    grads = []
    for forward in (
        lambda x: lm.logits(x.to(device)).cpu(),
        lambda x: model(inputs_embeds=x).logits,
    ):
        embeds = embeds_for(model, torch.float64).requires_grad_()
        forward(embeds).square().sum().backward()
        grads.append(embeds.grad)
    assert relative_error(grads[0], grads[1]) < FP64[device]
