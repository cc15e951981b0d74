"""Paths between two solutions of one text: the straight segment and a fitted Bezier curve.

Letters: P pairs, S points along a path, B rows of a batch, N targets (of the longest row), L input
positions, K leading vectors, d hidden size. A row's slots are its e₁ … e_K and, where the
arrangement has one, m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from prototok.common.arguments import is_betas, is_count, is_integer, is_number, require_seed
from prototok.common.shown import shapes
from prototok.common.world import own_world
from prototok.fitting.engine.inputs import OneForward
from prototok.model.frozen_lm import FrozenLM, require_frozen
from prototok.results.arrangement import Arrangement
from prototok.results.fit_result import FitResult
from prototok_kernels.adamw_rows import AdamWSettings, AdamWState, adamw_rows_
from prototok_kernels.linear_cross_entropy import HeadOutput, linear_cross_entropy


@dataclass(frozen=True, eq=False)
class Paths:
    """P paths, each between two rows of a fit, at S values of t from 0 to 1.

    pairs     (P, 2) int64, rows of the fit (text × seeds + seed)
    t         (S,) fp64
    accuracy  (P, S) fp32, token accuracy at each point, in the model's dtype and in a batch
    length    (P,) fp64, of the polyline through the S points, over the vectors that move
    straight  (P,) fp64, distance of the two ends
    control   (P, slots, d) fp32 control points; None for straight segments
    steps     (P,) int64 updates of the control point; 0 for straight segments
    """

    pairs: Tensor
    t: Tensor
    accuracy: Tensor
    length: Tensor
    straight: Tensor
    control: Tensor | None
    steps: Tensor

    __repr__ = shapes

    @property
    def length_ratio(self) -> Tensor:
        """Return (P,) length of the path over that of the segment; the paper's is at most 1.2."""
        return self.length / self.straight


@dataclass(frozen=True)
class BezierSettings:
    """Settings of fitting a control point.

    Attributes:
        lr, betas: AdamW's, without weight decay.
        max_steps: most updates.
        samples: values of t drawn anew for each update.
        check_every: updates between looks at the whole curve; a curve that is right at every point
            is done, and of a curve that never is the best one seen is kept.
        seed: of the draws.
    """

    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_steps: int = 5000
    samples: int = 8
    check_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "samples", "check_every"):
            if not is_count(getattr(self, name)):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not a positive integer")
        require_seed(self.seed)
        if not (is_number(self.lr) and self.lr > 0):
            raise ValueError(f"lr: {self.lr!r} is not a positive number")
        if not is_betas(self.betas):
            raise ValueError(f"betas: {self.betas!r} is not two numbers in [0, 1)")


@own_world
def interpolate(
    lm: FrozenLM,
    fit: FitResult,
    pairs: Sequence[tuple[int, int]] | None = None,
    points: int = 101,
    batch_size: int = 64,
    backend: str = "auto",
) -> Paths:
    """Measure accuracy along straight segments p(t) = (1 − t) p₁ + t p₂ (the paper's Figure 6).

    Args:
        lm: the model that `fit` was made on.
        fit: solutions; a vector that both ends have in common stays where it is.
        pairs: rows of the fit (text × seeds + seed), two with the same targets each. None: every
            two exact seeds of every text.
        points: values of t, evenly spaced, both ends among them.
        batch_size: rows a forward.
        backend: which kernels: "torch", "triton" (CUDA), "cpu" (C++), or "auto".

    Raises:
        ValueError: another model, pairs that are none, or fewer than two points.
    """
    _require_rows(batch_size)
    ends = _Ends.of(lm, fit, pairs, backend)
    t = _grid(points)
    still = torch.zeros(len(ends.pairs), dtype=torch.int64, device="cpu")
    accuracy = ends.accuracy(None, t, batch_size)
    straight = ends.straight()
    return Paths(ends.pairs, t, accuracy, straight.clone(), straight, None, still)


