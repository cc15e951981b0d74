"""Fits behind a constant prefix: kept in results and files, and true of plain transformers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import prototok
from prototok import FrozenLM, ProtoTokens, autoregressive
from prototok.autoregressive import MemFit
from prototok.fitting.prior import Prior
from prototok.fitting.recipe import PAPER
from prototok.geometry.paths import BezierSettings, connect, interpolate
from prototok.model import sink
from prototok.model.in_front import prefix_of
from prototok.results.arrangement import Arrangement
from support import small_llama

IDS = [5, 17, 9]
TEXTS = [[3, 8, 60], [44, 7, 12], [9, 9, 2]]
QUICK = prototok.Recipe(
    lr=0.1, betas=(0.8, 0.99), weight_decay=0.1, schedule="cosine", cycle=300, warmup=5,
    init_std=0.3, temperature=0.5, max_steps=900, margin=0.2,
)  # fmt: skip


def alone(path: Path, model: PreTrainedModel) -> list[list[int]]:
    """What plain transformers decodes, from nothing but the file and the model."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["prototok"])
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    table = model.get_input_embeddings()
    front = table(torch.tensor(header["prefix_ids"])).detach()
    assert torch.equal(front, stored["prefix"].to(front.dtype))
    found = []
    for text, length in enumerate(stored["lengths"].tolist()):
        e = stored["e"][text, 0]
        m = stored["m"][stored["groups"][text]] if header["share"] else stored["m"][text, 0]
        own = torch.stack([e, *[m] * (length - 1)])
        whole = torch.cat([front, own.to(front.dtype)])[None]
        with torch.no_grad():
            logits = model(inputs_embeds=whole).logits[0, len(front) :]
        found.append(logits.argmax(-1).tolist())
    return found


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)).eval()


@pytest.mark.parametrize("share", [None, "m"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("build", [small_llama, gpt2])
def test_what_is_exact_is_so_for_transformers_with_the_ids_in_front(
    build, dtype: str, share: str | None, tmp_path: Path
) -> None:
    model = build()
    lm = prototok.load(model, device="cpu", dtype=dtype)
    texts = [ids[:2] for ids in TEXTS] if share else TEXTS
    fit = prototok.fast_fit(
        lm, texts, prefix=IDS, share=share, seeds=1 if share else 3, recipe=QUICK, progress=False
    ).best()
    assert fit.exact.any()
    fit.save(tmp_path / "fit")
    for there in dict.fromkeys((torch.float32, lm.dtype)):
        path = tmp_path / "fit" / "proto_tokens.safetensors"
        found = alone(path, build().to(there))
        for ids, target, exact in zip(found, texts, fit.exact[:, 0].tolist(), strict=True):
            assert ids == target or not exact
    again = ProtoTokens.load(tmp_path / "fit" / "proto_tokens.safetensors")
    assert again.prefix is not None and again.prefix.ids == tuple(IDS)
    decoded = prototok.decode(lm, again)
    assert torch.equal(decoded, prototok.decode(lm, fit.tokens))
    right = (decoded == torch.tensor(texts)).all(1)
    assert torch.equal(right, fit.exact[:, 0])
    assert fit.tokens.provenance["prefix"].endswith("token 5, 17, 9 (as asked)")
    # It is the prefix that they need: without it they decode to something else.
    bare = dataclasses.replace(again, prefix=None)
    assert not torch.equal(prototok.decode(lm, bare), decoded)


@pytest.mark.parametrize("arrangement", ["e m*+1", "e*", "(e m)*", "e2 m*"])
def test_every_arrangement_is_the_laid_out_input_behind_the_prefix(
    arrangement: str, small_lm: FrozenLM
) -> None:
    fit = prototok.fast_fit(
        small_lm, [[3, 8], [44, 7]], prefix=IDS, arrangement=arrangement, seeds=3, recipe=QUICK,
        progress=False,
    ).best()  # fmt: skip
    layout = Arrangement.parse(arrangement).layout(2)
    front = small_lm.embed(torch.tensor(IDS))
    for row in range(2):
        whole = torch.cat([front, fit.tokens.vectors(row)[layout]])[None]
        with torch.no_grad():
            ids = small_lm.source(inputs_embeds=whole).logits[0, -2:].argmax(-1)
        assert torch.equal(ids, prototok.decode(small_lm, fit.tokens)[row])


def test_vectors_stand_in_front_as_well(small_lm: FrozenLM, tmp_path: Path) -> None:
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    fit = prototok.fast_fit(small_lm, TEXTS, length=2, prefix=vectors, recipe=QUICK, progress=False)
    assert fit.exact.any()
    fit.tokens.save(tmp_path / "tokens.safetensors")
    again = ProtoTokens.load(tmp_path / "tokens.safetensors")
    assert again.prefix is not None and torch.equal(again.prefix.vectors, vectors)
    assert again.prefix.ids is None and "2 vectors (as asked)" in fit.tokens.provenance["prefix"]
    assert torch.equal(prototok.decode(small_lm, again), prototok.decode(small_lm, fit.tokens))


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, pandas.Series])
def test_ids_come_in_any_column(small_lm: FrozenLM, kind: Callable[[list[int]], Any]) -> None:
    found = prefix_of(small_lm, kind(IDS))
    assert found is not None and found.ids == tuple(IDS)
    assert all(type(token) is int for token in found.ids)  # what JSON takes


