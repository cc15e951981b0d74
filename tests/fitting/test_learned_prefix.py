"""A prefix of vectors that all texts share: its gradients, what it is worth, where it is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import prototok
from prototok import FrozenLM, Prior, Recipe
from prototok.fitting import learned_prefix
from prototok.fitting.learn_shared import own_texts
from prototok.fitting.learned_prefix import learn_prefix
from support import small_llama

TEXTS = [torch.tensor(ids) for ids in ([5, 9, 2, 7], [11, 3, 8], [4, 4, 6, 1])]


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)).eval()


@pytest.mark.parametrize("build", [small_llama, gpt2])
def test_gradients_are_those_of_transformers(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    lm = prototok.load(model, device="cpu", dtype="float32")
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 2), (3, 1), (1, 1)
    vectors = [torch.randn(*s, lm.hidden_size, generator=generator) for s in shapes]
    leaves = [v.clone().requires_grad_() for v in vectors]
    total, right = torch.zeros(()), 0
    for i, ids in enumerate(TEXTS):
        p, e, m = leaves[0], leaves[1][i : i + 1], leaves[2]
        x = torch.cat([p, e, m.expand(-1, len(ids) - 1, -1)], dim=1)
        logits = model(inputs_embeds=x).logits[0, 2:]
        total = total + F.cross_entropy(logits / 0.5, ids, reduction="sum")
        right += int((logits.argmax(-1) == ids).sum())
    expected = torch.autograd.grad(total, leaves)
    ids, scored = learned_prefix._padded(TEXTS)
    for rows in (2, 8):  # in turns, and all at once
        found, share = learned_prefix._gradients(lm, vectors, ids, scored, 0.5, "auto", rows)
        assert share == pytest.approx(right / 11)
        for grad, plain in zip(found, expected, strict=True):
            assert torch.allclose(grad, plain, atol=2e-5 * float(plain.abs().max()))


def joint_accuracy(prior: Prior) -> float:
    return float(prior.provenance["accuracy"])


def test_one_learned_for_the_texts_carries_more_of_them_than_a_token(tiny_lm: FrozenLM) -> None:
    options: dict = {"texts": own_texts(tiny_lm, 12, 8), "length": 8, "steps": 60}
    token = prototok.learn_shared(tiny_lm, prefix=" the", progress=False, **options)
    learned = prototok.learn_shared(tiny_lm, prefix=8, progress=False, **options)
    assert joint_accuracy(learned) > joint_accuracy(token) + 0.05


def test_it_stands_in_front_of_fits_that_start_from_its_prior(
    small_lm: FrozenLM, tmp_path: Path
) -> None:
    def learned() -> Prior:
        return prototok.learn_shared(
            small_lm, [t.tolist() for t in TEXTS], length=3, steps=20, prefix=3, progress=False
        )

    prior = learned()
    assert prior.prefix is not None and prior.prefix.ids is None
    assert prior.prefix.vectors.shape == (3, small_lm.hidden_size)
    assert prior.provenance["prefix"] == (
        "3 vectors (learned from 3 texts of 3 tokens in 20 steps)"
    )
    again = learned()
    assert again.prefix is not None and torch.equal(again.prefix.vectors, prior.prefix.vectors)
    prior.save(tmp_path / "prior.safetensors")
    back = Prior.load(tmp_path / "prior.safetensors")
    tokens = prototok.fast_fit(small_lm, [[4, 5]], init=back, progress=False).tokens
    assert tokens.prefix is not None
    assert torch.equal(tokens.prefix.vectors, prior.prefix.vectors)


def test_it_starts_as_tokens_of_the_texts(small_lm: FrozenLM) -> None:
    recipe = Recipe(lr=1e-12, weight_decay=0.0, max_steps=1)
    found = learn_prefix(small_lm, TEXTS, 5, recipe, "auto").prefix
    expected = small_lm.embed(torch.tensor([5, 9, 2, 7, 11]))
    assert found is not None and torch.allclose(found.vectors, expected, atol=1e-9)


def test_what_it_says_came_back_does_so_behind_it(small_lm: FrozenLM) -> None:
    recipe = Recipe(lr=0.05, betas=(0.9, 0.99), max_steps=150)
    joint = learn_prefix(small_lm, TEXTS, 3, recipe, "auto")
    assert joint.prefix is not None
    behind, right = small_lm.behind(joint.prefix), 0
    for e, ids in zip(joint.e, TEXTS, strict=True):
        x = torch.stack([e] + [joint.m] * (len(ids) - 1))[None]
        right += int((behind.logits(x)[0].argmax(-1) == ids).sum())
    assert joint.accuracy == pytest.approx(right / 11) and right > 6


def test_what_cannot_be_is_named(small_lm: FrozenLM) -> None:
    for wrong in (0, -1, True):
        with pytest.raises(ValueError, match=f"^prefix: {wrong} is not a positive number"):
            prototok.learn_shared(small_lm, [[1, 2]] * 2, length=2, prefix=wrong)
    with pytest.raises(ValueError, match="^prefix: 40 vectors and 2 tokens need 42 positions"):
        prototok.learn_shared(small_lm, [[1, 2]] * 2, length=2, prefix=40)
    with pytest.raises(ValueError, match="did not stay finite"):
        learn_prefix(small_lm, TEXTS, 2, Recipe(lr=1e38, max_steps=3), "auto")
