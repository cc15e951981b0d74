"""A training that can go on: the network, what AdamW knows of it, and how many steps are behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from prototok.common.files import try_file
from prototok.model.frozen_lm import FrozenLM
from prototok.model.identity import ModelIdentity
from prototok.results.tensor_file import (
    Origin,
    Shapes,
    is_tensor_file,
    read_tensors,
    require_model,
    write_tensors,
)

_FORM = ("prototok.training", 1)


class Checkpoint:
    """One file, of one training; `provenance` says which, and another's is refused.

    Args:
        path: of the file.
        lm: the model, behind its prefix.
        provenance: the settings of the training.
    """

    def __init__(self, path: str | Path, lm: FrozenLM, provenance: dict[str, str]) -> None:
        self.path, self.lm = Path(path), lm
        try_file(self.path, "checkpoint", lambda head: is_tensor_file(self.path))
        self.origin = Origin(lm.identity, provenance, lm.prefix)

    def save(self, network: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write the file, whole or not at all."""
        kept = {name: tensor.detach().cpu() for name, tensor in _tensors(network, optimizer)}
        write_tensors(self.path, _FORM, kept, self.origin, step=step)

    def load(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Put network and optimiser where they were, and return the steps made; 0 without a file.

        Raises:
            ValueError: a file of something else, or of another training.
        """
        for parameter in network.parameters():
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
        if not self.path.exists():
            return 0
        places = dict(_tensors(network, optimizer))

        def require(header: dict, shapes: Shapes, model: ModelIdentity) -> None:
            step = header["step"]
            if not isinstance(step, int) or isinstance(step, bool) or step < 0:
                raise ValueError(f"its step is {step!r}")
            expected = {name: ("F32", tuple(tensor.shape)) for name, tensor in places.items()}
            if shapes != expected:
                raise ValueError("its tensors are those of another network")

        header, tensors, origin = read_tensors(self.path, "a training", _FORM, require)
        require_model("checkpoint", origin.model, self.lm)
        for name in origin.provenance | self.origin.provenance:
            theirs, ours = (o.provenance.get(name) for o in (origin, self.origin))
            if theirs != ours:
                raise ValueError(
                    f"checkpoint: {self.path} is of a training with {name} {theirs!r}, not {ours!r}"
                )
        with torch.no_grad():
            for name, place in places.items():
                place.copy_(tensors[name])
        step: int = header["step"]
        return step


def _tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Name the weights and, of each, the updates made and AdamW's two moments."""
    for name, parameter in network.named_parameters():
        yield name, parameter
        for what, tensor in optimizer.state[parameter].items():
            yield f"{what} of {name}", tensor
