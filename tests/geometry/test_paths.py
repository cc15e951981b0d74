"""Paths between solutions: accuracy along them, their length, and the curve that is fitted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prototok
from prototok import FitResult, FrozenLM, fast_fit
from prototok.decoding.decode import decode_vectors
from prototok.geometry import BezierSettings
from prototok.geometry.paths import _Ends, _gradient, bezier
from prototok.results.arrangement import Arrangement

HELD_OUT = Path(prototok.__file__).parent / "models" / "tiny-neox" / "held_out.txt"


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return prototok.load("tiny-neox", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def fit(lm: FrozenLM) -> FitResult:
    """Two texts of different length, three seeds each, m shared."""
    ids = lm.encode(HELD_OUT.read_text(encoding="utf-8")[:2000])
    found = fast_fit(lm, [ids[40:46], ids[100:108]], seeds=3, share="m", progress=False)
    assert bool(found.exact.all())
    return found


def test_the_straight_path_is_what_decoding_gives_point_by_point(
    lm: FrozenLM, fit: FitResult
) -> None:
    paths = prototok.interpolate(lm, fit, [(0, 2), (3, 4)], points=9)
    assert paths.t.tolist() == [i / 8 for i in range(9)]
    for p, (a, b) in enumerate([(0, 2), (3, 4)]):
        target = fit.targets[a // 3]
        for i, t in enumerate(paths.t.tolist()):
            point = (1 - t) * fit.tokens.vectors(a) + t * fit.tokens.vectors(b)
            ids = decode_vectors(
                lm, point[None], Arrangement.parse("e m*"), len(target), None, "auto"
            ).ids[0]
            assert float(paths.accuracy[p, i]) == pytest.approx(
                float((ids == target).float().mean())
            )
        # m is shared, so e alone moves.
        apart = fit.tokens.e[a // 3, a % 3] - fit.tokens.e[b // 3, b % 3]
        assert float(paths.straight[p]) == pytest.approx(float(apart.norm()), rel=1e-6)
    assert bool((paths.accuracy[:, [0, -1]] == 1).all())
    assert paths.control is None and paths.length_ratio.tolist() == [1, 1]


def test_every_two_exact_seeds_are_a_pair(lm: FrozenLM, fit: FitResult) -> None:
    exact = fit.exact.clone()
    exact[0, 1] = False
    paths = prototok.interpolate(lm, dataclasses.replace(fit, exact=exact), points=2)
    assert paths.pairs.tolist() == [[0, 2], [3, 4], [3, 5], [4, 5]]


def test_the_curve_stays_where_the_segment_leaves(lm: FrozenLM, fit: FitResult) -> None:
    alone = fast_fit(lm, fit.targets, seeds=2, progress=False)  # both e and m move
    settings = BezierSettings(lr=0.1, max_steps=80, check_every=20)
    straight = prototok.interpolate(lm, alone, points=21)
    curve = prototok.connect(lm, alone, points=21, settings=settings)
    assert bool((straight.accuracy.amin(1) < 0.99).all())  # otherwise there is nothing to show
    assert bool((curve.accuracy.mean(1) > straight.accuracy.mean(1)).all())
    assert bool((curve.accuracy.amin(1) > straight.accuracy.amin(1)).all())
    assert bool((curve.length_ratio > 1).all())
    # The accuracy is that of the control point which is returned.
    ends = _Ends.of(lm, alone, None, "auto")
    assert torch.equal(ends.accuracy(curve.control, curve.t, 7), curve.accuracy)
    whole = curve.accuracy.amin(1) == 1
    assert bool((curve.steps[~whole] == 80).all()) and bool((curve.steps <= 80).all())


def test_a_shared_vector_stays_where_it_is(lm: FrozenLM, fit: FitResult) -> None:
    settings = BezierSettings(max_steps=5, check_every=1)
    ends = _Ends.of(lm, fit, [(0, 1)], "auto")
    assert fit.tokens.m is not None
    control = ends.ends.mean(1)
    assert _gradient(ends, control, torch.tensor([0]), torch.tensor([[0.5]]))[:, 0].any()
    curve = prototok.connect(lm, fit, [(0, 1)], points=5, settings=settings)
    assert curve.control is not None
    assert torch.equal(curve.control[:, 1], fit.tokens.m[:1])


def test_the_gradient_is_that_of_the_papers_loss(lm: FrozenLM, fit: FitResult) -> None:
    twin = lm.cast(torch.float64)
    ends = _Ends.of(twin, fit, [(0, 1), (3, 5)], "auto")
    ends = dataclasses.replace(ends, ends=ends.ends.double())
    t = torch.tensor([[0.2, 0.9], [0.5, 0.1]], dtype=torch.float64)
    control = ends.ends.mean(1) + 0.1
    ours = _gradient(ends, control, torch.arange(2), t)
    leaf = control.clone().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for p in range(2):
        target = ends.targets[p]
        for s in t[p]:
            a, b = ends.ends[p]
            point = (1 - s) ** 2 * a + 2 * s * (1 - s) * leaf[p] + s**2 * b
            embeds = torch.cat([point[:1], point[1:].expand(len(target) - 1, -1)])
            loss = loss + F.cross_entropy(twin.logits(embeds[None])[0], target, reduction="sum")
    (theirs,) = torch.autograd.grad(loss, leaf)
    # The head takes its logits in fp32: an error of its roundings, in units of the whole gradient.
    rounding = 4 * torch.finfo(torch.float32).eps * float(theirs.abs().max())
    torch.testing.assert_close(ours[:, 0], theirs[:, 0], rtol=0.0, atol=rounding)
    assert not ours[:, 1].any()


def test_the_length_of_a_parabola() -> None:
    """A quadratic curve's length has a closed form; the polyline comes near it from below."""
    ends = torch.tensor([[[[-1.0, 1.0]], [[1.0, 1.0]]]], dtype=torch.float64)
    control = torch.tensor([[[0.0, -1.0]]], dtype=torch.float64)  # y = x² from −1 to 1
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    points = bezier(ends, control, t)[0, :, 0]
    np.testing.assert_allclose(points[:, 1], points[:, 0] ** 2, atol=1e-12)
    length = float((points[1:] - points[:-1]).norm(dim=1).sum())
    closed = float(np.sqrt(5) + np.arcsinh(2) / 2)
    assert closed - 2e-4 < length < closed


def test_pairs_that_are_none(lm: FrozenLM, fit: FitResult) -> None:
    for pairs in ([(0, 0)], [(0, 3)], [(0, 6)], [(0, 1, 2)]):
        with pytest.raises(ValueError, match="pairs: .* is not two solutions of one text"):
            prototok.interpolate(lm, fit, pairs)  # type: ignore[arg-type]
    nothing = dataclasses.replace(fit, exact=torch.zeros_like(fit.exact))
    with pytest.raises(ValueError, match="pairs: there are no two exact solutions"):
        prototok.connect(lm, nothing)
    with pytest.raises(ValueError, match="points: 1 is not"):
        prototok.interpolate(lm, fit, points=1)
