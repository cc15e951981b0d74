"""A trained network as it is kept: weights, where vectors start, and the model it is for.

Letters: d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from prototok.common.world import own_world
from prototok.fitting.prior import Prior
from prototok.model.frozen_lm import FrozenLM
from prototok.model.identity import ModelIdentity
from prototok.results.hub import OnHub
from prototok.results.tensor_file import Origin, Shapes, read_tensors, write_tensors

_START = ("mean", "std", "basis")  # tensors of the start; all others are the network's
N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class KeptNetwork(OnHub, Generic[N]):
    """One file: a network, and the `Prior` it goes with.

    start    where vectors start, the basis that the network sees or makes them in, and which
             model, prefix and training all this belongs to
    weights  state of the network by name, all but what `start` has; bfloat16 but for scalars
    """

    start: Prior
    weights: dict[str, Tensor]

    form: ClassVar[tuple[str, int]]
    _what: ClassVar[str]  # in words

    @classmethod
    def _blank(cls, shapes: dict[str, tuple[int, ...]], hidden_size: int, device: str) -> N:
        """Return a network of the size that tensors of these shapes are of."""
        raise NotImplementedError

    @property
    def model(self) -> ModelIdentity:  # type: ignore[override]  # read of `start`, never set
        return self.start.model

    @property
    def training(self) -> str:
        """How it was trained, in words."""
        made = self.start.provenance
        return f"trained at N = {made.get('lengths')} for {made.get('steps')} steps"

    def network(self, lm: FrozenLM) -> N:
        """Return the network on the model's device and in its dtype, frozen."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        # Without storage: to draw weights that are replaced took longer than a step of a fit.
        made = self._blank(shapes, self.start.mean.shape[1], "meta")
        given = {name: getattr(self.start, name) for name in _START if name in made.state_dict()}
        made.load_state_dict(self.weights | given, assign=True)
        made.requires_grad_(False).to(lm.device).eval()
        for part in made.parameters():  # what scales its inputs stays fp32
            part.data = part.data.to(lm.dtype)
        return made

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; it is there whole or not at all."""
        start = self.start
        tensors = {name: getattr(start, name) for name in _START} | self.weights
        origin = Origin(start.model, start.provenance, start.prefix)
        write_tensors(path, self.form, tensors, origin)

    @classmethod
    @own_world
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; names, types and shapes are checked before allocation.

        Raises:
            ValueError: no such file, or not one of these.
        """
        check = cls._require_consistent
        _, tensors, origin = read_tensors(path, cls._what, cls.form, check)
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"path: {path} holds values in {name} that are not finite")
        mean, std, basis = (tensors.pop(name) for name in _START)
        tensors.pop("prefix", None)
        start = Prior(mean, std, basis, origin.model, origin.provenance, origin.prefix)
        return cls(start, tensors)

    @classmethod
    def _require_consistent(cls, header: dict, shapes: Shapes, model: ModelIdentity) -> None:
        """Raise ValueError unless the shapes in the file are those of a network of its model."""
        d = model.hidden_size
        network = cls._blank({name: shape for name, (_, shape) in shapes.items()}, d, "meta")
        expected = {
            name: ("BF16" if tensor.ndim else "F32", tuple(tensor.shape))
            for name, tensor in network.state_dict().items()
        } | {"mean": ("F32", (2, d)), "std": ("F32", (2, d)), "basis": ("F32", (2, d, d))}
        if set(shapes) != set(expected):
            raise ValueError(f"it holds {sorted(shapes)}")
        for name, seen in shapes.items():
            if seen != expected[name]:
                raise ValueError(f"{name} is {seen[0]} {seen[1]}, not {expected[name]}")


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """Return the state of a network as a file keeps it."""
    return {
        name: tensor.detach().to("cpu", torch.bfloat16 if tensor.ndim else torch.float32).clone()
        for name, tensor in network.state_dict().items()
        if name not in _START
    }
