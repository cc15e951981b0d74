"""Noise, rounding and other decodings of a fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import prototok
from prototok import FitResult, FrozenLM, Recipe, fast_fit
from prototok.geometry import FORMATS, decodings, noisy, perturbations, rounded, score
from support import small_llama


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return prototok.load(small_llama(), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def fit(lm: FrozenLM) -> FitResult:
    recipe = Recipe(lr=0.1, max_steps=300)
    return fast_fit(lm, [[5, 9, 11], [40, 41, 7, 8]], seeds=2, recipe=recipe, progress=False)


def test_formats_round_as_far_as_they_must(fit: FitResult) -> None:
    e = fit.tokens.e
    top = e.abs().amax(-1, keepdim=True)
    # Half a unit in the last place, relative for floating formats and to the maximum for integers.
    bound = {
        "bfloat16": e.abs() * 2**-8, "float16": e.abs() * 2**-11 + 2**-24,
        "float8_e4m3fn": e.abs() * 2**-4 + top * 2**-10 / 448,
        "float8_e5m2": e.abs() * 2**-3 + top * 2**-17 / 57344,
        "int8": top / 127 / 2, "int4": top / 7 / 2,
    }  # fmt: skip
    assert set(bound) == set(FORMATS)
    for name, most in bound.items():
        changed = rounded(fit.tokens, name)
        off = (changed.e - e).abs()
        assert bool((off <= most * 1.001).all()), name
        assert off.max() > 0, name
        assert changed.m is fit.tokens.m
        assert not torch.equal(rounded(fit.tokens, name, "both").m, fit.tokens.m)


def test_noise_has_the_size_asked_for(fit: FitResult) -> None:
    wide = dataclasses.replace(fit.tokens, e=torch.randn(2, 2, 4096) * 3)
    off = noisy(wide, 0.1, seed=4).e - wide.e
    ratio = off.square().mean(-1).sqrt() / wide.e.square().mean(-1).sqrt()
    torch.testing.assert_close(ratio, torch.full((2, 2), 0.1), rtol=0.05, atol=0)
    assert torch.equal(noisy(wide, 0.1, seed=4).e, noisy(wide, 0.1, seed=4).e)
    with pytest.raises(ValueError, match="level"):
        noisy(wide, -1.0)
    with pytest.raises(ValueError, match="format: 'int3'"):
        rounded(wide, "int3")
    with pytest.raises(ValueError, match="vectors: 'x'"):
        rounded(wide, "int8", "x")


def test_what_is_unchanged_scores_as_the_fit_says(lm: FrozenLM, fit: FitResult) -> None:
    assert torch.equal(score(lm, fit), fit.accuracy)
    table = perturbations(lm, fit, noise=(0.0, 30.0), formats=("bfloat16",))
    assert [(w.what, w.setting) for w in table] == [
        ("unchanged", "fp32"), ("noise", "0"), ("noise", "30"), ("rounding", "bfloat16"),
    ]  # fmt: skip
    assert torch.equal(table[0].accuracy, fit.accuracy)
    assert torch.equal(table[1].exact, fit.exact)
    assert table[2].accuracy.mean() < table[0].accuracy.mean()  # e is drowned


def test_other_decodings_are_the_same_arithmetic(lm: FrozenLM, fit: FitResult) -> None:
    table = {w.setting: w for w in decodings(lm, fit, batch_sizes=(1, 4))}
    assert list(table) == [
        "float32, batch 1", "float32, batch 4", "bfloat16, batch 1", "float16, batch 1",
        "1 position more", "transformers' forward",
    ]  # fmt: skip
    for setting in ("float32, batch 4", "1 position more", "transformers' forward"):
        # Where the margin is far from zero, another order of summation changes nothing.
        safe = fit.margin > 1e-3
        assert bool(safe.any())
        assert torch.equal(table[setting].accuracy[safe], fit.accuracy[safe]), setting
