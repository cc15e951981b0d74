"""A group that reached its goal in the batch and does not hold alone goes on, and further."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from prototok import FrozenLM, Recipe
from prototok.fitting import driver
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.rows import make_groups
from prototok.fitting.engine.run import Finished, Refused, run
from prototok.fitting.engine.setup import Setup
from prototok.fitting.recipe import FAST, PAPER
from prototok.fitting.verify import Verified, verify
from prototok.results.arrangement import Arrangement


@pytest.mark.parametrize("accuracy", [0.4, 1.0])
def test_what_is_asked_for_rises_with_each_refusal(small_lm: FrozenLM, accuracy: float) -> None:
    recipe = Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=400, accuracy=accuracy)
    length = 2 if accuracy == 1.0 else 8
    targets = torch.randint(small_lm.vocab_size, (length,), generator=torch.manual_seed(1))
    shown: list[Finished] = []

    def confirm(finished: list[Finished]) -> list[Refused | None]:
        shown.extend(finished)
        return [None if len(shown) == 3 else Refused(0.0, exact=False)]

    (ended,) = run(
        Setup(small_lm, OneForward(Arrangement.parse("e m*")), recipe, "auto", None),
        make_groups([targets], [0], None, None),
        confirm,
        lambda event: None,
    )
    assert len(shown) == 3 and ended is shown[-1]
    steps = [finished.steps for finished in shown]
    assert steps[0] < steps[1] < steps[2] < 400
    right = [finished.correct[0] for finished in shown]
    if accuracy == 1.0:
        assert right == [length] * 3
    else:  # no margin counts there: it is more right tokens that are asked for
        assert right[0] >= accuracy * length
        assert right[0] < right[1] < right[2]
    assert not torch.equal(shown[0].vectors[0], shown[2].vectors[0])


def test_the_margin_asked_for_is_the_one_to_clear(small_lm: FrozenLM) -> None:
    recipe = Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=400)
    setup = Setup(small_lm, OneForward(Arrangement.parse("e m*")), recipe, "auto", None)
    targets = torch.randint(small_lm.vocab_size, (2,), generator=torch.manual_seed(1))
    asked = iter([Refused(0.5, exact=False), None])
    margins: list[float] = []

    def confirm(finished: list[Finished]) -> list[Refused | None]:
        (one,) = finished
        (check,) = verify(setup, [(targets, torch.cat([v[0] for v in one.vectors]))])
        margins.append(check.margin)
        return [next(asked)]

    list(run(setup, make_groups([targets], [0], None, None), confirm, lambda event: None))
    assert margins[0] < 0.25 and 0.49 < margins[1] < 1.0


def test_what_has_the_margin_already_is_shown_again_at_half_as_much_again(
    small_lm: FrozenLM,
) -> None:
    recipe = Recipe(lr=0.002, betas=(0.9, 0.99), max_steps=2000, margin=0.2)
    setup = Setup(small_lm, OneForward(Arrangement.parse("e m*")), recipe, "auto", None)
    targets = torch.randint(small_lm.vocab_size, (2,), generator=torch.manual_seed(1))
    margins: list[float] = []

    def confirm(finished: list[Finished]) -> list[Refused | None]:
        (one,) = finished
        (check,) = verify(setup, [(targets, torch.cat([v[0] for v in one.vectors]))])
        margins.append(check.margin)
        return [None if len(margins) == 3 else Refused(0.0, exact=False)]

    list(run(setup, make_groups([targets], [0], None, None), confirm, lambda event: None))
    assert 0.199 < margins[0] < 0.3
    for before, after in itertools.pairwise(margins):
        assert 1.49 * before < after < 1.9 * before


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("cycle", [66, 200])
def test_an_exact_unit_goes_on_for_a_quarter_and_to_the_end_of_its_cycle_at_most(
    small_lm: FrozenLM, exact: bool, cycle: int
) -> None:
    recipe = Recipe(lr=0.05, betas=(0.9, 0.99), schedule="cosine", cycle=cycle, max_steps=250)
    targets = torch.randint(small_lm.vocab_size, (2,), generator=torch.manual_seed(1))
    shown: list[int] = []

    def confirm(finished: list[Finished]) -> list[Refused | None]:
        shown.extend(one.steps for one in finished)
        return [Refused(1e6, exact)]

    (ended,) = run(
        Setup(small_lm, OneForward(Arrangement.parse("e m*")), recipe, "auto", None),
        make_groups([targets], [0], None, None), confirm, lambda event: None,
    )  # fmt: skip
    first = shown[0]
    assert first < 66
    quarter = min(first + first // 4, cycle)
    assert shown[1:] == [quarter if exact else 250] and ended.steps == shown[-1]


def test_the_quarter_counts_from_the_first_time_that_a_unit_is_exact(small_lm: FrozenLM) -> None:
    recipe = Recipe(lr=0.01, betas=(0.9, 0.99), max_steps=400)
    targets = torch.randint(small_lm.vocab_size, (2,), generator=torch.manual_seed(1))
    shown: list[int] = []

    def confirm(finished: list[Finished]) -> list[Refused | None]:
        shown.extend(one.steps for one in finished)
        return [Refused(0.0, exact=True)]  # a little more is asked for each time

    (ended,) = run(
        Setup(small_lm, OneForward(Arrangement.parse("e m*")), recipe, "auto", None),
        make_groups([targets], [0], None, None), confirm, lambda event: None,
    )  # fmt: skip
    assert len(shown) > 3
    assert ended.steps == shown[-1] == shown[0] + shown[0] // 4


@pytest.mark.parametrize("holds", [True, False])
def test_the_mean_of_what_goes_on_cold_is_looked_at_every_five_updates(
    small_lm: FrozenLM, holds: bool
) -> None:
    recipe = Recipe(lr=0.01, betas=(0.9, 0.99), max_steps=400, cold=0.1)
    targets = torch.randint(small_lm.vocab_size, (2,), generator=torch.manual_seed(1))
    shown: list[Finished] = []

    def confirm(finished: list[Finished]) -> list[Refused | None]:
        shown.extend(finished)
        return [None if holds and len(shown) == 3 else Refused(1e6, exact=True)]

    (ended,) = run(
        Setup(small_lm, OneForward(Arrangement.parse("e m*")), recipe, "auto", None),
        make_groups([targets], [0], None, None), confirm, lambda event: None,
    )  # fmt: skip
    first = shown[0].steps
    end = first + first // 4
    looks = [*range(first + 5, first + 11 if holds else end, 5)]
    assert [one.steps for one in shown] == [first, *looks, *([] if holds else [end])]
    assert ended is shown[-1] and len(looks) >= 2
    best, *means = [torch.cat([v[0] for v in one.vectors]) for one in shown]
    # The last that is shown of what never holds is its best again, here the one of the first look.
    for mean in means[: len(looks)]:
        moved = (mean - best).norm()
        assert 0 < moved < 30 * 0.1 * 0.01 * best.numel() ** 0.5


def test_what_is_wrong_alone_has_no_rounding_to_clear_yet() -> None:
    ids = torch.zeros(4, dtype=torch.int64)
    exact = Verified(1.0, 4, margin=0.3, spread=0.4, loss=0.1, ids=ids, margins=torch.ones(4))
    wrong = replace(exact, accuracy=0.75, correct=3, margin=-0.1)
    assert driver._refused([exact], FAST) == Refused(2 * 0.4, exact=True)
    assert driver._refused([wrong], FAST) == driver._refused([exact, wrong], FAST)
    assert driver._refused([wrong], FAST) == Refused(0.0, exact=False)  # twice its own is asked
    assert driver._refused([replace(exact, margin=0.9)], FAST) is None
    assert driver._refused([exact], PAPER) is None
