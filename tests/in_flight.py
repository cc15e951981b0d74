"""Slots that are partly taken, and every buffer they hold."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prototok import FrozenLM, Recipe
from prototok.fitting.engine.inputs import Inputs
from prototok.fitting.engine.rows import make_groups
from prototok.fitting.engine.setup import Setup
from prototok.fitting.engine.slots import Bank, Room, Slots
from prototok.fitting.learned.network import UpdateNetwork

RECIPE = Recipe(lr=0.1, schedule="cosine", warmup=3, max_steps=60, patience=50, temperature=0.5)


def buffers(slots: Slots) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that slots hold, by name."""
    for name, value in vars(slots).items():
        if isinstance(value, Tensor):
            yield name, value
    for b, bank in enumerate(slots.banks):
        assert isinstance(bank, Bank)
        for name, value in {**vars(bank), **vars(bank.adam)}.items():
            if isinstance(value, Tensor):
                yield f"banks[{b}].{name}", value


def untrained(lm: FrozenLM) -> UpdateNetwork:
    """A network that sees the first four positions and makes small updates."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UpdateNetwork(lm.hidden_size, 16, 1, 4)
    network.rate.fill_(0.1)
    return network.requires_grad_(False)


def filled(
    lm: FrozenLM,
    share: str | None,
    inputs: Inputs,
    recipe: Recipe = RECIPE,
    network: UpdateNetwork | None = None,
    backend: str = "auto",
) -> tuple[Slots, list]:
    """Room for eight rows, six of them taken, and the groups that still wait."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.vocab_size, (12, 8), generator=generator)
    texts = [row[: 8 - i % 4] for i, row in enumerate(ids)]
    groups = make_groups(texts, [0], share, 2 if share else None)
    slots = Slots(Setup(lm, inputs, recipe, backend, 8, network), Room(8, 8, 8), share)
    first = 6 // len(groups[0].rows)
    slots.admit(groups[:first])
    return slots, groups[first:]
