"""What is right in its batch and does not hold yet goes on cold, and not into a hot cosine."""

from __future__ import annotations

import torch

from prototok import FrozenLM, Recipe
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.rows import make_groups
from prototok.fitting.engine.setup import Setup
from prototok.fitting.engine.slots import Room, Slots
from prototok.fitting.engine.step import step
from prototok.results.arrangement import Arrangement

RECIPE = Recipe(
    lr=0.05, betas=(0.9, 0.99), schedule="cosine", cycle=60, max_steps=300, margin=1e9, cold=0.1
)  # fmt: skip
COLD = 0.1 * 0.05


def fits(lm: FrozenLM, recipe: Recipe, lengths: list[int]) -> Slots:
    """Return slots with a text of random tokens for each length."""
    generator = torch.manual_seed(1)
    texts = [torch.randint(lm.vocab_size, (n,), generator=generator) for n in lengths]
    setup = Setup(lm, OneForward(Arrangement.parse("e m*")), recipe, "auto", None)
    slots = Slots(setup, Room(len(texts), len(texts), max(lengths)))
    slots.admit(make_groups(texts, [0], None, None))
    return slots


def rates_of(lm: FrozenLM, slots: Slots, steps: int) -> torch.Tensor:
    """Make steps and return the rate of each: (steps, groups)."""
    rates = []
    for _ in range(steps):
        groups = len(slots.groups)
        step(lm, slots, slots.rows)
        slots.step[:groups] -= 1  # the rate of the update that was made
        rates.append(slots.rate_after(slots.step[:groups]))
        slots.step[:groups] += 1
    return torch.stack(rates)


def test_what_is_refused_goes_on_cold_for_as_many_updates_again(small_lm: FrozenLM) -> None:
    slots = fits(small_lm, RECIPE, [2, 3])
    scheduled = RECIPE.lr_at(torch.arange(40))
    assert torch.equal(rates_of(small_lm, slots, 10), scheduled[:10, None].expand(-1, 2))
    slots.reopen(1, 0.5)
    before = slots.banks[0].values[:2].clone()
    rates = rates_of(small_lm, slots, 1)
    moved = (slots.banks[0].values[:2] - before).flatten(1).abs().amax(1)
    assert moved[1] < 2 * COLD < moved[0]
    rates = torch.cat([rates, rates_of(small_lm, slots, 4)])
    slots.reopen(1, 1.0)  # it is cold already, and gets no more of it
    slots.release([0])  # and moves into the first place
    later = rates_of(small_lm, slots, 10)[:, 0]
    assert torch.equal(rates[:, 0], scheduled[10:15])
    assert torch.equal(rates[:, 1], torch.full((5,), COLD))
    assert torch.equal(later[:5], torch.full((5,), COLD))
    assert torch.equal(later[5:], scheduled[20:25])


def test_the_mean_follows_what_is_cold_and_is_the_vectors_of_the_rest(small_lm: FrozenLM) -> None:
    slots = fits(small_lm, RECIPE, [2, 3])
    rates_of(small_lm, slots, 10)
    slots.reopen(1, 0.5)
    expected = [bank.values[1].clone() for bank in slots.banks]
    for _ in range(4):
        rates_of(small_lm, slots, 1)
        for mean, bank in zip(expected, slots.banks, strict=True):
            mean.lerp_(bank.values[1], 0.2)
            assert torch.equal(bank.mean[0], bank.values[0])
    slots.release([0])  # and it moves into the first place
    for mean, found, bank in zip(expected, slots.mean_of(0), slots.banks, strict=True):
        torch.testing.assert_close(found[0], mean)
        assert not torch.equal(found[0], bank.values[0])


def test_the_schedule_may_be_colder(small_lm: FrozenLM) -> None:
    slots = fits(small_lm, RECIPE, [3])
    rates_of(small_lm, slots, 45)
    slots.reopen(0, 0.5)
    rates = rates_of(small_lm, slots, 15)[:, 0]
    assert rates[0] == COLD and rates[-1] < 0.1 * COLD
    assert torch.equal(rates, RECIPE.lr_at(torch.arange(45, 60)).clamp(max=COLD))


def test_no_hot_cosine_for_what_was_right_by_the_end_of_one(small_lm: FrozenLM) -> None:
    slots = fits(small_lm, RECIPE, [1, 30])
    rates_of(small_lm, slots, 60)
    assert slots.row_correct[0] == 1 and slots.row_correct[1] < 30
    after = rates_of(small_lm, slots, 2)
    assert torch.equal(after[:, 0], torch.full((2,), COLD))
    assert torch.equal(after[:, 1], RECIPE.lr_at(torch.tensor([60, 61])))


def test_a_recipe_without_it_follows_its_schedule(small_lm: FrozenLM) -> None:
    recipe = Recipe(**{**vars(RECIPE), "cold": None})
    slots = fits(small_lm, recipe, [2])
    rates_of(small_lm, slots, 60)
    slots.reopen(0, 0.5)
    rates = rates_of(small_lm, slots, 5)[:, 0]
    assert torch.equal(rates, recipe.lr_at(torch.arange(60, 65)))
