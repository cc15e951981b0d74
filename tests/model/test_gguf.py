"""GGUF files, written here with the gguf package, against the weights that went into them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import prototok
from support import small_llama

pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate")
gguf = pytest.importorskip("gguf", reason="needs the gguf package, the extra `gguf`")

TOKENS = ["<s>", "</s>", "<unk>", *map(chr, range(97, 123)), "ab", "cd"]
SIZES = {
    "vocab_size": len(TOKENS), "hidden_size": 64, "intermediate_size": 96, "bos_token_id": 0,
    "eos_token_id": 1, "rms_norm_eps": float(np.float32(1e-6)),
}  # fmt: skip


def written(model: LlamaForCausalLM, path: Path) -> LlamaForCausalLM:
    """Write the model with matrices in Q4_1; return it with the weights that the file holds."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "model.layers": "blk",
    }  # fmt: skip
    for key, parameter in model.named_parameters():
        name, value = key, parameter.detach().numpy()
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if value.ndim == 1:
            writer.add_tensor(name, value)
            continue
        count = next((n for part, n in heads.items() if part in key), None)
        # Files hold the two halves of a rotated head as neighbours.
        turned = value if count is None else rows_as_pairs(value, count)
        kind = gguf.GGMLQuantizationType.Q4_1
        packed = gguf.quants.quantize(turned, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        plain = gguf.quants.dequantize(packed, kind)
        plain = plain if count is None else rows_as_halves(plain, count)
        parameter.data.copy_(torch.from_numpy(plain))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def rows_as_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def rows_as_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def test_a_file_loads_as_what_was_quantised_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    plain = written(small_llama(**SIZES), path)
    lm = prototok.load(str(path), device="cpu", dtype="float32")
    assert lm.dequantised == "Q4_1" and lm.body.family == "llama"
    assert lm.context == plain.config.max_position_embeddings
    ids = torch.tensor([[3, 9, 27, 4, 5]])
    with torch.no_grad():
        expected = plain(ids).logits
    torch.testing.assert_close(lm.logits(lm.embed(ids)), expected, rtol=1e-4, atol=1e-4)
    assert lm.encode("abcdb") == [29, 30, 4] and lm.decode_ids([29, 30, 4]) == "abcdb"


def test_vectors_fitted_on_a_file_decode_on_the_same_weights(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    plain = written(small_llama(**SIZES), path)
    lm = prototok.load(path, device="cpu", dtype="float32")
    fit = prototok.fast_fit(lm, [[3, 4], [9, 5]], recipe="paper", progress=False)
    assert fit.exact.all()
    assert fit.tokens.provenance["dequantised from"] == "Q4_1"
    again = prototok.load(plain, device="cpu", dtype="float32")
    assert prototok.decode(again, fit.tokens).tolist() == [[3, 4], [9, 5]]


def test_what_is_no_gguf_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    with pytest.raises(ValueError, match=r"model: there is no file .*broken\.gguf"):
        prototok.load(path)
    path.write_bytes(b"not a model" * 100)
    with pytest.raises(ValueError, match=r"model: .*broken\.gguf is not a whole GGUF file"):
        prototok.load(path)
    written(small_llama(**SIZES), path)
    with pytest.raises(ValueError, match="revision: 'main' means nothing"):
        prototok.load(path, revision="main")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model: .*broken\.gguf is not a whole GGUF file"):
        prototok.load(path)
