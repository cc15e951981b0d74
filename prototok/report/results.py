"""Read a run folder: each planned unit joined with its fits or its failure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prototok.decoding.information import SUCCESS
from prototok.report.tables import Cell
from prototok.sweep.run_folder import RunFolder

Fit = dict[str, Any]  # a row of `schema.FITS`


@dataclass(frozen=True)
class Subject:
    """What is fitted on: a model as a sweep names it, and what stands in front of every text.

    prefix  text, token ids or None for nothing, as it was planned; "auto" left it to the recipe
    """

    model: str
    prefix: str | tuple[int, ...] | None = "auto"

    @classmethod
    def of(cls, group: dict[str, Any]) -> Subject:
        """Return that of a group of RUN/analysis/, where "auto" is not named."""
        prefix = group.get("prefix", "auto")
        return cls(group["model"], tuple(prefix) if isinstance(prefix, list) else prefix)

    @property
    def name(self) -> str:
        """Return the model's name, and what was asked for in front of it."""
        front = front_of(self.prefix)
        return name_of(self.model) + (f", {front}" if front else "")


def front_of(prefix: str | Sequence[int] | None) -> str:
    """Say what stands in front, such as "behind ' the'"; nothing where the recipe chose it."""
    if prefix == "auto":
        return ""
    if prefix is None:
        return "nothing in front"
    if isinstance(prefix, str):
        return f"behind {prefix!r}"
    return f"behind token {', '.join(map(str, prefix))}"


@dataclass(frozen=True)
class Work:
    """A planned unit. `fits` is empty until it is done; `reason` says why it failed."""

    key: str
    mode: str
    model: str
    source: str
    length: int
    share: str | None
    group_size: int | None
    arrangement: str
    vectors: int
    recipe: str
    rows: int
    prefix: str | tuple[int, ...] | None = "auto"
    fits: tuple[Fit, ...] = ()
    reason: str | None = None

    @property
    def subject(self) -> Subject:
        return Subject(self.model, self.prefix)

    @property
    def state(self) -> str:
        return "measured" if self.fits else "failed" if self.reason is not None else "missing"


@dataclass(frozen=True)
class Outcome:
    """A planned experiment, or a part of it, with its results; settings as `run.json` has them."""

    name: str
    settings: dict[str, Any]
    work: tuple[Work, ...]

    def fits(self) -> list[Fit]:
        return [fit for one in self.work for fit in one.fits]

    def count(self, state: str) -> int:
        return sum(one.state == state for one in self.work)

    @property
    def status(self) -> str:
        """Say it in words, such as "complete, 24 units" or "12 of 24 units, 3 failed"."""
        done, failed, total = self.count("measured"), self.count("failed"), len(self.work)
        units = "unit" if total == 1 else "units"
        head = f"complete, {total} {units}" if done == total else f"{done} of {total} {units}"
        return head + (f", {failed} failed" if failed else "")

    def where(self, **wanted: object) -> Outcome:
        """Return the part of it whose units have these values."""
        kept = [w for w in self.work if all(getattr(w, k) == v for k, v in wanted.items())]
        return Outcome(self.name, self.settings, tuple(kept))

    def values(self, name: str) -> list[Any]:
        """List the different values of a column, in the order they were planned."""
        return list(dict.fromkeys(getattr(one, name) for one in self.work))

    def by_setting(self) -> list[Outcome]:
        """Cut it into parts of one subject, source, N and share."""
        found = [
            self.where(subject=subject, source=s, length=n, share=share)
            for subject in self.values("subject")
            for s in self.values("source")
            for n in self.values("length")
            for share in self.values("share")
        ]
        return [part for part in found if part.work]


@dataclass(frozen=True)
class Results:
    """Everything a report is made of."""

    run: RunFolder
    experiments: dict[str, Outcome]
    measured: dict[str, Any] = field(default_factory=dict)  # see prototok.report.measure

    def get(self, name: str) -> Outcome | None:
        return self.experiments.get(name)


_NEEDED = ("text_id", "seed", "length", "accuracy", "exact")  # by every figure


