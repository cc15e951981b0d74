"""E6: what the vectors encode: how far solutions lie apart (Figures 4 and 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from prototok.geometry.distances import CLASSES, Pairs, binned_mean, pair_distances
from prototok.geometry.text import tfidf_distances
from prototok.report.chart import Axis, Chart, Series
from prototok.report.results import Fit, Results
from prototok.report.section import Content, Study
from prototok.report.tables import Cell, GridRow, grid, mean_std
from prototok.results.proto_tokens import ProtoTokens

_NO_SEMANTICS = (
    "Semantic distances were not measured: prototok report --semantic MODEL, a folder or the hub "
    "id of all-MiniLM-L6-v2."
)


@dataclass(frozen=True)
class Against:
    """A chart of Figure 5: the distance of e over a distance of the texts, pair by pair."""

    name: str
    title: str
    what: str  # the distance of the texts
    pairs: Pairs
    texts: torch.Tensor  # (pairs,)


def make(results: Results) -> Content:
    one = results.get("figure4") or results.get("figure5")
    if one is None:
        return Content()
    rows: list[GridRow] = []
    charts: list[Chart] = []
    for i, part in enumerate(one.by_setting(), start=1):
        fits = part.fits()
        if len(fits) < 2:
            continue
        model, length = part.work[0].subject.name, part.work[0].length
        title = f"{model}, N = {length}"
        pairs = distances(results, fits)
        rows.append(
            GridRow(names=(model, length), cells=[_spread(pairs.of(name)) for name in CLASSES])
        )
        charts.append(_density(f"figure4-{i}", title, pairs))
        words = tfidf_distances([f["target_text"] or "" for f in fits])[pairs.first, pairs.second]
        charts.append(
            _against(Against(f"figure5-words-{i}", title, "TF-IDF distance", pairs, words))
        )
        meant = semantic_of(results, fits)
        if meant is not None:
            between = (1 - meant @ meant.T)[pairs.first, pairs.second]
            name = f"figure5-meaning-{i}"
            charts.append(_against(Against(name, title, "semantic distance", pairs, between)))
    table = grid(
        name="figure4",
        caption="Cosine distance of e, mean±std over pairs of solutions",
        header=("model", "N"),
        columns=CLASSES,
        rows=rows,
    )
    missing = one.fits() and "semantic" not in results.measured
    return Content(
        remarks=(_NO_SEMANTICS,) if missing else (),
        tables=(table,) if rows else (),
        charts=tuple(charts),
    )


def distances(results: Results, fits: list[Fit]) -> Pairs:
    """Pair all solutions of some fits, with the distance of their e."""
    vectors = []
    opened: dict[str, ProtoTokens] = {}
    for fit in fits:
        if fit["key"] not in opened:
            tokens = results.run.tensors(fit["key"])
            assert isinstance(tokens, ProtoTokens)
            opened[fit["key"]] = tokens
        vectors.append(opened[fit["key"]].vectors(fit["row"])[0])
    places: dict[str, int] = {}
    texts = [places.setdefault(f["text_id"], len(places)) for f in fits]
    homes: dict[str, int] = {}
    contexts = [homes.setdefault(f["context"] or f["text_id"], len(homes)) for f in fits]
    return pair_distances(torch.stack(vectors), texts, contexts)


def semantic_of(results: Results, fits: list[Fit]) -> torch.Tensor | None:
    """Return (R, d) sentence embeddings of the fits' texts, where they were measured."""
    known = results.measured.get("semantic", {}).get("vectors", {})
    found = [known.get(f"{f['text_id']}-{f['length']}") for f in fits]
    if any(v is None for v in found):
        return None
    return torch.tensor(found, dtype=torch.float64, device="cpu")


def _spread(values: torch.Tensor) -> Cell:
    if not len(values):
        return Cell("·", None, "unplanned", "no such pair")
    return mean_std(values.tolist(), 3)


def _density(name: str, title: str, pairs: Pairs) -> Chart:
    """Draw Gaussian kernel densities, bandwidth by Scott's rule, where there are distances."""
    found: dict[str, tuple[np.ndarray, float]] = {}  # distances and bandwidth
    for kind in CLASSES:
        values = pairs.of(kind).numpy()
        if len(values) >= 2 and values.std() > 0:
            found[kind] = values, float(values.std(ddof=1)) * len(values) ** -0.2
    low = min((values.min() - 3 * width for values, width in found.values()), default=0.0)
    high = max((values.max() + 3 * width for values, width in found.values()), default=1.0)
    points = np.linspace(max(0.0, low), min(2.0, high), 160)  # a cosine distance is in 0 … 2
    series = []
    for kind, (values, width) in found.items():
        height = np.exp(-((points[:, None] - values) ** 2) / (2 * width**2)).mean(1)
        series.append(
            Series(
                label=f"{kind} ({len(values)} pairs)",
                x=tuple(points),
                y=tuple(height / (width * math.sqrt(2 * math.pi))),
                colour=CLASSES.index(kind),
            )
        )
    return Chart(
        name=name,
        title=f"{title}: how far solutions lie apart",
        x=Axis("cosine distance of e", low=0 if low <= 0 else None),
        y=Axis("density", low=0),
        series=tuple(series),
    )


def _against(a: Against) -> Chart:
    series = []
    for kind in CLASSES[1:]:
        own = a.pairs.kind == CLASSES.index(kind)
        if int(own.sum()) < 2:
            continue
        curve = binned_mean(a.texts[own], a.pairs.distance[own], bins=min(8, int(own.sum()) // 2))
        y = curve.y.numpy()
        error = curve.std.numpy() / np.sqrt(curve.count.numpy())
        series.append(
            Series(
                label=kind,
                x=tuple(curve.x.tolist()),
                y=tuple(y.tolist()),
                low=tuple(y - error),
                high=tuple(y + error),
                colour=CLASSES.index(kind),
            )
        )
    return Chart(
        name=a.name,
        title=f"{a.title}: e against {a.what}",
        x=Axis(a.what),
        y=Axis("cosine distance of e"),
        series=tuple(series),
    )


STUDY = Study(
    code="E6",
    title="What the vectors encode",
    source="Figures 4 and 5",
    names=("figure4", "figure5"),
    there="50 PG-19 contexts × 10 sampled continuations; ten seeds of the tenth",
    make=make,
)
