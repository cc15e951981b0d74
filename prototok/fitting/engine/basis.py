"""The eigenvectors of a model's gradients: coordinates in which AdamW does better.

The model is frozen, so the geometry of its loss around e and m is a property of the model: every
text sees the same stretched directions. AdamW scales each coordinate on its own, which helps only
as far as those directions are coordinates; the eigenvectors of the gradients' covariance make them
so. They are found once a model, from fits of random token ids, and not from the rows of a batch:
rows stay independent of each other. Letters: R rows, N targets, d hidden size.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.rows import Group, Row
from prototok.fitting.engine.setup import Setup
from prototok.fitting.engine.slots import Room, Slots
from prototok.fitting.engine.step import step
from prototok.fitting.prior import Prior
from prototok.fitting.recipe import Recipe
from prototok.model.frozen_lm import FrozenLM
from prototok.results.arrangement import Arrangement

_ROWS, _LENGTH, _STEPS = 32, 16, 100
# Ends for no row, so that all of them give a gradient at every step.
_RECIPE = Recipe(
    lr=0.1, betas=(0.9, 0.99), weight_decay=0.1, warmup=20, init_std=0.3, temperature=0.5,
    max_steps=_STEPS, margin=float(torch.finfo(torch.float32).max),
)  # fmt: skip

_known: WeakKeyDictionary[FrozenLM, Tensor] = WeakKeyDictionary()
_finding = threading.Lock()


def with_basis(setup: Setup) -> Setup:
    """Return the setup with the model's eigenbasis in its prior, where the recipe asks for one."""
    lm, recipe, prior = setup.lm, setup.recipe, setup.inputs.prior
    if not recipe.eigenbasis or (prior is not None and prior.basis is not None):
        return setup
    basis = eigenbasis(lm, setup.backend)
    if prior is None:
        mean = torch.zeros(2, lm.hidden_size, dtype=torch.float32, device="cpu")
        prior = Prior(mean, torch.full_like(mean, recipe.init_std), basis, lm.identity)
    return replace(setup, inputs=setup.inputs.starting(replace(prior, basis=basis)))


def eigenbasis(lm: FrozenLM, backend: str) -> Tensor:
    """Return (2, d, d) fp32 on the model's device: eigenvectors for e and for m, in columns.

    The same model gives the same basis up to rounding, whatever is fitted with it. It is computed
    at the first call and kept as long as `lm` lives; it costs what a hundred steps of 32 rows of 16
    tokens do, and the eigenvectors of two d × d matrices.
    """
    with _finding:  # so that threads that start together find it once
        if lm not in _known:
            _known[lm] = torch.linalg.eigh(gradient_covariance(lm, backend))[1]
        return _known[lm]


def gradient_covariance(lm: FrozenLM, backend: str) -> Tensor:
    """Sum g gᵀ / |g|² over fits of random token ids: (2, d, d), for e and for m."""
    length = min(_LENGTH, lm.context or _LENGTH)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.vocab_size, (_ROWS, length), generator=generator, device="cpu")
    setup = Setup(lm, OneForward(Arrangement.parse("e m*")), _RECIPE, backend, _ROWS)
    slots = Slots(setup, Room(_ROWS, _ROWS, length))
    slots.admit([Group(r, (Row(r, r, 0, row),), None) for r, row in enumerate(ids)])
    total = torch.zeros(2, lm.hidden_size, lm.hidden_size, device=lm.device, dtype=torch.float32)
    for _ in range(_STEPS):
        step(lm, slots, _ROWS)
        for covariance, bank in zip(total, slots.banks, strict=True):
            g = bank.grad[:, 0]  # (R, d)
            g = g.masked_fill(~g.isfinite().all(1, keepdim=True), 0.0)  # of a row that failed
            g = g / g.norm(dim=1, keepdim=True).clamp_min(1e-30)
            covariance.addmm_(g.T, g)
    return total
