"""A row whose loss or gradient is not finite ends at once as failed; its neighbours go on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import prototok
from prototok import FrozenLM, Recipe
from prototok.fitting.driver import fit_groups
from prototok.fitting.engine import step as step_module
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.rows import make_groups
from prototok.fitting.engine.setup import Setup
from prototok.fitting.verify import verify
from prototok.results.arrangement import Arrangement

RECIPE = Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=60, margin=0.1)
TARGETS = [torch.tensor(ids) for ids in ([5, 9], [3, 1], [7, 7])]


def fitted(lm: FrozenLM, bad: Tensor | None, share: str | None = None) -> dict[int, object]:
    """Row → how it ended; row 1 starts at the vectors `bad` (slots, d)."""
    groups = make_groups(TARGETS, [0], share, 1 if share else None)
    if bad is not None:
        (row,) = groups[1].rows
        groups[1] = replace(groups[1], rows=(replace(row, start=bad),))
    setup = Setup(lm, OneForward(Arrangement.parse("e m*")), RECIPE, "auto", None)
    return {
        one.row.index: one
        for _, rows in fit_groups(setup, groups, verify, lambda event: None)
        for one in rows
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("share", [None, "m"])
def test_a_row_that_is_not_finite_fails_alone(
    small_lm: FrozenLM, value: float, share: str | None
) -> None:
    bad = torch.zeros(2, small_lm.hidden_size)
    bad[0, 3] = value
    found, alone = fitted(small_lm, bad, share), fitted(small_lm, None, share)
    failed = found[1]
    assert failed.failed and failed.steps <= 1
    check = failed.check
    assert not check.exact and check.accuracy == 0.0 and check.correct == 0
    assert check.margin == float("-inf") and check.loss == float("inf")
    for row in (0, 2):
        assert not found[row].failed and found[row].check.exact
        assert found[row].steps == alone[row].steps
        torch.testing.assert_close(found[row].vectors, alone[row].vectors)


def test_a_gradient_that_is_not_finite_fails_where_the_loss_is(
    small_lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = step_module.forward_backward

    def poisoned(*args: object) -> tuple[Tensor, ...]:
        grads = real(*args)
        slots = args[1]
        for r, row in enumerate(row for group in slots.groups for row in group.rows):
            if row.index == 1 and int(slots.step[r]) == 3:
                grads[0][r, 0, 0] = float("nan")
        return grads

    monkeypatch.setattr(step_module, "forward_backward", poisoned)
    found = fitted(small_lm, None)
    assert [one.failed for _, one in sorted(found.items())] == [False, True, False]
    assert found[1].steps == 3
    assert torch.isfinite(found[1].vectors).all()


def test_a_rate_that_blows_up_is_reported_and_never_exact(small_lm: FrozenLM) -> None:
    recipe = Recipe(lr=1e38, max_steps=50, margin=0.1)
    fit = prototok.fast_fit(small_lm, TARGETS, recipe=recipe)
    assert fit.failed.all() and not fit.exact.any()
    assert bool((fit.accuracy == 0).all()) and bool((fit.steps < 50).all())
    assert torch.isfinite(fit.tokens.e).all()
