"""The verdicts, on results whose answer is known."""

from __future__ import annotations

import copy

import numpy as np
import torch

from prototok.geometry import pair_distances
from prototok.report.findings import _curve_stays, _gap
from prototok.report.results import Results
from report.made_up import PATHS


def fits_of(texts: int, contexts: int) -> list[dict]:
    return [{"text_id": f"t{i}", "context": f"c{i % contexts}"} for i in range(texts)]


def test_a_gap_between_contexts_is_told_from_chance() -> None:
    fits = fits_of(20, 5)
    homes = [i % 5 for i in range(20)]
    noise = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    centres = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    pairs = pair_distances(noise + centres[homes], range(20), homes)
    gap, chance = _gap(pairs, fits, None)
    same, other = pairs.of("same context"), pairs.of("different context")
    assert abs(gap - float(other.mean() - same.mean())) < 1e-9 and gap > 0.3
    assert chance == 0.001  # 1 of 1 + 999
    _, chance = _gap(pair_distances(noise, range(20), homes), fits, None)
    assert chance > 0.05


def test_what_the_texts_explain_is_taken_out_first() -> None:
    """e follows the text distance alone, and contexts differ in it: no gap is left."""
    fits = fits_of(20, 5)
    homes = [i % 5 for i in range(20)]
    pairs = pair_distances(torch.randn(20, 8), range(20), homes)
    texts = np.where(pairs.kind.numpy() == 2, 0.9, 0.5) + 0.05 * np.sin(np.arange(190))
    follows = type(pairs)(pairs.first, pairs.second, pairs.kind, torch.from_numpy(0.3 * texts))
    gap, _ = _gap(follows, fits, texts)
    assert abs(gap) < 1e-9
    assert _gap(follows, fits, None)[0] > 0.1


def test_curves_cut_short_refute_nothing() -> None:
    def verdict(updates: int) -> str:
        group = copy.deepcopy(PATHS["groups"][0])
        group["curve"]["accuracy"][0] = group["curve"]["accuracy"][1] = [1.0, 0.75, 1.0]
        group["settings"]["max_steps"] = updates
        return _curve_stays(Results(None, {}, {"paths": {"groups": [group]}}))[0]  # type: ignore[arg-type]

    assert verdict(100) == "undecided" and verdict(5000) == "does not hold"
