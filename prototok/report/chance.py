"""A permutation test on pairs of solutions: do contexts lie apart by more than chance?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prototok.geometry.distances import Pairs
from prototok.report.results import Fit

_SHUFFLES = 999


def context_gap(pairs: Pairs, fits: Sequence[Fit], texts: np.ndarray | None) -> tuple[float, float]:
    """Return how much further pairs of different contexts are, and the chance by shuffling.

    `texts` are distances of the texts whose linear influence is taken out first. Pairs share
    solutions, so they are no independent sample; the contexts of the texts are shuffled instead.
    """
    names = list(dict.fromkeys(f["text_id"] for f in fits))
    context = {f["text_id"]: f["context"] or f["text_id"] for f in fits}
    place = np.array([names.index(f["text_id"]) for f in fits])
    home = np.array([list(dict.fromkeys(context.values())).index(context[n]) for n in names])
    other = (pairs.kind > 0).numpy()
    a, b = place[pairs.first.numpy()[other]], place[pairs.second.numpy()[other]]
    y = pairs.distance.numpy()[other]
    base = np.ones((len(y), 1)) if texts is None else np.stack([np.ones_like(y), texts[other]], 1)

    def gap(of: np.ndarray) -> float:
        columns = np.hstack([base, (of[a] != of[b])[:, None]])
        return float(np.linalg.lstsq(columns, y, rcond=None)[0][-1])

    rng = np.random.default_rng(0)
    shuffled = [gap(rng.permutation(home)) for _ in range(_SHUFFLES)]
    seen = gap(home)
    return seen, (1 + sum(g >= seen for g in shuffled)) / (1 + _SHUFFLES)
