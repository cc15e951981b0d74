"""Cosine distances between fitted vectors, in the three classes of the paper's Figure 4.

Letters: R rows (solutions), P pairs of rows, T texts, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prototok.common.arguments import hint
from prototok.common.shown import shapes

CLASSES = ("same text", "same context", "different context")


def cosine_distances(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Return (R, R') fp64 in [0, 2]: 1 − cos of rows of `a` (R, d) with rows of `b`, or of `a`.

    A row of zeros has no direction; it is at distance 1 from everything.
    """
    for name, given in (("a", a), ("b", b)):
        if given is not None and (given.ndim != 2 or not given.is_floating_point()):
            raise ValueError(
                f"{name}: {given.dtype} of shape {tuple(given.shape)} is not rows of numbers"
            )
    unit_a = torch.nn.functional.normalize(a.double(), dim=1)
    unit_b = unit_a if b is None else torch.nn.functional.normalize(b.double(), dim=1)
    if unit_a.shape[1] != unit_b.shape[1]:
        raise ValueError(f"b: rows of {unit_b.shape[1]} numbers beside rows of {unit_a.shape[1]}")
    return (1 - unit_a @ unit_b.T).clamp(0, 2)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Every two solutions, once.

    first, second  (P,) int64 rows, first < second
    kind           (P,) int64 place in `CLASSES`
    distance       (P,) fp64 cosine distance
    """

    first: Tensor
    second: Tensor
    kind: Tensor
    distance: Tensor

    __repr__ = shapes

    def of(self, name: str) -> Tensor:
        """Return the distances of one class, by its name in `CLASSES`."""
        if name not in CLASSES:
            raise ValueError(
                f"name: {name!r} is not one of {', '.join(CLASSES)}" + hint(name, CLASSES)
            )
        return self.distance[self.kind == CLASSES.index(name)]


def pair_distances(
    vectors: Tensor,  # (R, d)
    texts: Sequence[int],
    contexts: Sequence[int],
) -> Pairs:
    """Pair all solutions, with their distance and class (Figure 4 of the paper).

    Args:
        vectors: e (or m) of each solution.
        texts: the text each encodes; two rows of one text are two seeds of it.
        contexts: what each text continues; texts of one context are continuations of it.

    Raises:
        ValueError: lists that do not go with the vectors, or a text in two contexts.
    """
    rows = len(vectors)
    for name, given in (("texts", texts), ("contexts", contexts)):
        if len(given) != rows:
            raise ValueError(f"{name}: {len(given)} entries for {rows} vectors")
    home: dict[int, int] = {}
    for text, context in zip(texts, contexts, strict=True):
        if home.setdefault(text, context) != context:
            raise ValueError(f"contexts: text {text} stands in {home[text]} and in {context}")
    text_of, context_of = (
        torch.tensor(list(texts), dtype=torch.int64, device="cpu"),
        torch.tensor(list(contexts), dtype=torch.int64, device="cpu"),
    )
    first, second = torch.triu_indices(rows, rows, offset=1)
    same_text = text_of[first] == text_of[second]
    same_context = context_of[first] == context_of[second]
    kind = 2 - same_context.long() - same_text.long()
    return Pairs(first, second, kind, cosine_distances(vectors)[first, second].cpu())


@dataclass(frozen=True, eq=False)
class Curve:
    """Mean of y in bins of x; bins without a pair are left out.

    x (B,) mean x of the bin, y (B,) mean y, std (B,) of y, count (B,) int64
    """

    x: Tensor
    y: Tensor
    std: Tensor
    count: Tensor

    __repr__ = shapes


def binned_mean(x: Tensor, y: Tensor, bins: int = 10) -> Curve:
    """Average y (P,) in at most `bins` bins of x (P,), cut at its quantiles (Figure 5).

    Equal x share a bin, so where many are equal there are fewer bins.
    """
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"y: shape {tuple(y.shape)} does not go with x of shape {tuple(x.shape)}")
    x, y = x.double(), y.double()
    cuts = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device="cpu")[1:-1]
    edges = x.quantile(cuts).unique() if len(x) else x
    place = torch.bucketize(x, edges, right=True)
    groups = [(x[place == i], y[place == i]) for i in place.unique()]
    empty = torch.empty(0, dtype=torch.float64, device="cpu")
    return Curve(
        x=torch.stack([g.mean() for g, _ in groups]) if groups else empty,
        y=torch.stack([g.mean() for _, g in groups]) if groups else empty,
        std=torch.stack([g.std(correction=0) for _, g in groups]) if groups else empty,
        count=torch.tensor([len(g) for g, _ in groups], dtype=torch.int64, device="cpu"),
    )
