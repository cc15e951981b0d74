"""The setup of a fit: all that is the same for every row."""

from __future__ import annotations

from dataclasses import dataclass

from prototok.fitting.engine.inputs import Inputs
from prototok.fitting.learned.network import UpdateNetwork
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
    network     what makes updates before AdamW does, ready on the device; None: AdamW makes all
    """

    lm: FrozenLM
    inputs: Inputs
    recipe: Recipe
    backend: str
    batch_size: int | None
    network: UpdateNetwork | None = None

    def __post_init__(self) -> None:
        if self.recipe.learned and self.network is None:
            raise ValueError(
                f"recipe: {self.recipe.name!r} needs init, a LearnedOptimizer of this model "
                "(`prototok learn optimizer` makes one)"
            )
