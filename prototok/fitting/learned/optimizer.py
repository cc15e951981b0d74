"""A learned optimiser as it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from prototok.fitting.learned.kept import KeptNetwork
from prototok.fitting.learned.network import UpdateNetwork


@dataclass(frozen=True, eq=False, repr=False)
class LearnedOptimizer(KeptNetwork[UpdateNetwork]):
    """What makes the first updates of `fast_fit(lm, texts, recipe="learned", init=optimizer)`.

    start    where fits start, the basis that the network sees gradients in, and which model,
             prefix and training all this belongs to
    weights  state of the `UpdateNetwork` by name, all but its mean; bfloat16 but for scalars
    """

    def __repr__(self) -> str:
        return f"LearnedOptimizer({self.start.model.name}, {self.training})"

    form: ClassVar[tuple[str, int]] = ("prototok.optimizer", 1)
    _what: ClassVar[str] = "a learned optimiser"
    _file: ClassVar[str] = "optimizer.safetensors"
    _usage: ClassVar[str] = (
        'optimizer = prototok.LearnedOptimizer.from_pretrained("{repo_id}")\n'
        'fit = prototok.fast_fit(lm, ["Call me Ishmael."], recipe="learned", init=optimizer)'
    )

    @property
    def reach(self) -> int:
        """Count the first positions of which the network sees the token and its error."""
        return _reach_of({name: tuple(tensor.shape) for name, tensor in self.weights.items()})

    @torch.no_grad()
    def begin(self, network: UpdateNetwork) -> None:
        """Put these weights into a network of the same size, whose reach may be larger.

        It then makes of a text within the reach of this one the updates that this one makes.
        """
        state = network.state_dict()
        if network.reach:
            state["along.weight"].zero_()
        for name, tensor in self.weights.items():
            place = state[name]
            if name == "along.weight":
                place = place[:, : tensor.shape[1]]
            place.copy_(tensor)
        if self.reach:  # errors are counted in their mean over the positions within reach
            state["error.weight"].mul_(self.reach / network.reach)
        state["mean"].copy_(self.start.mean)

    @classmethod
    def _blank(
        cls, shapes: dict[str, tuple[int, ...]], hidden_size: int, device: str
    ) -> UpdateNetwork:
        width, _ = shapes["first.weight"]
        depth = sum(name.endswith(".up.weight") for name in shapes)
        return UpdateNetwork(hidden_size, width, depth, _reach_of(shapes), device=device)


def _reach_of(shapes: dict[str, tuple[int, ...]]) -> int:
    if "along.weight" not in shapes:
        return 0
    narrow, _ = shapes["token.weight"]
    _, columns = shapes["along.weight"]
    return columns // (2 * narrow + 2)
