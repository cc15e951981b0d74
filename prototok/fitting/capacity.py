"""`capacity`: the longest prefix of each text that two vectors hold.

Letters: T texts, N targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prototok.common.arguments import batch_size_of, is_count, listed_items
from prototok.common.progress import Progress
from prototok.common.shown import shapes
from prototok.common.world import own_world
from prototok.decoding.decode import require_length
from prototok.fitting.driver import EndedRow, fit_groups
from prototok.fitting.engine.rows import Group, Row
from prototok.fitting.engine.run import FitEvent
from prototok.fitting.fast_fit import one_forward
from prototok.fitting.front import front_of
from prototok.fitting.prior import Prior, require_prior
from prototok.fitting.recipe import Recipe, recipe_of
from prototok.fitting.under_way import UnderWay
from prototok.fitting.verify import Verified, verify
from prototok.model.frozen_lm import FrozenLM, require_frozen
from prototok.model.in_front import PrefixLike
from prototok.model.prefix import Prefix
from prototok.results.arrangement import Arrangement
from prototok.texts.targets import Texts, targets_of

# Below this token accuracy a warm start is too far off for a fresh one to be worth its cost.
_NEAR = 0.9

# The paper's Table 3.
GRID = (4, 5, 8, 11, 16, 22, 32, 45, 64, 90, 128, 181, 256, 362, 512, 724, 1024, 1448)


@dataclass(frozen=True, eq=False)
class Capacity:
    """The part of each text that came back; every tensor is (T,).

    exact    int64, the longest N of the grid that came back whole; 0 where none did
    at_099   int64, the longest N at token accuracy ≥ 0.99
    ended    bool: the text, the model's context or the grid ended first, so there may be more
    steps    int64, updates of all its fits
    seconds  fp32, its share of the wall time
    """

    lengths: tuple[int, ...]
    exact: Tensor
    at_099: Tensor
    ended: Tensor
    steps: Tensor
    seconds: Tensor

    __repr__ = shapes


@dataclass(frozen=True, eq=False)
class Growth:
    """How far one text has come along the grid, and all that is needed to go on from there.

    text     its place in the list
    stage    lengths of the grid that are behind it, and so the place of the next
    failed   fits of the next length that have failed
    exact    the longest N so far that came back whole, at_099 at token accuracy ≥ 0.99
    steps    updates of all its fits so far, seconds their share of the wall time
    start    (slots, d) fp32, vectors of the length before; None: the next fit has fresh ones
    """

    text: int
    stage: int = 0
    failed: int = 0
    exact: int = 0
    at_099: int = 0
    steps: int = 0
    seconds: float = 0.0
    start: Tensor | None = None

    def after(self, one: EndedRow[Verified], length: int, restarts: int) -> Growth:
        """Return where the text stands after a fit of its next length."""
        check = one.check
        spent = replace(self, steps=self.steps + one.steps, seconds=self.seconds + one.seconds)
        if check.accuracy >= 0.99:
            exact = length if check.exact else self.exact
            return replace(
                spent, stage=self.stage + 1, failed=0, exact=exact, at_099=length,
                start=one.vectors,
            )  # fmt: skip
        warm = self.start is not None
        if warm and check.accuracy < _NEAR:
            return replace(spent, failed=restarts + 1, start=None)
        # The first failure was that of the warm start, which the first length has not.
        more = 1 + (not warm and self.failed == 0)
        return replace(spent, failed=self.failed + more, start=None)

    def group(self, ids: Tensor, length: int) -> Group:
        """Return what is to be fitted next, of the text's ids (N,)."""
        row = Row(self.text, self.text, self.failed, ids[:length], self.start)
        return Group(self.text, (row,), None)


class CapacityInterrupted(KeyboardInterrupt):
    """Ctrl-C during `capacity`; a call with the same arguments and `grown` goes on from there.

    `texts` are the places of those that had ended, and `result` is of these.
    """

    def __init__(self, result: Capacity, texts: list[int], grown: list[Growth]) -> None:
        super().__init__(f"interrupted with {len(texts)} texts measured")
        self.result, self.texts, self.grown = result, texts, grown

    def __reduce__(self) -> tuple:  # an exception by itself is made again of its message
        return CapacityInterrupted, (self.result, self.texts, self.grown)


