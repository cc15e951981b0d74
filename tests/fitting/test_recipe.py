"""Recipes: the paper's settings, the schedules, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from prototok import Recipe
from prototok.fitting.recipe import PAPER, recipe_of


def test_paper_recipe_is_the_papers() -> None:
    assert recipe_of("paper") is PAPER
    assert (PAPER.lr, PAPER.betas, PAPER.weight_decay) == (0.01, (0.9, 0.9), 0.01)
    assert (PAPER.max_steps, PAPER.accuracy, PAPER.margin, PAPER.init_std) == (5000, 1.0, 0.0, 1.0)
    assert (PAPER.schedule, PAPER.warmup, PAPER.temperature) == ("constant", 0, 1.0)
    steps = torch.tensor([0, 1, 4999])
    assert torch.equal(PAPER.lr_at(steps), torch.full((3,), 0.01))


def test_cosine_with_warm_up() -> None:
    recipe = Recipe(lr=0.2, schedule="cosine", warmup=10, max_steps=100)
    rates = recipe.lr_at(torch.arange(101)).tolist()
    assert rates[0] == pytest.approx(0.02)
    assert rates[9] == pytest.approx(0.1 * (1 + math.cos(math.pi * 0.09)))
    assert rates[50] == pytest.approx(0.1)
    assert rates[100] == pytest.approx(0.0, abs=1e-7)


def test_the_cosine_is_raised_to_the_power_of_the_cooling() -> None:
    plain = Recipe(lr=0.5, schedule="cosine", cycle=10, warmup=3, max_steps=30)
    cooled = replace(plain, cooling=2.0)
    steps = torch.arange(3, 30)
    assert torch.allclose(cooled.lr_at(steps) / 0.5, (plain.lr_at(steps) / 0.5) ** 2)
    assert torch.equal(cooled.lr_at(torch.tensor([10])), plain.lr_at(torch.tensor([10])))


def test_cycles_double_and_start_anew() -> None:
    recipe = Recipe(lr=0.2, schedule="cosine", cycle=10, max_steps=70)
    rates = recipe.lr_at(torch.arange(71)).tolist()
    for start, length in ((0, 10), (10, 20), (30, 40)):
        cosine = [0.1 * (1 + math.cos(math.pi * i / length)) for i in range(length)]
        assert rates[start : start + length] == pytest.approx(cosine, abs=1e-6)
    assert rates[70] == pytest.approx(0.2)
    ends = [recipe.end_of_cycle(step) for step in (0, 9, 10, 29, 30, 69, 70)]
    assert ends == [10, 10, 30, 30, 70, 70, 70]
    assert Recipe(max_steps=5).end_of_cycle(3) == 5


def test_a_long_text_has_no_cosine_shorter_than_in_proportion() -> None:
    plain = Recipe(lr=0.2, schedule="cosine", cycle=10, max_steps=86)
    recipe = replace(plain, cycle_tokens=4)
    steps = torch.arange(86)
    assert torch.equal(recipe.lr_at(steps, 4), plain.lr_at(steps))
    nine = recipe.lr_at(steps, torch.full_like(steps, 9)).tolist()
    for start, length in ((0, 23), (23, 23), (46, 40)):  # 10 · 9 / 4 = 22.5, and 4 · 10
        cosine = [0.1 * (1 + math.cos(math.pi * i / length)) for i in range(length)]
        assert nine[start : start + length] == pytest.approx(cosine, abs=1e-6)
        ends = {recipe.end_of_cycle(step, 9) for step in range(start, start + length)}
        assert ends == {start + length}
    assert recipe.end_of_cycle(0, 1000) == 86  # the last update is a cold one
    row_by_row = recipe.lr_at(torch.tensor([12, 12]), torch.tensor([4, 9]))
    assert row_by_row.tolist() == [plain.lr_at(steps)[12].item(), nine[12]]


def test_a_further_cosine_starts_where_the_one_before_has_ended() -> None:
    recipe = Recipe(schedule="cosine", cycle=10, cycle_tokens=4, max_steps=86)
    steps = torch.arange(87)
    for tokens, starts in ((4, [10, 30, 70]), (9, [23, 46, 86])):
        flags = recipe.restarts(steps, torch.full_like(steps, tokens))
        assert flags.nonzero()[:, 0].tolist() == starts
    assert not Recipe(schedule="cosine").restarts(steps, steps).any()


def test_behind_a_network_a_long_text_gets_no_longer_cosine() -> None:
    assert recipe_of("fast").end_of_cycle(0, 32) == 2 * recipe_of("fast").end_of_cycle(0, 16) == 600
    assert {recipe_of("learned").end_of_cycle(0, tokens) for tokens in (8, 16, 32)} == {300}


def test_a_prior_lowers_the_rate_with_the_width_and_keeps_the_decay() -> None:
    recipe = Recipe(lr=0.1, weight_decay=0.2, prior_rate=0.3)
    near = recipe.at_width(256, prior=True)
    assert near.lr == pytest.approx(0.3 / 16)
    assert near.lr * near.weight_decay == pytest.approx(recipe.lr * recipe.weight_decay)
    assert recipe.at_width(256, prior=False) is recipe
    assert PAPER.at_width(256, prior=True) is PAPER and near.at_width(64, prior=True) is near


def test_an_update_is_as_long_at_any_width() -> None:
    recipe = Recipe(lr=0.1, lr_width=64)
    assert [recipe.at_width(d, prior=False).lr for d in (64, 256, 1024)] == [0.1, 0.05, 0.025]
    narrow = replace(recipe, prior_rate=0.3).at_width(900, prior=True)
    assert narrow.lr == pytest.approx(0.01) and narrow.at_width(64, prior=True) is narrow


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"schedule": "linear"}, "schedule"),
        ({"betas": (0.9,)}, "betas"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"accuracy": 0.0}, "accuracy"),
        ({"accuracy": 1.1}, "accuracy"),
        ({"margin": -1.0}, "margin"),
        ({"cooling": 0.0}, "cooling"),
        ({"spreads": -1.0}, "spreads"),
        ({"lr_width": 0}, "lr_width"),
        ({"temperature": 0.0}, "temperature"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_steps": 10.5}, "max_steps"),
        ({"warmup": -1}, "warmup"),
        ({"schedule": "cosine", "cycle": 0}, "cycle"),
        ({"cycle": 10}, "cycle"),
        ({"schedule": "cosine", "cycle": 10, "cycle_tokens": 0}, "cycle_tokens"),
        ({"prior_rate": 0.0}, "prior_rate"),
        ({"cold": 0.0}, "cold"),
        ({"m_rate": -0.1}, "m_rate"),
    ],
)
def test_bad_settings_are_named(changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: "):
        Recipe(**changes)


def test_unknown_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^recipe: 'quick' is not"):
        recipe_of("quick")
