"""Flags read one burst late, as on CUDA, lead to the fits that flags read at once lead to."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import prototok
from fake_cuda import windows_of_cuda
from prototok import FitResult, FrozenLM, Recipe
from prototok.fitting import fast_fit as fit_module
from prototok.fitting.engine import run as run_module
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.rows import make_groups
from prototok.fitting.engine.runner import StepRunner
from prototok.fitting.engine.setup import Setup
from prototok.results.arrangement import Arrangement

RECIPE = Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=400)


class Lagging(StepRunner):
    """The CPU with the bursts and the polls of CUDA."""

    burst = 10
    lags = True


def as_on_cuda(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run_module, "step_runner", Lagging)
    windows_of_cuda(patch)


def fit(lm: FrozenLM, share: str | None, **changes: object) -> FitResult:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.vocab_size, (11, 3), generator=generator)
    texts = [row[: 1 + i % 3] for i, row in enumerate(ids)]
    recipe = Recipe(**{**vars(RECIPE), **changes})
    options = {"share": share, "group_size": 2 if share else None}
    return prototok.fast_fit(lm, texts, recipe=recipe, batch_size=4, progress=False, **options)


@pytest.mark.parametrize("share", [None, "m", "e"])
def test_results_are_the_same(
    small_lm: FrozenLM, share: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 400 if share is None else 100
    at_once = fit(small_lm, share, max_steps=steps)
    as_on_cuda(monkeypatch)
    late = fit(small_lm, share, max_steps=steps)
    assert torch.equal(late.exact, at_once.exact)
    assert int(late.exact.sum()) >= (5 if share is None else 2)
    # Not one update more: what is done on the device moves no further until it is seen.
    apart = (late.steps - at_once.steps)[at_once.exact].abs()
    assert float(apart.float().median()) == 0 and int(apart.max()) <= 3
    torch.testing.assert_close(late.accuracy, at_once.accuracy, atol=0.34, rtol=0)


def test_no_update_is_made_beyond_the_last(
    small_lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_cuda(monkeypatch)
    found = fit(small_lm, None, max_steps=17, margin=1e9)
    assert set(found.steps.flatten().tolist()) == {17}
    found = fit(small_lm, None, max_steps=100, margin=1e9, patience=5)
    assert int(found.steps.max()) < 100


def test_a_claim_that_does_not_hold_is_asked_about_once(
    small_lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag that comes after the refusal is older than it and must not be believed."""
    as_on_cuda(monkeypatch)
    verify, margins = fit_module.verify, []

    def strict(*args: object) -> list[object]:
        (found,) = verify(*args)
        margins.append(found.margin)
        return [dataclasses.replace(found, accuracy=0.5) if len(margins) < 3 else found]

    monkeypatch.setattr(fit_module, "verify", strict)
    ids = torch.randint(small_lm.vocab_size, (1, 2), generator=torch.Generator().manual_seed(0))
    found = prototok.fast_fit(small_lm, ids, recipe=RECIPE, progress=False)
    assert found.exact.item() and len(margins) == 3
    assert margins[0] < margins[1] < margins[2]


def test_a_mean_is_said_to_be_as_old_as_it_is(
    small_lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It moves on while the host looks, so its updates are counted where it is read."""
    recipe = dataclasses.replace(RECIPE, lr=0.01, cold=0.1)
    setup = Setup(small_lm, OneForward(Arrangement.parse("e m*")), recipe, "auto", None)
    targets = torch.randint(small_lm.vocab_size, (2,), generator=torch.manual_seed(1))

    def means() -> dict[int, torch.Tensor]:
        shown: list[run_module.Finished] = []

        def confirm(finished: list[run_module.Finished]) -> list[run_module.Refused]:
            shown.extend(finished)
            return [run_module.Refused(1e6, exact=False) for _ in finished]

        groups = make_groups([targets], [0], None, None)
        list(run_module.run(setup, groups, confirm, lambda event: None))
        return {one.steps: one.vectors[0] for one in shown[1:-1]}

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_LOOK", 1)
        at_once = means()
    as_on_cuda(monkeypatch)
    late = means()
    assert len(late) > 3
    for steps, e in list(late.items())[:3]:  # it may be cold no longer when the last is read
        torch.testing.assert_close(e, at_once[steps])
