"""What the host sends while groups enter and leave, without waiting for what is queued."""

from __future__ import annotations

import pytest
import torch

from prototok import Recipe
from prototok.fitting.engine.rows import make_groups
from prototok.fitting.engine.runner import StepRunner
from rehearsal import frozen, rehearsal, slots_of
from zoo import OWN


@pytest.mark.parametrize(
    ("inputs", "share"),
    [("e m*", None), ("e m*", "m"), ("e m*", "e"), ("[mem]", None)],
)
@pytest.mark.parametrize("accuracy", [1.0, 0.9])
def test_every_copy_of_the_host_goes_through_sent(inputs, share, accuracy):
    with rehearsal() as seen:
        lm = frozen(OWN["llama, grouped, tied"])
        recipe = Recipe(accuracy=accuracy)
        slots = slots_of(lm, inputs, 8, 9, share=share, recipe=recipe)
        slots.release([0])
        slots.admit(a_group(share))
        slots.reopen(0, 0.1)
        StepRunner(lm, slots, 8).poll()
    assert seen.sent > 0 and seen.copied == []


def a_group(share):
    ids = torch.zeros(7, dtype=torch.int64, device="cpu")
    return make_groups([ids], [0], share, 1 if share else None)[:1]
