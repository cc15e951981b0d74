"""Launches and bytes of real steps: a change that costs more of either shows here."""

from __future__ import annotations

import pytest
from rehearse import GPUS, SHAPES, rehearsed


@pytest.mark.parametrize(
    ("shape", "launches", "gigabytes", "milliseconds"),
    [
        ("pythia-160m", 409, 66.5, 33.1),
        ("llama-3.2-1b", 511, 142.0, 137.4),
        ("llama-3.1-8b", 851, 144.0, 197.0),
        ("smollm2-135m", 602, 26.0, 12.6),
    ],
)
def test_a_step_stays_within_its_budget(shape, launches, gigabytes, milliseconds):
    one = rehearsed(shape, *SHAPES[shape])
    found = (len(one.launches), one.bytes / 1e9, 1e3 * one.seconds(GPUS[0]))
    budget = (launches, gigabytes, milliseconds)
    assert all(a <= b for a, b in zip(found, budget, strict=True)), found
    # The products are those of the model, forward and backward, less what the first block spares.
    flops = sum(launch.flops for launch in one.launches if launch.kind == "product")
    whole = 4 * one.weights * one.rows * one.length
    assert 0.8 * whole < flops < whole
    # Large ones leave few processors idle; 576 columns are no whole number of tiles.
    least = 0.6 if shape == "smollm2-135m" else 0.9
    for launch, _ in one.products():
        assert launch.flops < 2e11 or GPUS[0].fill(launch) > least, launch