def test_a_model_without_a_sink_is_fitted_as_without_a_prefix(tiny_lm: FrozenLM) -> None:
    texts = ["The old house stood", "She did not answer him"]
    found, plain = (
        prototok.fast_fit(tiny_lm, texts, length=4, prefix=prefix, progress=False)
        for prefix in ("auto", None)
    )
    assert found.tokens.prefix is None
    assert torch.equal(found.tokens.e, plain.tokens.e) and torch.equal(found.steps, plain.steps)
    said = found.tokens.provenance["prefix"]
    assert said.startswith("none (no attention sink, position 0 gets 0.0")


def test_a_sink_brings_a_token_to_the_fast_recipe_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    monkeypatch.setattr(
        sink, "first_position_share", lambda lm: looked.append(lm.identity.name) or 0.5
    )
    lm = prototok.load("tiny-llama", device="cpu")
    the = tuple(lm.encode(" the")[:1])

    def front(**options: object) -> ProtoTokens:
        return prototok.fast_fit(lm, [[7, 8]], progress=False, **options).tokens

    tokens = front()
    assert tokens.prefix is not None and tokens.prefix.ids == the
    said = tokens.provenance["prefix"]
    assert said == (
        f"' the', token {the[0]} (an attention sink, position 0 gets 0.500 of the attention)"
    )
    assert front(recipe="paper").prefix is None
    assert front(prefix=None).prefix is None
    assert front(prefix=[4]).prefix.ids == (4,)
    assert looked == ["tiny-llama"]  # once a model


def test_capacity_grows_behind_the_prefix(small_lm: FrozenLM) -> None:
    found = prototok.capacity(
        small_lm, TEXTS, lengths=(1, 2), prefix=IDS, recipe=QUICK, progress=False
    )
    assert (found.exact >= 1).all()
    with pytest.raises(ValueError, match="prefix: 40 vectors leave no room"):
        prototok.capacity(small_lm, TEXTS, prefix=[1] * 40, progress=False)


def test_what_is_learned_behind_a_prefix_starts_fits_behind_it(
    small_lm: FrozenLM, tmp_path: Path
) -> None:
    prior = prototok.learn_shared(small_lm, TEXTS, length=2, steps=40, prefix=IDS, progress=False)
    prior.save(tmp_path / "prior.safetensors")
    again = Prior.load(tmp_path / "prior.safetensors")
    assert again.prefix is not None and again.prefix.ids == tuple(IDS)
    fit = prototok.fast_fit(small_lm, [[4]], init=again, progress=False)
    assert fit.tokens.prefix is not None and fit.tokens.prefix.ids == tuple(IDS)
    assert fit.tokens.provenance["prefix"].endswith("(that of init)")
    assert prototok.fast_fit(small_lm, [[4]], init=again, prefix=None).tokens.prefix is None
    bare = prototok.learn_shared(small_lm, TEXTS, length=2, steps=40, progress=False)
    assert bare.prefix is None and not torch.allclose(bare.mean, again.mean)
    assert bare.basis is not None and not torch.allclose(bare.basis.abs(), again.basis.abs())


def test_paths_run_behind_the_prefix_of_their_ends(small_lm: FrozenLM) -> None:
    fit = prototok.fast_fit(small_lm, [[3, 8]], prefix=IDS, seeds=6, recipe=QUICK, progress=False)
    rows = fit.exact[0].nonzero()[:2, 0].tolist()
    for path in (
        interpolate(small_lm, fit, [tuple(rows)], points=5),
        connect(small_lm, fit, [tuple(rows)], points=5, settings=BezierSettings(max_steps=3)),
    ):
        assert path.accuracy[0, 0] == path.accuracy[0, -1] == 1.0


@pytest.mark.parametrize("build", [small_llama, gpt2])
def test_mem_vectors_generate_behind_the_prefix(build, tmp_path: Path) -> None:
    model = build()
    lm = prototok.load(model, device="cpu", dtype="float32")
    recipe = prototok.Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=600)
    fit = autoregressive.fit(lm, TEXTS, 2, length=2, prefix=IDS, recipe=recipe, progress=False)
    assert fit.exact.any()
    fit.save(tmp_path / "mem.safetensors")
    again = MemFit.load(tmp_path / "mem.safetensors")
    assert again.prefix is not None and again.prefix.ids == tuple(IDS)
    front = model.get_input_embeddings()(torch.tensor(IDS)).detach()
    for text, seed in fit.exact.nonzero().tolist():
        row: Tensor = torch.cat([front, again.mem[text, seed]])[None]
        for token in TEXTS[text][:2]:
            with torch.no_grad():
                assert int(model(inputs_embeds=row).logits[0, -1].argmax()) == token
            following = model.get_input_embeddings()(torch.tensor([[token]])).detach()
            row = torch.cat([row, following], dim=1)


def test_a_file_whose_prefix_does_not_fit_is_refused(small_lm: FrozenLM, tmp_path: Path) -> None:
    fit = prototok.fast_fit(small_lm, [[3]], prefix=IDS, recipe=PAPER, progress=False)
    path = tmp_path / "tokens.safetensors"
    fit.tokens.save(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["prototok"])
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for ids, prefix in (([5, 17], None), ([5, 17, 97], None), (IDS, torch.zeros(3, 31))):
        changed = header | {"prefix_ids": ids}
        tensors = stored if prefix is None else stored | {"prefix": prefix}
        save_file(tensors, path, metadata={"prototok": json.dumps(changed)})
        with pytest.raises(ValueError, match=r"path: .*tokens\.safetensors is incons.*prefix"):
            ProtoTokens.load(path)
    bare = prototok.fast_fit(small_lm, [[3]], recipe=PAPER, progress=False).tokens
    bare.save(path)
    with safe_open(path, "pt") as file:
        assert "prefix_ids" not in json.loads(file.metadata()["prototok"])
        assert "prefix" not in set(file.keys())
