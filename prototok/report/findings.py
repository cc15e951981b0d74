"""The paper's findings, each checked on the results at hand.

A verdict is a plain rule over the numbers, stated in the evidence; "mixed" where it holds in some
models or sources and not in others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from prototok.geometry.distances import CLASSES, Pairs
from prototok.geometry.text import tfidf_distances
from prototok.report.experiments.distances import distances
from prototok.report.experiments.throughput import fastest
from prototok.report.results import Fit, Outcome, Results, best_seeds, longest, name_of


@dataclass(frozen=True)
class Finding:
    """`verdict` is holds, does not hold, mixed, undecided or not measured; `code` an experiment's.

    Nothing counts before all units of a comparison are done.
    """

    code: str
    claim: str
    verdict: str
    evidence: str


def findings(results: Results) -> list[Finding]:
    """Check every finding and give its verdict."""
    return [Finding(code, claim, *check(results)) for code, claim, check in _FINDINGS]


Verdict = tuple[str, str]
_SHUFFLES = 999
_UPDATES = 5000
_NOT_MEASURED: Verdict = ("not measured", "–")


def _verdict(held: Sequence[bool], evidence: Sequence[str]) -> Verdict:
    if not held:
        return _NOT_MEASURED
    word = "holds" if all(held) else "does not hold" if not any(held) else "mixed"
    return word, "; ".join(evidence)


def _whole(part: Outcome) -> list[Fit]:
    """Return its fits once all of its units are done: half of a comparison is none."""
    return part.fits() if part.count("measured") == len(part.work) else []


def _mean(fits: Sequence[Fit]) -> float:
    return float(np.mean([f["accuracy"] for f in best_seeds(fits)]))


def _one_vector(results: Results) -> Verdict:
    """One vector repeated stops at a token or two; two vectors do not."""
    held, evidence = [], []
    for model, part in _by(results.get("table1"), "model"):
        alone, both = part.where(arrangement="e*"), part.where(arrangement="e m*")
        lengths = [n for n in part.values("length") if n >= 4]
        for n in lengths[:1]:
            a, b = _whole(alone.where(length=n)), _whole(both.where(length=n))
            if a and b:
                held.append(_mean(a) < 0.5 < 0.9 < _mean(b))
                evidence.append(
                    f"{model}: N = {n}, one vector {_mean(a):.2f}, e m* {_mean(b):.2f} "
                    f"({len(best_seeds(b))} texts)"
                )
    return _verdict(held, evidence)


def _default_best(results: Results) -> Verdict:
    """[e] [m]×(N−1) is at least as accurate as every other arrangement at the longest N."""
    held, evidence = [], []
    for model, part in _by(results.get("table1"), "model"):
        n = max(part.values("length"))
        means = {
            a: _mean(fits)
            for a in part.values("arrangement")
            if (fits := _whole(part.where(arrangement=a, length=n)))
        }
        if "e m*" in means and len(means) > 1:
            held.append(means["e m*"] >= max(means.values()) - 0.005)
            shown = ", ".join(f"{a} {m:.2f}" for a, m in means.items())
            evidence.append(f"{model}: N = {n}: {shown}")
    return _verdict(held, evidence)


def _sharing(results: Results) -> Verdict:
    """With the best of the seeds, the largest group loses at most 0.01 of accuracy."""
    held, evidence = [], []
    for model, part in _by(results.get("table2"), "model"):
        for share in part.values("share"):
            sizes = [n for n in part.values("group_size") if n is not None]
            own = part.where(share=share)
            one = _whole(own.where(group_size=min(sizes, default=1)))
            all_ = _whole(own.where(group_size=max(sizes, default=1)))
            if one and all_ and len(sizes) > 1:
                held.append(_mean(all_) >= _mean(one) - 0.01)
                average = np.mean([f["accuracy"] for f in all_])
                evidence.append(
                    f"{model}, {share} shared by {max(sizes)}: best {_mean(all_):.2f} (alone "
                    f"{_mean(one):.2f}), mean {average:.2f}"
                )
    return _verdict(held, evidence)


def _held(fits: Sequence[Fit]) -> float:
    return float(np.mean([0 if f is None else f["length"] for f in longest(fits).values()]))


def _nats(fits: Sequence[Fit]) -> float:
    return float(np.mean([0.0 if f is None else f["h_lm"] for f in longest(fits).values()]))


def _m_per_text(results: Results) -> Verdict:
    """Mean longest N over texts is higher with m per text than with m shared."""
    held, evidence = [], []
    for model, part in _by(results.get("table3"), "model"):
        for source in part.values("source"):
            own = _whole(part.where(share=None, source=source))
            shared = _whole(part.where(share="m", source=source))
            if own and shared:
                held.append(_held(own) > _held(shared))
                evidence.append(
                    f"{model}, {source}: {_held(own):.1f} tokens, shared {_held(shared):.1f} "
                    f"({len(longest(own))} texts)"
                )
    return _verdict(held, evidence)


def _random_nats(results: Results) -> Verdict:
    """Random text: fewer tokens than natural text, and more nats (m per text)."""
    held, evidence = [], []
    for model, part in _by(results.get("table3"), "model"):
        sources = part.values("source")
        words = [s for s in sources if s.lower().startswith("random")]
        natural = [s for s in sources if s not in words]
        chance = _whole(part.where(share=None, source=words[0])) if words else []
        for source in natural:
            text = _whole(part.where(share=None, source=source))
            if chance and text:
                held.append(_held(chance) <= _held(text) and _nats(chance) >= _nats(text))
                evidence.append(
                    f"{model}: random {_held(chance):.1f} tokens, {_nats(chance):.0f} nats; "
                    f"{source} {_held(text):.1f}, {_nats(text):.0f}"
                )
    return _verdict(held, evidence)


def _information(results: Results) -> Verdict:
    """Autoregressive vectors hold at least as many nats as the one forward, at most ten times."""
    held, evidence = [], []
    for model, part in _by(results.get("figure2"), "model"):
        for vectors, share in ((1, "m"), (2, None)):
            left = _whole(part.where(mode="autoregressive", vectors=vectors))
            right = _whole(part.where(mode="one-forward", share=share))
            if left and right and _nats(right):
                ratio = _nats(left) / _nats(right)
                held.append(1 <= ratio <= 10)
                evidence.append(f"{model}, K = {vectors}: {ratio:.2f}×")
    return _verdict(held, evidence)


_MANY = 2  # times the tokens a second, the least that could be called many


def _throughput(results: Results) -> Verdict:
    """One forward gives more tokens a second than autoregression, each at its longest text."""
    held, evidence = [], []
    for model, part in _by(results.get("figure3"), "model"):
        ratios = []
        for source in part.values("source"):
            own = part.where(source=source)
            a = fastest(_whole(own.where(mode="autoregressive")))
            b = fastest(_whole(own.where(mode="one-forward")))
            if a and b:
                ratios.append(b["tokens_per_second"] / a["tokens_per_second"])
        if ratios:
            held.append(min(ratios) >= _MANY)
            evidence.append(f"{model}: {min(ratios):.1f}× to {max(ratios):.1f}×")
    return _verdict(held, evidence)


def _classes(results: Results) -> Verdict:
    """Mean distance: same text < same context < different context, the last not by chance."""
    held, evidence = [], []
    for model, part in _by(results.get("figure4") or results.get("figure5"), "model"):
        fits = part.fits()
        if len(fits) < 3:
            continue
        pairs = distances(results, fits)
        means = [float(pairs.of(name).mean()) for name in CLASSES if len(pairs.of(name))]
        if len(means) == 3:
            _, chance = _gap(pairs, fits, None)
            held.append(means[0] < means[1] < means[2] and chance < 0.05)
            shown = " / ".join(f"{m:.3f}" for m in means)
            evidence.append(f"{model}: {shown}, the last two p = {chance:.3f}")
    return _verdict(held, evidence)


def _same_context(results: Results) -> Verdict:
    """At equal TF-IDF distance, e of one context are closer than of different contexts.

    The difference in e that is left after a common linear dependence on the text distance.
    """
    held, evidence = [], []
    for model, part in _by(results.get("figure5") or results.get("figure4"), "model"):
        fits = part.fits()
        if len(fits) < 3:
            continue
        pairs = distances(results, fits)
        texts = tfidf_distances([f["target_text"] or "" for f in fits])[pairs.first, pairs.second]
        gap, chance = _gap(pairs, fits, texts.numpy())
        held.append(gap > 0 and chance < 0.05)
        evidence.append(f"{model}: different context further by {gap:+.4f} (p = {chance:.3f})")
    return _verdict(held, evidence)


def _gap(pairs: Pairs, fits: Sequence[Fit], texts: np.ndarray | None) -> tuple[float, float]:
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


def _paths(results: Results) -> tuple[list[dict], list[str]]:
    groups = results.measured.get("paths", {}).get("groups", [])
    return groups, [f"{name_of(g['model'])}{'' if g['share'] else ', m per text'}" for g in groups]


def _straight_leaves(results: Results) -> Verdict:
    """Most straight segments have a point with an accuracy below 0.99."""
    groups, names = _paths(results)
    left = [np.mean([min(row) < 0.99 for row in g["straight"]["accuracy"]]) for g in groups]
    return _verdict(
        [share > 0.5 for share in left],
        [f"{name}: {100 * share:.0f} % of {g['pairs']} pairs leave"
         for name, share, g in zip(names, left, groups, strict=True)],
    )  # fmt: skip


def _curve_stays(results: Results) -> Verdict:
    """Most curves keep an accuracy of 0.99 at every point.

    Curves given fewer updates than the 5000 that are usual cannot refute it: undecided.
    """
    groups, names = _paths(results)
    stay = [np.mean([min(row) >= 0.99 for row in g["curve"]["accuracy"]]) for g in groups]
    word, evidence = _verdict(
        [share > 0.5 for share in stay],
        [f"{name}: {100 * share:.0f} % of {g['pairs']} stay (at most "
         f"{g['settings']['max_steps']} updates)"
         for name, share, g in zip(names, stay, groups, strict=True)],
    )  # fmt: skip
    short = any(
        share <= 0.5 and g["settings"]["max_steps"] < _UPDATES
        for share, g in zip(stay, groups, strict=True)
    )
    return "undecided" if short else word, evidence


def _curve_short(results: Results) -> Verdict:
    """The greatest ratio of lengths is at most 1.2, as in the paper.

    Of curves that stay where their segment leaves: a curve that need not bend is no evidence.
    """
    held, evidence = [], []
    for group, name in zip(*_paths(results), strict=True):
        curve = group["curve"]
        inside = [
            ratio
            for ratio, row, straight in zip(
                curve["length_ratio"], curve["accuracy"], group["straight"]["accuracy"], strict=True
            )
            if min(row) >= 0.99 > min(straight)
        ]
        if inside:
            held.append(max(inside) <= 1.2)
            evidence.append(f"{name}: at most {max(inside):.2f} ({len(inside)} curves that stay)")
    return _verdict(held, evidence)


def _by(one: Outcome | None, column: str) -> list[tuple[str, Outcome]]:
    if one is None:
        return []
    return [(name_of(str(v)), one.where(**{column: v})) for v in one.values(column)]


_FINDINGS: tuple[tuple[str, str, Callable[[Results], Verdict]], ...] = (
    ("E1", "One vector, repeated, holds hardly more than a token; two hold many.", _one_vector),
    ("E1", "[e] [m]×(N−1) is the best arrangement.", _default_best),
    ("E2", "A vector can be shared by all texts without loss, given the best of several seeds.",
     _sharing),
    ("E3", "A text with an m of its own reaches further than with a shared one.", _m_per_text),
    ("E3", "Random text: fewer tokens come back, and more nats.", _random_nats),
    ("E4", "Autoregressive vectors hold as many nats as one forward, or a few times as many.",
     _information),
    ("E5", "One forward gives many times the tokens a second.", _throughput),
    ("E6", "Solutions of one text lie closest, then those of one context, then the others.",
     _classes),
    ("E6", "At equal distance of the texts, those of one context are closer.", _same_context),
    ("E7", "The straight segment between two solutions leaves the solutions.", _straight_leaves),
    ("E7", "A quadratic Bezier curve stays inside.", _curve_stays),
    ("E7", "The curve is at most 1.2 times as long as the segment.", _curve_short),
)  # fmt: skip
