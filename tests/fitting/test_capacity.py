"""`capacity`: prefixes grow until one no longer comes back, and the grid says the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import prototok
from prototok import FrozenLM, Recipe
from prototok.cli import main

QUICK = Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=200)
GRID = (1, 2, 3, 5, 8)


@pytest.fixture
def ids(small_lm: FrozenLM) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(small_lm.vocab_size, (6, 8), generator=generator)


def test_agrees_with_one_fit_a_length(small_lm: FrozenLM, ids: torch.Tensor) -> None:
    found = prototok.capacity(small_lm, ids, lengths=GRID, recipe=QUICK, progress=False)
    by_grid = torch.zeros(6, dtype=torch.int64)
    for place, n in enumerate(GRID):
        fit = prototok.fast_fit(small_lm, ids, length=n, recipe=QUICK)
        by_grid[fit.exact[:, 0]] = place
    place = torch.tensor([GRID.index(n) for n in found.exact.tolist()])
    assert int((place - by_grid).abs().max()) <= 1
    assert 1 <= int(place.min()) < len(GRID) - 1  # a capacity, not an end
    assert torch.equal(found.exact, found.at_099)  # below 100 tokens 0.99 is all of them
    assert torch.equal(found.ended, found.exact == GRID[-1])


def test_a_prefix_starts_from_the_one_before(small_lm: FrozenLM, ids: torch.Tensor) -> None:
    """With no update granted beyond the first prefix's, only a warm start can hold one token."""
    one = ids[:1, :1].expand(1, 2).clone()
    grown = prototok.capacity(small_lm, one, lengths=(1, 2), recipe=QUICK, restarts=0)
    alone = prototok.fast_fit(small_lm, one, length=1, recipe=QUICK)
    fresh = prototok.fast_fit(small_lm, one, length=2, recipe=QUICK)
    assert grown.exact.item() == 2
    assert int(grown.steps) - int(alone.steps) < int(fresh.steps)


def test_failures_are_tried_again_and_counted(small_lm: FrozenLM, ids: torch.Tensor) -> None:
    hopeless = dataclasses.replace(QUICK, max_steps=3, lr=1e-6)
    for restarts in (0, 2):
        found = prototok.capacity(
            small_lm, ids, lengths=(8,), recipe=hopeless, restarts=restarts, progress=False
        )
        assert found.exact.tolist() == [0] * 6 and not found.ended.any()
        assert found.steps.tolist() == [3 * max(1, restarts)] * 6


def test_far_off_is_not_tried_again(small_lm: FrozenLM) -> None:
    """Thirty tokens are out of reach of this model, and one fit at that length shows it."""
    ids = torch.randint(small_lm.vocab_size, (6, 30), generator=torch.Generator().manual_seed(6))
    alone = prototok.fast_fit(small_lm, ids, length=1, recipe=QUICK)
    found = prototok.capacity(small_lm, ids, lengths=(1, 30), recipe=QUICK, restarts=2)
    assert alone.exact.all() and found.exact.tolist() == [1] * 6
    assert torch.equal(found.steps, alone.steps[:, 0] + QUICK.max_steps)


def test_short_texts_end_before_their_capacity(small_lm: FrozenLM) -> None:
    found = prototok.capacity(small_lm, [[7], [7, 9, 11]], lengths=(2, 3), recipe=QUICK)
    assert found.exact.tolist() == [0, 3]
    assert found.ended.tolist() == [True, True]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lengths": ()}, "lengths"),
        ({"lengths": (4, 2)}, "lengths"),
        ({"lengths": (0, 2)}, "lengths"),
        ({"restarts": -1}, "restarts"),
        ({"lengths": (4000,)}, "length"),
    ],
)
def test_bad_arguments_are_named(small_lm: FrozenLM, options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: "):
        prototok.capacity(small_lm, [[1, 2, 3]], **options)


def test_command_line_refuses_what_cannot_be(tmp_path, capsys) -> None:
    book = tmp_path / "book.txt"
    book.write_text("It was the best of times.")
    with pytest.raises(SystemExit) as stop:
        main(["capacity", str(book), "--longest", "2"])
    assert stop.value.code == 2
    assert "longest: 2" in capsys.readouterr().err
