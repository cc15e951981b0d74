"""A learned optimiser as it is kept: weights, where fits start, and the model it is for.

Letters: d hidden size, w width of the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from prototok.fitting.learned.network import UpdateNetwork
from prototok.fitting.prior import Prior
from prototok.model.frozen_lm import FrozenLM
from prototok.model.identity import ModelIdentity
from prototok.model.load import BUILT_IN, path_of
from prototok.results.hub import OnHub
from prototok.results.tensor_file import Origin, Shapes, read_tensors, write_tensors

FILE = "optimizer.safetensors"
_FORM = ("prototok.optimizer", 1)
_START = ("mean", "std", "basis")  # tensors of the start; all others are the network's


@dataclass(frozen=True, eq=False)
class LearnedOptimizer(OnHub):
    """What makes the first updates of `fast_fit(lm, texts, recipe="learned", init=optimizer)`.

    start    where fits start, the basis that the network sees gradients in, and which model,
             prefix and training all this belongs to
    weights  state of the `UpdateNetwork` by name, all but its mean; bfloat16 but for scalars
    """

    start: Prior
    weights: dict[str, Tensor]

    def __repr__(self) -> str:
        made = self.start.provenance
        return (
            f"LearnedOptimizer({self.start.model.name}, trained at N = {made.get('lengths')} for "
            f"{made.get('steps')} steps)"
        )

    _file: ClassVar[str] = FILE
    _usage: ClassVar[str] = (
        'optimizer = prototok.LearnedOptimizer.from_pretrained("{repo_id}")\n'
        'fit = prototok.fast_fit(lm, ["Call me Ishmael."], recipe="learned", init=optimizer)'
    )

    @property
    def model(self) -> ModelIdentity:  # type: ignore[override]  # read of `start`, never set
        return self.start.model

    def network(self, lm: FrozenLM) -> UpdateNetwork:
        """Return the network on the model's device and in its dtype, frozen."""
        _, d = self.start.mean.shape
        made = UpdateNetwork(d, *_size_of({name: t.shape for name, t in self.weights.items()}))
        made.load_state_dict(self.weights | {"mean": self.start.mean})
        made.requires_grad_(False).to(lm.device).eval()
        for part in made.parameters():  # what scales its inputs stays fp32
            part.data = part.data.to(lm.dtype)
        return made

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; it is there whole or not at all."""
        start = self.start
        tensors = {name: getattr(start, name) for name in _START} | self.weights
        write_tensors(path, _FORM, tensors, Origin(start.model, start.provenance, start.prefix))

    @classmethod
    def load(cls, path: str | Path) -> LearnedOptimizer:
        """Read what `save` wrote; names, types and shapes are checked before allocation.

        Raises:
            ValueError: no such file, or not one of a learned optimiser.
        """
        _, tensors, origin = read_tensors(path, "a learned optimiser", _FORM, _require_consistent)
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"path: {path} holds values in {name} that are not finite")
        mean, std, basis = (tensors.pop(name) for name in _START)
        tensors.pop("prefix", None)
        start = Prior(mean, std, basis, origin.model, origin.provenance, origin.prefix)
        return cls(start, tensors)


def shipped_optimizer(lm: FrozenLM) -> LearnedOptimizer | None:
    """Return the one in the package for the model that `lm` holds; None where there is none."""
    if lm.identity.name not in BUILT_IN:
        return None
    path = Path(path_of(lm.identity.name)) / FILE
    return LearnedOptimizer.load(path) if path.exists() else None


def weights_of(network: UpdateNetwork) -> dict[str, Tensor]:
    """Return the state of a network as a `LearnedOptimizer` keeps it."""
    return {
        name: tensor.detach().to("cpu", torch.bfloat16 if tensor.ndim else torch.float32).clone()
        for name, tensor in network.state_dict().items()
        if name != "mean"
    }


def _size_of(shapes: dict[str, tuple[int, ...]]) -> tuple[int, int, int]:
    """Return the width, the depth and the reach of a network by its tensors."""
    width, _ = shapes["first.weight"]
    depth, reach = sum(name.endswith(".up.weight") for name in shapes), 0
    if "along.weight" in shapes:
        narrow, _ = shapes["token.weight"]
        _, along = shapes["along.weight"]
        reach = along // (2 * narrow + 2)
    return width, depth, reach


def _require_consistent(header: dict, shapes: Shapes, model: ModelIdentity) -> None:
    """Raise ValueError unless the shapes in the file are those of an optimiser of its model."""
    d = model.hidden_size
    found = {name: shape for name, (_, shape) in shapes.items()}
    network = UpdateNetwork(d, *_size_of(found), device="meta").state_dict()
    expected = {
        name: ("BF16" if tensor.ndim else "F32", tuple(tensor.shape))
        for name, tensor in network.items()
    } | {"mean": ("F32", (2, d)), "std": ("F32", (2, d)), "basis": ("F32", (2, d, d))}
    if set(shapes) != set(expected):
        raise ValueError(f"it holds {sorted(shapes)}")
    for name, seen in shapes.items():
        if seen != expected[name]:
            raise ValueError(f"{name} is {seen[0]} {seen[1]}, not {expected[name]}")
