"""The setup of a fit: all that is the same for every row."""

from __future__ import annotations

from dataclasses import dataclass

from prototok.fitting.engine.inputs import Inputs
from prototok.fitting.recipe import Recipe
from prototok.model.frozen_lm import FrozenLM


@dataclass(frozen=True, eq=False)
class Setup:
    """Values that travel together from the public call to the step.

    lm          the frozen model
    inputs      how vectors become its input, and where they start
    recipe      optimiser, schedule, and when to stop
    backend     which kernels, as it was asked for
    batch_size  rows on the device at once; None for as many as are good at each length
    """

    lm: FrozenLM
    inputs: Inputs
    recipe: Recipe
    backend: str
    batch_size: int | None
