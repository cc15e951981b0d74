"""Recipes of a fit: initial vectors, optimiser, schedule and when to stop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prototok.common.arguments import hint, is_betas, is_integer, is_number, plain_number
from prototok_kernels.adamw_rows import AdamWSettings


@dataclass(frozen=True)
class Recipe:
    """Settings of a fit; frozen, and stored with its results.

    Attributes:
        name: what results are labelled with.
        lr: peak learning rate of AdamW.
        lr_width: the hidden size that lr is meant for; fits of e and m on a model of hidden size d
            go at lr · √(lr_width / d), so that an update is as long on each; None: lr on any.
        betas, eps, weight_decay: AdamW's other constants.
        schedule: "constant", or "cosine" from lr to zero.
        cycle: updates of the first cosine, each later one twice as long as the one before
            (Loshchilov & Hutter's warm restarts); None: one cosine over `max_steps`.
        cycle_tokens: length of text that `cycle` is meant for; fits of e and m on a longer one have
            no cosine shorter than `cycle` in proportion to its length, or than `max_steps` where
            that is less; None: it is meant for any.
        cooling: power that the cosine is raised to; above 1 the rate falls earlier, then is low for
            longer.
        warmup: updates over which lr rises linearly from zero.
        init_std: initial vectors are N(0, init_std²) in every coordinate.
        eigenbasis: AdamW runs in the eigenvectors of the model's gradients (`engine.basis`); with
            a `Prior` that has them it does so anyway.
        prior_rate: with a `Prior` the peak rate is prior_rate / √d (d: hidden size) in place of lr,
            and weight_decay is scaled so that an update takes as much off as before; None: lr
            with a prior too.
        m_rate: the rate of m as a multiple of that of e; 0 leaves m where it starts.
        against_sink: put one ordinary token in front of a model that has an attention sink, where
            the call leaves the prefix to the recipe (`model.sink`).
        shipped_prior: start from the `Prior` that comes with a built-in model, where none is given.
        temperature: T of the loss CE(logits / T); predictions and margins are at T = 1.
        max_steps: most updates of one row.
        patience: most updates in a row without a higher accuracy; None: any number.
        accuracy: share of right tokens that ends the fit (1.0: all of them).
        margin: smallest (target logit − best other logit) asked for as well before the fit ends.
        spreads: the margin asked for is also at least this many times the rounding of the model's
            dtype, measured on the row itself (`fitting.verify.Verified.spread`); 0: it is not.
        learned: a learned optimiser makes the first updates; after so many without progress, or
            twenty times as many in all, AdamW takes over and has `max_steps` of its own. 0: AdamW
            makes all.
        cold: a row that is right in its batch and does not hold alone goes no faster than this
            multiple of lr, for as many updates again as it has made; nor does one that was right in
            its batch when a cosine ends, which would start hot again. Of a row that was refused the
            mean of the vectors since is looked at as well. None: they may, and it is not.
    """

    name: str = "custom"
    lr: float = 0.01
    lr_width: int | None = None
    betas: tuple[float, float] = (0.9, 0.9)
    eps: float = 1e-8
    weight_decay: float = 0.01
    schedule: str = "constant"
    cycle: int | None = None
    cycle_tokens: int | None = None
    cooling: float = 1.0
    warmup: int = 0
    init_std: float = 1.0
    eigenbasis: bool = False
    prior_rate: float | None = None
    m_rate: float = 1.0
    against_sink: bool = False
    shipped_prior: bool = False
    temperature: float = 1.0
    max_steps: int = 5000
    patience: int | None = None
    accuracy: float = 1.0
    margin: float = 0.0
    spreads: float = 0.0
    learned: int = 0
    cold: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"name: {self.name!r} is not a text")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule: {self.schedule!r} is neither 'constant' nor 'cosine'")
        for name in ("eigenbasis", "shipped_prior"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not True or False")
        for name in ("lr", "init_std", "temperature", "eps", "cooling"):
            value = getattr(self, name)
            if not (is_number(value) and value > 0):
                raise ValueError(f"{name}: {value!r} is not a positive number")
        for name in ("prior_rate", "cold"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > 0):
                raise ValueError(f"{name}: {value!r} is not None or a positive number")
        for name in ("weight_decay", "margin", "m_rate", "spreads"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0):
                raise ValueError(f"{name}: {value!r} is negative or not a number")
        if not (is_number(self.accuracy) and 0 < self.accuracy <= 1):
            raise ValueError(f"accuracy: {self.accuracy!r} is not in (0, 1]")
        if not is_betas(self.betas):
            raise ValueError(f"betas: {self.betas!r} is not two numbers in [0, 1)")
        if self.cycle is not None and self.schedule != "cosine":
            raise ValueError(f"cycle: {self.cycle!r} means nothing to a {self.schedule} schedule")
        limits = {
            "max_steps": 1, "warmup": 0, "patience": 1, "cycle": 1, "cycle_tokens": 1,
            "lr_width": 1, "learned": 0,
        }  # fmt: skip
        for name, least in limits.items():
            value = getattr(self, name)
            if value is None and name in ("patience", "cycle", "cycle_tokens", "lr_width"):
                continue
            if not is_integer(value) or value < least:
                raise ValueError(f"{name}: {value!r} is not a 64-bit integer of at least {least}")
        # Results store them as JSON, which numpy's numbers are not.
        for name in vars(self):
            if is_number(value := getattr(self, name)):
                object.__setattr__(self, name, plain_number(value))
        object.__setattr__(self, "betas", tuple(map(plain_number, self.betas)))

    @property
    def adamw(self) -> AdamWSettings:
        return AdamWSettings(self.betas, self.eps, self.weight_decay)

    def at_width(self, width: int, prior: bool) -> Recipe:
        """Return these settings for vectors of `width` coordinates, from a prior or without one."""
        if prior and self.prior_rate is not None:
            lr = self.prior_rate / math.sqrt(width)
            decay = self.weight_decay * self.lr / lr
            return replace(self, lr=lr, lr_width=None, weight_decay=decay, prior_rate=None)
        if self.lr_width is None:
            return self
        return replace(self, lr=self.lr * math.sqrt(self.lr_width / width), lr_width=None)

    def lr_at(self, step: Tensor, tokens: Tensor | int = 0, cold: Tensor | bool = False) -> Tensor:
        """Return the rate of the update that follows `step` updates, on the device, row by row.

        tokens: the length of each row's text, for `cycle_tokens`
        cold: rows that go on cold, bool, for `cold`
        """
        length = torch.as_tensor(tokens, device=step.device).expand_as(step)
        step = step.float()  # or torch's default dtype would be that of the quotients
        rate = torch.full_like(step, self.lr)
        if self.schedule == "cosine":
            falling = (1 + torch.cos(math.pi * self._phase(step, length))) / 2
            rate = rate * (falling if self.cooling == 1.0 else falling**self.cooling)
        if self.warmup:
            rate = rate * ((step + 1) / self.warmup).clamp(max=1.0)
        if self.cold is None:
            return rate
        cold = torch.as_tensor(cold, device=step.device)
        return torch.where(cold, rate.clamp(max=self.cold * self.lr), rate)

    def end_of_cycle(self, step: int, tokens: int = 0) -> int:
        """Return the step at which the cosine that `step` is in has come to zero."""
        if self.cycle is None:
            return self.max_steps
        for _, end in self._cycles(torch.tensor(tokens, dtype=torch.int64, device="cpu")):
            if step < end:
                return min(int(end), self.max_steps)
        return self.max_steps

    def restarts(self, step: Tensor, tokens: Tensor) -> Tensor:
        """Flag rows that have made `step` updates and start a further cosine, hot again: bool."""
        return (self._phase(step, tokens) == 0) & (step > 0)

    def _phase(self, step: Tensor, tokens: Tensor) -> Tensor:
        """Return how much of its cosine is behind a row that has made `step` updates, in [0, 1]."""
        if self.cycle is None:
            return step / self.max_steps
        # The number of a row's cycle comes from comparisons, for a logarithm may round the first
        # step of a cycle into the one before.
        phase = torch.zeros_like(step)
        for start, end in self._cycles(tokens):
            inside = (step >= start) & (step < end)
            phase = torch.where(inside, (step - start) / (end - start), phase)
        return phase

    def _cycles(self, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield where each cycle of texts of `tokens` starts and ends, in updates, int64."""
        assert self.cycle is not None
        shortest = torch.zeros_like(tokens)
        if self.cycle_tokens is not None:
            shortest = -(-self.cycle * tokens // self.cycle_tokens)  # rounded up
            shortest = shortest.clamp(max=self.max_steps)
        start, length = torch.zeros_like(tokens), self.cycle
        # Those of a short text, which start first, start at cycle · (2^k − 1).
        while length - self.cycle <= self.max_steps:
            end = start + shortest.clamp(min=length)
            yield start, end
            start, length = end, 2 * length


# The paper's §4.1: AdamW lr 0.01, betas (0.9, 0.9), weight decay 0.01, N(0, 1), at most 5000 steps,
# stop at accuracy 1.0, no schedule.
PAPER = Recipe(name="paper")

# A higher learning rate: an update is 0.7 long in the d-dimensional norm, whatever the model. It
# falls by the square of a cosine, for it is the cooling that ends a fit, in cycles of 300, 600,
# 1200 and 2400 updates, so that hard texts get a long one; a text of more than 16 tokens gets one
# from the first. A start nearer to the size of embeddings, or a learned one where the model brings
# it: from there the way is short, and an update 0.4 long. A sharpened loss that weighs the tokens
# still wrong. A margin above what the model's dtype rounds away, so that what is exact stays so
# under other kernels; for that a row that is right goes on cold, for it has nothing left to find.
FAST = Recipe(
    name="fast",
    lr=0.1,
    lr_width=48,
    betas=(0.8, 0.9),
    weight_decay=0.1,
    schedule="cosine",
    cycle=300,
    cycle_tokens=16,
    cooling=2.0,
    warmup=5,
    init_std=0.3,
    prior_rate=0.4,
    against_sink=True,
    shipped_prior=True,
    temperature=0.5,
    max_steps=4500,
    margin=0.2,
    spreads=2.0,
    cold=0.1,
)

# A learned optimiser begins, and `fast` goes on from its best vectors. Most tokens of a long text
# are right there, so the first cosine is as short as that of a short one.
LEARNED = replace(FAST, name="learned", learned=10, cycle_tokens=None)


def recipe_of(recipe: str | Recipe, max_steps: int | None = None) -> Recipe:
    """Return the recipe itself, or the one of that name; `max_steps` replaces its own."""
    if max_steps is not None:
        return replace(recipe_of(recipe), max_steps=max_steps)
    if isinstance(recipe, Recipe):
        return recipe
    if recipe == "paper":
        return PAPER
    if recipe == "fast":
        return FAST
    if recipe == "learned":
        return LEARNED
    known = ("fast", "paper", "learned")
    raise ValueError(
        f"recipe: {recipe!r} is not 'fast', 'paper', 'learned' or a Recipe" + hint(recipe, known)
    )
