"""What an encoder is trained on: its guesses for fresh texts, scored by the frozen model.

Letters: R rows of a step, N targets, d hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prototok.fitting.engine.rows import Group, Row
from prototok.fitting.engine.setup import Setup
from prototok.fitting.engine.slots import Room, Slots, Window
from prototok.fitting.engine.step import forward_backward
from prototok.fitting.learned.encoder import placed
from prototok.fitting.learned.encoder_network import EncoderNetwork
from prototok.fitting.learned.network import token_rows
from prototok.fitting.learned.pool import Corpus

_POSITIONS = 1024  # of a step, rows × targets
_FORGET = 0.98


class Guesses:
    """Rows of one length, in slots of the engine; each step fills them with fresh texts."""

    def __init__(self, setup: Setup, network: EncoderNetwork, length: int) -> None:
        rows = max(8, _POSITIONS // length)
        self.setup, self.network, self.length = setup, network, length
        self.slots = Slots(setup, Room(rows, rows, length))
        ids = torch.zeros(length, dtype=torch.int64, device="cpu")
        self.slots.admit([Group(r, (Row(r, r, 0, ids),), None) for r in range(rows)])
        self.window = Window(rows, rows, length)
        self.right: float | None = None  # share of tokens, of late

    def note(self) -> str:
        """Return in words how guesses of late have fared."""
        return f"N = {self.length}: {self.right or 0.0:.3f} of tokens right"

    def train_step(
        self, optimizer: torch.optim.Optimizer, corpus: Corpus, generator: torch.Generator
    ) -> None:
        """Guess e and m of fresh texts, decode, and descend on the mean loss of the tokens."""
        lm, network, rows = self.setup.lm, self.network, self.window.rows
        ids = corpus.draw(rows, self.length, generator).to(lm.device)
        lengths = torch.full((rows,), self.length, dtype=torch.int64, device=lm.device)
        half = lm.dtype == torch.bfloat16
        # Without the cache: inside another autocast it would keep the weights of the first step.
        with torch.autocast(lm.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            made = network(token_rows(lm)[ids], lengths)
        signal, right = self._signal(made.detach(), ids)
        optimizer.zero_grad(set_to_none=True)
        made.backward(signal)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        share = float(right) / (rows * self.length)
        before = share if self.right is None else self.right
        self.right = _FORGET * before + (1 - _FORGET) * share

    def _signal(self, made: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient at what the network made, (R, 2, d), and how many tokens are right.

        A row whose loss or gradient is not finite teaches nothing.
        """
        slots, prior, t = self.slots, self.setup.inputs.prior, self.setup.recipe.temperature
        assert prior is not None
        slots.targets.copy_(ids)
        vectors = placed(prior, made).unbind(1)
        leaves = [part[:, None].requires_grad_() for part in vectors]
        grads = forward_backward(self.setup.lm, slots, leaves, slice(0, self.window.rows))
        turned = [
            bank.turned(grad[:, 0].float()) for bank, grad in zip(slots.banks, grads, strict=True)
        ]
        signal = torch.stack(turned, dim=1)
        good = signal.flatten(1).isfinite().all(1) & slots.loss.isfinite()
        signal = torch.where(good[:, None, None], signal, 0.0) * (t / ids.numel())
        return signal, slots.correct[good].sum()
