"""Fits that will hardly come back whole are named early, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

import prototok
from prototok import FrozenLM, Recipe
from prototok.fitting import driver
from prototok.fitting.engine.run import FitEvent
from prototok.fitting.outlook import Outlook


def event(step: int, **correct: int) -> FitEvent:
    rows = torch.tensor([int(name[1:]) for name in correct])
    zeros = torch.zeros(len(rows))
    right = torch.tensor(list(correct.values()))
    return FitEvent(rows, torch.full_like(rows, step), zeros, right, zeros)


@pytest.mark.parametrize("stride", [1, 7])  # a look at every step, and every few as on CUDA
def test_rows_with_few_right_at_the_end_of_the_first_cycle_are_behind(stride: int) -> None:
    outlook = Outlook({0: 10, 1: 10, 2: 5}, {0: 20, 1: 20, 2: 20})
    for step in range(0, 60, stride):
        # Row 0 gets 3 of 10; row 1 has 4 in the middle and loses them; row 2 gets 2 of 5.
        outlook.see(event(step, r0=3, r1=4 if step == 14 else 1, r2=2))
        assert outlook.behind == ({0} if step > 20 else set())
        assert ("1 will hardly end" in outlook.note()) == (step > 20)


def test_each_row_has_its_own_first_cycle() -> None:
    outlook = Outlook({0: 10, 1: 20}, {0: 20, 1: 40})
    for step in range(60):
        outlook.see(event(step, r0=1, r1=1))
        assert outlook.behind == {row for row, end in ((0, 20), (1, 40)) if step > end}
    assert "2 will hardly end, few tokens right after 40 steps" in outlook.note()


def test_nothing_is_said_without_cycles() -> None:
    outlook = Outlook({0: 10}, {})
    for step in range(50):
        outlook.see(event(step, r0=0))
    assert not outlook.behind and outlook.note() == ""


def test_a_fit_says_so_and_is_what_it_was(
    small_lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(driver.Progress, "update", lambda self, done, note: notes.append(note()))
    texts = torch.randint(small_lm.vocab_size, (2, 30), generator=torch.manual_seed(0))
    recipe = Recipe(lr=0.05, schedule="cosine", cycle=10, max_steps=25)
    found = prototok.fast_fit(small_lm, texts, recipe=recipe)
    said = ["2 will hardly end" in note for note in notes]
    # A note a step; those behind the last are of rows that ended.
    assert said[:25] == [False] * 11 + [True] * 14 and not any(said[25:])
    monkeypatch.setattr(Outlook, "see", lambda self, event: None)
    assert torch.equal(prototok.fast_fit(small_lm, texts, recipe=recipe).tokens.e, found.tokens.e)
