"""A model is what its modules do, not what its config says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from transformers import (
    AttentionInterface,
    BertConfig,
    BertLMHeadModel,
    BigBirdConfig,
    BigBirdForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

import prototok
from support import small_llama
from zoo import OWN, SIZES, made, neox


def relative_error(model: nn.Module, source: PreTrainedModel) -> tuple[float, str]:
    """Of the largest logit; and the family that gave it."""
    lm = prototok.load(model, device="cpu", dtype="float32")
    x = torch.randn(1, 10, lm.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = source(inputs_embeds=x, use_cache=False).logits
        error = (lm.logits(x) - theirs).abs().max() / theirs.abs().max()
    return float(error), lm.body.family


def with_lora(model: PreTrainedModel, *modules: str) -> PreTrainedModel:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=list(modules), init_lora_weights=False))
    return model.eval()


def get_base_model(model: PreTrainedModel) -> PreTrainedModel:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, settings).get_base_model().eval()


class OwnForward(LlamaForCausalLM):
    def forward(self, *args: object, **kwargs: object) -> object:
        made = super().forward(*args, **kwargs)
        made.logits = made.logits.tanh()
        return made


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object):
    return torch.zeros_like(q).transpose(1, 2), None


def change(name: str) -> PreTrainedModel:
    model = small_llama()
    block = model.model.layers[1]
    match name:
        case "an adapter":
            return with_lora(model, "q_proj", "v_proj", "down_proj")
        case "an adapter on GPT-NeoX":
            return with_lora(made(neox), "query_key_value", "dense_4h_to_h")
        case "the base of a PeftModel":
            return get_base_model(model)
        case "a forward hook":
            block.register_forward_hook(lambda module, args, out: 2 * out)
        case "a forward hook in front":
            block.mlp.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        case "another activation":
            block.mlp.act_fn = nn.Tanh()
        case "another norm":
            model.model.norm = nn.LayerNorm(32)
        case "norms that do nothing":
            block.input_layernorm = nn.Identity()
        case "a head with a bias":
            model.lm_head.bias = nn.Parameter(torch.randn(97))
        case "fewer layers by the config":
            model.config.num_hidden_layers = 1
        case "a forward of an instance":
            block.mlp.forward = lambda x: torch.zeros_like(x)
        case "a forward of a class":
            model.__class__ = OwnForward
        case "a parametrisation":
            parametrize.register_parametrization(block.mlp.down_proj, "weight", Doubled())
        case "pruned weights":
            prune.random_unstructured(block.mlp.down_proj, "weight", 0.5)
        case "another scaling":
            block.self_attn.scaling = 1.0
        case "another eps":
            block.input_layernorm.variance_epsilon = 1.0
        case "layers that are one":
            model.model.layers[1] = model.model.layers[0]
        case "attention of one's own":
            AttentionInterface.register("nothing", attend)
            model.config._attn_implementation = "nothing"
        case "sizes that the config does not have":
            for mlp in (b.mlp for b in model.model.layers):
                mlp.gate_proj, mlp.up_proj = nn.Linear(32, 20), nn.Linear(32, 20)
                mlp.down_proj = nn.Linear(20, 32)
    return model


CHANGES = [
    "an adapter", "an adapter on GPT-NeoX", "the base of a PeftModel", "a forward hook",
    "a forward hook in front", "another activation", "another norm", "norms that do nothing",
    "a head with a bias", "fewer layers by the config", "a forward of an instance",
    "a forward of a class", "a parametrisation", "pruned weights", "another scaling",
    "another eps", "layers that are one", "attention of one's own",
    "sizes that the config does not have",
]  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_goes_the_general_way_and_says_so(name: str) -> None:
    model = change(name)
    error, family = relative_error(model, model)
    assert error < 1e-5 and family == "general"
    body = prototok.load(model, device="cpu", dtype="float32").body
    assert body.reason and "\n" not in body.reason


def test_what_a_change_is_called() -> None:
    reasons = {
        name: prototok.load(change(name), device="cpu", dtype="float32").body.reason
        for name in ("a forward hook", "another activation", "a head with a bias", "another eps")
    }
    assert reasons["a forward hook"] == "model.layers.1 has a hook"
    assert reasons["another activation"].startswith("model.layers.1.mlp.act_fn is torch's Tanh")
    assert reasons["a head with a bias"].startswith("lm_head has bias (97,)")
    assert reasons["another eps"].startswith(
        "model.layers.1.input_layernorm has variance_epsilon = 1.0 where"
    )


@pytest.mark.parametrize("name", OWN)
def test_a_stock_model_goes_its_own_way(name: str) -> None:
    model = made(OWN[name])
    model(torch.tensor([[1, 2]]), output_hidden_states=True)  # for which it puts hooks of its own
    model.gradient_checkpointing_enable()
    model.resize_token_embeddings(101)
    error, family = relative_error(model.eval(), model)
    assert error < 1e-4 and family != "general"
    assert prototok.load(model, device="cpu").body.reason == "its own forward"


def test_a_window_that_llama_does_not_have_is_none() -> None:
    model = small_llama()
    model.config.sliding_window = 3
    error, family = relative_error(model, model)
    assert error < 1e-5 and family == "llama"


def test_a_patched_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="^model: LlamaForCausalLM computes something else"):
            prototok.load(small_llama().to(dtype), device="cpu")


def test_the_comparison_leaves_the_weights_as_they_are() -> None:
    model = small_llama().bfloat16()
    lm = prototok.load(model, device="cpu", dtype="bfloat16")
    assert all(p.dtype == torch.bfloat16 for p in lm.source.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.source.modules())
    assert lm.embedding.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_mistral_slides_in_layers_that_its_config_calls_full() -> None:
    """Not one of the zoo: transformers generates from no such model."""
    torch.manual_seed(0)
    types = ["full_attention"] * SIZES["num_hidden_layers"]
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=20, layer_types=types)
    model = MistralForCausalLM(config).eval()
    lm, x = prototok.load(model, device="cpu", dtype="float32"), torch.randn(2, 48, 48)
    assert lm.body.family == "llama"
    torch.testing.assert_close(lm.logits(x), model(inputs_embeds=x, use_cache=False).logits)


@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m))]
)
def test_wrapped_models_are_unwrapped(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = small_llama()
    error, family = relative_error(wrap(model), model)
    assert error < 1e-5 and family == "llama"


class Negated(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **given: object) -> object:
        out = self.module(**given)
        out.logits = -out.logits
        return out


def hooked(model: nn.Module) -> nn.Module:
    wrapper = nn.DataParallel(model)
    wrapper.register_forward_hook(lambda module, args, out: None)
    return wrapper


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (Negated, "Negated is not a transformers model, nor what torch, peft or deepspeed make"),
        (hooked, "this DataParallel has a hook, and what is inside it is frozen alone"),
    ],
)
def test_a_wrapper_that_may_compute_something_is_refused(
    wrap: Callable[[nn.Module], nn.Module], says: str
) -> None:
    with pytest.raises(ValueError, match=f"^model: {says}"):
        prototok.load(wrap(small_llama()))


def by_closure(module: nn.Module) -> Callable[..., object]:
    old = module.forward
    return lambda *args: old(*args)


def by_default(module: nn.Module) -> Callable[..., object]:
    return lambda x, of=module: type(of).forward(of, x)


def by_itself(module: nn.Module) -> Callable[..., object]:
    def forward(x: Tensor, again: bool = True) -> object:
        return forward(x, False) if again else module.down_proj(x)

    return forward


@pytest.mark.parametrize("patch", [by_closure, by_default, by_itself])
def test_a_forward_that_keeps_hold_of_the_users_module_is_refused(
    patch: Callable[[nn.Module], Callable[..., object]],
) -> None:
    model = small_llama()
    mlp = model.model.layers[0].mlp
    mlp.forward = patch(mlp)
    with pytest.raises(ValueError, match="^model: .* forward of model.layers.0.mlp that keeps"):
        prototok.load(model)


def test_a_weight_that_changes_as_it_is_read_is_refused() -> None:
    model = small_llama()
    model.model.embed_tokens.max_norm = 0.5
    before = model.model.embed_tokens.weight.detach().clone()
    with pytest.raises(ValueError, match="^model: .* has max_norm = 0.5 in model.embed_tokens"):
        prototok.load(model)
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_a_model_that_chooses_its_attention_by_the_first_text_is_refused() -> None:
    torch.manual_seed(0)
    config = BigBirdConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=128, is_decoder=True, block_size=4,
        num_random_blocks=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="^model: .* sets attention_type of bert to 'orig"):
        prototok.load(BigBirdForCausalLM(config).eval(), device="cpu", dtype="float32")


@pytest.mark.parametrize("kind", ["get_peft_model", "PeftMixedModel"])
def test_a_peft_model_keeps_its_adapter(kind: str) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = getattr(peft, kind)(small_llama(), settings).eval()
    error, family = relative_error(model, model)
    assert error < 1e-5 and family == "general"


def test_a_learned_prompt_is_refused() -> None:
    peft = pytest.importorskip("peft")
    prompt = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="^model: the adapter of this PeftModelForCausalLM is a"):
        prototok.load(peft.get_peft_model(small_llama(), prompt))


@pytest.fixture
def adapted(tmp_path: Path) -> Path:
    """A folder of base weights with an adapter among them."""
    small_llama().save_pretrained(tmp_path)
    with_lora(small_llama(), "v_proj").save_pretrained(tmp_path / "adapter")
    for file in (tmp_path / "adapter").glob("adapter*"):
        shutil.copy(file, tmp_path)
    return tmp_path


def test_a_folder_with_an_adapter_loads_with_it(adapted: Path) -> None:
    lm = prototok.load(adapted, device="cpu", dtype="float32")
    source = with_lora(small_llama(), "v_proj")
    x = torch.randn(1, 5, 32)
    torch.testing.assert_close(lm.logits(x), source(inputs_embeds=x).logits)
    assert lm.body.reason.startswith("model.layers.0.self_attn.v_proj is peft's Linear")
    with pytest.raises(ValueError, match="holds an adapter without its model"):
        prototok.load(adapted / "adapter", device="cpu")


@pytest.mark.parametrize(
    ("file", "key", "says"),
    [
        ("model.safetensors", "model.norm.weight", "lacks 1 weights, model.norm.weight first"),
        ("adapter_model.safetensors", None, "the adapter of .* lacks model.layers.0"),
    ],
)
def test_a_folder_with_an_adapter_must_be_whole(
    file: str, key: str | None, says: str, adapted: Path
) -> None:
    tensors = load_file(adapted / file)
    tensors.pop(key or min(tensors))
    save_file(tensors, adapted / file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"^model: .*{says}"):
        prototok.load(adapted, device="cpu")


def test_an_adapter_needs_peft(adapted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prototok.model import load

    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^model: .* holds an adapter, which needs the peft"):
        prototok.load(adapted, device="cpu")


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path: Path) -> None:
    small_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(ValueError, match="^model: weights of .* do not fit its config") as caught:
        prototok.load(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def on_meta() -> PreTrainedModel:
    with torch.device("meta"):
        return small_llama()


def in_float8() -> PreTrainedModel:
    model = small_llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    return model


def in_int8() -> nn.Module:
    with pytest.warns(DeprecationWarning):
        return torch.ao.quantization.quantize_dynamic(small_llama(), {nn.Linear}, torch.qint8)


def by_a_quantiser() -> PreTrainedModel:
    model = small_llama()
    model.is_quantized = True  # what transformers' quantisers leave, whatever they do to weights
    return model


def bert(is_decoder: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=16, is_decoder=is_decoder, initializer_range=0.3)
    return BertLMHeadModel(config).eval()


def xlnet() -> PreTrainedModel:
    torch.manual_seed(0)
    config = XLNetConfig(
        vocab_size=60, d_model=16, n_layer=2, n_head=2, d_inner=16, initializer_range=0.3
    )
    return XLNetLMHeadModel(config).eval()


def bidirectional() -> PreTrainedModel:
    model = small_llama()
    model.config.is_causal = False
    return model


def gemma4() -> PreTrainedModel:
    transformers = pytest.importorskip("transformers.models.gemma4")
    config = transformers.Gemma4TextConfig(
        vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, vocab_size_per_layer_input=60,
        hidden_size_per_layer_input=8, num_kv_shared_layers=0,
    )  # fmt: skip
    return transformers.Gemma4ForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (on_meta, "has no weights yet, model.embed_tokens.weight is on the meta device"),
        (in_float8, "is quantised, model.layers.0.mlp.up_proj.weight is float8_e4m3fn"),
        (in_int8, "is quantised, in model.layers.0.self_attn.q_proj"),
        (by_a_quantiser, "is quantised; load the unquantised weights"),
        (lambda: bert(False), "is not causal, what stands at later positions"),
        (xlnet, "(is not causal, what|does not run on vectors)"),  # it has no bf16 forward
        (bidirectional, "is not causal, what stands at later positions"),
        (gemma4, "does not run on vectors in place of token ids"),
        (lambda: nn.Linear(2, 2), "Linear is not a transformers model"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_cannot_be_fitted_is_one_sentence(
    build: Callable[[], nn.Module], says: str, dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match=f"^model: .*{says}") as caught:
        prototok.load(build(), device="cpu", dtype=dtype)
    assert "\n" not in str(caught.value)


def test_a_decoder_of_bert_is_causal() -> None:
    model = bert(True)
    assert relative_error(model, model) == (0.0, "general")
