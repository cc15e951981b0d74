"""What the page does: fit a text and let it be watched, and walk between two solutions of it.

Nothing here knows of a browser. Letters: N tokens of the text, S solutions, d hidden size.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from prototok.decoding.decode import decode, decode_vectors
from prototok.fitting.fast_fit import FitEvent, fast_fit
from prototok.fitting.front import front_of
from prototok.fitting.recipe import FAST
from prototok.geometry.paths import BezierSettings, Paths, bezier, connect, interpolate
from prototok.model.frozen_lm import FrozenLM
from prototok.results.arrangement import Arrangement
from prototok.results.fit_result import FitResult
from prototok.texts.targets import targets_of

MOST_TOKENS = 64
SOLUTIONS = 2
POINTS = 51  # of a path, where its accuracy is measured
_PAIR = Arrangement.parse("e m*")
_CURVE = BezierSettings(max_steps=300, check_every=25)


@dataclass(frozen=True)
class Look:
    """One solution at one moment, decoded alone in the model's dtype.

    step    updates made before
    ids     (N,) int64, what comes; right (N,) bool, where that is the text
    margin  (N,) fp32, target logit − best other logit
    """

    step: int
    ids: Tensor
    right: Tensor
    margin: Tensor


@dataclass
class Film:
    """A fit as it is watched.

    lm       the model, behind what the recipe puts in front
    targets  (N,) int64
    looks    of each solution, one whenever its vectors became better
    step     updates made, of `most`
    fit      the result; None while it is made
    """

    lm: FrozenLM
    targets: Tensor
    most: int = FAST.max_steps
    step: int = 0
    looks: tuple[list[Look], ...] = field(
        default_factory=lambda: tuple([] for _ in range(SOLUTIONS))
    )
    fit: FitResult | None = None

    def look_at(self, solution: int, step: int) -> Look:
        """Return the look of a solution that was the last one after `step` updates."""
        looks = self.looks[solution]
        return next((one for one in reversed(looks) if one.step <= step), looks[0])

    def seen(self, vectors: Tensor, step: int) -> Look:
        """Decode vectors (slots, d)."""
        found = decode_vectors(
            self.lm, vectors[None], _PAIR, len(self.targets), self.targets[None], "auto"
        )
        ids = found.ids[0]
        return Look(step, ids, ids == self.targets, found.margin[0])


def film_of(lm: FrozenLM, text: str) -> Film:
    """Take a text, before anything is fitted.

    Raises:
        ValueError: no text, one of too many tokens, or one that the tokenizer cannot take.
    """
    if not text.strip():
        raise ValueError("Type a text first.")
    try:
        (targets,) = targets_of(lm, [text])
    except ValueError as error:
        raise ValueError(f"This text cannot be fitted: {error}.") from None
    if len(targets) > MOST_TOKENS:
        raise ValueError(
            f"This text has {len(targets)} tokens. Take one of at most {MOST_TOKENS}: "
            f"{lm.identity.name} is small, and holds few."
        )
    return Film(front_of(lm, "auto", FAST)[0], targets)


def watch(film: Film, pace: float = 0.0) -> Iterator[Film]:
    """Fit the film's text from two seeds, and yield the film whenever it has grown.

    The fit runs on a thread of its own, which ends when this iterator is closed. It waits `pace`
    seconds after each look, so that people can follow.
    """
    news: queue.SimpleQueue[FitResult | BaseException | None] = queue.SimpleQueue()
    closed = threading.Event()
    last: dict[int, Tensor] = {}

    def add(row: int, step: int, vectors: Tensor | None) -> bool:
        if vectors is None or (row in last and torch.equal(vectors, last[row])):
            return False
        last[row] = vectors
        film.looks[row].append(film.seen(vectors, step))
        return True

    def look(event: FitEvent) -> None:
        if closed.is_set():
            raise _NobodyWatches
        seen = list(zip(event.rows.tolist(), event.steps.tolist(), strict=True))
        film.step = max(film.step, *(step for _, step in seen))
        grown = [add(row, step, event.best_of(row)) for row, step in seen]
        if any(grown):
            news.put(None)
            closed.wait(pace)

    def work() -> None:
        try:
            targets = [film.targets.tolist()]
            fit = fast_fit(film.lm, targets, seeds=SOLUTIONS, progress=False, callback=look)
            for row, step in enumerate(fit.steps[0].tolist()):
                add(row, step, fit.tokens.vectors(row))
            news.put(fit)
        except BaseException as error:
            news.put(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while film.fit is None:
            found = news.get()
            while found is None and not news.empty():  # whoever looks on may be slower
                found = news.get()
            if isinstance(found, BaseException):
                raise found
            film.fit = found
            yield film
    finally:
        closed.set()
        worker.join()


class _NobodyWatches(Exception):
    """Ends a fit whose film is no longer looked at."""


def decoded(film: Film) -> list[str]:
    """Decode both solutions, one forward each, as `prototok.decode` does."""
    assert film.fit is not None
    return decode(film.lm, film.fit, text=True)


@dataclass(frozen=True)
class Walk:
    """Ways from one solution to the other: the straight segment and, once fitted, a curve."""

    film: Film
    straight: Paths
    curve: Paths | None = None

    def accuracy(self) -> dict[str, list[float]]:
        """Return the token accuracy at `POINTS` values of t from 0 to 1, by way."""
        ways = {"straight": self.straight} | ({} if self.curve is None else {"curve": self.curve})
        return {name: paths.accuracy[0].tolist() for name, paths in ways.items()}

    def at(self, t: float, curved: bool) -> Look:
        """Decode the vectors at t of the curve, or of the segment."""
        ends = _ends(self.film)
        control = ends.mean(1)  # half-way: the segment
        if curved and self.curve is not None:
            assert self.curve.control is not None
            control = self.curve.control
        place = torch.tensor([t], dtype=torch.float64, device="cpu")
        return self.film.seen(bezier(ends, control, place)[0, 0], 0)


def walk(film: Film) -> Walk:
    """Measure the straight segment between both solutions."""
    assert film.fit is not None
    return Walk(film, interpolate(film.lm, film.fit, [(0, 1)], POINTS))


def bend(way: Walk) -> Walk:
    """Fit a Bezier curve between the same solutions; seconds."""
    assert way.film.fit is not None
    return replace(way, curve=connect(way.film.lm, way.film.fit, [(0, 1)], POINTS, _CURVE))


def _ends(film: Film) -> Tensor:
    """Return the vectors of both solutions, (1, 2, slots, d)."""
    assert film.fit is not None
    return torch.stack([film.fit.tokens.vectors(row) for row in range(SOLUTIONS)])[None]
