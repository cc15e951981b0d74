"""Loading: sources, what is recorded, and one clear sentence for what cannot be loaded."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

import prototok
from prototok import Recipe
from support import small_llama


def test_a_users_model_is_never_changed() -> None:
    model = small_llama(attention_dropout=0.1).train()
    model.lm_head.weight.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    config, flags = model.config.to_dict(), [p.requires_grad for p in model.parameters()]
    lm = prototok.load(model, device="cpu", dtype="bfloat16")
    prototok.fast_fit(lm, [[3, 4]], recipe=Recipe(max_steps=3))
    assert model.training and all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags and all(flags)
    assert all(p.grad is None for p in model.parameters())
    assert model.config.to_dict() == config
    after = model.state_dict()
    assert all(
        torch.equal(before[k], after[k]) and after[k].dtype == before[k].dtype for k in before
    )


def test_weights_of_the_same_dtype_are_not_copied() -> None:
    model = small_llama()
    lm = prototok.load(model, device="cpu", dtype="float32")
    assert lm.embedding.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert not lm.embedding.requires_grad


def test_folder_hub_layout_round_trip(tmp_path: Path) -> None:
    model = small_llama()
    model.save_pretrained(tmp_path)
    lm = prototok.load(tmp_path, device="cpu", dtype="float32")
    embeds = torch.randn(1, 5, 32)
    torch.testing.assert_close(lm.logits(embeds), model(inputs_embeds=embeds).logits)
    assert lm.tokenizer is None and lm.identity.revision is None
    with pytest.raises(ValueError, match="^lm: .* came without a tokenizer"):
        prototok.fast_fit(lm, ["some text"])


def test_hub_id_from_the_cache_resolves_to_a_commit(tmp_path: Path) -> None:
    """A repository in the hub's cache layout, without a network: branch and commit both load."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--small"
    small_llama().save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = (
        "import prototok\n"
        f"for revision in (None, 'main', {commit!r}):\n"
        "    found = prototok.load('someone/small', revision=revision).identity\n"
        f"    assert (found.name, found.revision) == ('someone/small', {commit!r}), found\n"
        "try: prototok.load('someone/small', revision='v2')\n"
        "except ValueError as error: assert 'could not be had from the hub' in str(error), error\n"
        "else: raise SystemExit('accepted')"
    )
    offline = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=offline)


def test_fingerprint_is_of_the_weights_and_not_of_their_dtype(tmp_path: Path) -> None:
    model = small_llama()
    found = prototok.load(model, device="cpu").identity.fingerprint
    rounded = prototok.load(copy.deepcopy(model).bfloat16(), device="cpu").identity.fingerprint
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    assert rounded == found
    assert prototok.load(other, device="cpu").identity.fingerprint != found


def test_cast_starts_from_the_stored_weights() -> None:
    model = small_llama()
    lm = prototok.load(model, device="cpu", dtype="bfloat16")
    embeds = torch.randn(1, 5, 32)
    twin = lm.cast(torch.float32)
    torch.testing.assert_close(twin.logits(embeds), model(inputs_embeds=embeds).logits)
    assert lm.cast(torch.float32) is twin and lm.cast(torch.bfloat16) is lm


def saved(folder: Path, **config: object) -> Path:
    small_llama().save_pretrained(folder)
    if config:
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(found | config))
    return folder


def break_weights(folder: Path, change: object) -> Path:
    saved(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def poisoned(tensors: dict) -> dict:
    key = "model.layers.1.mlp.up_proj.weight"
    tensors[key][3, 5] = float("nan")
    return tensors


def without_norm(tensors: dict) -> dict:
    return {k: v for k, v in tensors.items() if k != "model.norm.weight"}


def pickled(folder: Path) -> Path:
    model = small_llama()
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def truncated(folder: Path) -> Path:
    saved(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


def bert(folder: Path) -> Path:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def empty(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda f: f / "nowhere", "is no folder here and could not be had from the hub"),
        (empty, "has no config.json"),
        (pickled, "has only pickled weights"),
        (
            lambda f: saved(f, quantization_config={"quant_method": "gptq", "bits": 4}),
            "is quantised",
        ),
        (bert, "is not a causal language model"),
        (lambda f: break_weights(f, poisoned), r"not finite, in model\.layers\.1\.mlp\.up_proj"),
        (lambda f: break_weights(f, without_norm), "lacks 1 weights, model.norm.weight first"),
        (truncated, "are damaged"),
        (lambda f: saved(f, model_type="unheard_of"), "could not be loaded"),
        (
            lambda f: saved(
                f,
                model_type="own_code",
                auto_map={"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"},
            ),
            "needs code of its own",
        ),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(build: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        prototok.load(build(tmp_path), device="cpu")
    message = str(caught.value)
    assert message.startswith("model: ") and "\n" not in message


def test_gated_models_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError

    def gated(*args: object, **kwargs: object) -> None:
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", gated)
    monkeypatch.setattr("prototok.model.load.hf_hub_download", gated)
    with pytest.raises(ValueError, match=r"^model: meta/llama is gated; accept its licence"):
        prototok.load("meta/llama")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "gpu0"}, "^device: 'gpu0' is not a torch device"),
        ({"dtype": "int8"}, "^dtype: 'int8' is not"),
        ({"dtype": "bf17"}, "^dtype: 'bf17' is not"),
        ({"revision": "main"}, "^revision: 'main' means nothing"),
    ],
)
def test_bad_options(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        prototok.load(small_llama(), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="^device: 'cuda' was asked for"):
        prototok.load(small_llama(), device="cuda")


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-neox"])
def test_built_in_models(name: str) -> None:
    lm = prototok.load(name, device="cpu")
    folder = Path(prototok.__file__).parent / "models" / name
    record = json.loads((folder / "training.json").read_text())
    assert lm.body.family == {"tiny-llama": "llama", "tiny-neox": "gpt_neox"}[name]
    sizes = {f.stem: f.stat().st_size for f in folder.glob("*.safetensors")}
    assert sizes.pop("optimizer") <= 10e6 and sizes.pop("encoder") <= 10e6
    assert sum(sizes.values()) <= 12e6
    text = (folder / "held_out.txt").read_text()
    assert lm.decode_ids(lm.encode(text)) == text
    ids = lm.encode(text)[: lm.context]
    nats = float(prototok.information(lm, [ids]).nats) / (len(ids) - 1)
    assert abs(nats - record["held_out_loss"]) < 0.7  # one window of one held-out book
