"""An encoder as it is kept, and fits that start from it.

Letters: T texts, N tokens of a text, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from prototok.common.world import own_world
from prototok.fitting.engine.rows import Group, initial_vectors
from prototok.fitting.learned.encoder_network import EncoderNetwork
from prototok.fitting.learned.kept import KeptNetwork
from prototok.fitting.learned.network import token_rows
from prototok.fitting.learned.optimizer import LearnedOptimizer
from prototok.fitting.prior import Prior
from prototok.model.frozen_lm import FrozenLM
from prototok.results.tensor_file import require_model
from prototok.texts.targets import Texts, targets_of

_ROWS = 1024  # at once


@dataclass(frozen=True, eq=False, repr=False)
class Encoder(KeptNetwork[EncoderNetwork]):
    """From a text to e and m in one pass of a small network, for one frozen model.

    `e, m = encoder(texts)`, or `fast_fit(lm, texts, init=encoder)` to start there.

    start    the mean that vectors are counted from and the eigenbasis they are given in, how far
             seeds other than 0 start from the guess, and which model and prefix this belongs to
    weights  state of the `EncoderNetwork` by name; bfloat16 but for scalars
    lm       the model, to read texts with; None in one from a file: see `on`
    """

    lm: FrozenLM | None = None

    def __repr__(self) -> str:
        return f"Encoder({self.start.model.name}, up to {self.longest} tokens, {self.training})"

    form: ClassVar[tuple[str, int]] = ("prototok.encoder", 1)
    _what: ClassVar[str] = "an encoder"
    _file: ClassVar[str] = "encoder.safetensors"
    _usage: ClassVar[str] = (
        'encoder = prototok.Encoder.from_pretrained("{repo_id}")\n'
        'e, m = encoder.on(lm)(["Call me Ishmael."])\n'
        'fit = prototok.fast_fit(lm, ["Call me Ishmael."], init=encoder)'
    )

    @property
    def longest(self) -> int:
        """Count the tokens of the longest text it takes."""
        _, columns = self.weights["first.weight"].shape
        return columns // (self.start.mean.shape[1] + 1)

    def on(self, lm: FrozenLM) -> Encoder:
        """Return the same with the model that it reads texts with.

        Raises:
            ValueError: another model than it was trained for.
        """
        require_model("encoder", self.model, lm)
        return replace(self, lm=lm)

    @own_world
    def __call__(self, texts: Texts) -> tuple[Tensor, Tensor]:
        """Return e (T, d) and m (T, d), fp32 on the CPU, of texts as `fast_fit` takes them.

        Raises:
            ValueError: a text longer than `longest`, or no model to read texts with.
        """
        if self.lm is None:
            raise ValueError(
                "encoder: one from a file has no model to read texts with; call encoder.on(lm)"
            )
        e, m = self.vectors(self.lm, targets_of(self.lm, texts)).unbind(1)
        return e, m

    @torch.no_grad()
    def vectors(self, lm: FrozenLM, targets: list[Tensor]) -> Tensor:
        """Return e and m of each text's ids, (T, 2, d) fp32 on the CPU; see `__call__`."""
        require_model("encoder", self.model, lm)
        for i, ids in enumerate(targets):
            if len(ids) > self.longest:
                raise ValueError(
                    f"texts: text {i} has {len(ids)} tokens, more than the {self.longest} that "
                    "this encoder takes"
                )
        guess, found = self.guesser(lm), [self.start.mean.new_empty(0, 2, lm.hidden_size)]
        for first in range(0, len(targets), _ROWS):
            part = targets[first : first + _ROWS]
            lengths = torch.tensor([len(ids) for ids in part], dtype=torch.int64, device=lm.device)
            ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(lm.device)
            found.append(guess(ids, lengths))
        return torch.cat(found)

    def guesser(self, lm: FrozenLM) -> Callable[[Tensor, Tensor], Tensor]:
        """Return what makes e and m, (R, 2, d) fp32 on the CPU, of ids (R, N) and lengths (R,)."""
        network, rows = self.network(lm), token_rows(lm)
        return lambda ids, lengths: placed(self.start, network(rows[ids], lengths).cpu())

    def started(self, lm: FrozenLM, groups: list[Group], shorter: bool = False) -> list[Group]:
        """Return groups whose rows start at the guess, seeds other than 0 near to it.

        With `shorter` a group with a text that is too long for the encoder stays as it is.
        """
        taken = [one for one in groups if not shorter or one.length <= self.longest]
        rows = [row for group in taken for row in group.rows]
        made = []
        for row, guess in zip(rows, self.vectors(lm, [row.targets for row in rows]), strict=True):
            if row.seed:
                noise = initial_vectors(Group(0, (row,), None), 1, guess.shape[1], 1.0)
                guess = guess + self.start.std * torch.cat([noise[0][0], noise[1]])
            made.append(replace(row, start=guess))
        left = iter(made)
        found = {
            group.index: replace(group, rows=tuple(next(left) for _ in group.rows))
            for group in taken
        }
        return [found.get(group.index, group) for group in groups]

    @classmethod
    def _blank(
        cls, shapes: dict[str, tuple[int, ...]], hidden_size: int, device: str
    ) -> EncoderNetwork:
        width, columns = shapes["first.weight"]
        depth = sum(name.endswith(".up.weight") for name in shapes)
        longest = columns // (hidden_size + 1)
        return EncoderNetwork(hidden_size, width, depth, longest, device=device)


Init = Prior | LearnedOptimizer | Encoder | tuple[Encoder, LearnedOptimizer]


def parted(init: Init | None) -> tuple[Encoder | None, Prior | LearnedOptimizer | None]:
    """Part what fits start from into where each starts and what all of them have in common.

    Raises:
        ValueError: something else than `fast_fit` takes.
    """
    if isinstance(init, Encoder):
        return init, init.start
    if isinstance(init, tuple | list) and len(init) == 2:
        encoder, optimizer = init
        if isinstance(encoder, Encoder) and isinstance(optimizer, LearnedOptimizer):
            return encoder, optimizer
    if init is None or isinstance(init, Prior | LearnedOptimizer):
        return None, init
    raise ValueError(
        f"init: {type(init).__name__} is not a Prior, a LearnedOptimizer, an Encoder, or (Encoder, "
        "LearnedOptimizer); see learn_shared, learn_optimizer and learn_encoder"
    )


def placed(start: Prior, made: Tensor) -> Tensor:
    """Return vectors (R, 2, d) in the model's coordinates from what the network made."""
    assert start.basis is not None
    mean, basis = start.mean.to(made.device), start.basis.to(made.device)
    turned = [part @ turn.T for part, turn in zip(made.unbind(1), basis, strict=True)]
    return mean + torch.stack(turned, dim=1)
