"""The verdicts, on results whose answer is known."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import torch

from prototok.geometry import pair_distances
from prototok.report.chance import context_gap
from prototok.report.findings import _curve_stays, _information, _m_per_text
from prototok.report.results import Outcome, Results, Work
from prototok.report.verdict import Comparison, judged, mean_of, share_of
from report.made_up import PATHS


def fits_of(texts: int, contexts: int) -> list[dict]:
    return [{"text_id": f"t{i}", "context": f"c{i % contexts}"} for i in range(texts)]


def test_a_gap_between_contexts_is_told_from_chance() -> None:
    fits = fits_of(20, 5)
    homes = [i % 5 for i in range(20)]
    noise = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    centres = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    pairs = pair_distances(noise + centres[homes], range(20), homes)
    gap, chance = context_gap(pairs, fits, None)
    same, other = pairs.of("same context"), pairs.of("different context")
    assert abs(gap - float(other.mean() - same.mean())) < 1e-9 and gap > 0.3
    assert chance == 0.001  # 1 of 1 + 999
    _, chance = context_gap(pair_distances(noise, range(20), homes), fits, None)
    assert chance > 0.05


def test_what_the_texts_explain_is_taken_out_first() -> None:
    """e follows the text distance alone, and contexts differ in it: no gap is left."""
    fits = fits_of(20, 5)
    homes = [i % 5 for i in range(20)]
    pairs = pair_distances(torch.randn(20, 8), range(20), homes)
    texts = np.where(pairs.kind.numpy() == 2, 0.9, 0.5) + 0.05 * np.sin(np.arange(190))
    follows = type(pairs)(pairs.first, pairs.second, pairs.kind, torch.from_numpy(0.3 * texts))
    gap, _ = context_gap(follows, fits, texts)
    assert abs(gap) < 1e-9
    assert context_gap(follows, fits, None)[0] > 0.1


def test_curves_cut_short_refute_nothing() -> None:
    def verdict(updates: int, pairs: int) -> str:
        group = copy.deepcopy(PATHS["groups"][0])
        group["curve"]["accuracy"] = [[1.0, 0.75, 1.0]] * pairs
        group["settings"]["max_steps"] = updates
        return _curve_stays(Results(None, {}, {"paths": {"groups": [group]}}))[0]  # type: ignore[arg-type]

    assert verdict(100, 12) == "undecided" and verdict(5000, 12) == "does not hold"
    assert verdict(5000, 2) == "undecided"  # two pairs refute nothing either


def outcome(*rows: tuple[str, str | None, int, float]) -> Outcome:
    """Fits of one model, (text, share, N, accuracy), each a unit of its own."""
    work = [
        Work(
            key=f"{i}", mode="one-forward", model="m", source="novels", length=n, share=share,
            group_size=None, arrangement="e m*", vectors=1, recipe="fast", rows=1,
            fits=(
                {
                    "model": "m", "source": "novels", "share": share, "vectors": 1,
                    "mode": "one-forward", "text_id": text, "length": n, "correct": n,
                    "margin": 0.0, "accuracy": accuracy, "exact": accuracy == 1.0, "h_lm": 2.0 * n,
                },
            ),
        )
        for i, (text, share, n, accuracy) in enumerate(rows)
    ]  # fmt: skip
    return Outcome("table3", {}, tuple(work))


def m_per_text(own: list[int], shared: list[int]) -> tuple[str, str]:
    """The verdict where text i comes back up to own[i] and shared[i], on the grid 4, 8, 16."""
    rows = [
        (f"t{i}", share, n, 1.0 if n <= longest else 0.5)
        for share, reached in ((None, own), ("m", shared))
        for i, longest in enumerate(reached)
        for n in (4, 8, 16)
    ]
    return _m_per_text(Results(None, {"table3": outcome(*rows)}, {}))  # type: ignore[arg-type]


def test_where_the_grid_ends_nothing_is_decided() -> None:
    verdict, evidence = m_per_text([16, 16, 16], [16, 16, 16])
    assert verdict == "undecided" and "the grid ends here (n = 3)" in evidence


def test_nats_beyond_the_grid_of_one_forward_are_not_told_from_fewer() -> None:
    """[mem] comes back up to N = 8 of 16, m shared up to the end of its own grid."""

    def verdict(grid: tuple[int, ...]) -> str:
        rows = [(f"t{i}", "m", n, 1.0 if n <= 4 else 0.5) for i in range(3) for n in grid]
        mem = [(f"t{i}", None, n, 1.0 if n <= 8 else 0.5) for i in range(3) for n in (4, 8, 16)]
        work = outcome(*rows).work + tuple(
            dataclasses.replace(one, mode="autoregressive") for one in outcome(*mem).work
        )
        both = Outcome("figure2", {}, work)
        return _information(Results(None, {"figure2": both}, {}))[0]  # type: ignore[arg-type]

    assert verdict((2, 4)) == "undecided" and verdict((4, 8)) == "holds"


def test_a_difference_counts_with_its_interval() -> None:
    verdict, evidence = m_per_text([8, 8, 8, 8, 8, 16], [4] * 6)
    assert verdict == "holds" and "n = 6" in evidence
    assert m_per_text([8, 4, 8, 4], [4, 8, 4, 8])[0] == "undecided"
    assert m_per_text([4, 4, 4, 4], [8, 8, 8, 8])[0] == "does not hold"
    assert m_per_text([8], [4])[0] == "undecided"  # one text has no interval
    # Texts at the end of both grids say nothing; the others decide.
    verdict, evidence = m_per_text([16, 8, 8, 8], [16, 4, 4, 4])
    assert verdict == "holds" and "1 more at the end of the grid" in evidence


def test_intervals() -> None:
    mean = mean_of([1.0, 2.0, 3.0])
    assert (mean.value, mean.n) == (2.0, 3) and abs(mean.high - 2.0 - 4.303 / 3**0.5) < 1e-9
    assert mean_of([0.5] * 9).at_least(0.5) is True
    assert mean_of([0.5]).at_least(0.0) is None
    share = share_of(9, 10)
    assert abs(share.low - 0.596) < 1e-3 and abs(share.high - 0.982) < 1e-3
    assert judged([]) == ("not measured", "–")
    assert judged([Comparison(True, "a"), Comparison(False, "b")]) == ("mixed", "a; b")
    assert judged([Comparison(True, "a"), Comparison(None, "b")])[0] == "undecided"
