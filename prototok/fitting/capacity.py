"""`capacity`: the longest prefix of each text that two vectors hold.

Letters: T texts, N targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prototok.common.arguments import batch_size_of, is_count, listed_items
from prototok.common.progress import Progress
from prototok.common.shown import shapes
from prototok.common.world import own_world
from prototok.decoding.decode import require_length
from prototok.fitting.driver import fit_groups
from prototok.fitting.engine.rows import Group, Row
from prototok.fitting.fast_fit import one_forward
from prototok.fitting.front import front_of
from prototok.fitting.prior import Prior
from prototok.fitting.recipe import Recipe, recipe_of
from prototok.fitting.verify import verify
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

    Raises:
        ValueError: an argument that cannot be met, named.
    """
    require_frozen(lm)
    grid = tuple(listed_items(lengths) or ())
    if not grid or not all(is_count(n) for n in grid) or list(grid) != sorted(set(grid)):
        raise ValueError(f"lengths: {lengths!r} is not a rising list of positive integers")
    grid = tuple(int(n) for n in grid)
    if not is_count(restarts) and restarts != 0:
        raise ValueError(f"restarts: {restarts!r} is not an integer of at least 0")
    if init is not None:
        init.require_model(lm)
    settings, layout = recipe_of(recipe), Arrangement.parse("e m*")
    targets = targets_of(lm, texts)
    lm, _ = front_of(lm, prefix, settings, init)
    setup = one_forward(lm, layout, settings, init, backend, batch_size_of(batch_size))
    room = [n for n in grid if lm.context is None or layout.input_length(n) <= lm.context]
    require_length(grid[0], lm, layout)

    count = len(targets)
    exact, at_099, steps = (torch.zeros(count, dtype=torch.int64, device="cpu") for _ in range(3))
    seconds, ended = (
        torch.zeros(count, dtype=torch.float32, device="cpu"),
        torch.zeros(count, dtype=torch.bool, device="cpu"),
    )
    growing = [_Growth(t, ids) for t, ids in enumerate(targets)]
    for growth in growing:
        growth.reaches = sum(n <= len(growth.ids) for n in room)
        ended[growth.text] = growth.reaches == 0
    growing = [growth for growth in growing if growth.reaches]
    with Progress(count, "capacity", progress) as bar:
        while growing:
            groups = [growth.next_group(room) for growth in growing]
            for group, (one,) in fit_groups(setup, groups, verify, lambda event: None):
                growth = next(g for g in growing if g.text == group.index)
                check = one.check
                t, n = growth.text, room[growth.stage]
                steps[t] += one.steps
                seconds[t] += one.seconds
                if check.accuracy >= 0.99:
                    at_099[t] = n
                    exact[t] = n if check.exact else exact[t]
                    growth.start = one.vectors
                    growth.stage, growth.failed = growth.stage + 1, 0
                    ended[t] = growth.stage == growth.reaches
                else:
                    warm = growth.start is not None
                    # The first failure was that of the warm start, which the first prefix has not.
                    growth.failed += 1 + (not warm and growth.failed == 0)
                    if warm and check.accuracy < _NEAR:
                        growth.failed = restarts + 1
                    growth.start = None
            growing = [
                g for g in growing if g.failed <= restarts and g.stage < g.reaches
            ]  # fmt: skip
            bar.update(count - len(growing), f"{len(growing)} texts still growing")
    return Capacity(grid, exact, at_099, ended, steps, seconds)


@dataclass
class _Growth:
    """One text on its way along the grid."""

    text: int
    ids: Tensor  # (N,)
    stage: int = 0  # place in the grid of the prefix to fit next
    reaches: int = 0  # places of the grid that the text is long enough for
    failed: int = 0  # fits of this prefix that failed
    start: Tensor | None = None  # (slots, d), vectors of the prefix before

    def next_group(self, grid: Sequence[int]) -> Group:
        row = Row(self.text, self.text, self.failed, self.ids[: grid[self.stage]], self.start)
        return Group(self.text, (row,), None)