def read(path: str | Path) -> Results:
    """Read the results of a run; ValueError where `path` is no run folder."""
    run = RunFolder.open(path)
    reasons = {row["key"]: row["reason"] for row in run.failures().to_pylist()}
    fits: dict[str, list[Fit]] = {}
    for row in run.fits().to_pylist():
        lacking = [name for name in _NEEDED if row[name] is None]
        if lacking:
            raise ValueError(f"run: {run.path} has a fit of {row['key']} without {lacking[0]}")
        fits.setdefault(row["key"], []).append(row)
    plan, units = run.plan().to_pylist(), run.units()
    columns = (
        "key", "mode", "model", "source", "length", "share", "group_size", "arrangement",
        "vectors", "recipe", "rows",
    )  # fmt: skip
    found = {}
    for name, settings in run.settings().items():
        work = tuple(
            Work(
                **{c: row[c] for c in columns},
                prefix=units[row["key"]].prefix,
                fits=tuple(fits.get(row["key"], ())),
                reason=reasons.get(row["key"]),
            )
            for row in plan
            if row["experiment"] == name
        )
        found[name] = Outcome(name, settings, work)
    return Results(run, found, _measured(run))


def _measured(run: RunFolder) -> dict[str, Any]:
    """Read what `prototok report --measure` found before, by experiment."""
    found = {}
    for path in sorted((run.path / "analysis").glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"run: {path} is damaged ({error})") from None
    return found


def cell(part: Outcome, make: Callable[[list[Fit]], Cell]) -> Cell:
    """Make a cell of the fits of `part`; it says how much is missing or failed."""
    total, done, failed = len(part.work), part.count("measured"), part.count("failed")
    if not total:
        return Cell("·", None, "unplanned", "not planned")
    if not done:
        reasons = "; ".join(dict.fromkeys(w.reason for w in part.work if w.reason))
        if failed:
            return Cell("failed", None, "failed", reasons)
        return Cell("…", None, "missing", f"none of {total} units done")
    made = make(part.fits())
    if done == total:
        return made
    note = f"{done} of {total} units" + (f", {failed} failed" if failed else "")
    note = f"{made.note}; {note}".lstrip("; ")
    return Cell(made.text + "*", made.value, "partial", note, made.std, made.n)


def name_of(model: str) -> str:
    """Return a model's name without the folder it lies in."""
    return model.rstrip("/").rsplit("/", 1)[-1]


def best_seeds(fits: Iterable[Fit]) -> list[Fit]:
    """Choose the best seed of each (unit kind, text, N): most right tokens, then largest margin."""
    best: dict[tuple, Fit] = {}
    for fit in fits:
        at = (fit["model"], fit["source"], fit["share"], fit["vectors"], fit["mode"],
              fit["text_id"], fit["length"])  # fmt: skip
        if at not in best or _rank(fit) > _rank(best[at]):
            best[at] = fit
    return list(best.values())


def _rank(fit: Fit) -> tuple[int, float]:
    return fit["correct"], fit["margin"] if fit["margin"] is not None else float("-inf")


def longest(fits: Iterable[Fit], criterion: str = "success") -> dict[str, Fit | None]:
    """Find each text's fit at the longest N it was reconstructed at; None where there was none.

    `criterion`: "success" is an accuracy of at least 0.99, "exact" is every token.
    """
    found: dict[str, Fit | None] = {}
    for fit in best_seeds(fits):
        found.setdefault(fit["text_id"], None)
        held = fit["exact"] if criterion == "exact" else fit["accuracy"] >= SUCCESS
        before = found[fit["text_id"]]
        if held and (before is None or fit["length"] > before["length"]):
            found[fit["text_id"]] = fit
    return found


def kuratov(fits: Iterable[Fit]) -> int:
    """Return Kuratov et al.'s "max tokens": the largest N with mean accuracy ≥ 0.99; else 0."""
    by_length: dict[int, list[float]] = {}
    for fit in best_seeds(fits):
        by_length.setdefault(fit["length"], []).append(fit["accuracy"])
    held = [n for n, values in by_length.items() if sum(values) / len(values) >= SUCCESS]
    return max(held, default=0)
