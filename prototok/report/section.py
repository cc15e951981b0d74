"""Sections of the report: an experiment of the paper, its settings here and there, its content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prototok.report.chart import Chart
from prototok.report.results import Outcome, Results, front_of, name_of
from prototok.report.tables import Table


@dataclass(frozen=True)
class Content:
    """The content of a section; `remarks` say what a reader has to know beside the numbers."""

    remarks: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()


@dataclass(frozen=True)
class Study:
    """An experiment of the paper, as the report knows it.

    code, title, source   such as E1, "Where e and m stand", "Table 1"
    names   the sweeps it is made of
    there   the paper's settings
    make    makes the content from a run; None where the paper gives nothing to measure
    """

    code: str
    title: str
    source: str
    names: tuple[str, ...]
    there: str
    make: Callable[[Results], Content] | None


@dataclass(frozen=True)
class Section:
    """One experiment in the report.

    status  of its sweeps, one line; n: how many texts, seeds, models, fits
    here, there  settings of ours and of the paper
    """

    code: str
    title: str
    source: str
    status: str
    n: str
    here: str
    there: str
    content: Content = Content()

    @property
    def anchor(self) -> str:
        return self.code.lower()

    @property
    def state(self) -> str:
        """Return "complete", "partial", "failed" or "none", for the table of contents."""
        if self.status.startswith("not "):
            return "none"
        if "failed" in self.status:
            return "failed"
        return "partial" if " of " in self.status else "complete"


def section_of(study: Study, results: Results) -> Section:
    """Make the section of a study, planned in this run or not."""

    def section(status: str, n: str, here: str, content: Content) -> Section:
        return Section(
            code=study.code, title=study.title, source=study.source, status=status, n=n,
            here=here, there=study.there, content=content,
        )  # fmt: skip

    if study.make is None:
        status = "not run: judged by eye in the paper, which gives no measure of it"
        return section(status, "–", "–", Content())
    content = study.make(results)
    planned = [results.experiments[name] for name in study.names if name in results.experiments]
    if not planned:
        status = "not planned: " + " · ".join(f"prototok sweep plan {name}" for name in study.names)
        return section(status, "0", "–", Content((), content.tables, content.charts))
    status = "; ".join(
        one.status if len(planned) == 1 else f"{one.name}: {one.status}" for one in planned
    )
    reasons = Counter(w.reason for one in planned for w in one.work if w.state == "failed")
    failed = tuple(
        f"Failed, {_plural(count, 'unit')}: {reason}" for reason, count in reasons.most_common(3)
    )
    here = " / ".join(dict.fromkeys(_settings_of(one) for one in planned))
    content = Content(content.remarks + failed, content.tables, content.charts)
    return section(status, _count(planned), here, content)


def _count(planned: Sequence[Outcome]) -> str:
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


def _settings_of(one: Outcome) -> str:
    """Say what an experiment was planned with; what was planned beside it behind a stroke."""
    return " / ".join(map(_in_words, (one.settings, *one.settings.get("also", ()))))


def _in_words(s: Mapping[str, Any]) -> str:
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
    front = front_of(s.get("prefix", "auto"))
    return "; ".join([*parts, front] if front else parts)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(str(v) for v in values)
