"""Initial vectors belong to a row and its seed, not to its place in a batch."""

from __future__ import annotations

import torch

from prototok.fitting.engine.rows import initial_vectors, make_groups

TEXTS = [torch.tensor([1, 2, 3]), torch.tensor([4, 5]), torch.tensor([6, 7, 8, 9])]


def test_rows_draw_the_same_whatever_stands_beside_them() -> None:
    alone = make_groups([TEXTS[1]], [3], None, None)[0]
    among = next(u for u in make_groups(TEXTS[::-1], [0, 3], None, None) if u.rows[0].index == 3)
    assert among.rows[0].seed == 3 and torch.equal(among.rows[0].targets, TEXTS[1])
    for a, b in zip(
        initial_vectors(alone, 2, 8, 1.0), initial_vectors(among, 2, 8, 1.0), strict=True
    ):
        assert torch.equal(a, b)


def test_seeds_texts_and_kinds_draw_differently() -> None:
    groups = make_groups(TEXTS[:2], [0, 1], None, None)
    drawn = [v.flatten() for u in groups for v in initial_vectors(u, 1, 8, 1.0)]
    assert len({tuple(v.tolist()) for v in drawn}) == len(drawn) == 8


def test_draws_are_standard_normal_scaled() -> None:
    e, m = initial_vectors(make_groups(TEXTS[:1], [0], None, None)[0], 4, 20_000, 0.5)
    for v in (e, m):
        assert v.dtype == torch.float32
        assert abs(float(v.mean())) < 0.02
        assert abs(float(v.std()) - 0.5) < 0.01


def test_first_draws_are_pinned() -> None:
    """Stored fits name their seeds; another draw for the same seed would make those names lies."""
    e, _ = initial_vectors(make_groups(TEXTS[:1], [0], None, None)[0], 1, 3, 1.0)
    expected = torch.tensor([0.0816737, -2.3167794, -0.2958719])
    torch.testing.assert_close(e[0, 0], expected, atol=1e-6, rtol=0)


def test_groups_are_texts_after_one_another_with_all_their_seeds() -> None:
    groups = make_groups(TEXTS, [0, 1], "m", 2)
    assert [[(r.text, r.seed) for r in u.rows] for u in groups] == [
        [(0, 0), (0, 1), (1, 0), (1, 1)],
        [(2, 0), (2, 1)],
    ]
    e, m = initial_vectors(groups[0], 1, 8, 1.0)
    assert e.shape == (4, 1, 8) and m.shape == (1, 8)
    e, m = initial_vectors(make_groups(TEXTS, [0], "e", None)[0], 1, 8, 1.0)
    assert e.shape == (1, 1, 8) and m.shape == (3, 8)


def test_a_shared_vector_does_not_depend_on_the_order_of_its_texts() -> None:
    one = make_groups(TEXTS, [0], "m", None)[0]
    other = make_groups(TEXTS[::-1], [0], "m", None)[0]
    assert torch.equal(initial_vectors(one, 1, 8, 1.0)[1], initial_vectors(other, 1, 8, 1.0)[1])
