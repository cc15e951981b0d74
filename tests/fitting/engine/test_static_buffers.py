"""The step rebinds no buffer and reads nothing back, so that it can be a CUDA graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fake_cuda import NoWaiting
from in_flight import RECIPE, buffers, filled, untrained
from prototok import FrozenLM
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.runner import StepRunner
from prototok.fitting.engine.slots import Slots, Window
from prototok.fitting.engine.step import step
from prototok.results.arrangement import Arrangement


@pytest.mark.parametrize("share", [None, "m", "e"])
@pytest.mark.parametrize("arrangement", ["e m*", "e* m*"])
def test_a_step_waits_for_nothing(small_lm: FrozenLM, arrangement: str, share: str | None) -> None:
    slots, _ = filled(small_lm, share, OneForward(Arrangement.parse(arrangement)))
    with NoWaiting() as mode:
        step(small_lm, slots, 4)
    assert "where" in mode.seen and "mm" in mode.seen
    for waiting in (lambda: bool(slots.done.any()), lambda: slots.step[slots.done]):
        with pytest.raises(RuntimeError, match="waits"), NoWaiting():
            waiting()


@pytest.mark.parametrize("share", [None, "m", "e"])
def test_a_learned_step_waits_for_nothing(small_lm: FrozenLM, share: str | None) -> None:
    inputs, recipe = OneForward(Arrangement.parse("e m*")), replace(RECIPE, learned=1)
    slots, _ = filled(small_lm, share, inputs, recipe, untrained(small_lm))
    slots.device = torch.device("cuda")  # on the CPU it asks whether any group is the network's
    with NoWaiting() as mode:
        step(small_lm, slots, 4)
    assert "gelu" in mode.seen


@pytest.mark.parametrize("share", [None, "m"])
def test_buffers_stay_where_they_are(small_lm: FrozenLM, share: str | None) -> None:
    """Over steps, refills and the shrinking end of a queue."""
    slots, waiting = filled(small_lm, share, OneForward(Arrangement.parse("e m*")))
    runner = StepRunner(small_lm, slots, 8)
    places = {name: tensor.data_ptr() for name, tensor in buffers(slots)}
    assert len(places) > 25
    while slots.groups:
        runner.advance(3)
        slots.release([0])
        if waiting:
            slots.admit([waiting.pop()])
    assert {name: tensor.data_ptr() for name, tensor in buffers(slots)} == places


@pytest.mark.parametrize("learned", [0, 4])
@pytest.mark.parametrize("share", [None, "m", "e"])
def test_free_places_inside_the_window_change_nothing(
    small_lm: FrozenLM, share: str | None, learned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA a step computes more places than are taken; they must not be seen."""
    inputs, recipe = OneForward(Arrangement.parse("e m*")), replace(RECIPE, learned=learned)
    network = untrained(small_lm) if learned else None
    results = []
    for whole in (False, True):
        slots, waiting = filled(small_lm, share, inputs, recipe, network)
        if whole:
            monkeypatch.setattr(Slots, "window", Window(8, 8, 8))
        runner = StepRunner(small_lm, slots, 8)
        runner.advance(5)
        slots.release([1])
        runner.advance(5)
        slots.admit([waiting[0]])
        runner.advance(5)
        results.append(runner.poll())
    tight, loose = results
    assert [group.index for group in tight.groups] == [group.index for group in loose.groups]
    assert torch.equal(tight.step, loose.step) and torch.equal(tight.done, loose.done)
    torch.testing.assert_close(tight.loss, loose.loss, rtol=1e-4, atol=1e-5)
    assert torch.equal(tight.scored_at, loose.scored_at)


def test_windows_halve_with_what_is_in_flight(small_lm: FrozenLM) -> None:
    slots, _ = filled(small_lm, None, OneForward(Arrangement.parse("e m*")))
    assert (slots.window.rows, slots.window.length) == (6, 8)  # the CPU computes what is there
    slots.device = torch.device("cuda")
    assert (slots.window.rows, slots.window.groups, slots.window.length) == (8, 8, 8)
    slots._hold(slots.groups[:4])
    assert slots.window.rows == 4
    slots._hold(slots.groups[:1])
    assert slots.window.rows == 1
