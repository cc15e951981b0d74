"""The paper's findings, each checked on the results at hand.

A verdict is a plain rule over intervals, and the evidence carries them with n: "mixed" where it
holds in some models or sources and not in others, "undecided" where an interval or the end of a
grid leaves it open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prototok.geometry.distances import CLASSES
from prototok.geometry.text import tfidf_distances
from prototok.report.chance import context_gap
from prototok.report.experiments.distances import distances
from prototok.report.experiments.throughput import fastest
from prototok.report.results import Fit, Outcome, Results, Subject, best_seeds, longest
from prototok.report.verdict import Comparison, all_of, judged, mean_of, share_of


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
_UPDATES = 5000


def _whole(part: Outcome) -> list[Fit]:
    """Return its fits once all of its units are done: half of a comparison is none."""
    return part.fits() if part.count("measured") == len(part.work) else []


def _accuracies(fits: Sequence[Fit]) -> dict[str, float]:
    return {f["text_id"]: f["accuracy"] for f in best_seeds(fits)}


def _differences(more: dict[str, float], less: dict[str, float]) -> list[float]:
    """Return more − less of each text that both have."""
    return [value - less[text] for text, value in more.items() if text in less]


def _one_vector(results: Results) -> Verdict:
    """One vector repeated stops at a token or two; two vectors do not."""
    found = []
    for model, part in _by(results.get("table1")):
        alone, both = part.where(arrangement="e*"), part.where(arrangement="e m*")
        lengths = [n for n in part.values("length") if n >= 4]
        for n in lengths[:1]:
            a, b = _whole(alone.where(length=n)), _whole(both.where(length=n))
            if a and b:
                one, two = (mean_of(list(_accuracies(fits).values())) for fits in (a, b))
                below = one.at_least(0.5)
                held = all_of(None if below is None else not below, two.at_least(0.9))
                found.append(Comparison(held, f"{model}: N = {n}, one vector {one}, e m* {two}"))
    return judged(found)


def _default_best(results: Results) -> Verdict:
    """[e] [m]×(N−1) is at least as accurate as every other arrangement at the longest N."""
    found = []
    for model, part in _by(results.get("table1")):
        n = max(part.values("length"))
        of = {
            a: _accuracies(fits)
            for a in part.values("arrangement")
            if (fits := _whole(part.where(arrangement=a, length=n)))
        }
        ours = of.pop("e m*", None)
        gains = {a: _differences(ours, other) for a, other in of.items()} if ours else {}
        gains = {a: gain for a, gain in gains.items() if gain}
        if gains:
            ahead = {a: mean_of(gain) for a, gain in gains.items()}
            held = all_of(*(gain.at_least(-0.005) for gain in ahead.values()))
            shown = ", ".join(f"{a} behind by {gain}" for a, gain in ahead.items())
            found.append(Comparison(held, f"{model}: N = {n}: {shown}"))
    return judged(found)


def _sharing(results: Results) -> Verdict:
    """With the best of the seeds, the largest group loses at most 0.01 of accuracy."""
    found = []
    for model, part in _by(results.get("table2")):
        for share in part.values("share"):
            sizes = [n for n in part.values("group_size") if n is not None]
            own = part.where(share=share)
            one = _whole(own.where(group_size=min(sizes, default=1)))
            all_ = _whole(own.where(group_size=max(sizes, default=1)))
            lost = _differences(_accuracies(all_), _accuracies(one)) if len(sizes) > 1 else []
            if lost:
                gain = mean_of(lost)
                found.append(
                    Comparison(
                        gain.at_least(-0.01),
                        f"{model}, {share} shared by {max(sizes)} against alone: {gain}",
                    )
                )
    return judged(found)


def _held(fits: Sequence[Fit]) -> dict[str, float]:
    return {t: 0 if f is None else f["length"] for t, f in longest(fits).items()}


def _nats(fits: Sequence[Fit]) -> dict[str, float]:
    return {t: 0.0 if f is None else f["h_lm"] for t, f in longest(fits).items()}


def _reach(more: Outcome, less: Outcome) -> tuple[bool | None, str] | None:
    """Compare longest N text by text; None where a part is not done or they share no text.

    A text that reaches the end of the grid on both sides says nothing about which reaches further.
    """
    a, b = _held(_whole(more)), _held(_whole(less))
    ends = [max(part.values("length"), default=0) for part in (more, less)]
    texts = [t for t in a if t in b]
    if not texts:
        return None
    open_ = [t for t in texts if not (a[t] == ends[0] and b[t] == ends[1])]
    means = " against ".join(f"{sum(x[t] for t in texts) / len(texts):.1f}" for x in (a, b))
    if not open_:
        return None, f"{means} tokens, undecided: the grid ends here (n = {len(texts)})"
    gain = mean_of([a[t] - b[t] for t in open_])
    # By a token at least: the difference of two lengths of a grid is never less.
    higher = gain.at_least(math.nextafter(0.0, 1.0))
    at_end = len(texts) - len(open_)
    note = f", {at_end} more at the end of the grid" if at_end else ""
    return higher, f"{means} tokens, further by {gain}{note}"


def _m_per_text(results: Results) -> Verdict:
    """A text reaches a longer N with m of its own than with m shared."""
    found = []
    for model, part in _by(results.get("table3")):
        for source in part.values("source"):
            of = part.where(source=source)
            reach = _reach(of.where(share=None), of.where(share="m"))
            if reach is not None:
                found.append(Comparison(reach[0], f"{model}, {source}: {reach[1]}"))
    return judged(found)


def _random_nats(results: Results) -> Verdict:
    """Random text: fewer tokens than natural text, and more nats (m per text)."""
    found = []
    for model, part in _by(results.get("table3")):
        sources = part.values("source")
        words = [s for s in sources if s.lower().startswith("random")]
        for source in [s for s in sources if s not in words]:
            of = part.where(share=None)
            random = _whole(of.where(source=words[0])) if words else []
            text = _whole(of.where(source=source))
            if random and text:
                found.append(_random_against(f"{model}, {source}", random, text, of))
    return judged(found)


def _random_against(
    name: str, random: Sequence[Fit], text: Sequence[Fit], of: Outcome
) -> Comparison:  # fmt: skip
    """Compare means of different texts: random words against natural text."""
    end = max(of.values("length"))
    tokens = [list(_held(fits).values()) for fits in (random, text)]
    nats = [list(_nats(fits).values()) for fits in (random, text)]
    shown = "; ".join(
        f"{what} {mean_of(a)}, random, against {mean_of(b)}"
        for what, (a, b) in (("tokens", tokens), ("nats", nats))
    )
    if any(max(values) == end for values in tokens):
        return Comparison(None, f"{name}: {shown}, undecided: the grid ends here")
    held = all_of(_apart(tokens[1], tokens[0]), _apart(nats[0], nats[1]))
    return Comparison(held, f"{name}: {shown}")


def _apart(more: Sequence[float], less: Sequence[float]) -> bool | None:
    """Return True if the interval of `more` lies above that of `less`, False if below it."""
    a, b = mean_of(more), mean_of(less)
    if a.low >= b.high:
        return True
    return False if a.high < b.low else None


def _information(results: Results) -> Verdict:
    """Autoregressive vectors hold at least as many nats as the one forward, at most ten times.

    A side that ends with its grid may hold more: what that could overturn is undecided.
    """
    found = []
    for model, part in _by(results.get("figure2")):
        for vectors, share in ((1, "m"), (2, None)):
            ours = part.where(mode="autoregressive", vectors=vectors)
            theirs = part.where(mode="one-forward", share=share)
            left, right = _nats(_whole(ours)), _nats(_whole(theirs))
            texts = [t for t in left if t in right]
            total = sum(right[t] for t in texts)
            if total:
                more = mean_of([left[t] - right[t] for t in texts])
                below = mean_of([10 * right[t] - left[t] for t in texts])
                ratio = sum(left[t] for t in texts) / total
                held = all_of(
                    more.at_least(0.0) and (None if _at_end(theirs) else True),
                    below.at_least(0.0) and (None if _at_end(ours) else True),
                )
                found.append(
                    Comparison(
                        held,
                        f"{model}, K = {vectors}: {ratio:.2f}×, nats more: {more}",
                    )
                )
    return judged(found)


def _at_end(part: Outcome) -> bool:
    """Return True if a text still came back at the longest N that was tried."""
    return max(_held(part.fits()).values()) == max(part.values("length"))


_MANY = 2  # times the tokens a second, the least that could be called many


def _throughput(results: Results) -> Verdict:
    """One forward gives more tokens a second than autoregression, each at its longest text."""
    found = []
    for model, part in _by(results.get("figure3")):
        ratios = []
        for source in part.values("source"):
            own = part.where(source=source)
            a = fastest(_whole(own.where(mode="autoregressive")))
            b = fastest(_whole(own.where(mode="one-forward")))
            if a and b:
                ratios.append(b["tokens_per_second"] / a["tokens_per_second"])
        if ratios:
            decided = [ratio >= _MANY for ratio in ratios]
            found.append(
                Comparison(
                    decided[0] if len(set(decided)) == 1 else None,
                    f"{model}: {min(ratios):.1f}× to {max(ratios):.1f}× (sources: {len(ratios)})",
                )
            )
    return judged(found)


def _classes(results: Results) -> Verdict:
    """Mean distance: same text < same context < different context, the last not by chance."""
    found = []
    for model, part in _by(results.get("figure4") or results.get("figure5")):
        fits = part.fits()
        if len(fits) < 3:
            continue
        pairs = distances(results, fits)
        means = [float(pairs.of(name).mean()) for name in CLASSES if len(pairs.of(name))]
        if len(means) == 3:
            _, chance = context_gap(pairs, fits, None)
            shown = " / ".join(f"{m:.3f}" for m in means)
            found.append(
                Comparison(
                    all_of(means[0] < means[1], _by_chance(chance)),
                    f"{model}: {shown}, the last two p = {chance:.3f} (n = {len(fits)} solutions)",
                )
            )
    return judged(found)


def _by_chance(chance: float) -> bool | None:
    """Judge a one-sided chance: below 0.05 it holds, above 0.95 the opposite does."""
    if chance < 0.05:
        return True
    return False if chance > 0.95 else None


def _same_context(results: Results) -> Verdict:
    """At equal TF-IDF distance, e of one context are closer than of different contexts.

    The difference in e that is left after a common linear dependence on the text distance.
    """
    found = []
    for model, part in _by(results.get("figure5") or results.get("figure4")):
        fits = part.fits()
        if len(fits) < 3:
            continue
        pairs = distances(results, fits)
        texts = tfidf_distances([f["target_text"] or "" for f in fits])[pairs.first, pairs.second]
        gap, chance = context_gap(pairs, fits, texts.numpy())
        found.append(
            Comparison(
                _by_chance(chance),
                f"{model}: different context further by {gap:+.4f} (p = {chance:.3f}, n = "
                f"{len(fits)} solutions)",
            )
        )
    return judged(found)


def _paths(results: Results) -> tuple[list[dict], list[str]]:
    groups = results.measured.get("paths", {}).get("groups", [])
    return groups, [f"{Subject.of(g).name}{'' if g['share'] else ', m per text'}" for g in groups]


def _straight_leaves(results: Results) -> Verdict:
    """Most straight segments have a point with an accuracy below 0.99."""
    found = []
    for group, name in zip(*_paths(results), strict=True):
        rows = group["straight"]["accuracy"]
        left = share_of(sum(min(row) < 0.99 for row in rows), len(rows))
        found.append(Comparison(left.at_least(0.5), f"{name}: share that leaves {left}"))
    return judged(found)


def _curve_stays(results: Results) -> Verdict:
    """Most curves keep an accuracy of 0.99 at every point.

    Curves given fewer updates than the 5000 that are usual cannot refute it: undecided.
    """
    found = []
    for group, name in zip(*_paths(results), strict=True):
        rows, updates = group["curve"]["accuracy"], group["settings"]["max_steps"]
        stay = share_of(sum(min(row) >= 0.99 for row in rows), len(rows))
        held = stay.at_least(0.5)
        if held is False and updates < _UPDATES:
            held = None
        found.append(
            Comparison(held, f"{name}: share that stays {stay}, at most {updates} updates")
        )
    return judged(found)


def _curve_short(results: Results) -> Verdict:
    """The greatest ratio of lengths is at most 1.2, as in the paper: one longer curve refutes it.

    Of curves that stay where their segment leaves: a curve that need not bend is no evidence.
    """
    found = []
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
            shown = f"{name}: {min(inside):.2f} to {max(inside):.2f}, n = {len(inside)} that stay"
            found.append(Comparison(max(inside) <= 1.2, shown))
    return judged(found)


def _by(one: Outcome | None) -> list[tuple[str, Outcome]]:
    """Cut an experiment into parts of one subject, by its name."""
    if one is None:
        return []
    return [(subject.name, one.where(subject=subject)) for subject in one.values("subject")]


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