@own_world
def capacity(
    lm: FrozenLM,
    texts: Texts,
    *,
    lengths: Sequence[int] = GRID,
    recipe: str | Recipe = "fast",
    prefix: PrefixLike | Prefix = "auto",
    init: Prior | None = None,
    restarts: int = 1,
    backend: str = "auto",
    batch_size: int | str = "auto",
    progress: bool | None = None,
    grown: Sequence[Growth] = (),
    on_fit: Callable[[Growth], None] | None = None,
) -> Capacity:
    """Grow each text's prefix along the grid until it no longer comes back (Table 3's C_tokens).

    A prefix starts from the vectors of the one before it; where that fails with nine tokens of ten
    right, from fresh ones, with another seed. All texts go through the same slots. A prefix that
    fails ends its text, so of all the fits of a grid that would fail only the first is made.

    Args:
        lm: the frozen model, from `prototok.load`.
        texts: strings, ragged lists of token ids, or a LongTensor (T, N).
        lengths: the grid, rising.
        recipe: "fast", "paper", or a `Recipe`; its `max_steps` are those of one fit.
        prefix: what stands in front of e, as in `fast_fit`.
        init: where fresh vectors start, as in `fast_fit`.
        restarts: fresh starts after a warm one has come near and failed.
        backend, batch_size, progress: as in `fast_fit`.
        grown: how far an earlier call with the same arguments has come, to go on from there.
        on_fit: called after every fit with how far its text has come, to keep it.

    Raises:
        ValueError: an argument that cannot be met, named.
        CapacityInterrupted: Ctrl-C; carries how far each text has come.
    """
    require_frozen(lm)
    grid = tuple(listed_items(lengths) or ())
    if not grid or not all(is_count(n) for n in grid) or list(grid) != sorted(set(grid)):
        raise ValueError(f"lengths: {lengths!r} is not a rising list of positive integers")
    grid = tuple(int(n) for n in grid)
    if not is_count(restarts) and restarts != 0:
        raise ValueError(f"restarts: {restarts!r} is not an integer of at least 0")
    if init is not None:
        require_prior("init", init, lm)
    settings, layout = recipe_of(recipe), Arrangement.parse("e m*")
    targets = targets_of(lm, texts)
    lm, _ = front_of(lm, prefix, settings, init)
    setup = one_forward(lm, layout, settings, init, backend, batch_size_of(batch_size))
    room = [n for n in grid if lm.context is None or layout.input_length(n) <= lm.context]
    require_length(grid[0], lm, layout)

    reaches = [sum(n <= len(ids) for n in room) for ids in targets]
    state = _begun(grown, reaches, (layout.slots, lm.hidden_size))

    def has_ended(growth: Growth) -> bool:
        return growth.failed > restarts or growth.stage == reaches[growth.text]

    def result(growths: list[Growth]) -> Capacity:
        def column(read: Callable[[Growth], float], dtype: torch.dtype) -> Tensor:
            return torch.tensor([read(growth) for growth in growths], dtype=dtype, device="cpu")

        return Capacity(
            lengths=grid,
            exact=column(lambda g: g.exact, torch.int64),
            at_099=column(lambda g: g.at_099, torch.int64),
            ended=column(lambda g: g.stage == reaches[g.text], torch.bool),
            steps=column(lambda g: g.steps, torch.int64),
            seconds=column(lambda g: g.seconds, torch.float32),
        )

    try:
        with Progress(len(state), "capacity", progress) as bar:
            while left := [growth for growth in state if not has_ended(growth)]:
                groups = [growth.group(targets[growth.text], room[growth.stage]) for growth in left]
                watching = _Watching(bar, UnderWay(groups, setup), len(state) - len(left))
                for group, (one,) in fit_groups(setup, groups, verify, watching.see):
                    watching.under_way.end([one])
                    before = state[group.index]
                    now = before.after(one, room[before.stage], restarts)
                    if on_fit is not None:
                        on_fit(now)
                    state[group.index] = now  # what could not be kept does not count
    except KeyboardInterrupt:
        over = [growth for growth in state if has_ended(growth)]
        raise CapacityInterrupted(result(over), [g.text for g in over], state) from None
    return result(state)


@dataclass(frozen=True)
class _Watching:
    """Shows how far the fits of one length a text are, with so many texts over."""

    bar: Progress
    under_way: UnderWay
    over: int

    def see(self, event: FitEvent) -> None:
        self.under_way.see(event)
        self.bar.update(self.over, self.note)

    def note(self) -> str:
        return (
            f"{self.under_way.texts} still growing, at their next lengths {self.under_way.note()}"
        )


def _begun(grown: object, reaches: list[int], shape: tuple[int, int]) -> list[Growth]:
    """Return how far each text has come; ValueError where `grown` cannot be of these texts."""
    found = listed_items(grown)
    if found is None or not all(isinstance(growth, Growth) for growth in found):
        raise ValueError(f"grown: {grown!r} is not a list of Growth")
    state = [Growth(t) for t in range(len(reaches))]
    for growth in found:
        fits = 0 <= growth.text < len(state) and 0 <= growth.stage <= reaches[growth.text]
        if not fits or (growth.start is not None and growth.start.shape != shape):
            raise ValueError(f"grown: text {growth.text} has not come so far in these texts")
        state[growth.text] = growth
    return state
