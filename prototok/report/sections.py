"""The sections of a report, one an experiment of the paper: its tables and charts, ours and theirs.

E1 … E9 are the paper's experiments in its order; every one has its section, planned or not.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prototok.geometry.distances import CLASSES, Pairs, binned_mean, pair_distances
from prototok.geometry.text import tfidf_distances
from prototok.report import paper
from prototok.report.chart import Axis, Chart, Series
from prototok.report.results import (
    Experiment,
    Fit,
    Results,
    best_seeds,
    cell,
    kuratov,
    longest,
    name_of,
)
from prototok.report.tables import Cell, Table, label, mean_std, number
from prototok.results.proto_tokens import ProtoTokens


@dataclass(frozen=True)
class Section:
    """One experiment in the report.

    code, title, source   such as E1, "Where e and m stand", "Table 1"
    names     the sweeps it is made of
    status    of these sweeps, one line; n: how many texts, seeds, models, fits
    here, there  settings of ours and of the paper
    remarks   what a reader has to know beside the numbers
    """

    code: str
    title: str
    source: str
    names: tuple[str, ...]
    status: str
    n: str
    here: str
    there: str
    remarks: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()

    @property
    def anchor(self) -> str:
        return self.code.lower()

    @property
    def state(self) -> str:
        """ "complete", "partial", "failed" or "none", for the table of contents."""
        if self.status.startswith("not "):
            return "none"
        if "failed" in self.status:
            return "failed"
        return "partial" if " of " in self.status else "complete"


def sections(results: Results) -> list[Section]:
    """E1 … E9, and what lies beyond the paper."""
    found = [
        _section(results, code, title, source, names, there, make)
        for code, title, source, names, there, make in _EXPERIMENTS
    ]
    remarks, tables, charts = _solutions(results)
    groups = results.measured.get("solutions", {}).get("groups", [])
    status = f"complete, {len(groups)} models" if groups else "not measured"
    n = ", ".join(f"{g['solutions']} solutions of {name_of(g['model'])}" for g in groups) or "0"
    here = ", ".join(dict.fromkeys(f"fits of {g['experiment']}" for g in groups)) or "–"
    found.append(
        Section(
            "S",
            "What solutions are like, and what they withstand",
            "beyond the paper",
            (),
            status,
            n,
            here,
            "–",
            tuple(remarks),
            tuple(tables),
            tuple(charts),
        )
    )
    return found


Parts = tuple[list[str], list[Table], list[Chart]]  # remarks, tables, charts


def _section(
    results: Results, code: str, title: str, source: str, names: tuple[str, ...], there: str,
    make: Callable[[Results], Parts] | None,
) -> Section:  # fmt: skip
    planned = [results.experiments[name] for name in names if name in results.experiments]
    if make is None:
        status = "not run: judged by eye in the paper, which gives no measure of it"
        return Section(code, title, source, names, status, "–", "–", there)
    remarks, tables, charts = make(results)
    if not planned:
        status = "not planned: " + " · ".join(f"prototok sweep plan {name}" for name in names)
        return Section(
            code, title, source, names, status, "0", "–", there, (), tuple(tables), tuple(charts)
        )
    status = "; ".join(
        one.status if len(planned) == 1 else f"{one.name}: {one.status}" for one in planned
    )
    seen = dict.fromkeys(_settings_of(one) for one in planned)
    reasons = Counter(w.reason for one in planned for w in one.work if w.state == "failed")
    remarks += [f"Failed, {_plural(n, 'unit')}: {reason}" for reason, n in reasons.most_common(3)]
    return Section(
        code, title, source, names, status, _count(planned), " / ".join(seen), there,
        tuple(remarks), tuple(tables), tuple(charts),
    )  # fmt: skip


def _count(planned: Sequence[Experiment]) -> str:
    fits = {(f["key"], f["row"]): f for one in planned for f in one.fits()}.values()
    texts = {(f["model"], f["source"], f["text_id"]) for f in fits}
    pairs = {(f["model"], f["source"]) for f in fits}
    seeds = {f["seed"] for f in fits}
    if not fits:
        return "0"
    return (
        f"{len(texts) / len(pairs):g} texts × {_plural(len(seeds), 'seed')}, "
        f"{_plural(len({m for m, _ in pairs}), 'model')} × "
        f"{_plural(len({s for _, s in pairs}), 'source')}, {len(fits)} fits"
    )


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _settings_of(one: Experiment) -> str:
    s = one.settings
    models = ", ".join(name_of(str(m)) for m in s.get("models", ()))
    sources = ", ".join(x["name"] if isinstance(x, dict) else str(x) for x in s.get("sources", ()))
    changes = s.get("changes") or {}
    parts = [models, sources, f"{s.get('texts')} texts", f"N = {_listed(s.get('lengths', ()))}"]
    if s.get("contexts"):
        parts[2] = f"{s['contexts']} contexts × {s.get('continuations', 1)} continuations"
    if s.get("seeds", 1) != 1:
        parts.append(f"{s['seeds']} seeds")
    share = ["m per text" if x is None else f"{x} shared" for x in s.get("share", ())]
    parts += [" and ".join(share)] if share else []
    parts.append(
        f"recipe {s.get('recipe')}"
        + "".join(f", {key.replace('_', ' ')} {value}" for key, value in changes.items())
    )
    return "; ".join(parts)


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(str(v) for v in values)


# E1


def _table_1(results: Results) -> Parts:
    header = ("arrangement", *(f"N = {n}" for n in paper.TABLE_1["e m*"]))
    theirs = Table(
        "table1-paper",
        f"Table 1 of the paper: accuracy, mean±std, Llama-3.2-1B, 50 texts ({paper.CITATION})",
        header,
        tuple(
            (label(name), *(Cell(f"{m:.2f}±{s:.2f}", m) for m, s in row.values()))
            for name, row in paper.TABLE_1.items()
        ),
    )
    one = results.get("table1")
    if one is None:
        return [], [theirs], []
    lengths = sorted(one.values("length"))
    tables, charts = [], []
    for i, model in enumerate(one.values("model")):
        part = one.where(model=model)
        rows, series = [], []
        for name in one.values("arrangement"):
            cells = [cell(part.where(arrangement=name, length=n), _accuracy) for n in lengths]
            rows.append((label(name), *cells))
            series.append(_line(name, lengths, cells))
        tables.append(
            Table(
                f"table1-{i + 1}", f"{name_of(model)}: token accuracy, mean±std over texts",
                ("arrangement", *(f"N = {n}" for n in lengths)), tuple(rows),
            )
        )  # fmt: skip
        charts.append(
            Chart(
                f"table1-{i + 1}", f"{name_of(model)}: which arrangement carries a text",
                _tokens_axis(lengths), _ACCURACY, tuple(series),
            )
        )  # fmt: skip
    return [], [*tables, theirs], charts


def _accuracy(fits: list[Fit]) -> Cell:
    return mean_std([f["accuracy"] for f in best_seeds(fits)])


# E2


def _table_2(results: Results) -> Parts:
    sizes = tuple(next(iter(paper.TABLE_2.values())))
    theirs = Table(
        "table2-paper",
        f"Table 2 of the paper: token accuracy at N = 256, 256 texts, 10 seeds ({paper.CITATION})",
        ("shared", "aggregate", *(f"group of {n}" for n in sizes)),
        tuple(
            (label(share), label(how), *(Cell(f"{m:.2f}±{s:.2f}", m) for m, s in row.values()))
            for (share, how), row in paper.TABLE_2.items()
        ),
    )
    one = results.get("table2")
    if one is None:
        return [], [theirs], []
    tables: list[Table] = []
    charts: list[Chart] = []
    for model in one.values("model"):
        for length in one.values("length"):
            part = one.where(model=model, length=length)
            sizes = tuple(sorted(part.values("group_size"), key=lambda n: n or math.inf))
            rows, series = [], []
            for share in part.values("share"):
                for how, make in (("max", _accuracy), ("avg", _average)):
                    cells = [cell(part.where(share=share, group_size=n), make) for n in sizes]
                    rows.append((label(share), label(how), *cells))
                    series.append(_line(f"{share} shared, {how}", _group_x(sizes, part), cells))
            at = len(tables) + 1
            title = f"{name_of(model)}, N = {length}"
            tables.append(
                Table(
                    f"table2-{at}", f"{title}: token accuracy, mean±std",
                    ("shared", "aggregate", *(f"group of {n or 'all'}" for n in sizes)),
                    tuple(rows),
                )
            )  # fmt: skip
            x = Axis("texts that share a vector", log=True, ticks=tuple(_group_x(sizes, part)))
            charts.append(
                Chart(f"table2-{at}", f"{title}: what sharing costs", x, _ACCURACY, tuple(series))
            )
    remarks = ["max: the best seed of each text, then the mean over texts; avg: over seeds too."]
    return remarks, [*tables, theirs], charts


def _average(fits: list[Fit]) -> Cell:
    return mean_std([f["accuracy"] for f in fits])


def _group_x(sizes: Sequence[int | None], part: Experiment) -> list[float]:
    return [float(n or max(w.rows for w in part.work)) for n in sizes]


# E3


@dataclass(frozen=True)
class _Statistic:
    name: str
    caption: str
    make: Callable[[list[Fit]], Cell]


def _held(fits: list[Fit]) -> list[int]:
    """Longest N of each text; 0 where not even the shortest came back."""
    return [0 if fit is None else fit["length"] for fit in longest(fits).values()]


def _capped(value: float, fits: list[Fit], digits: int = 0) -> Cell:
    """Marks what may be more: a text came back at the longest N that was tried."""
    at_end = max(_held(fits)) == max(f["length"] for f in fits)
    found = number(value, digits, f"n = {len(longest(fits))} texts")
    note = found.note + ("; the longest N tried, so at least" if at_end else "")
    return Cell(("≥" if at_end else "") + found.text, found.value, "measured", note)


def _nats(fits: list[Fit]) -> Cell:
    values = [0.0 if fit is None else fit["h_lm"] for fit in longest(fits).values()]
    return mean_std(values, 1)


_STATISTICS = (
    _Statistic("max", "C_tokens: the longest N that any text came back at, which is how the "
               "paper's numbers behave", lambda f: _capped(max(_held(f)), f)),
    _Statistic("median", "C_tokens: the median text's longest N",
               lambda f: _capped(float(np.median(_held(f))), f, 1)),
    _Statistic("mean", "C_tokens: mean±std over texts of the longest N",
               lambda f: mean_std(_held(f), 1)),
    _Statistic("kuratov", "Kuratov et al.'s max tokens: the largest N whose mean accuracy is at "
               "least 0.99", lambda f: number(kuratov(f))),
    _Statistic("nats", "H_LM in nats at the longest N, mean±std over texts", _nats),
)  # fmt: skip


def _table_3(results: Results) -> Parts:
    theirs = []
    published: list[tuple[str, str, Mapping]] = [
        ("tokens", "C_tokens", paper.TABLE_3_TOKENS), ("nats", "H_LM in nats", paper.TABLE_3_NATS),
    ]  # fmt: skip
    for name, caption, given in published:
        theirs.append(
            Table(
                f"table3-paper-{name}", f"Table 3 of the paper: {caption} ({paper.CITATION})",
                ("source", "m", *paper.MODELS),
                tuple(
                    (label(source), label("shared" if shared else "per text"),
                     *(_theirs(value) for value in values))
                    for (source, shared), values in given.items()
                ),
            )
        )  # fmt: skip
    one = results.get("table3")
    if one is None:
        return [], theirs, []
    models = one.values("model")
    tables = []
    for statistic in _STATISTICS:
        rows = [
            (label(source), label("per text" if share is None else "shared"),
             *(cell(one.where(model=m, source=source, share=share), statistic.make)
               for m in models))
            for source in one.values("source")
            for share in one.values("share")
        ]  # fmt: skip
        tables.append(
            Table(
                f"table3-{statistic.name}", statistic.caption,
                ("source", "m", *(name_of(m) for m in models)), tuple(rows),
            )
        )  # fmt: skip
    charts = [_solved(one.where(model=model), i) for i, model in enumerate(models)]
    remarks = [
        "Success is a token accuracy of at least 0.99 as decoded alone. ≥ marks a cell in which a "
        "text still came back at the longest N tried. A text that came back at no N counts as 0.",
    ]
    return remarks, [*tables, *theirs], charts


def _theirs(value: float | tuple[float, float]) -> Cell:
    if isinstance(value, tuple):
        return Cell(f"{value[0]:.1f}±{value[1]:.1f}", value[0])
    return number(value)


def _solved(part: Experiment, i: int) -> Chart:
    """Share of texts that came back, over N."""
    lengths = sorted(part.values("length"))
    series = []
    for source in part.values("source"):
        for share in part.values("share"):
            own = part.where(source=source, share=share)
            points = []
            for n in lengths:
                fits = best_seeds(own.where(length=n).fits())
                if fits:
                    points.append((n, float(np.mean([f["accuracy"] >= 0.99 for f in fits]))))
            name = f"{source}, m {'per text' if share is None else 'shared'}"
            series.append(
                Series(name, tuple(float(n) for n, _ in points), tuple(y for _, y in points))
            )
    model = name_of(part.work[0].model)
    return Chart(
        f"table3-solved-{i + 1}", f"{model}: share of texts that come back",
        _tokens_axis(lengths), Axis("texts with accuracy ≥ 0.99", low=0, high=1), tuple(series),
    )  # fmt: skip


# E4


def _figure_2(results: Results) -> Parts:
    one = results.get("figure2")
    if one is None:
        return [], [], []
    tables, charts = [], []
    for vectors, share in ((1, "m"), (2, None)):
        rows = []
        small: list[Series] = []
        large: list[Series] = []
        for model in one.values("model"):
            for source in one.values("source"):
                part = one.where(model=model, source=source)
                left = part.where(mode="autoregressive", vectors=vectors)
                right = part.where(mode="one-forward", share=share)
                ours, other = _information(left.fits()), _information(right.fits())
                both = [t for t in ours if t in other]
                name = f"{name_of(model)}, {source}"
                rows.append(
                    (label(name_of(model)), label(source), cell(left, _nats), cell(right, _nats),
                     _ratio([ours[t] for t in both], [other[t] for t in both]))
                )  # fmt: skip
                if both:
                    x, y = [ours[t] for t in both], [other[t] for t in both]
                    place = len(small)
                    small.append(Series(name, tuple(x), tuple(y), "points", colour=place))
                    large.append(
                        Series("", (float(np.mean(x)),), (float(np.mean(y)),), "points",
                               names=(f"{name}: mean of {len(both)} texts",), weight=6,
                               colour=place)
                    )  # fmt: skip
        what = f"{vectors} [mem] vector{'s' if vectors > 1 else ''} against m " + (
            "shared" if share else "per text"
        )
        tables.append(
            Table(
                f"figure2-{vectors}", f"H_LM in nats at the longest accurate prefix, {what}",
                ("model", "source", "autoregressive", "one forward", "ratio"),
                tuple(rows),
            )
        )  # fmt: skip
        seen = [v for s in small for v in (*s.x, *s.y)] or [10.0, 100.0]
        low, high = min(seen) / 1.5, max(seen) * 1.5  # both axes alike, so that y = x is diagonal
        charts.append(
            Chart(
                f"figure2-{vectors}", what[0].upper() + what[1:],
                Axis("H_LM, autoregressive (nats)", log=True, low=low, high=high),
                Axis("H_LM, one forward (nats)", log=True, low=low, high=high),
                (*_guides(small), *small, *large),
            )
        )  # fmt: skip
    remarks = [
        "Small points are texts that came back at some N in both modes, large ones the means of "
        "their (model, source). Autoregressive success is decided by really generating.",
    ]
    return remarks, tables, charts


def _information(fits: list[Fit]) -> dict[str, float]:
    found = longest(fits)
    return {t: f["h_lm"] for t, f in found.items() if f is not None and f["h_lm"] > 0}


def _ratio(above: list[float], below: list[float]) -> Cell:
    if not above:
        return Cell("·", None, "unplanned", "no text came back in both modes")
    return number(float(np.mean(above) / np.mean(below)), 2, f"n = {len(above)} texts")


def _guides(small: list[Series]) -> list[Series]:
    xs = [x for s in small for x in s.x] or [1.0, 10.0]
    ends = (min(xs) / 3, max(xs) * 3)
    return [
        Series(f"y = x{'' if k == 1 else f'/{k}'}", ends, (ends[0] / k, ends[1] / k), "guide")
        for k in (1, 2, 5)
    ]


# E5


def _always(shown: Cell, fits: list[Fit]) -> Cell:
    return shown


_TIMES = (("length", 1, 0), ("decode_seconds", 1e3, 2), ("tokens_per_second", 1, 0))


def _figure_3(results: Results) -> Parts:
    one = results.get("figure3")
    if one is None:
        return [], [], []
    rows, points = [], []
    for model in one.values("model"):
        for source in one.values("source"):
            part = one.where(model=model, source=source)
            cells: list[Cell] = []
            rates: list[float] = []
            for mode in ("autoregressive", "one-forward"):
                own = part.where(mode=mode)
                best = fastest(own.fits())
                for name, scale, digits in _TIMES:
                    shown = number(best[name] * scale if best else None, digits)
                    cells.append(cell(own, functools.partial(_always, shown)))
                if best:
                    rates.append(best["tokens_per_second"])
            ratio = rates[1] / rates[0] if len(rates) == 2 else None
            rows.append(
                (label(name_of(model)), label(source), *cells,
                 number(ratio, 1, "one forward over autoregressive, each at its own longest N"))
            )  # fmt: skip
            if ratio is not None:
                points.append(
                    Series(f"{name_of(model)}, {source}", (rates[0],), (rates[1],), "points",
                           weight=5)
                )  # fmt: skip
    header = (
        "model", "source", "autoregressive N", "ms", "tokens/s", "one forward N", "ms", "tokens/s",
        "ratio",
    )  # fmt: skip
    table = Table(
        "figure3", "Throughput at the longest text that came back whole, batch 1", header,
        tuple(rows),
    )  # fmt: skip
    low = min((s.x[0] for s in points), default=1.0) / 3
    high = max((s.x[0] for s in points), default=100.0) * 3
    guides = [
        Series(f"{k}×", (low, high), (k * low, k * high), "guide")
        for k in (1, 10, paper.FIGURE_3_RATIO)
    ]
    chart = Chart(
        "figure3", "Tokens a second, one forward against autoregressive",
        Axis("autoregressive (tokens/s)", log=True, low=low, high=high),
        Axis("one forward (tokens/s)", log=True, low=low),
        (*guides, *points),
    )  # fmt: skip
    remarks = [
        f"The paper reports {paper.FIGURE_3_RATIO}× without naming the loop it is against. Here it "
        "is prototok's own static-KV decoder. A ratio depends on N, on the "
        "machine and on the loop; python -m prototok.bench measures the ceiling beside it.",
    ]
    return remarks, [table], [chart]


def fastest(fits: list[Fit]) -> Fit | None:
    """The paper's point: the longest exact text, and of these the median decoding."""
    timed = [f for f in fits if f["exact"] and f["tokens_per_second"]]
    if not timed:
        return None
    most = max(f["length"] for f in timed)
    at_most = sorted(
        (f for f in timed if f["length"] == most), key=lambda f: f["tokens_per_second"]
    )
    return at_most[len(at_most) // 2]


# E6


def _figures_4_and_5(results: Results) -> Parts:
    tables, charts, remarks = [], [], []
    one = results.get("figure4") or results.get("figure5")
    if one is None:
        return [], [], []
    rows = []
    for i, part in enumerate(_parts(one)):
        fits = part.fits()
        title = f"{name_of(part.work[0].model)}, N = {part.work[0].length}"
        if len(fits) < 2:
            continue
        pairs = distances(results, fits)
        charts.append(_density(f"figure4-{i + 1}", title, pairs))
        rows.append(
            (label(name_of(part.work[0].model)), label(part.work[0].length),
             *(_spread(pairs.of(name)) for name in CLASSES))
        )  # fmt: skip
        texts = [f["target_text"] or "" for f in fits]
        words = tfidf_distances(texts)[pairs.first, pairs.second]
        charts.append(_against(f"figure5-words-{i + 1}", title, "TF-IDF distance", pairs, words))
        meant = semantic_of(results, fits)
        if meant is not None:
            between = (1 - meant @ meant.T)[pairs.first, pairs.second]
            name = f"figure5-meaning-{i + 1}"
            charts.append(_against(name, title, "semantic distance", pairs, between))
    if rows:
        tables.append(
            Table("figure4", "Cosine distance of e, mean±std over pairs of solutions",
                  ("model", "N", *CLASSES), tuple(rows))
        )  # fmt: skip
    if one.fits() and "semantic" not in results.measured:
        remarks.append(
            "Semantic distances were not measured: prototok report --semantic MODEL, a folder or "
            "the hub id of all-MiniLM-L6-v2."
        )
    return remarks, tables, charts


def _parts(one: Experiment) -> list[Experiment]:
    """By model, source, N and share."""
    found = [
        one.where(model=m, source=s, length=n, share=share)
        for m in one.values("model")
        for s in one.values("source")
        for n in one.values("length")
        for share in one.values("share")
    ]
    return [part for part in found if part.work]


def distances(results: Results, fits: list[Fit]) -> Pairs:
    """Every two solutions of some fits, with the distance of their e."""
    vectors = []
    opened: dict[str, Any] = {}
    for fit in fits:
        tokens = opened.setdefault(fit["key"], None) or results.run.tensors(fit["key"])
        opened[fit["key"]] = tokens
        assert isinstance(tokens, ProtoTokens)
        vectors.append(tokens.vectors(fit["row"])[0])
    places: dict[str, int] = {}
    texts = [places.setdefault(f["text_id"], len(places)) for f in fits]
    homes: dict[str, int] = {}
    contexts = [homes.setdefault(f["context"] or f["text_id"], len(homes)) for f in fits]
    return pair_distances(torch.stack(vectors), texts, contexts)


def semantic_of(results: Results, fits: list[Fit]) -> torch.Tensor | None:
    """(R, d) sentence embeddings of the fits' texts, where they were measured."""
    known = results.measured.get("semantic", {}).get("vectors", {})
    found = [known.get(f"{f['text_id']}-{f['length']}") for f in fits]
    return (
        None
        if any(v is None for v in found)
        else torch.tensor(found, dtype=torch.float64, device="cpu")
    )


def _spread(values: torch.Tensor) -> Cell:
    if not len(values):
        return Cell("·", None, "unplanned", "no such pair")
    return mean_std(values.tolist(), 3)


def _density(name: str, title: str, pairs: Pairs) -> Chart:
    """Gaussian kernel densities, bandwidth by Scott's rule."""
    top = float(pairs.distance.max()) if len(pairs.distance) else 1.0
    grid = np.linspace(0, top * 1.1, 160)
    series = []
    for kind in CLASSES:
        values = pairs.of(kind).numpy()
        if len(values) < 2 or values.std() == 0:
            continue
        width = values.std(ddof=1) * len(values) ** -0.2
        height = np.exp(-((grid[:, None] - values) ** 2) / (2 * width**2)).mean(1)
        density = height / (width * math.sqrt(2 * math.pi))
        label_ = f"{kind} ({len(values)} pairs)"
        series.append(Series(label_, tuple(grid), tuple(density), colour=CLASSES.index(kind)))
    return Chart(
        name, f"{title}: how far solutions lie apart", Axis("cosine distance of e", low=0),
        Axis("density", low=0), tuple(series),
    )  # fmt: skip


def _against(name: str, title: str, what: str, pairs: Pairs, texts: torch.Tensor) -> Chart:
    series = []
    for kind in CLASSES[1:]:
        own = pairs.kind == CLASSES.index(kind)
        if int(own.sum()) < 2:
            continue
        curve = binned_mean(texts[own], pairs.distance[own], bins=min(8, int(own.sum()) // 2))
        y = curve.y.numpy()
        error = curve.std.numpy() / np.sqrt(curve.count.numpy())
        series.append(
            Series(
                kind, tuple(curve.x.tolist()), tuple(y.tolist()), low=tuple(y - error),
                high=tuple(y + error), colour=CLASSES.index(kind),
            )
        )  # fmt: skip
    return Chart(
        name, f"{title}: e against {what}", Axis(what), Axis("cosine distance of e"), tuple(series)
    )


# E7


def _figure_6(results: Results) -> Parts:
    one = results.get("figure6")
    found = results.measured.get("paths", {}).get("groups", [])
    if one is None:
        return [], [], []
    if not found:
        return ["Paths were not measured: prototok report RUN --measure."], [], []
    rows, charts = [], []
    for i, group in enumerate(found):
        title = f"{name_of(group['model'])}, N = {group['length']}"
        if group["share"] is None:
            title += ", m per text"
        straight, curve = (np.array(group[k]["accuracy"]) for k in ("straight", "curve"))
        ratio = np.array(group["curve"]["length_ratio"])
        rows.append(
            (label(name_of(group["model"])), label(group["length"]),
             label("per text" if group["share"] is None else "shared"), number(len(ratio)),
             mean_std(straight.min(1).tolist()), mean_std(curve.min(1).tolist()),
             _percent(straight.min(1) >= 0.99), _percent(curve.min(1) >= 0.99),
             mean_std(ratio.tolist()), number(float(ratio.max()), 2))
        )  # fmt: skip
        t = tuple(float(v) for v in group["t"])
        series = tuple(
            Series(
                name, t, tuple(values.mean(0)), low=tuple(np.quantile(values, 0.1, axis=0)),
                high=tuple(np.quantile(values, 0.9, axis=0)), colour=colour,
            )
            for colour, (name, values) in enumerate(
                (("straight segment", straight), ("Bezier curve", curve))
            )
        )  # fmt: skip
        charts.append(
            Chart(
                f"figure6-{i + 1}", f"{title}: accuracy along paths", Axis("t", low=0, high=1),
                _ACCURACY, series,
            )
        )  # fmt: skip
    header = (
        "model", "N", "m", "pairs", "straight, least", "curve, least", "straight stays",
        "curve stays", "length ratio", "greatest",
    )  # fmt: skip
    caption = (
        "Paths between exact solutions of one text: least accuracy along a path, mean±std over "
        "pairs; share of paths that stay at 0.99 or more at every point; length of the curve over "
        f"that of the segment, at most {paper.FIGURE_6_RATIO} in the paper"
    )
    settings = found[0]["settings"]
    remarks = [
        f"Lines are means over pairs, bands the middle 80 %. Control points: lr {settings['lr']}, "
        f"{settings['samples']} values of t an update, at most {settings['max_steps']} updates; "
        "the straight segment and the curve move the vectors that are not shared."
    ]
    return remarks, [Table("figure6", caption, header, tuple(rows))], charts


def _percent(held: np.ndarray) -> Cell:
    share = 100 * float(held.mean())
    return Cell(f"{share:.0f} %", share, note=f"{int(held.sum())} of {len(held)}")


# E8


def _table_4(results: Results) -> Parts:
    lengths = (32, 64, 128, 256, 512)
    theirs = Table(
        "table4-paper",
        f"Table 4 of the paper (v2): seconds to fit one text on an A100 or H100 ({paper.CITATION})",
        ("model", *(f"N = {n}" for n in lengths)),
        tuple(
            (label(model), *(number(row.get(n)) for n in lengths))
            for model, row in paper.TABLE_4.items()
        ),
    )
    one = results.get("table4")
    if one is None:
        return [], [theirs], []
    ours = sorted(one.values("length"))
    rows, series = [], []
    for model in one.values("model"):
        for share in one.values("share"):
            part = one.where(model=model, share=share)
            cells = [cell(part.where(length=n), _seconds) for n in ours]
            rows.append((label(name_of(model)), *cells))
            series.append(_line(name_of(model), ours, cells, band=False))
    tables = [
        Table("table4", "Seconds to fit one text, alone, early stopping included: median; exact of "
              "all", ("model", *(f"N = {n}" for n in ours)), tuple(rows))
    ]  # fmt: skip
    chart = Chart(
        "table4", "Seconds to fit one text", _tokens_axis(ours), Axis("seconds", log=True),
        tuple(series),
    )  # fmt: skip
    return [], [*tables, theirs], [chart]


def _seconds(fits: list[Fit]) -> Cell:
    seconds = float(np.median([f["seconds"] for f in fits]))
    exact = sum(f["exact"] for f in fits)
    quartiles = np.quantile([f["seconds"] for f in fits], (0.25, 0.75))
    note = f"quartiles {quartiles[0]:.2f} and {quartiles[1]:.2f}, {exact} of {len(fits)} exact"
    return Cell(f"{seconds:.2f}; {exact}/{len(fits)}", seconds, "measured", note)


# Beyond the paper.


def _solutions(results: Results) -> Parts:
    groups = results.measured.get("solutions", {}).get("groups", [])
    if not groups:
        return ["Not measured: prototok report RUN --measure."], [], []
    where_rows, charts = [], []
    settings = [(w["what"], w["setting"]) for w in groups[0]["withstood"]]
    settings += [
        (w["what"], w["setting"])
        for g in groups[1:]
        for w in g["withstood"]
        if (w["what"], w["setting"]) not in settings
    ]
    titles = [f"{name_of(g['model'])}, N = {g['length']}" for g in groups]
    for i, (group, title) in enumerate(zip(groups, titles, strict=True)):
        for name in ("e", "m"):
            if name in group:
                own = group[name]
                where_rows.append(
                    (label(title), label(name), number(group["solutions"]),
                     mean_std(own["norm"], 2), number(group["vocabulary"][2], 2),
                     number(group["vocabulary"][4], 2), mean_std(own["nearest"], 3),
                     number(own["random"], 3))
                )  # fmt: skip
        charts.append(_components(group, title, i))
    withstood = []
    for what, setting in settings:
        cells = []
        for group in groups:
            found = next(
                (w for w in group["withstood"] if (w["what"], w["setting"]) == (what, setting)),
                None,
            )
            if found is None:
                cells.append(Cell("·", None, "unplanned", "another dtype"))
            else:
                share = found["exact"] / group["solutions"]
                text = f"{found['exact']}/{group['solutions']}; {found['accuracy']:.3f}"
                cells.append(Cell(text, share, note="exact of all; mean token accuracy"))
        withstood.append((label(what), label(setting), *cells))
    tables = [
        Table("solutions-robustness", "Exact solutions that stay exact, and the mean token "
              "accuracy; noise and rounding are of e alone", ("", "condition", *titles),
              tuple(withstood)),
        Table("solutions-where", "Norms, and the cosine distance of the nearest embedding of the "
              "vocabulary; last the same for a random direction",
              ("model", "", "solutions", "norm", "vocabulary median", "vocabulary greatest",
               "nearest", "random"), tuple(where_rows)),
    ]  # fmt: skip
    remarks = [
        "Noise σ is a share of a vector's root mean square coordinate. Formats of 8 bits and fewer "
        "scale each vector to its largest coordinate. One setting a model: the one with the most "
        "exact solutions; at most 64 of them.",
    ]
    return remarks, tables, charts


def _components(group: dict[str, Any], title: str, i: int) -> Chart:
    """Solutions in the plane of their first two principal components, by context."""
    found = group["pca"]
    homes = list(dict.fromkeys(found["context"]))
    series = []
    for home in homes:
        at = [j for j, c in enumerate(found["context"]) if c == home]
        series.append(
            Series("", tuple(found["coordinates"][j][0] for j in at),
                   tuple(found["coordinates"][j][1] for j in at), "points",
                   names=tuple(found["text"][j] or "" for j in at), weight=2)
        )  # fmt: skip
    share = [f"{100 * v:.0f} %" for v in found["explained"]]
    return Chart(
        f"solutions-pca-{i + 1}", f"{title}: e by text or context",
        Axis(f"first principal component ({share[0]})"),
        Axis(f"second ({share[1]})"), tuple(series),
    )  # fmt: skip


# What several have in common.

_ACCURACY = Axis("token accuracy", low=0, high=1)


def _tokens_axis(lengths: Sequence[int]) -> Axis:
    shown = list(lengths)
    while len(shown) > 10:
        shown = shown[::2]
    return Axis("N, tokens", log=True, ticks=tuple(float(n) for n in shown))


def _line(name: str, x: Sequence[float], cells: Sequence[Cell], band: bool = True) -> Series:
    """The means of cells as a line, ± one standard deviation as its band, kept within 0 … 1."""
    known = [
        (float(at), one.value, one.std)
        for at, one in zip(x, cells, strict=True)
        if one.value is not None
    ]
    return Series(
        name, tuple(at for at, *_ in known), tuple(y for _, y, _ in known),
        low=tuple(max(0.0, y - std) for _, y, std in known) if band else (),
        high=tuple(min(1.0, y + std) for _, y, std in known) if band else (),
    )  # fmt: skip


_RECIPE = "AdamW lr 0.01, betas (0.9, 0.9), decay 0.01, N(0, 1), at most 5000 steps"
_EXPERIMENTS: tuple[tuple[str, str, str, tuple[str, ...], str, Any], ...] = (
    ("E1", "Where e and m stand", "Table 1", ("table1",),
     f"Llama-3.2-1B; 50 PG-19 texts; N = 1, 2, 4, …, 1024; {_RECIPE}", _table_1),
    ("E2", "Vectors shared by groups of texts", "Table 2", ("table2",),
     "256 PG-19 texts; N = 256; groups of 1, 4, 16, 64, 256; 10 seeds", _table_2),
    ("E3", "Capacity in tokens and in nats", "Table 3", ("table3",),
     "six models; four sources; N = 4, 5, 8, …, 1448; m per text and shared; texts a cell not "
     "given", _table_3),
    ("E4", "Information, autoregressive against one forward", "Figure 2", ("figure2",),
     "the texts of Table 3; one [mem] vector against m shared, two against m per text", _figure_2),
    ("E5", "Throughput", "Figure 3", ("figure3",),
     "longest text reconstructed without loss over its time; GPU, batch, dtype, cache not given",
     _figure_3),
    ("E6", "What the vectors encode", "Figures 4 and 5", ("figure4", "figure5"),
     "50 PG-19 contexts × 10 sampled continuations; ten seeds of the tenth", _figures_4_and_5),
    ("E7", "Paths between solutions", "Figure 6", ("figure6",),
     "5 texts × 10 solutions, 225 pairs; quadratic Bezier curves", _figure_6),
    ("E8", "Seconds to fit one text", "Table 4 (v2)", ("table4",),
     "six models; N = 32 … 512; one A100 or H100, one text at a time", _table_4),
    ("E9", "Continuing from the vectors", "v2, a negative result", (),
     "(e, m) of 128 tokens, continued from combinations of e, m and BOS; judged by eye", None),
)  # fmt: skip
