"""What is known of good vectors on one model before any is fitted.

Letters: d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from prototok.common.world import own_world
from prototok.model.frozen_lm import FrozenLM
from prototok.model.identity import ModelIdentity
from prototok.model.prefix import Prefix
from prototok.results.hub import OnHub
from prototok.results.tensor_file import (
    Origin,
    Shapes,
    read_tensors,
    require_model,
    write_tensors,
)

_FORM = ("prototok.prior", 1)


@dataclass(frozen=True, eq=False)
class Prior(OnHub):
    """Where vectors start, N(mean, std²) by coordinate, and the coordinates AdamW sees them in.

    mean   (2, d) fp32, of e and of m
    std    (2, d) fp32; zero for a vector that always starts at its mean
    basis  (2, d, d) fp32, orthonormal columns for e and for m; None: the model's own coordinates
    model  which frozen model it belongs to
    prefix what stood in front of the fits it was learned from; None: nothing
    """

    mean: Tensor
    std: Tensor
    basis: Tensor | None
    model: ModelIdentity
    provenance: dict[str, str] = field(default_factory=dict)
    prefix: Prefix | None = None

    def __repr__(self) -> str:
        basis = "in the model's own coordinates" if self.basis is None else "in an eigenbasis"
        front = "" if self.prefix is None else f", behind {self.prefix}"
        return f"Prior({self.model.name!r}, d = {self.mean.shape[1]}, {basis}{front})"

    def require_model(self, lm: FrozenLM) -> None:
        """Raise ValueError unless this was learned on the model that `lm` holds."""
        require_model("init", self.model, lm)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; it is there whole or not at all."""
        tensors = {"mean": self.mean, "std": self.std, "basis": self.basis}
        origin = Origin(self.model, self.provenance, self.prefix)
        write_tensors(path, _FORM, tensors, origin)

    _file: ClassVar[str] = "prior.safetensors"
    _usage: ClassVar[str] = (
        'prior = prototok.Prior.from_pretrained("{repo_id}")\n'
        'fit = prototok.fast_fit(lm, ["Call me Ishmael."], init=prior)'
    )

    @classmethod
    @own_world
    def load(cls, path: str | Path) -> Prior:
        """Read what `save` wrote; names, types and shapes are checked before allocation.

        Raises:
            ValueError: no such file, or not one of a prior.
        """
        _, tensors, origin = read_tensors(path, "a prior", _FORM, _require_consistent)
        return cls(
            tensors["mean"], tensors["std"], tensors.get("basis"), origin.model, origin.provenance,
            origin.prefix,
        )  # fmt: skip


def _require_consistent(header: dict, shapes: Shapes, model: ModelIdentity) -> None:
    """Raise ValueError unless the shapes in the file are those of a prior of its model."""
    d = model.hidden_size
    expected = {"mean": (2, d), "std": (2, d), "basis": (2, d, d)}
    if not {"mean", "std"} <= set(shapes) <= set(expected):
        raise ValueError(f"it holds {sorted(shapes)}")
    for name, (dtype, shape) in shapes.items():
        if dtype != "F32" or shape != expected[name]:
            raise ValueError(f"{name} is {dtype} {shape} where F32 {expected[name]} is expected")


def require_prior(name: str, prior: object, lm: FrozenLM) -> None:
    """Raise ValueError unless the argument of that name is a Prior of the model that `lm` holds."""
    if not isinstance(prior, Prior):
        raise ValueError(f"{name}: {type(prior).__name__} is not a Prior")
    prior.require_model(lm)
