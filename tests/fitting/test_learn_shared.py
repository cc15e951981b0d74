"""`learn_shared`: a prior of e and m, its file, and fits that start from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import prototok
from prototok import FrozenLM, Prior, Recipe
from prototok.fitting.engine.basis import eigenbasis
from prototok.fitting.fast_fit import FitEvent
from prototok.fitting.learn_shared import own_texts
from prototok.fitting.recipe import FAST
from prototok.fitting.shipped import shipped
from prototok.model.load import BUILT_IN, load
from tests.support import small_llama

ONE_STEP = Recipe(max_steps=1)


@pytest.fixture(scope="module")
def prior(small_lm: FrozenLM) -> Prior:
    return prototok.learn_shared(small_lm, length=3, steps=60, progress=False)


def first_losses(lm: FrozenLM, texts: list, **options: object) -> list[float]:
    """Of the vectors that the fits start from."""
    seen: list[FitEvent] = []
    prototok.fast_fit(lm, texts, recipe=ONE_STEP, callback=seen.append, progress=False, **options)
    return [loss for event in seen if int(event.steps[0]) == 0 for loss in event.loss.tolist()]


def test_learned_from_the_models_own_samples_and_better_than_noise(
    small_lm: FrozenLM, prior: Prior
) -> None:
    assert prior.mean.shape == prior.std.shape == (2, small_lm.hidden_size)
    assert float(prior.std[0].min()) > 0 and not prior.std[1].any()
    assert torch.equal(prior.basis, eigenbasis(small_lm, "auto").cpu())
    unseen = list(own_texts(small_lm, 8, 3, seed=9))
    informed, blind = (sum(first_losses(small_lm, unseen, init=p)) for p in (prior, None))
    assert informed < 0.95 * blind


def test_same_model_same_prior(prior: Prior) -> None:
    again = prototok.learn_shared(
        load(small_llama(), dtype="float32"), length=3, steps=60, progress=False
    )
    assert torch.equal(again.mean, prior.mean) and torch.equal(again.std, prior.std)


def test_a_fit_starts_where_the_prior_says(small_lm: FrozenLM, prior: Prior) -> None:
    exactly = dataclasses.replace(prior, std=torch.zeros_like(prior.std))
    fit = prototok.fast_fit(small_lm, [[1, 2, 3]], recipe=ONE_STEP, init=exactly, seeds=2)
    # One update of AdamW moves no coordinate of its basis by more than the learning rate.
    for found, mean in ((fit.tokens.e, prior.mean[0]), (fit.tokens.m, prior.mean[1])):
        assert torch.allclose(found, mean.expand_as(found), atol=0.01 * small_lm.hidden_size**0.5)
    seeds = prototok.fast_fit(small_lm, [[1, 2, 3]], recipe=ONE_STEP, init=prior, seeds=2).tokens
    assert not torch.equal(seeds.e[0, 0], seeds.e[0, 1])


def test_a_fit_from_a_prior_goes_at_its_rate(small_lm: FrozenLM, prior: Prior) -> None:
    def spread(rate: float | None) -> float:
        losses: list[float] = []
        recipe = Recipe(lr=1.0, weight_decay=0.0, prior_rate=rate, max_steps=3, margin=1e9)
        prototok.fast_fit(
            small_lm, [[1, 2, 3]], recipe=recipe, init=prior, progress=False,
            callback=lambda event: losses.append(float(event.loss)),
        )  # fmt: skip
        return max(losses) - min(losses)

    assert spread(1e-9) < 1e-4 < spread(None)


@pytest.mark.parametrize("share", [None, "m"])
def test_m_moves_at_its_own_rate(small_lm: FrozenLM, prior: Prior, share: str | None) -> None:
    def moved(rate: float) -> tuple[float, float]:
        tokens = prototok.fast_fit(
            small_lm, [[1, 2, 3], [4, 5, 6]], share=share, init=prior,
            recipe=Recipe(m_rate=rate, max_steps=2, margin=1e9), progress=False,
        ).tokens  # fmt: skip
        assert tokens.m is not None
        return (
            float((tokens.e - prior.mean[0]).abs().max()),
            float((tokens.m - prior.mean[1]).abs().max()),
        )

    assert moved(0.0)[1] == 0.0 < moved(0.0)[0]
    assert 0 < moved(0.1)[1] < 0.5 * moved(1.0)[1]


def test_shorter_texts_where_one_m_cannot_carry_them(small_lm: FrozenLM) -> None:
    def length_of(**options: object) -> str:
        return prototok.learn_shared(small_lm, progress=False, **options).provenance["length"]

    repeated = [[1] * 16, [2] * 16, [3] * 16]
    assert length_of(texts=repeated, steps=200) == "16"
    assert length_of(steps=1) == "4"
    assert length_of(steps=1, length=5) == "5"


def test_kept_is_the_seed_that_texts_are_fitted_soonest_from(small_lm: FrozenLM) -> None:
    texts = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 3, 1, 2]]

    def learned(seeds: int | list[int]) -> Prior:
        return prototok.learn_shared(
            small_lm, texts, length=4, steps=30, seeds=seeds, progress=False
        )

    best = learned([2, 0, 1])
    updates = [float(u) for u in best.provenance["updates from each"].split(", ")]
    assert len(set(updates)) == 3
    for seed, of in zip((2, 0, 1), updates, strict=True):
        alone = learned([seed])
        assert "seed" not in alone.provenance
        fit = prototok.fast_fit(small_lm, texts, init=alone, max_steps=300, prefix=alone.prefix)
        taken = torch.where(fit.exact, fit.steps, 300).double().clamp_min(1)
        assert float(taken.log().mean().exp()) == pytest.approx(of, abs=0.1)
        kept = best.provenance["seed"] == str(seed)
        assert kept == (of == min(updates)) == torch.equal(best.mean, alone.mean)


def test_file_round_trip(prior: Prior, tmp_path: Path) -> None:
    path = tmp_path / "prior.safetensors"
    prior.save(path)
    back = Prior.load(path)
    for name in ("mean", "std", "basis"):
        assert torch.equal(getattr(back, name), getattr(prior, name))
    assert (back.model, back.provenance) == (prior.model, prior.provenance)
    dataclasses.replace(prior, basis=None).save(path)
    assert Prior.load(path).basis is None


def test_other_files_are_refused(prior: Prior, tmp_path: Path) -> None:
    path = tmp_path / "prior.safetensors"
    with pytest.raises(ValueError, match="^path: there is no file"):
        Prior.load(path)
    save_file({"mean": torch.zeros(2, 3)}, path)
    with pytest.raises(ValueError, match="but not a prior"):
        Prior.load(path)
    path.unlink()
    dataclasses.replace(prior, std=prior.std[:, :-1]).save(path)
    with pytest.raises(ValueError, match="std is F32"):
        Prior.load(path)
    with pytest.raises(ValueError, match="^mean: it has values that are not finite"):
        dataclasses.replace(prior, mean=prior.mean / 0).save(path)
    prior.save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors | {"mean": tensors["mean"] / 0}, path, metadata=metadata)
    with pytest.raises(ValueError, match="holds values in mean that are not finite"):
        Prior.load(path)


def test_bad_arguments_are_named(small_lm: FrozenLM, prior: Prior) -> None:
    with pytest.raises(ValueError, match="^texts: one text has nothing in common"):
        prototok.learn_shared(small_lm, [[1, 2, 3]], length=3)
    with pytest.raises(ValueError, match="^length: 0 is not"):
        prototok.learn_shared(small_lm, length=0)
    with pytest.raises(
        ValueError, match="^init: str is not a Prior, a LearnedOptimizer, an Encoder"
    ):
        prototok.fast_fit(small_lm, [[1, 2]], init="m")
    other = load(small_llama(num_hidden_layers=3), dtype="float32")
    with pytest.raises(ValueError, match="^init: fitted on"):
        prototok.fast_fit(other, [[1, 2]], init=prior)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_models_bring_theirs(name: str) -> None:
    lm = load(name)
    prior = shipped(Prior, lm)
    assert prior is not None
    prior.require_model(lm)


def test_the_fast_recipe_uses_it_and_needs_fewer_steps() -> None:
    lm = load("tiny-neox")
    texts = list(own_texts(lm, 8, 6, seed=9))
    plain = dataclasses.replace(FAST, shipped_prior=False)
    informed, blind = (prototok.fast_fit(lm, texts, recipe=r) for r in (FAST, plain))
    assert informed.exact.all() and blind.exact.all()
    assert int(informed.steps.sum()) < 0.9 * int(blind.steps.sum())


def test_other_models_bring_none(small_lm: FrozenLM) -> None:
    assert shipped(Prior, small_lm) is None