@own_world
def connect(
    lm: FrozenLM,
    fit: FitResult,
    pairs: Sequence[tuple[int, int]] | None = None,
    points: int = 101,
    settings: BezierSettings | None = None,
    batch_size: int = 64,
    backend: str = "auto",
) -> Paths:
    """Fit φ(t) = (1 − t)² p₁ + 2 t (1 − t) π + t² p₂ so that every point reconstructs the text.

    Minimises the fit loss at φ(t), t uniform in [0, 1], over the one control point π, which starts
    half-way (the paper's quadratic Bezier curves, Figure 6). Arguments as in `interpolate`.
    """
    settings = BezierSettings() if settings is None else settings
    if not isinstance(settings, BezierSettings):
        raise ValueError(f"settings: {type(settings).__name__} is not BezierSettings")
    _require_rows(batch_size)
    ends = _Ends.of(lm, fit, pairs, backend)
    t = _grid(points)
    at_once = max(1, batch_size // settings.samples)
    parts = [
        _fit_curves(ends.part(list(range(start, min(start + at_once, len(ends.pairs))))), t,
                    settings, batch_size)
        for start in range(0, len(ends.pairs), at_once)
    ]  # fmt: skip
    control, accuracy, steps = (torch.cat(column) for column in zip(*parts, strict=True))
    return Paths(ends.pairs, t, accuracy, ends.length(control, t), ends.straight(), control, steps)


def bezier(ends: Tensor, control: Tensor, t: Tensor) -> Tensor:
    """Evaluate φ(t): ends (P, 2, slots, d), control points (P, slots, d), t (P, S) or (S,).

    Returns (P, S, slots, d).
    """
    t = t.expand(len(ends), -1)[..., None, None].to(ends.dtype)
    first, last, control = ends[:, :1], ends[:, 1:], control[:, None]
    return (1 - t) ** 2 * first + 2 * t * (1 - t) * control + t**2 * last


@dataclass(frozen=True, eq=False)
class _Ends:
    """The two ends of each path and the text they both stand for."""

    lm: FrozenLM
    inputs: OneForward
    pairs: Tensor  # (P, 2)
    ends: Tensor  # (P, 2, slots, d) fp32 on the model's device
    targets: list[Tensor]  # P of (N,)
    backend: str

    @classmethod
    def of(
        cls, lm: FrozenLM, fit: FitResult, pairs: Sequence[tuple[int, int]] | None, backend: str
    ) -> _Ends:  # fmt: skip
        require_frozen(lm)
        if not isinstance(fit, FitResult):
            raise ValueError(f"fit: {type(fit).__name__} is not a FitResult")
        tokens = fit.tokens
        pairs = pairs.tolist() if isinstance(pairs, Tensor) else pairs
        tokens.require_model(lm)
        lm = lm.behind(tokens.prefix)
        seeds = tokens.seeds
        try:
            chosen = _exact_pairs(fit) if pairs is None else [tuple(pair) for pair in pairs]
        except TypeError:
            raise ValueError(f"pairs: {pairs!r} is not a list of pairs of rows") from None
        if not chosen:
            raise ValueError("pairs: there are no two exact solutions of one text to connect")
        for pair in chosen:
            whole = len(pair) == 2 and all(map(is_integer, pair))
            inside = whole and all(0 <= row < len(tokens) for row in pair)
            texts = [fit.targets[row // seeds] for row in pair] if inside else []
            if not texts or pair[0] == pair[1] or not torch.equal(*texts):
                raise ValueError(f"pairs: {pair!r} is not two solutions of one text")
        arrangement = Arrangement.parse(tokens.arrangement)
        ends = torch.stack([torch.stack([tokens.vectors(row) for row in p]) for p in chosen])
        targets = [fit.targets[first // seeds] for first, _ in chosen]
        return cls(
            lm, OneForward(arrangement), torch.tensor(chosen, dtype=torch.int64, device="cpu"),
            ends.to(lm.device), targets, backend,
        )  # fmt: skip

    def part(self, at: list[int]) -> _Ends:
        """Return some of the paths."""
        targets = [self.targets[i] for i in at]
        ends = self.ends[torch.tensor(at, dtype=torch.int64, device="cpu").to(self.ends.device)]
        return _Ends(self.lm, self.inputs, self.pairs[at], ends, targets, self.backend)

    def straight(self) -> Tensor:
        return (self.ends[:, 0] - self.ends[:, 1]).double().flatten(1).norm(dim=1).cpu()

    def length(self, control: Tensor, t: Tensor) -> Tensor:
        """Return (P,) length of the polyline through the curve's points at t."""
        t = t.to(self.ends.device, control.dtype)
        points = bezier(self.ends.double(), control.double().to(self.ends.device), t)
        return (points[:, 1:] - points[:, :-1]).flatten(2).norm(dim=2).sum(1).cpu()

    def head(self, vectors: Tensor, path: Tensor, need_grad: bool) -> tuple[Tensor, HeadOutput]:
        """Compute hidden states (B · N, d) of rows (B, slots, d) of the paths `path` (B,)."""
        rows = [self.targets[i] for i in path.tolist()]
        lengths = [len(ids) for ids in rows]
        targets = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.lm.device)
        layout = self.inputs.lay_out(targets, lengths, self.lm.dtype).to(self.lm.device)
        embeds = self.inputs.embeds(vectors, layout)
        plan = self.lm.plan(len(embeds), embeds.shape[1], self.backend)
        hidden = self.lm.body.hidden(embeds, plan)
        offset = self.inputs.offset
        hidden = hidden[:, offset : offset + targets.shape[1]].flatten(0, 1)
        position = torch.arange(targets.shape[1], device=targets.device)
        scored = position < torch.tensor(lengths, device=targets.device, dtype=torch.int64)[:, None]
        output = linear_cross_entropy(
            hidden.detach(), self.lm.body.head, targets.flatten(), scored.flatten().float(),
            need_grad=need_grad, backend=plan.head.taken,
        )  # fmt: skip
        return hidden, output

    @torch.no_grad()
    def accuracy(self, control: Tensor | None, t: Tensor, batch_size: int) -> Tensor:
        """Measure (P, S) accuracy at t (S,) of the curves; without control, of the segments."""
        if control is None:
            control = self.ends.mean(1)  # a control point half-way makes the curve the segment
        found = []
        for path, targets in enumerate(self.targets):
            rows = bezier(self.ends[path : path + 1], control[path : path + 1], t.to(control))[0]
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                at = torch.full((len(part),), path, dtype=torch.int64, device="cpu")
                predicted = self.head(part, at, need_grad=False)[1].predicted
                right = predicted.view(len(part), -1).cpu() == targets
                found.append(right.float().mean(1))
        return torch.cat(found).view(len(self.targets), len(t))


def _fit_curves(
    ends: _Ends, t: Tensor, settings: BezierSettings, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit control points (P, slots, d); return accuracy along them (P, S) and updates (P,) too."""
    control = ends.ends.mean(1)
    adam = AdamWState.zeros(control.flatten(1))
    constants = AdamWSettings(settings.betas, weight_decay=0.0)
    rate = torch.full((len(control),), settings.lr, device=control.device, dtype=torch.float32)
    generator = torch.Generator().manual_seed(settings.seed)
    best, best_accuracy = control.clone(), ends.accuracy(control, t, batch_size)
    active = best_accuracy.amin(1) < 1.0
    backend = ends.lm.plan(len(control), 1, ends.backend).update.taken
    alive = here = active.new_empty(0, dtype=torch.int64)  # what is active, on the host and not
    part = ends
    for step in range(1, settings.max_steps + 1):
        if int(active.sum()) != len(alive):
            alive = active.nonzero()[:, 0]
            here, part = alive.to(control.device), ends.part(alive.tolist())
        if not len(alive):
            break
        drawn = torch.rand(
            len(control), settings.samples, generator=generator, dtype=torch.float32, device="cpu"
        )[alive]
        grad = torch.zeros_like(control)
        grad[here] = _gradient(part, control[here], torch.arange(len(alive), device="cpu"), drawn)
        adamw_rows_(
            control.flatten(1),
            grad.flatten(1),
            adam,
            rate,
            active.to(control.device),
            constants,
            backend=backend,
        )
        if step % settings.check_every == 0 or step == settings.max_steps:
            seen = part.accuracy(control[here], t, batch_size)
            better = alive[seen.mean(1) > best_accuracy[alive].mean(1)]
            best_accuracy[better] = seen[torch.isin(alive, better)]
            there = better.to(control.device)
            best[there] = control[there]
            active[alive[seen.amin(1) == 1.0]] = False
    return best.cpu(), best_accuracy, adam.step.cpu()


def _gradient(ends: _Ends, control: Tensor, path: Tensor, t: Tensor) -> Tensor:
    """Return (A, slots, d): the gradient in the control points of the loss summed over t."""
    leaf, both = control.detach().requires_grad_(), ends.ends[path.to(control.device)]
    rows = bezier(both, leaf, t.to(control)).flatten(0, 1)
    hidden, output = ends.head(rows, path.repeat_interleave(t.shape[1]), need_grad=True)
    (grad,) = torch.autograd.grad(hidden, leaf, output.grad_hidden)
    moves = (both[:, 0] != both[:, 1]).any(-1, keepdim=True)  # not so a vector they share
    return grad * moves


def _exact_pairs(fit: FitResult) -> list[tuple[int, int]]:
    seeds = fit.tokens.seeds
    found = []
    for text, exact in enumerate(fit.exact):
        rows = [text * seeds + s for s in exact.nonzero()[:, 0].tolist()]
        found += list(combinations(rows, 2))
    return found


def _require_rows(batch_size: object) -> None:
    if not is_count(batch_size):
        raise ValueError(f"batch_size: {batch_size!r} is not a positive integer")


def _grid(points: int) -> Tensor:
    if not is_count(points) or points < 2:
        raise ValueError(f"points: {points!r} is not an integer of at least 2")
    return torch.linspace(0, 1, points, dtype=torch.float64, device="cpu")
