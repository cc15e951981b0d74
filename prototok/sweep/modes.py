"""The two ways a sweep fits a text, behind one face: [e, m, …, m], and [mem] before the text.

Letters: N targets, K vectors in front, d hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from prototok.autoregressive.fit import mem_fit_of, teacher_forced
from prototok.autoregressive.generate import generate, require_room
from prototok.autoregressive.verify import cache_of
from prototok.autoregressive.verify import verify as generate_alone
from prototok.decoding.decode import decode_vectors, require_length
from prototok.fitting.driver import EndedRow, Verify
from prototok.fitting.engine.setup import Setup
from prototok.fitting.fast_fit import one_forward, tokens_of
from prototok.fitting.recipe import Recipe
from prototok.fitting.verify import verify as decode_alone
from prototok.model.frozen_lm import FrozenLM
from prototok.results.arrangement import Arrangement
from prototok.sweep.unit import Unit

Save = Callable[[Path], None]


class Mode(Protocol):
    """One way of fitting: how the units of one `group()` are fitted, verified and kept."""

    @property
    def setup(self) -> Setup: ...

    @property
    def decoder(self) -> str:
        """Name what decodes a row when its time is taken."""
        ...

    @property
    def verify(self) -> Verify: ...

    def require(self, length: int) -> None:
        """Raise ValueError unless the model has room for a text of N = `length`."""
        ...

    def measured(self, one: EndedRow) -> dict[str, Any]:
        """Fill the columns that this mode alone knows."""
        ...

    def decode(self, vectors: Tensor, length: int) -> Callable[[], object]:
        """Decode one row alone at batch 1, when called."""
        ...

    def saving(self, rows: list[EndedRow], provenance: dict[str, str]) -> Save:
        """Return what writes the vectors of a unit, a text a row."""
        ...


@dataclass(frozen=True)
class OneForwardMode:
    setup: Setup
    arrangement: Arrangement
    share: str | None
    decoder = "one forward"
    verify = staticmethod(decode_alone)

    def require(self, length: int) -> None:
        require_length(length, self.setup.lm, self.arrangement)

    def measured(self, one: EndedRow) -> dict[str, Any]:
        return {
            "loss": one.check.loss,
            "accuracy_in_batch": one.accuracy_in_batch,
            "margins": one.check.margins.tolist(),
        }

    def decode(self, vectors: Tensor, length: int) -> Callable[[], object]:
        lm, backend = self.setup.lm, self.setup.backend
        return functools.partial(
            decode_vectors, lm, vectors[None], self.arrangement, length, None, backend
        )

    def saving(self, rows: list[EndedRow], provenance: dict[str, str]) -> Save:
        return tokens_of(self.setup, rows, 1, self.share, provenance).save


@dataclass(frozen=True)
class AutoregressiveMode:
    setup: Setup
    verify = staticmethod(generate_alone)

    @property
    def decoder(self) -> str:
        return f"autoregressive, {cache_of(self.setup.lm)}"

    def require(self, length: int) -> None:
        require_room(self.setup.lm, self.setup.inputs.leading, length)

    def measured(self, one: EndedRow) -> dict[str, Any]:
        return {"accuracy_in_batch": one.check.teacher_forced}

    def decode(self, vectors: Tensor, length: int) -> Callable[[], object]:
        lm, backend = self.setup.lm, self.setup.backend
        return functools.partial(
            generate, lm, vectors[None], length, cache_of(lm), None, backend
        )  # fmt: skip

    def saving(self, rows: list[EndedRow], provenance: dict[str, str]) -> Save:
        return mem_fit_of(self.setup, rows, 1, provenance).save


def mode_of(lm: FrozenLM, unit: Unit, recipe: Recipe, batch_size: int | None) -> Mode:
    """Return the mode of a unit, which is that of all units of its `group()`.

    `lm` is the model behind the prefix that they have.
    """
    if unit.mode == "autoregressive":
        return AutoregressiveMode(teacher_forced(lm, unit.vectors, recipe, "auto", batch_size, 0))
    arrangement = Arrangement.parse(unit.arrangement)
    setup = one_forward(lm, arrangement, recipe, None, "auto", batch_size)
    return OneForwardMode(setup, arrangement, unit.share)
